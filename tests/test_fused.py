# SPDX-License-Identifier: Apache-2.0
"""What is special to the fused backend; that it equals the scan is shown in `test_backends.py`.

Axes: B batch, T time, D input features, H = J hidden units.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_lstm.errors import UserError
from flax_lstm.nn import recurrence
from flax_lstm.nn.cells import CELLS, GRUCell, LSTMCell, SimpleRNNCell
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.recurrence import fused, rows
from flax_lstm.nn.variants import LayerNormGRUCell, LayerNormLSTMCell, ProjectedLSTMCell

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from own_cells import CoupledLSTMCell, MinimalGatedCell, PeepholeLSTMCell

B, T, D, H = 8, 5, 3, 4
CELL_NAMES = sorted(CELLS)


class LeakyCell(LSTMCell):
    """A user's cell, which changes what its parent gives."""

    def step(self, weights, state, x_BGH, mask_BJ=None):
        new = super().step(weights, state, x_BGH, mask_BJ)
        return jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, new, state)


class TwiceCell(GRUCell):
    """It multiplies by its recurrent weights twice."""

    def step(self, weights, state, x_BGH, mask_BJ=None):
        return super().step(weights, super().step(weights, state, x_BGH, mask_BJ), x_BGH, mask_BJ)


class DenseCell(SimpleRNNCell):
    """It multiplies another way."""

    def step(self, weights, state, x_BGH, mask_BJ=None):
        return jnp.tanh(x_BGH[:, 0] + state @ weights.recurrent_JGH[:, 0])


class UnmaskedCell(SimpleRNNCell):
    """It forgets recurrent dropout."""

    def step(self, weights, state, x_BGH, mask_BJ=None):
        return super().step(weights, state, x_BGH)


OWN = {
    "leaky": LeakyCell,
    "coupled": CoupledLSTMCell,
    "peephole": PeepholeLSTMCell,
    "minimal gated": MinimalGatedCell,
    "layernorm_lstm": LayerNormLSTMCell,
    "layernorm_gru": LayerNormGRUCell,
    "projected": functools.partial(ProjectedLSTMCell, projection=3),
    "other activations": functools.partial(GRUCell, activation_fn=nn.soft_sign),
}


def example(name, dtype=jnp.float32):
    """A cell, its weights (none of them zero), inputs, lengths, a state and a mask of recurrent
    dropout."""
    rng = np.random.default_rng(0)
    cell = {**CELLS, **OWN}[name](H, param_dtype=dtype)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    variables = cell.init(jax.random.key(0), cell.initial_state(B, dtype), x_BTD[:, 0])
    weights = cell.apply(variables, D, method="weights")

    def noise(tree):
        return jax.tree.map(
            lambda a: jnp.asarray(a + 0.5 * rng.normal(size=a.shape), a.dtype), tree
        )

    state = noise(cell.initial_state(B, dtype))
    mask_BJ = jnp.asarray(2 * rng.integers(0, 2, (B, cell.outputs)), dtype)
    return cell, noise(weights), x_BTD, jnp.array([0, 1, 2, 3, 4, 5, 5, 3]), state, mask_BJ


def by_hand(cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse, reset_BT=None):
    """The recurrence as a Python loop."""
    x_BTGH, y_BTH = cell.project(weights, x_BTD), [None] * T
    fresh_BT = None if reset_BT is None else rows.fresh(reset_BT, lengths_B, reverse)
    for t in reversed(range(T)) if reverse else range(T):
        begin = state
        if fresh_BT is not None:
            begin = jax.tree.map(lambda s, t=t: jnp.where(fresh_BT[:, t, None], 0, s), state)
        new = cell.step(weights, begin, x_BTGH[:, t], mask_BJ)
        valid = (t < lengths_B)[:, None]
        state = jax.tree.map(lambda a, b, valid=valid: jnp.where(valid, a, b), new, state)
        y_BTH[t] = jnp.where(valid, cell.output(state), 0)
    return state, jnp.stack(y_BTH, 1)


def gradients(run, cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse, reset_BT=None):
    """Outputs, and gradients for every real argument, of a random weighing of all outputs."""

    def loss(weights, x_BTD, state, mask_BJ):
        out = run(cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse, reset_BT)
        leaves = jax.tree.leaves(out)
        return sum(
            jnp.sum(a * np.random.default_rng(n).normal(size=a.shape).astype(a.dtype))
            for n, a in enumerate(leaves)
        ), out

    both = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    # The loop op by op: each is compiled once for all cells, and not the loop for each of them.
    both = both if run is by_hand else jax.jit(both)
    return both(weights, x_BTD, state, mask_BJ)


@functools.lru_cache(maxsize=2)
def in_float64(name, reverse):
    """Those of the loop written out, once for all ways of doing the same."""
    return gradients(by_hand, *example(name, jnp.float64), reverse)


RESET = jnp.asarray(np.random.default_rng(0).random((B, T)) < 0.4)


