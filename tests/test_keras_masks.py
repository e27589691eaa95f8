# SPDX-License-Identifier: Apache-2.0
"""Dropout with a mask for each gate is that of Keras' LSTM and GRU.

Axes: B batch, T time, D input features, G gates, H = J hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm import convert
from flax_lstm.nn.cells import CELLS, Cell, GRUCell, LSTMCell, LSTMState, Weights
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.recurrence import fused

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, D, H = 3, 5, 2, 4
rng = np.random.default_rng(0)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def keras(weights: list[np.ndarray], x_BTD: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """`keras.layers.LSTM` (4 masks of the inputs, 4 of h, in the order i, f, c, o) or `GRU` (z, r,
    h; `reset_after=True`) in training, with `recurrent_dropout`: one matrix and one mask a gate."""
    gates = len(masks) // 2
    kernel, recurrent = (np.split(w, gates, axis=1) for w in weights[:2])
    dropped, recurrently = masks[:gates], masks[gates:]
    bias = np.split(weights[2], gates, axis=-1)
    c, h = np.zeros((2, len(x_BTD), H))
    outputs = []
    for x in np.swapaxes(x_BTD, 0, 1):
        xs = [(x * m) @ w for m, w in zip(dropped, kernel, strict=True)]
        hs = [(h * m) @ w for m, w in zip(recurrently, recurrent, strict=True)]
        if gates == 4:
            i, f, g, o = (a + b + d for a, b, d in zip(xs, hs, bias, strict=True))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            z, r = (sigmoid(xs[n] + hs[n] + bias[n].sum(0)) for n in range(2))
            n = np.tanh(xs[2] + bias[2][0] + r * (hs[2] + bias[2][1]))
            h = z * h + (1 - z) * n
        outputs.append(h)
    return np.stack(outputs, 1)


@pytest.mark.parametrize("name, order", [("lstm", [0, 1, 2, 3]), ("gru", [1, 0, 2])])
def test_equals_keras_under_its_masks(name: str, order: list[int], x64: None) -> None:
    """Step by step as the scan does it, and by the fused backend."""
    gates = len(order)
    bias = (2, gates * H) if name == "gru" else (gates * H,)
    shapes = (D, gates * H), (H, gates * H), bias
    weights = [rng.normal(size=shape) for shape in shapes]
    x_BTD = rng.normal(size=(B, T, D))
    masks = [rng.integers(0, 2, (B, size)) / 0.5 for size in (D, H) for _ in range(gates)]
    expected = keras(weights, x_BTD, masks)

    tree = convert.from_keras([weights])["layers_0"]["cell"]
    ours = Weights(tree["input"], tree["recurrent"], tree["bias"], tree.get("recurrent_bias"))
    ours = jax.tree.map(jnp.asarray, ours)
    cell: Cell = CELLS[name](H, param_dtype=jnp.float64)
    inputs, hidden = (
        np.stack([part[n] for n in order], 1) for part in (masks[:gates], masks[gates:])
    )
    x_masked = jnp.asarray((x_BTD[:, :, None] * inputs[:, None]).reshape(B, T, -1))
    state = cell.initial_state(B, jnp.float64)
    _, y_BTH = fused.run(cell, ours, x_masked, None, state, jnp.asarray(hidden), False)
    np.testing.assert_allclose(y_BTH, expected, rtol=1e-10)
    x_BTGH = cell.project(ours, x_masked)
    for t in range(T):
        state = cell.step(ours, state, x_BTGH[:, t], jnp.asarray(hidden))
        np.testing.assert_allclose(cell.output(state), expected[:, t], rtol=1e-10)


class Difference(Cell):
    """The difference of what two gates see."""

    gates = 2

    @staticmethod
    def equations(weights: Weights, h: Any, x_BGH: Any, mask_BJ: Any = None) -> Any:
        return x_BGH[:, 0] - x_BGH[:, 1]


@pytest.mark.parametrize("per_gate", [False, True])
def test_gates_see_inputs_under_masks_of_their_own(per_gate: bool) -> None:
    """Each drawn once a sequence, and scaled."""
    rnn = RNN(Difference(64), dropout=0.5, masks_per_gate=per_gate)
    eye = jnp.stack([jnp.eye(64)] * 2, 1)
    params = {"input": eye, "recurrent": jnp.zeros((64, 2, 64)), "bias": jnp.zeros((2, 64))}
    x_BTD = jnp.ones((B, T, 64))
    variables, rngs = {"params": {"cell": params}}, {"dropout": jax.random.key(0)}
    _, y_BTH = rnn.apply(variables, x_BTD, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(y_BTH, y_BTH[:, :1].repeat(T, 1))
    values, counts = np.unique(y_BTH, return_counts=True)
    if per_gate:
        np.testing.assert_array_equal(values, [-2, 0, 2])
        assert 0.35 < counts[1] / counts.sum() < 0.65
    else:
        np.testing.assert_array_equal(values, [0])
    assert not rnn.apply(variables, x_BTD)[1].any()


@pytest.mark.parametrize("cell", [LSTMCell(H), GRUCell(H)])
def test_a_layer_draws_the_same_masks_whatever_runs_it(cell: Cell) -> None:
    """The scan, the fused backend and the kernel, in rows that end (NaN behind it) and begin anew,
    read backward by the GRU, gradients included; no mask in evaluation."""
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    reset_BT = jnp.asarray(rng.random((B, T)) < 0.3)
    options: Any = {"dropout": 0.3, "recurrent_dropout": 0.5}
    names: Any = ("fused", "scan", "cpu")
    layers = [RNN(cell, backend=b, masks_per_gate=True, **options) for b in names]
    variables = layers[0].init(jax.random.key(0), x_BTD)

    def outcome(layer: RNN) -> Any:
        def loss(variables: Any) -> Any:
            rngs, behind = {"dropout": jax.random.key(1)}, x_BTD.at[1, 3:].set(jnp.nan)
            given: Any = {"reset_BT": reset_BT, "reverse": isinstance(cell, GRUCell)}
            given |= {"deterministic": False, "rngs": rngs}
            y_BTH = layer.apply(variables, behind, jnp.array([5, 3, 0]), **given)[1]
            return jnp.sum(jnp.sin(y_BTH)), y_BTH

        return jax.value_and_grad(loss, has_aux=True)(variables)

    one, *others = map(outcome, layers)
    for other in others:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    tied = outcome(RNN(cell, backend="scan", **options))
    assert np.abs(one[0][1] - tied[0][1]).max() > 1e-3
    plain = RNN(cell, backend="scan").apply(variables, x_BTD)[1]
    np.testing.assert_allclose(layers[0].apply(variables, x_BTD)[1], plain, atol=1e-6)


def test_a_state_keeps_its_names() -> None:
    """With masks as without."""
    rnn = RNN(LSTMCell(H), recurrent_dropout=0.5, masks_per_gate=True)
    state, _ = rnn.init_with_output(jax.random.key(0), jnp.ones((B, T, D)))[0]
    assert isinstance(state, LSTMState)
