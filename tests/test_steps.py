# SPDX-License-Identifier: Apache-2.0
"""The training step against NumPy, over meshes, in parts; optimisers and schedules."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from flax import linen as nn

from flax_lstm import MeshConfig, UserError
from flax_lstm.data.base import Batch
from flax_lstm.machine.sharding import check_batch_size, make_mesh, put_batch
from flax_lstm.tasks.base import weighted
from flax_lstm.training.assembly import assemble
from flax_lstm.training.optim import learning_rate, make_optimizer, plateau_scale
from flax_lstm.training.steps import join, make_steps, split

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, FEATURES = 8, 3


class Line(nn.Module):
    """xW + b of the first step, for gradients that can be written down."""

    @nn.compact
    def __call__(self, x_BTD, lengths_B, state, covariates, *, deterministic=True):
        return None, nn.Dense(1, name="head")(x_BTD[:, 0])


def batch_of(step: int, weights=None) -> Batch:
    generator = np.random.default_rng(step)
    return Batch(
        inputs=generator.normal(size=(ROWS, 1, FEATURES)).astype(np.float32),
        targets=generator.normal(size=(ROWS, 1)).astype(np.float32) * 3,
        lengths=np.ones(ROWS, np.int32),
        weights=np.ones(ROWS, np.float32) if weights is None else np.asarray(weights, np.float32),
    )


UNEQUAL = [1, 0.5, 0, 2, 0, 0, 1, 0.25]


def squares(outputs, batch):
    return weighted(jnp.square(outputs - batch.targets), batch.weights[:, None])


def make(optimizer=None, rate=0.1, loss=squares, mesh=None, **options):
    schedule = learning_rate("constant", rate, 0, 10)
    optimizer = optimizer or make_optimizer("sgd", schedule, 0.0, 0.0)
    mesh = mesh or make_mesh(1)
    steps = make_steps(
        Line(),
        loss,
        lambda outputs, batch: outputs,
        optimizer,
        schedule,
        mesh,
        batch_of(0),
        **options,
    )
    return steps, lambda batch: put_batch(batch, mesh)


def numbers(params) -> tuple[np.ndarray, np.ndarray]:
    head = params["head"]
    return np.asarray(head["kernel"], np.float64)[:, 0], np.asarray(head["bias"], np.float64)[0]


def gradient(kernel, bias, batch: Batch):
    """Loss and gradient of the weighted mean square, in float64."""
    x, y, w = (
        batch.inputs[:, 0].astype(np.float64),
        batch.targets[:, 0],
        batch.weights / batch.weights.sum(),
    )
    error = x @ kernel + bias - y
    return np.sum(w * error**2), 2 * x.T @ (w * error), 2 * np.sum(w * error)


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_sgd_with_momentum_and_averaged_weights_by_hand(accumulate):
    """Three steps of unequal weights, one of whose parts weighs nothing at all."""
    steps, put = make(accumulate=accumulate, ema=0.15)
    state = steps.init()
    kernel, bias = numbers(state.params)
    average, momentum = (kernel, bias), (0.0, 0.0)
    for step in range(3):
        batch = batch_of(step, UNEQUAL)
        loss, *grads = gradient(kernel, bias, batch)
        momentum = [0.9 * m + g for m, g in zip(momentum, grads, strict=True)]
        kernel, bias = kernel - 0.1 * momentum[0], bias - 0.1 * momentum[1]
        decay = min(0.15, (1 + step) / (10 + step))  # 0.1 in the first step
        average = [
            decay * a + (1 - decay) * p for a, p in zip(average, (kernel, bias), strict=True)
        ]
        state, metrics = steps.train(state, put(batch))
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(
            np.sqrt(np.sum(grads[0] ** 2) + grads[1] ** 2), rel=1e-5
        )
        assert metrics["learning_rate"] == pytest.approx(0.1)
        for ours, by_hand in ((state.params, (kernel, bias)), (state.ema, average)):
            np.testing.assert_allclose(numbers(ours)[0], by_hand[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(numbers(ours)[1], by_hand[1], rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3


def test_rows_of_weight_zero_change_nothing():
    steps, put = make()
    batch = batch_of(0, UNEQUAL)
    nothing = batch.weights == 0
    spoilt = batch._replace(
        inputs=np.where(nothing[:, None, None], 1e3, batch.inputs).astype(np.float32),
        targets=np.where(nothing[:, None], -1e3, batch.targets).astype(np.float32),
    )
    one, other = (steps.train(steps.init(), put(b)) for b in (batch, spoilt))
    assert float(one[1]["loss"]) == float(other[1]["loss"])
    jax.tree.map(np.testing.assert_array_equal, one[0].params, other[0].params)


def test_gradients_are_clipped_by_their_norm_and_the_log_has_the_whole_norm():
    schedule = learning_rate("constant", 0.1, 0, 10)
    steps, put = make(make_optimizer("sgd", schedule, 0.0, clip=0.5))
    state = steps.init()
    kernel, bias = numbers(state.params)
    _, *grads = gradient(kernel, bias, batch_of(0))
    norm = np.sqrt(np.sum(grads[0] ** 2) + grads[1] ** 2)
    assert norm > 0.5
    state, metrics = steps.train(state, put(batch_of(0)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(
        numbers(state.params)[0], kernel - 0.1 * grads[0] * 0.5 / norm, rtol=1e-5
    )


def test_the_state_is_donated_and_equal_shapes_compile_once():
    steps, put = make(ema=0.5)
    state = before = steps.init()
    for step in range(3):
        state, _ = steps.train(state, put(batch_of(step)))
    assert all(
        leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.ema, before.opt_state))
    )
    assert steps.train._cache_size() == 1
    for step in range(2):
        steps.evaluate(state.params, None, put(batch_of(step)))
    assert steps.evaluate._cache_size() == 1


def test_split_takes_turns_and_join_puts_back():
    rows = {"x": jnp.arange(12).reshape(6, 2)}
    parts = split(rows, 3)
    np.testing.assert_array_equal(parts["x"][0], [[0, 1], [6, 7]])
    np.testing.assert_array_equal(join(parts)["x"], rows["x"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_weight_decay_spares_biases(name):
    params = {
        "cell": {
            "input": jnp.ones((2, 4, 3)),
            "bias": jnp.ones((4, 3)),
            "recurrent_bias": jnp.ones(3),
        },
        "embed": {"embedding": jnp.ones((5, 2))},
        "head_bias": jnp.ones(5),
    }
    optimizer = make_optimizer(name, learning_rate("constant", 0.1, 0, 10), 0.5, 1.0)
    nothing = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def update():
        return optimizer.update(nothing, optimizer.init(params), params, value=jnp.asarray(1.0))[0]

    updates = update()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        if "bias" in jax.tree_util.keystr(path[-1:]):
            np.testing.assert_array_equal(update, 0)
        else:
            assert np.all(np.asarray(update) < 0)
    if name != "adafactor":
        np.testing.assert_allclose(updates["embed"]["embedding"], -0.1 * 0.5, rtol=1e-6)


def test_warm_up_and_cosine():
    schedule = learning_rate("cosine", 2.0, 4, 12)
    values = [float(schedule(step)) for step in (0, 1, 3, 4, 8, 12, 20)]
    assert values == pytest.approx([0, 0.5, 1.5, 2, 1, 0, 0], abs=1e-6)
    assert float(schedule(6)) == pytest.approx(1 + np.cos(np.pi / 4), rel=1e-6)
    assert [float(learning_rate("constant", 2.0, 2, 9)(step)) for step in (0, 1, 2, 50)] == [
        0,
        1,
        2,
        2,
    ]
    assert float(learning_rate("cosine", 2.0, 9, 9)(9)) == 2.0  # all warm-up


def test_a_cooldown_is_the_last_fifth_and_what_comes_before_does_not_know_the_length():
    schedule, longer = learning_rate("cooldown", 2.0, 4, 24), learning_rate("cooldown", 2.0, 4, 99)
    values = [float(schedule(step)) for step in (0, 2, 4, 20, 21, 22, 24, 30)]
    assert values == pytest.approx([0, 1, 2, 2, 1.5, 1, 0, 0], abs=1e-6)
    assert [float(longer(step)) for step in range(21)] == [float(schedule(s)) for s in range(21)]
    assert float(learning_rate("cooldown", 2.0, 0, 1)(1)) == 0.0  # no step but the last fifth's


def test_plateau_halves_the_step_as_the_loss_stalls():
    """Means over 2 steps; the first sets the mark, three without progress halve."""
    rate = 0.1
    optimizer = make_optimizer(
        "sgd", learning_rate("plateau", rate, 0, 100), 0.0, 0.0, plateau_steps=2
    )
    params = {"w": jnp.ones(2)}
    state, scales = optimizer.init(params), []
    update = jax.jit(
        lambda state, loss: optimizer.update({"w": jnp.ones(2)}, state, params, value=loss)[1]
    )
    losses = [5.0, 5.0] * 4 + [3.0, 3.0, 1.0, 1.0] + [2.0, 0.5] * 3
    for loss in losses:
        state = update(state, jnp.asarray(loss))
        scales.append(float(plateau_scale(state)))
    assert scales == [1.0] * 7 + [0.5] * 10 + [0.25]
    assert (
        plateau_scale(
            make_optimizer("sgd", learning_rate("constant", rate, 0, 9), 0, 0).init(params)
        )
        == 1.0
    )


def test_plateau_is_in_the_logged_rate_and_in_the_update():
    schedule = learning_rate("plateau", 0.1, 0, 100)

    def flat(outputs, batch):  # a loss that stays where it is, with a gradient of 1 for the bias
        return weighted(outputs - jax.lax.stop_gradient(outputs) + 1.0, batch.weights[:, None])

    steps, put = make(make_optimizer("adamw", schedule, 0.0, 0.0, plateau_steps=1), loss=flat)
    state, rates, moved = steps.init(), [], []
    for _ in range(5):
        before = numbers(state.params)[1]
        state, metrics = steps.train(state, put(batch_of(0)))
        rates.append(float(metrics["learning_rate"]))
        moved.append(before - numbers(state.params)[1])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])
    assert moved == pytest.approx(
        rates, rel=1e-3
    )  # Adam's step for an unchanging gradient is the rate


def test_every_mesh_gives_the_same(tmp_path):
    """With dropout, carried state, tied embeddings, and two accumulated parts."""
    config = small_runs.language_run(tmp_path, batch_size=16)
    dataset = config.data.load(tmp_path / "assets")
    source = dataset.train(16, 0)
    found = []
    for sizes in ((1, 1, 1), (8, 1, 1), (4, 2, 1)):
        mesh, steps, _ = assemble(replace(config, mesh=MeshConfig(*sizes)), dataset.info)
        state, losses = steps.init(), []
        for step in range(3):
            state, metrics = steps.train(state, put_batch(source[step], mesh))
            losses.append(float(metrics["loss"]))
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {int(np.prod(sizes))}
        found.append((losses, jax.device_get(state)))
        assert steps.train._cache_size() == 1
    for losses, state in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.carry, found[0][1].carry
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            state.params,
            found[0][1].params,
        )


def test_carried_state_makes_two_windows_one_sequence(tmp_path):
    config = small_runs.language_run(tmp_path)
    dataset = config.data.load(tmp_path / "assets")
    steps = assemble(config, dataset.info).steps
    params = steps.init().params
    lanes = list(dataset.evaluation("train", 8))[:2]
    zeros = jax.tree.map(
        lambda s: jnp.ones(s.shape, s.dtype), steps.abstract.carry
    )  # reset makes zeros of it
    carry, first = steps.forward(params, zeros, lanes[0])
    _, second = steps.forward(params, carry, lanes[1])
    whole = lanes[0]._replace(
        inputs=np.concatenate([batch.inputs for batch in lanes], axis=1),
        lengths=sum(batch.lengths for batch in lanes),
    )
    _, outputs = steps.forward(params, zeros, whole)
    valid = np.concatenate([batch.weights for batch in lanes], axis=1) > 0
    parts = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(parts[valid], np.asarray(outputs)[valid], atol=1e-6)
    # A reset of some rows alone is a fresh beginning for them alone.
    rows = np.arange(8) % 2 == 0
    _, mixed = steps.forward(params, carry, lanes[1]._replace(reset=rows))
    _, fresh = steps.forward(params, zeros, lanes[1]._replace(reset=np.ones(8, bool)))
    np.testing.assert_allclose(mixed, np.where(rows[:, None, None], fresh, second), atol=1e-6)
    assert np.abs(np.asarray(fresh) - second).max() > 1e-4


def test_forward_takes_any_number_of_rows(tmp_path):
    config = replace(small_runs.adding_run(), mesh=MeshConfig(data=8))
    dataset = config.data.load(tmp_path)
    steps = assemble(config, dataset.info).steps
    params = steps.init().params
    (batch,) = dataset.evaluation("test", 10)
    outputs = np.asarray(steps.forward(params, None, batch)[1])
    first = jax.tree.map(lambda x: x[:3], batch)
    np.testing.assert_allclose(steps.forward(params, None, first)[1], outputs[:3], atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(tmp_path):
    config = replace(small_runs.adding_run(batch_size=20, accumulate=2), mesh=MeshConfig())
    info = config.data.restore(tmp_path)
    with pytest.raises(UserError, match=r"batch-size 20 .* 8 devices x 2 accumulated.*: 16, 32"):
        assemble(config, info)
    with pytest.raises(UserError, match=r"batch-size 5 .*: 8$"):
        check_batch_size(5, 1, make_mesh(4, 2, 1))
    check_batch_size(16, 2, make_mesh(4, 2, 1))


@pytest.mark.parametrize(
    "sizes", [(3, -1, 1), (-1, -1, 1), (16, 1, 1), (0, 1, 1), (-2, 1, 1), (-1, 16, 1)]
)
def test_a_mesh_that_does_not_fit_is_a_user_error(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*sizes)


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert make_mesh(3).devices.size == 3