def assert_close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize(
    "devices, gpu, keep", [(1, False, 1 << 30), (8, True, 1 << 30), (8, False, 0)]
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CELL_NAMES)
def test_gradients_of_everything_in_float64(
    name, reverse, devices, gpu, keep, x64, quick_compile, monkeypatch
):
    """The mask's gradient included, with the matmuls of one device and the arrays of a GPU, which
    other tests never use, and with time in chunks."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(fused, "on_gpu", lambda: gpu)
    monkeypatch.setattr(fused, "KEEP", keep)
    ours = gradients(fused.run, *example(name, jnp.float64), reverse)
    assert_close(ours, in_float64(name, reverse), 1e-12)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_auto_takes_it(name):
    cell, _, x_BTD, *_ = example(name)
    assert recurrence.resolve("fused", cell, x_BTD) is fused
    assert recurrence.resolve("auto", cell, x_BTD) is not None


@pytest.mark.parametrize("name", OWN)
def test_cells_with_equations_of_their_own(name, x64, quick_compile, monkeypatch):
    """All gradients, those of weights that only they have included, with resets, a mask for each
    gate, and rows that end; every other cell backward and in chunks of time."""
    reverse = list(OWN).index(name) % 2 == 1
    monkeypatch.setattr(fused, "KEEP", 0 if reverse else 1 << 30)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    cell, weights, x_BTD, lengths_B, state, mask_BJ = example(name, jnp.float64)
    assert fused.supports(cell, x_BTD, True, True) is None
    masks = jnp.stack([jnp.roll(mask_BJ, gate, 0) for gate in range(cell.gates)], 1)
    arguments = (cell, weights, x_BTD, lengths_B, state, masks, reverse, RESET)
    assert_close(gradients(fused.run, *arguments), gradients(by_hand, *arguments), 1e-11)


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["chunks", "whole"])
def test_states_after_every_step(keep, x64, quick_compile, monkeypatch):
    """Of a cell whose output is not its whole state, c besides h, with all gradients."""
    monkeypatch.setattr(fused, "KEEP", keep)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    cell, _, x_BTD, lengths_B, state, _ = example("projected", jnp.float64)
    variables = RNN(cell).init(jax.random.key(0), x_BTD)

    def found(backend):
        layer = RNN(cell, backend=backend, return_states=True)

        def loss(variables, x_BTD, state):
            out = layer.apply(variables, x_BTD, lengths_B, state, reset_BT=RESET, reverse=True)
            leaves = jax.tree.leaves(out)
            return sum(jnp.sum(jnp.sin((1 + n) * a)) for n, a in enumerate(leaves)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(variables, x_BTD, state)

    assert_close(found("fused"), found("scan"), 1e-11)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_resets_and_a_mask_for_each_gate(name, x64, quick_compile):
    cell, weights, x_BTD, lengths_B, state, mask_BJ = example(name, jnp.float64)
    masks = jnp.stack([jnp.roll(mask_BJ, gate, 0) for gate in range(cell.gates)], 1)
    arguments = (cell, weights, x_BTD, lengths_B, state, masks, name != "gru", RESET)
    assert_close(gradients(fused.run, *arguments), gradients(by_hand, *arguments), 1e-12)


def test_a_layer_of_such_a_cell_is_fused_where_no_kernel_is_faster():
    x_BTD = jnp.ones((B, T, D))
    assert recurrence.resolve("auto", PeepholeLSTMCell(H), x_BTD, True, True) is fused
    leaky, plain = RNN(LeakyCell(H)), RNN(LSTMCell(H))
    variables = leaky.init(jax.random.key(0), x_BTD)
    assert not np.allclose(leaky.apply(variables, x_BTD)[1], plain.apply(variables, x_BTD)[1])


@pytest.mark.parametrize(
    "cell, says",
    [
        (TwiceCell, "another array than its output, or several"),
        (DenseCell, "equations of DenseCell"),
        (UnmaskedCell, "recurrent dropout is left out"),
    ],
)
def test_other_equations_are_scanned(cell, says):
    x_BTD = jnp.ones((B, T, D))
    assert says in fused.supports(cell(H), x_BTD, False)
    with pytest.raises(UserError, match=rf"model\.backend fused .*{cell.__name__}"):
        RNN(cell(H), backend="fused").init(jax.random.key(0), x_BTD)
    variables = RNN(cell(H)).init(jax.random.key(0), x_BTD)
    assert RNN(cell(H)).apply(variables, x_BTD)[1].shape == (B, T, H)


def loops(jaxpr):
    """The scans in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            if inner := getattr(value, "jaxpr", None):
                yield from loops(getattr(inner, "jaxpr", inner))


