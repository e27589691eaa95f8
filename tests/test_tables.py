# SPDX-License-Identifier: Apache-2.0
"""A table of embeddings updated by the rows that were looked up, against AdamW in float64 NumPy on
a model whose gradients can be written down: softmax regression on the mean embedding.

Axes: B batch, T time, V vocabulary, F features, K classes.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_native import needs_compiler

from flax_lstm import Classification, TextModel, load_config
from flax_lstm.data.base import Batch
from flax_lstm.machine.sharding import make_mesh, put_batch
from flax_lstm.nn.models import Embed, SequenceModel, mean_pool
from flax_lstm.nn.ngrams import NGrams
from flax_lstm.nn.recurrence import native
from flax_lstm.training.assembly import table_of
from flax_lstm.training.optim import learning_rate, make_optimizer
from flax_lstm.training.steps import make_steps
from flax_lstm.training.tables import Table, by_rows, take

pytestmark = [needs_compiler, pytest.mark.usefixtures("quick_compile")]

ROWS, STEPS, WORDS, FEATURES, CLASSES, UPDATES = 4, 6, 40, 19, 2, 4
RATE, DECAY, EPSILON, CLIP = 0.1, 0.01, 1e-6, 0.05
CROSS_ENTROPY = Classification().loss


class Nothing(nn.Module):
    """A recurrent layer that gives its inputs back."""

    def __call__(self, x_BTD, lengths_B, state=None, *, deterministic=True):
        return None, x_BTD


def batch_of(step: int) -> Batch:
    """Words that come more than once, within a row too, and most of the table not at all."""
    generator = np.random.default_rng(step)
    return Batch(
        inputs=generator.integers(0, 8, (ROWS, STEPS)).astype(np.int32) * 5,
        targets=generator.integers(0, CLASSES, ROWS).astype(np.int32),
        lengths=np.array([6, 3, 1, 2], np.int32),
        weights=np.array([1, 2, 0.5, 0], np.float32),
    )


def trained(table: Table | None, clip: float, loss: Any = CROSS_ENTROPY):
    """Parameters before and after some updates, the moments, and the gradients' norms."""
    module = SequenceModel(Nothing(), CLASSES, embed=Embed(WORDS, FEATURES), pool=mean_pool)
    schedule, mesh = learning_rate("constant", RATE, 2, 10), make_mesh(1)
    optimizer = make_optimizer("adamw", schedule, DECAY, clip, epsilon=EPSILON)
    steps = make_steps(
        module,
        loss,
        lambda outputs, batch: outputs,
        optimizer,
        schedule,
        mesh,
        batch_of(0),
        table=table,
    )
    state = steps.init()
    first = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    norms = []
    for step in range(UPDATES):
        state, metrics = steps.train(state, put_batch(batch_of(step), mesh))
        norms.append(float(metrics["grad_norm"]))
    moments = [s for s in jax.tree.leaves(state.opt_state) if s.shape == (WORDS, FEATURES)]
    return first, state.params, moments, norms


def gradients(params, batch: Batch):
    table_VF, head = params["embed"]["embedding"], params["head"]
    valid_BT = np.arange(STEPS) < batch.lengths[:, None]
    share_BT = valid_BT / batch.lengths[:, None]
    mean_BF = np.einsum("bt,btf->bf", share_BT, table_VF[batch.inputs])
    e_BK = np.exp(mean_BF @ head["kernel"] + head["bias"])
    d_BK = e_BK / e_BK.sum(1, keepdims=True) - np.eye(CLASSES)[batch.targets]
    d_BK *= (batch.weights / batch.weights.sum())[:, None]
    table = np.zeros_like(table_VF)
    np.add.at(table, batch.inputs, share_BT[..., None] * (d_BK @ head["kernel"].T)[:, None])
    return {
        "embed": {"embedding": table},
        "head": {"kernel": mean_BF.T @ d_BK, "bias": d_BK.sum(0)},
    }


