# SPDX-License-Identifier: Apache-2.0
"""The cells beside the three are their equations, in float64 NumPy. That they run by the fused
backend is in `test_fused.py`; that a projected LSTM is PyTorch's, in `test_parity.py`.

Axes: B batch, D input features, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm import LayerNormGRUCell, LayerNormLSTMCell, ProjectedLSTMCell
from flax_lstm.errors import ArgumentError
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.models import RecurrentModel

pytestmark = pytest.mark.usefixtures("quick_compile")

B, D, H, P = 3, 2, 4, 3


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: Any = 0) -> np.ndarray:
    """Of the vector in each row."""
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * gain + bias


def normal_sums(w: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray) -> list[np.ndarray]:
    """LN(Wx) + b and LN(Rh), as vectors of all gates."""
    flat = {name: a.reshape(len(a), -1) if a.ndim == 3 else a.reshape(-1) for name, a in w.items()}
    return [
        layer_norm(x @ flat["input"], flat["input_gain"]) + flat["bias"],
        layer_norm(h @ flat["recurrent"], flat["recurrent_gain"]),
    ]


def norm_lstm(w: Any, x: np.ndarray, c: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    i, f, g, o = np.split(sum(normal_sums(w, x, h)), 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return c, sigmoid(o) * np.tanh(layer_norm(c, w["c_gain"], w["c_bias"]))


def norm_gru(w: Any, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    (xr, xz, xn), (hr, hz, hn) = (np.split(s, 3, axis=1) for s in normal_sums(w, x, h))
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    n = np.tanh(xn + r * (hn + w["recurrent_bias"]))
    return ((1 - z) * n + z * h,)


def projected(w: Any, x: np.ndarray, c: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    W, R = (w[name].reshape(len(w[name]), -1) for name in ("input", "recurrent"))
    i, f, g, o = np.split(x @ W + h @ R + w["bias"].reshape(-1), 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return c, (sigmoid(o) * np.tanh(c)) @ w["projection_weight"]


@pytest.mark.parametrize(
    "cell, equations",
    [
        (LayerNormLSTMCell(H, param_dtype=jnp.float64), norm_lstm),
        (LayerNormGRUCell(H, param_dtype=jnp.float64), norm_gru),
        (ProjectedLSTMCell(H, projection=P, param_dtype=jnp.float64), projected),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_the_equations_in_numpy(cell: Any, equations: Any, x64: None) -> None:
    rng = np.random.default_rng(0)
    zeros = cell.initialize_carry(jax.random.key(0), (B, D))
    shapes = cell.init(jax.random.key(0), zeros, jnp.ones((B, D)))["params"]
    weights = jax.tree.map(lambda w: rng.normal(size=w.shape), shapes)
    expected = [rng.normal(size=leaf.shape) for leaf in jax.tree.leaves(zeros)]
    state = jax.tree.unflatten(jax.tree.structure(zeros), map(jnp.asarray, expected))
    for _ in range(3):
        x = rng.normal(size=(B, D))
        expected = equations(weights, x, *expected)
        state, y = cell.apply({"params": weights}, state, jnp.asarray(x))
        for ours, theirs in zip(jax.tree.leaves(state), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11)
        np.testing.assert_array_equal(y, jax.tree.leaves(state)[-1])


def test_a_projection_is_smaller_than_the_layer() -> None:
    for projection in (0, H, -1):
        with pytest.raises(ArgumentError, match="at least 1 and less than features"):
            RNN(ProjectedLSTMCell(H, projection=projection)).init(
                jax.random.key(0), jnp.ones((B, 1, D))
            )


def test_models_have_them_by_name() -> None:
    stack = RecurrentModel(cell="layernorm_lstm", hidden_size=H, dtype="bfloat16").stack()
    (_, y), variables = stack.init_with_output(jax.random.key(0), jnp.ones((B, 2, D)))
    assert y.dtype == jnp.bfloat16 and isinstance(stack.layers[0].cell, nn.RNNCellBase)
    gains = variables["params"]["layers_0"]["cell"]
    assert gains["input_gain"].shape == (4, H) and gains["c_gain"].dtype == jnp.float32
