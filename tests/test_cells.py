# SPDX-License-Identifier: Apache-2.0
"""The cells are the equations, their weights begin as said, and their dtypes are as said."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm import convert
from flax_lstm.errors import UserError
from flax_lstm.nn.cells import CELLS, LSTMCell, LSTMState, gru_step, orthogonal_per_gate
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.recurrence import cpu

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D, H = 6, 3, 2, 4
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
each_cell = pytest.mark.parametrize("name", CELLS)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def random_weights(name: str) -> dict[str, np.ndarray]:
    gates = GATES[name]
    weights = {
        "input": random(D, gates, H),
        "recurrent": random(H, gates, H),
        "bias": random(gates, H),
    }
    return weights | ({"recurrent_bias": random(H)} if name == "gru" else {})


# The textbook: a matrix for each gate, multiplied by the concatenation of h and x.


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def textbook_lstm(
    w: dict[str, np.ndarray], x: np.ndarray, c: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, ...]:
    Wi, Wf, Wc, Wo = (np.concatenate([w["recurrent"][:, g], w["input"][:, g]]) for g in range(4))
    bi, bf, bc, bo = w["bias"]
    hx = np.concatenate([h, x])
    f, i, o = sigmoid(hx @ Wf + bf), sigmoid(hx @ Wi + bi), sigmoid(hx @ Wo + bo)
    c = f * c + i * np.tanh(hx @ Wc + bc)
    return c, o * np.tanh(c)


def textbook_gru(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    Wr, Wz = (np.concatenate([w["recurrent"][:, g], w["input"][:, g]]) for g in range(2))
    br, bz, bn = w["bias"]
    hx = np.concatenate([h, x])
    r, z = sigmoid(hx @ Wr + br), sigmoid(hx @ Wz + bz)
    n = np.tanh(x @ w["input"][:, 2] + bn + r * (h @ w["recurrent"][:, 2] + w["recurrent_bias"]))
    return ((1 - z) * n + z * h,)


def textbook_rnn(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    W = np.concatenate([w["recurrent"][:, 0], w["input"][:, 0]])
    return (np.tanh(np.concatenate([h, x]) @ W + w["bias"][0]),)


TEXTBOOK: Any = {"lstm": textbook_lstm, "gru": textbook_gru, "rnn": textbook_rnn}


@each_cell
def test_cell_is_the_textbook_step_by_step(name: str, x64: None) -> None:
    weights, cell, x_BTD = (
        random_weights(name),
        CELLS[name](H, param_dtype=jnp.float64),
        random(B, T, D),
    )
    parts = 2 if name == "lstm" else 1
    begin = [random(B, H, seed=part) for part in range(parts)]
    state = LSTMState(*map(jnp.asarray, begin)) if name == "lstm" else jnp.asarray(begin[0])
    expected = [[part[row] for part in begin] for row in range(B)]
    for t in range(T):
        expected = [TEXTBOOK[name](weights, x_BTD[row, t], *expected[row]) for row in range(B)]
        state, y_BH = cell.apply({"params": weights}, state, jnp.asarray(x_BTD[:, t]))
        for part, leaf in enumerate(jax.tree.leaves(state)):
            assert leaf.dtype == jnp.float64
            np.testing.assert_allclose(leaf, [row[part] for row in expected], rtol=1e-12)
        np.testing.assert_allclose(y_BH, [row[-1] for row in expected], rtol=1e-12)


@pytest.mark.parametrize(
    "name, theirs, activations",
    [
        ("lstm", nn.LSTMCell, {"gate_fn": nn.hard_sigmoid, "activation_fn": nn.soft_sign}),
        ("gru", nn.GRUCell, {"gate_fn": nn.hard_sigmoid, "activation_fn": nn.soft_sign}),
        ("rnn", nn.SimpleCell, {"activation_fn": nn.relu}),
    ],
)
def test_other_activations_are_those_of_flax(name: str, theirs: Any, activations: Any) -> None:
    """And kernels written for sigmoid and tanh leave such a cell alone."""
    x_BTD, rnn = jnp.asarray(random(B, T, D), jnp.float32), nn.RNN(theirs(H, **activations))
    expected, variables = rnn.init_with_output(jax.random.key(0), x_BTD)
    params = convert.from_flax(variables["params"])["layers_0"]
    cell = CELLS[name](H, **activations)
    np.testing.assert_allclose(RNN(cell).apply({"params": params}, x_BTD)[1], expected, atol=1e-6)
    assert "other activations" in str(cpu.supports(cell, x_BTD, False))
    for backend in ("cpu", "cudnn"):
        with pytest.raises(UserError, match=f"{backend} cannot run"):
            RNN(cell, backend=backend).apply({"params": params}, x_BTD)


@each_cell
def test_flax_rnn_scans_our_cell(name: str) -> None:
    x_BTD, weights = jnp.asarray(random(B, T, D), jnp.float32), random_weights(name)
    params = {"params": {"cell": jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)}}
    theirs = nn.RNN(CELLS[name](H), return_carry=True).apply(params, x_BTD)
    ours = RNN(CELLS[name](H), backend="scan").apply(params, x_BTD)
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), theirs, ours)


@each_cell
def test_weights_begin_as_said(name: str) -> None:
    variables = CELLS[name](64).lazy_init(
        jax.random.key(0),
        CELLS[name](64).initial_state(1),
        jax.ShapeDtypeStruct((1, 32), jnp.float32),
    )
    weights = variables["params"]
    gates = GATES[name]
    rows = weights["recurrent"].reshape(64, gates * 64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(64), atol=1e-5)
    per_gate = orthogonal_per_gate(jax.random.key(0), (64, gates, 64))
    blocks = [per_gate[:, gate] for gate in range(gates)]
    for block in blocks:
        np.testing.assert_allclose(block @ block.T, np.eye(64), atol=1e-5)
    for one, other in pairwise(blocks):
        assert np.abs(one - other).max() > 0.1, "gates are drawn independently"

    bias = np.zeros((gates, 64))
    if name == "lstm":
        bias[1] = 1  # i, f, g, o
    np.testing.assert_array_equal(weights["bias"], bias)
    if name == "gru":
        np.testing.assert_array_equal(weights["recurrent_bias"], np.zeros(64))

    limit = np.sqrt(6 / (32 + gates * 64))  # Glorot, of all gates together
    assert 0.95 * limit < np.abs(weights["input"]).max() <= limit
    np.testing.assert_allclose(np.std(weights["input"]), limit / np.sqrt(3), rtol=0.05)
    assert len(weights) == 3 + (name == "gru")


@each_cell
@pytest.mark.parametrize(
    "dtype, param_dtype, output, state",
    [
        (None, jnp.float32, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float16, jnp.float32),
        (None, jnp.float64, jnp.float64, jnp.float64),
    ],
)
def test_dtypes(
    name: str, dtype: Any, param_dtype: Any, output: Any, state: Any, x64: None
) -> None:
    """Outputs in `dtype`, weights and their gradients in `param_dtype`, the state in float32 at
    least."""
    cell = CELLS[name](H, dtype=dtype, param_dtype=param_dtype)
    x_BTD = jnp.asarray(random(B, T, D), jnp.float32)
    for module, arguments in (
        (RNN(cell), (x_BTD,)),
        (cell, (cell.initialize_carry(jax.random.key(0), (B, D)), x_BTD[:, 0])),
    ):
        variables = jax.eval_shape(module.init, jax.random.key(0), *arguments)
        final, y = jax.eval_shape(module.apply, variables, *arguments)
        gradient = jax.eval_shape(
            jax.grad(lambda v, m=module, a=arguments: m.apply(v, *a)[1].sum()), variables
        )
        assert y.dtype == output
        assert {leaf.dtype for leaf in jax.tree.leaves(final)} == {jnp.dtype(state)}
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, gradient))} == {
            jnp.dtype(param_dtype)
        }


@each_cell
def test_bfloat16_carries_float32(name: str) -> None:
    """The state keeps what bfloat16 would round away."""
    variables = RNN(CELLS[name](H)).init(jax.random.key(0), jnp.zeros((B, T, D)))
    cell = CELLS[name](H, dtype=jnp.bfloat16)
    state, y = RNN(cell, backend="scan").apply(
        variables, jnp.asarray(random(B, T, D), jnp.bfloat16)
    )
    h = state.h_BH if name == "lstm" else state
    assert np.any(h != h.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(y[:, -1], h.astype(jnp.bfloat16))


@each_cell
def test_recurrent_dropout_leaves_the_carried_state_alone(name: str) -> None:
    """A mask of zeros cuts the recurrent matmul and nothing else."""
    cell = CELLS[name](H)
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_weights(name))
    params, x_BD = {"params": weights}, jnp.asarray(random(B, D), jnp.float32)
    state = jax.tree.map(
        lambda s: jnp.asarray(random(*s.shape), jnp.float32), cell.initial_state(B)
    )

    def step(params: Any, state: Any, mask: Any) -> Any:
        def both(cell: Any) -> Any:
            w = cell.weights(D)
            return cell.step(w, state, cell.project(w, x_BD), mask)

        return nn.apply(both, cell)(params)

    cut = {"params": weights | {"recurrent": jnp.zeros_like(weights["recurrent"])}}
    masked, plain = step(params, state, jnp.zeros((B, H))), step(cut, state, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), masked, plain)
    # What is carried still reaches the next state where the cell carries it (c of an LSTM, h of a
    # GRU).
    if name != "rnn":
        moved = step(params, jax.tree.map(lambda s: s + 1, state), jnp.zeros((B, H)))
        assert np.all(jax.tree.leaves(moved)[0] != jax.tree.leaves(masked)[0])


def test_mask_is_of_hidden_units_and_shared_by_gates() -> None:
    """Masking unit j is the same as a state whose unit j is zero in the matmul of every gate."""
    weights = random_weights("gru")
    cell, h, x = CELLS["gru"](H), jnp.asarray(random(B, H), jnp.float32), jnp.zeros((B, 3, H))
    params = {"params": jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)}
    mask = jnp.ones((B, H)).at[:, 1].set(0)
    w = nn.apply(lambda cell: cell.weights(D), cell)(params)
    without = w._replace(recurrent_JGH=w.recurrent_JGH.at[1].set(0))
    np.testing.assert_allclose(gru_step(w, h, x, mask), gru_step(without, h, x), atol=1e-6)


def test_state_of_zeros_has_names() -> None:
    state = LSTMCell(H).initial_state(B)
    assert state.c_BH.shape == state.h_BH.shape == (B, H) and not state.c_BH.any()