def test_chunks_of_time_keep_little(monkeypatch):
    cell, weights, *_ = example("lstm")
    x_BTD = jax.ShapeDtypeStruct((B, 6400, D), jnp.float32)

    def megabytes(keep):
        monkeypatch.setattr(fused, "KEEP", keep)

        def loss(weights, x_BTD):
            return jnp.sum(
                jnp.sin(
                    fused.run(cell, weights, x_BTD, None, cell.initial_state(B), None, False)[1]
                )
            )

        compiled = jax.jit(jax.grad(loss)).lower(weights, x_BTD).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    assert megabytes(0) < megabytes(1 << 30) / 3


@pytest.mark.parametrize("name", [*CELL_NAMES, "peephole", "layernorm_gru"])
def test_one_matmul_a_step(name):
    """No weight gradient and no input projection inside a loop."""
    cell, weights, x_BTD, lengths_B, state, _ = example(name)

    def loss(weights, x_BTD):
        return jnp.sum(fused.run(cell, weights, x_BTD, lengths_B, state, None, False)[1])

    training = list(loops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights, x_BTD).jaxpr))
    assert len(training) == 2
    assert all(str(loop.params["jaxpr"]).count("dot_general") == 1 for loop in training)


@pytest.mark.parametrize("name", ["peephole", "layernorm_lstm", "layernorm_gru"])
def test_a_step_of_such_a_cell_is_arithmetic(name):
    """Gradients are put together from padded slices, and summed over rows, nowhere in a loop."""
    cell, weights, x_BTD, _, state, _ = example(name)

    def loss(weights, x_BTD):
        return jnp.sum(jnp.sin(fused.run(cell, weights, x_BTD, None, state, None, False)[1]))

    training = list(loops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights, x_BTD).jaxpr))
    steps = [str(loop.params["jaxpr"]) for loop in training]
    assert len(steps) == 2
    assert not any("pad[" in step or "reduce_sum[axes=(0," in step for step in steps)


def test_no_lengths_no_selects():
    cell, weights, x_BTD, lengths_B, state, _ = example("lstm")

    def selects(lengths_B):
        def loss(x_BTD):
            return jnp.sum(fused.run(cell, weights, x_BTD, lengths_B, state, None, False)[1])

        return str(jax.make_jaxpr(jax.grad(loss))(x_BTD)).count("select_n")

    assert selects(None) == 0 < selects(lengths_B)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_batch_over_eight_devices(name):
    """A sharded batch equals one device, and is never gathered."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    cell, weights, x_BTD, lengths_B, state, _ = example(name)

    def loss(weights, x_BTD, lengths_B, state):
        final, y_BTH = fused.run(cell, weights, x_BTD, lengths_B, state, None, False)
        return jnp.sum(jnp.sin(3 * y_BTH)) + sum(jnp.sum(a * a) for a in jax.tree.leaves(final))

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 3)))
    expected = step(weights, x_BTD, lengths_B, state)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = jax.device_put((weights, x_BTD, lengths_B, state), (whole, rows, rows, rows))
    got = step(*sharded)
    assert_close(got, expected, 1e-5)
    assert got[1][1].sharding.is_equivalent_to(rows, 3)
    compiled = step.lower(*sharded).compile().as_text()
    assert "all-gather" not in compiled and "all-to-all" not in compiled
    assert "all-reduce" in compiled


def test_bfloat16_keeps_a_float32_state(monkeypatch):
    """Many small steps: a state in bfloat16 would stand still."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rnn = RNN(GRUCell(H, dtype=jnp.bfloat16), backend="fused")
    x_BTD = jnp.zeros((B, 200, D))
    variables = rnn.init(jax.random.key(0), x_BTD)
    weights = jax.tree.map(jnp.zeros_like, variables["params"]["cell"])
    weights["bias"] = (
        weights["bias"].at[1].set(8).at[2].set(1)
    )  # z close to 1: each step adds 3e-4 of what is missing
    variables = {"params": {"cell": weights}}
    state, y_BTH = jax.jit(rnn.apply)(variables, x_BTD, state=jnp.full((B, H), 0.5))
    assert state.dtype == jnp.float32 and y_BTH.dtype == jnp.bfloat16
    update = 1 - 1 / (1 + np.exp(-8.0))
    expected = np.tanh(1) + (0.5 - np.tanh(1)) * (1 - update) ** 200
    np.testing.assert_allclose(state, expected, rtol=2e-3)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(rnn.apply(v, x_BTD)[1].astype(jnp.float32))))(
        variables
    )
    assert all(np.all(np.isfinite(g)) and g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))


def test_vmap_and_empty_time():
    cell, weights, x_BTD, lengths_B, state, mask_BJ = example("gru")

    def loss(x_BTD):
        return jnp.sum(
            jnp.sin(fused.run(cell, weights, x_BTD, lengths_B, state, mask_BJ, False)[1])
        )

    several = jnp.stack([x_BTD, 2 * x_BTD])
    assert_close(
        jax.jit(jax.vmap(jax.grad(loss)))(several),
        jnp.stack([jax.grad(loss)(x) for x in several]),
        1e-5,
    )
    assert jax.grad(loss)(x_BTD[:, :0]).shape == (B, 0, D)
