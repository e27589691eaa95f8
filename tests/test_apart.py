# SPDX-License-Identifier: Apache-2.0
"""A function computed from parts of its arrays gives what it gives of the arrays.

Axes: B batch, G gates, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm.nn.recurrence.apart import Copies, Parts, evaluate

B, G, H = 5, 3, 4


def gates_by_slices(x: Any, w_GH: Any, v_H: Any) -> Any:
    z = jax.nn.sigmoid(x + w_GH[None])
    return z[:, 0] * v_H[None] + jnp.tanh(z[:, 2]), z[:, 1:]


def gates_by_splitting(x: Any, w_GH: Any, v_H: Any) -> Any:
    a, b, c = jnp.split(x * w_GH[None], G, axis=1)
    return jax.nn.relu(a[:, 0]) + b.reshape(B, H) * jnp.squeeze(c, 1), v_H * v_H


def other_axes(x: Any, w_GH: Any, v_H: Any) -> Any:
    """Turned round, read backward, put together, compared, picked."""
    turned = jnp.moveaxis(x, 1, 2)[..., ::-1] + w_GH.T[None]
    picked = jnp.where(x > 0, x, w_GH[None] * v_H[None, None])
    return jnp.concatenate([picked[:, :1], x], 1), turned, jnp.maximum(x, v_H[None, None])


def layer_norms(x: Any, w_GH: Any, v_H: Any) -> Any:
    """Over both axes, over units, over gates."""
    both = x - jnp.mean(x, (1, 2), keepdims=True)
    units = nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x) * w_GH[None]
    return both * w_GH[None], units, jnp.sum(x * x, 1) * v_H[None], jnp.sum(w_GH, 0) * v_H


def products(x: Any, w_GH: Any, v_H: Any) -> Any:
    """A weight that enters a matmul, and one that is used for all rows at once."""
    return jnp.einsum("bgh,kh->bgk", x, w_GH), (x[:, 0] @ v_H)[:, None], jnp.outer(x[:, 1, 0], v_H)


def rows_that_look_like_gates(x: Any, w_GH: Any, v_H: Any) -> Any:
    """B numbers at a place where copies could be taken for rows of the batch."""
    per_row = jnp.broadcast_to(v_H[None], (B, H)) * x[:, 0]
    return per_row, jnp.broadcast_to(w_GH[None], (B, G, H)) + x, x[:1] * v_H[None, None], x.sum(0)


def loops(x: Any, w_GH: Any, v_H: Any) -> Any:
    step = lambda total, row: (total + row * v_H[None], jnp.cos(total))  # noqa: E731
    return jax.lax.scan(step, x[:, 0], jnp.swapaxes(x, 0, 1)), jax.jit(jnp.multiply)(x, w_GH[None])


@pytest.mark.parametrize(
    "function",
    [
        gates_by_slices,
        gates_by_splitting,
        other_axes,
        layer_norms,
        products,
        rows_that_look_like_gates,
        loops,
    ],
)
def test_parts_give_what_the_whole_gives(function: Any, x64: None, quick_compile: None) -> None:
    """Values, and gradients: those of a weight are the sum over its copies."""
    rng = np.random.default_rng(0)
    x, w_GH, v_H = (jnp.asarray(rng.normal(size=shape)) for shape in ((B, G, H), (G, H), (H,)))

    def apart(gates: Any, w_copies: Any, v_copies: Any) -> Any:
        values = (Parts(1, gates), Parts(0, tuple(map(Copies, w_copies))), Copies(v_copies))
        return evaluate(function, (x, w_GH, v_H), values)

    gates = tuple(jnp.moveaxis(x, 1, 0))
    w_copies = tuple(jnp.broadcast_to(w[None], (B, H)) for w in w_GH)
    v_copies = jnp.broadcast_to(v_H[None], (B, H))
    expected, pull = jax.vjp(function, x, w_GH, v_H)
    found, pull_parts = jax.vjp(apart, gates, w_copies, v_copies)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
    jax.tree.map(close, found, expected)
    cotangents = jax.tree.map(lambda y: jnp.asarray(rng.normal(size=y.shape)), expected)
    dx, dw, dv = pull(cotangents)
    d_gates, d_w_copies, d_v_copies = pull_parts(cotangents)
    close(jnp.stack(d_gates, 1), dx)
    close(jnp.stack(d_w_copies).sum(1), dw)
    close(d_v_copies.sum(0), dv)
