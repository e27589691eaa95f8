# SPDX-License-Identifier: Apache-2.0
"""Layers that learn at rates of their own, and one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_lstm import TrainConfig, UserError
from flax_lstm.training.optim import learning_rate, levels_below_head, make_optimizer, plateau_scale

PARAMS = {
    "embed": {"embedding": jnp.ones((3, 2))},
    "recurrent": {
        "layers_0": {"forward": {"cell": {"bias": jnp.ones(2)}}},
        "layers_1": {"cell": {"bias": jnp.ones(2)}},
    },
    "dense": {"kernel": jnp.ones((2, 2))},
    "head": {"kernel": jnp.ones((2, 2))},
}
LEVELS = {"embed": 3, "layers_0": 2, "layers_1": 1, "dense": 0, "head": 0}


def level_of(path) -> int:
    return next(LEVELS[key.key] for key in path if key.key in LEVELS)


def test_levels_are_counted_from_the_head_down():
    levels = levels_below_head(PARAMS)
    jax.tree_util.tree_map_with_path(
        lambda path, n: np.testing.assert_equal(n, level_of(path)), levels
    )
    assert set(jax.tree.leaves(levels_below_head({"model": {"head": jnp.ones(1)}}))) == {0}


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_each_level_learns_at_its_share_of_the_rate_once_it_is_thawed(name):
    """Against the same optimiser without levels, on the same gradients."""
    schedule = learning_rate("constant", 0.1, 0, 10)
    plain = make_optimizer(name, schedule, 0.01, 1.0)
    levelled = make_optimizer(name, schedule, 0.01, 1.0, layer_decay=0.5, unfreeze_every=2)
    states = plain.init(PARAMS), levelled.init(PARAMS)
    for step in range(7):
        grads = jax.tree.map(lambda p, n=step: (n + 1.0) * p, PARAMS)
        (all_at_once, first), (by_level, second) = (
            optimizer.update(grads, state, PARAMS, value=jnp.zeros(()))
            for optimizer, state in zip((plain, levelled), states, strict=True)
        )
        states = first, second

        def check(path, update, other, step=step):
            n = level_of(path)
            expected = 0.5**n * other if step >= 2 * n else 0 * other
            np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0)

        jax.tree_util.tree_map_with_path(check, by_level, all_at_once)


def test_wrong_settings_are_said():
    with pytest.raises(UserError, match=r"train\.layer-decay 0"):
        TrainConfig(layer_decay=0)
    with pytest.raises(UserError, match=r"train\.unfreeze-every -1"):
        TrainConfig(unfreeze_every=-1)


def test_unknown_optimisers_and_schedules_are_refused():
    with pytest.raises(UserError, match=r"train\.optimizer adam: choose one of adamw, sgd"):
        make_optimizer("adam", optax.constant_schedule(1.0), weight_decay=0.0, clip=0.0)
    with pytest.raises(
        UserError, match=r"train\.schedule linear: choose .* constant, cooldown, cos"
    ):
        learning_rate("linear", 1.0, 0, 10)


def test_the_plateau_scale_is_found_beside_parameters_of_that_name():
    """A layer norm has a parameter `scale`, and so have Adam's moments."""
    schedule = optax.constant_schedule(1.0)
    optimizer = make_optimizer("adamw", schedule, 0.0, clip=1.0, plateau_steps=2)
    state = optimizer.init({"norm": {"scale": jnp.full(3, 7.0)}})
    assert float(plateau_scale(state)) == 1.0
    plain = make_optimizer("adamw", schedule, 0.0, clip=1.0)
    assert plateau_scale(plain.init({"scale": jnp.full(3, 7.0)})) == 1.0


def test_a_setting_that_would_not_act_is_refused():
    with pytest.raises(UserError, match=r"acts with train\.optimizer adamw only"):
        TrainConfig(optimizer="sgd", epsilon=1e-7)
