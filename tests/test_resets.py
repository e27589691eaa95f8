# SPDX-License-Identifier: Apache-2.0
"""Resets: a row of several sequences is as those sequences alone, however it is read.

Axes: B batch, T time, D input features, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm.nn.cells import CELLS, LSTMCell
from flax_lstm.nn.layers import RNN, Bidirectional, ScannedRNN, Stack
from flax_lstm.nn.recurrence import BACKENDS

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, D, H = 3, 7, 2, 3
LENGTHS = np.array([7, 4, 0])
RESETS = np.zeros((B, T), bool)
RESETS[0, [0, 2, 3]] = RESETS[1, [1, 6]] = True  # the one at 6 is in padding
each_cell = pytest.mark.parametrize("name", CELLS)
each_backend = pytest.mark.parametrize("backend", ("scan", *BACKENDS))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def random_variables(layer: nn.Module, *inputs: Any) -> Any:
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), shapes)


def begin(cell: Any, seed: int = 5) -> Any:
    return jax.tree.map(lambda s: random(*s.shape, seed=seed), cell.initial_state(B))


def pieces(row: int) -> list[tuple[int, int, bool]]:
    """[start, stop) of each sequence in a row, and whether it begins with a reset."""
    length = int(LENGTHS[row])
    borders = [t for t in range(length) if RESETS[row, t]]
    starts = borders if borders[:1] == [0] else [0, *borders]
    return [
        (a, b, bool(RESETS[row, a])) for a, b in zip(starts, [*starts[1:], length], strict=True)
    ]


def alone(layer: RNN, variables: Any, x_BTD: Any, state: Any, reverse: bool) -> Any:
    """Every sequence by a call of its own: the final states and outputs of all rows. Read forward,
    the state is for the first sequence unless a reset precedes it; read backward, it is for the
    last."""
    ends, ys = [], []
    for row in range(B):
        one = jax.tree.map(lambda s, row=row: s[row : row + 1], state)
        zeros = jax.tree.map(jnp.zeros_like, one)
        y_TH = jnp.zeros((T, H))
        parts = pieces(row) if LENGTHS[row] else []
        for n, (a, b, reset) in enumerate(parts[::-1] if reverse else parts):
            first = n == 0 if reverse else not reset
            one, y = layer.apply(
                variables, x_BTD[row : row + 1, a:b], None, one if first else zeros, reverse=reverse
            )
            y_TH = y_TH.at[a:b].set(y[0])
        ends.append(one)
        ys.append(y_TH)
    return jax.tree.map(lambda *s: jnp.concatenate(s), *ends), jnp.stack(ys)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), a, b)


def gradients(run: Any, *arguments: Any) -> Any:
    """Results, and gradients under cotangents that differ everywhere."""
    out, pull = jax.vjp(run, *arguments)
    wave = lambda o: jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape)  # noqa: E731
    return out, pull(jax.tree.map(wave, out))


@pytest.mark.parametrize(
    "name, reverse", [("lstm", False), ("lstm", True), ("gru", True), ("rnn", False)]
)
def test_the_scan_with_resets_is_every_sequence_alone(name: str, reverse: bool) -> None:
    layer, x_BTD = RNN(CELLS[name](H), backend="scan"), random(B, T, D)
    variables, state = random_variables(layer, x_BTD), begin(layer.cell)

    def together(variables: Any, x_BTD: Any, state: Any) -> Any:
        return layer.apply(variables, x_BTD, LENGTHS, state, reset_BT=RESETS, reverse=reverse)

    def apart(variables: Any, x_BTD: Any, state: Any) -> Any:
        return alone(layer, variables, x_BTD, state, reverse)

    ours, expected = (
        jax.jit(lambda *a, run=run: gradients(run, *a))(variables, x_BTD, state)
        for run in (together, apart)
    )
    assert_close(ours, expected)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@each_cell
@each_backend
def test_every_backend_resets_as_the_scan(
    backend: str, name: str, reverse: bool, time_major: bool
) -> None:
    """With ragged and empty rows, a state, recurrent dropout, and the states of all steps."""
    if backend == "scan" and not time_major:
        pytest.skip("it is the scan")
    x_BTD, found = random(B, T, D), []
    if backend != "scan":
        module, cell = BACKENDS[backend], CELLS[name](H)
        if reason := module.supports(cell, x_BTD, True, True):
            pytest.skip(f"{backend}: {reason}")
    states = backend == "scan" or hasattr(BACKENDS[backend], "run_states")
    for one, turned in ((backend, time_major), ("scan", False)):
        options: Any = {"time_major": turned, "return_states": states, "recurrent_dropout": 0.5}
        layer = RNN(CELLS[name](H), backend=one, **options)
        turn = lambda a, turned=turned: jnp.swapaxes(a, 0, 1) if turned else a  # noqa: E731
        variables = random_variables(layer, turn(x_BTD))

        def run(
            variables: Any, x_BTD: Any, state: Any, layer: Any = layer, turn: Any = turn
        ) -> Any:
            out = layer.apply(
                variables,
                turn(x_BTD),
                LENGTHS,
                state,
                reset_BT=turn(jnp.asarray(RESETS)),
                reverse=reverse,
                deterministic=False,
                rngs={"dropout": jax.random.key(7)},
            )
            return out[0], *jax.tree.map(turn, out[1:])

        found.append(
            jax.jit(lambda *a, run=run: gradients(run, *a))(variables, x_BTD, begin(layer.cell))
        )
    assert_close(*found)


@each_cell
def test_states_after_every_step_are_those_of_shorter_rows(name: str) -> None:
    layer = RNN(CELLS[name](H), return_states=True)
    x_BTD, state = random(B, T, D), begin(layer.cell)
    variables = random_variables(layer, x_BTD)
    run = jax.jit(lambda n: layer.apply(variables, x_BTD, n, state, reset_BT=RESETS))
    end, _, states = run(LENGTHS)
    for t in range(T):
        shorter, _, _ = run(np.minimum(LENGTHS, t + 1))
        assert_close(jax.tree.map(lambda s, t=t: s[:, t], states), shorter)
    assert_close(jax.tree.map(lambda s: s[:, -1], states), end)


def test_stacks_and_both_directions_reset_alike() -> None:
    """A stack of a bidirectional and a forward layer over a packed row equals the sequences
    alone."""
    layers = [Bidirectional(RNN(LSTMCell(2)), RNN(LSTMCell(2))), RNN(LSTMCell(H))]
    stack, x_BTD = Stack(layers), random(1, T, D)
    variables = random_variables(stack, x_BTD)
    _, y_BTH = stack.apply(variables, x_BTD, None, reset_BT=RESETS[:1])
    for a, b in ((0, 2), (2, 3), (3, 7)):
        assert_close(stack.apply(variables, x_BTD[:, a:b])[1], y_BTH[:, a:b])


def test_scanned_rnn_is_the_class_of_reinforcement_learning() -> None:
    """Written out as PureJaxRL and its kin do, around one of our cells: time first, the carry set
    to zeros before a step whose reset is true."""
    ins_TBD, resets_TB = jnp.swapaxes(random(B, T, D), 0, 1), jnp.asarray(RESETS.T)
    layer = ScannedRNN()
    carry = ScannedRNN.initialize_carry(B, D) + 1
    variables = random_variables(layer, carry, (ins_TBD, resets_TB))
    end, out_TBH = jax.jit(layer.apply)(variables, carry, (ins_TBD, resets_TB))
    cell, h_BH = CELLS["gru"](D), carry
    for t in range(T):
        h_BH = jnp.where(resets_TB[t][:, None], 0, h_BH)
        h_BH, y_BH = cell.apply({"params": variables["params"]["cell"]}, h_BH, ins_TBD[t])
        assert_close(out_TBH[t], y_BH)
    assert_close(end, h_BH)
    assert set(variables["params"]) == {"cell"}


def test_scanned_rnn_carries_what_it_was_given_through_a_scan_under_vmap() -> None:
    """One step at a time inside the scan of an environment, environments mapped."""
    layer = ScannedRNN(LSTMCell(H))
    carry = (jnp.zeros((1, H)), jnp.zeros((1, H)))
    xs = random(B, T, 1, 1, D), jnp.asarray(RESETS)[..., None, None]
    variables = random_variables(layer, carry, (xs[0][0, 0], xs[1][0, 0]))

    def episode(ins: Any, resets: Any) -> Any:
        return jax.lax.scan(lambda c, x: layer.apply(variables, c, x), carry, (ins, resets))

    end, out = jax.jit(jax.vmap(episode))(*xs)
    rnn = RNN(LSTMCell(H), backend="scan")
    state, y_BTH = rnn.apply(variables, xs[0][:, :, 0, 0], reset_BT=RESETS)
    assert_close(out[:, :, 0, 0], y_BTH)
    assert_close((end[0][:, 0], end[1][:, 0]), tuple(state))


@pytest.mark.parametrize("sharded", [False, True])
def test_resets_over_a_mesh(sharded: bool) -> None:
    """Each device with its rows; backends run as the program of one device."""
    from flax_lstm.machine.sharding import make_mesh, on_mesh, put_batch

    layer, x_BTD = RNN(LSTMCell(H)), random(8, T, D)
    resets = np.asarray(random(8, T, seed=9)) > 0.5
    variables = random_variables(layer, x_BTD)

    def loss(variables: Any, x_BTD: Any, resets: Any) -> Any:
        return jnp.sum(jnp.sin(layer.apply(variables, x_BTD, None, reset_BT=resets)[1]))

    expected = jax.grad(loss)(variables, x_BTD, resets)
    mesh = make_mesh(8 if sharded else 1, 1, 1)
    run = jax.jit(on_mesh(jax.grad(loss), mesh))
    assert_close(run(variables, *put_batch((x_BTD, resets), mesh)), expected)


def test_a_cell_of_others_carries_the_dtype_of_its_inputs() -> None:
    """Float64 where it is enabled; the same as the cell step by step."""
    rng = np.random.default_rng(0)
    ins_TBD, begin_BH = (jnp.asarray(rng.normal(size=shape)) for shape in ((5, 2, 3), (2, 4)))
    resets_TB = jnp.asarray(rng.integers(0, 2, (5, 2)), bool)
    cell = nn.GRUCell(4)
    layer = ScannedRNN(cell)
    variables = layer.init(jax.random.key(0), begin_BH, (ins_TBD, resets_TB))
    carry_BH, out_TBH = layer.apply(variables, begin_BH, (ins_TBD, resets_TB))
    assert carry_BH.dtype == out_TBH.dtype == ins_TBD.dtype
    (params,) = variables["params"].values()
    h_BH = begin_BH
    for x_BD, reset_B, out_BH in zip(ins_TBD, resets_TB, out_TBH, strict=True):
        h_BH, _ = cell.apply({"params": params}, jnp.where(reset_B[:, None], 0, h_BH), x_BD)
        np.testing.assert_allclose(out_BH, h_BH, rtol=1e-5, atol=1e-6)