def reference(params, clip: float):
    """The same updates in float64."""
    zeros = jax.tree.map(np.zeros_like, params)
    first, second, norms = zeros, zeros, []
    decay = jax.tree_util.tree_map_with_path(lambda p, _: DECAY * ("bias" not in str(p)), params)
    for step in range(UPDATES):
        grads = gradients(params, batch_of(step))
        norms.append(np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads))))
        scale = min(1, clip / norms[-1]) if clip else 1
        first = jax.tree.map(lambda m, g, s=scale: 0.9 * m + 0.1 * s * g, first, grads)
        second = jax.tree.map(lambda v, g, s=scale: 0.999 * v + 0.001 * (s * g) ** 2, second, grads)
        rate, made = RATE * min(step / 2, 1), step + 1

        def update(p, m, v, d, rate=rate, made=made):
            root = np.sqrt(v / (1 - 0.999**made)) + EPSILON
            return p - rate * (m / (1 - 0.9**made) / root + d * p)

        params = jax.tree.map(update, params, first, second, decay)
    return params, [first["embed"]["embedding"], second["embed"]["embedding"]], norms


@pytest.mark.parametrize("clip", [0.0, CLIP])
def test_updates_by_rows_are_those_of_adamw(clip: float) -> None:
    """Rows that were not looked up in a step move on; so do moments, norm and all other weights."""
    assert native.unavailable() is None
    first, params, moments, norms = trained(Table(DECAY, EPSILON, clip), clip)
    exact, exact_moments, exact_norms = reference(first, clip)
    # A few roundings of 6e-8 each, relative; a step is RATE where the gradient's sign is certain.
    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, rtol=0, atol=2e-5), params, exact)
    np.testing.assert_allclose(norms, exact_norms, rtol=1e-5)
    for found, e in zip(moments, exact_moments, strict=True):
        np.testing.assert_allclose(found, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())


def test_they_are_those_without_rows() -> None:
    by_row, whole = (trained(t, CLIP) for t in (Table(DECAY, EPSILON, CLIP), None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), by_row, whole)


def test_a_loss_sees_the_words_and_not_what_was_looked_up() -> None:
    """One of your own may weigh rows by them."""

    def loss(outputs: Any, batch: Batch) -> Any:
        odd_B = batch.inputs[:, 0] % 2
        return CROSS_ENTROPY(outputs, batch._replace(weights=1.0 + odd_B))

    by_row, whole = (trained(t, CLIP, loss) for t in (Table(DECAY, EPSILON, CLIP), None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), by_row, whole)


def test_a_word_that_is_none_counts_for_nothing() -> None:
    assert native.unavailable() is None
    shapes = [jax.ShapeDtypeStruct((5,), jnp.int32), jax.ShapeDtypeStruct((5, 2), jnp.float32)]
    ids, values = jnp.array([2, -1, 0, 2, 3]), jnp.arange(10.0).reshape(5, 2)
    found, sums = jax.ffi.ffi_call("flax_lstm_add_up", shapes)(ids, values, rows=3)
    np.testing.assert_array_equal(found, [0, 2, 3, 3, 3])
    np.testing.assert_array_equal(sums, [[4, 5], [6, 8], [0, 0], [0, 0], [0, 0]])


def test_what_is_looked_up_is_what_jax_takes() -> None:
    """Of words that are none, too, and of many words, which several threads look up."""
    assert native.unavailable() is None
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(9, 130)), jnp.float32)
    for words in (np.array([[8, -1, 0], [9, -10, -9]]), rng.integers(0, 9, (20, 30))):
        found = take(table, jnp.asarray(words))
        np.testing.assert_array_equal(found, jnp.take(table, words, axis=0))


def test_only_adamw_alone_and_an_embedding_of_its_own_are_updated_by_rows() -> None:
    config = load_config("imdb_lstm")
    train = config.train
    info = SimpleNamespace(labels=range(2), vocabulary_size=WORDS)
    module = Classification().build(TextModel(hidden_size=(8,)), info)
    mesh = make_mesh(1)
    expected = Table(train.weight_decay, train.epsilon, train.clip)
    assert table_of(config, module, mesh) == expected
    assert table_of(config.with_backend("cpu"), module, mesh) == expected
    for backend in ("fused", "scan"):  # which need no compiler
        assert table_of(config.with_backend(backend), module, mesh) is None
    for other in (
        {"optimizer": "sgd", "epsilon": 1e-8},
        {"schedule": "plateau"},
        {"layer_decay": 0.5},
        {"unfreeze_every": 3},
        {"frozen": ("embed",)},
        {"accumulate": 2},
    ):
        changed = replace(config, train=replace(train, **other))
        assert table_of(changed, module, mesh) is None, other
    assert not by_rows(module, make_mesh(2))
    assert not by_rows(module.clone(tied=True), mesh)
    assert not by_rows(module.clone(embed=None), mesh)
    assert not by_rows(module.clone(ngrams=NGrams(2, 2)), mesh)
