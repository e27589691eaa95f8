# SPDX-License-Identifier: Apache-2.0
"""What padding and resets mean, in one place for all backends.

Axes: B batch, T time. Sequences are padded on the right.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def valid(lengths_B: Array, time: int) -> Array:
    """Which steps [B, T] of each row are its own, and which are padding."""
    return jnp.arange(time)[None] < lengths_B[:, None]


def fresh(reset_BT: Array, lengths_B: Array | None, reverse: bool) -> Array:
    """Which steps [B, T] begin from zeros, where `reset_BT` marks those that are the first of a
    sequence.

    Read forward these are the marked steps themselves. Read backward, a step comes right after the
    border where the one behind it in time is marked: that is where a sequence that began there has
    been read to its first step. Padding behind a row's last step is not read, so its marks say
    nothing.
    """
    if not reverse:
        return reset_BT
    if lengths_B is not None:
        reset_BT = reset_BT & valid(lengths_B, reset_BT.shape[1])
    return jnp.pad(reset_BT[:, 1:], ((0, 0), (0, 1)))


def reverse_rows(x_BTD: Array, lengths_B: Array | None) -> Array:
    """Each row [T, ...] from its last valid step to its first; padding stays in its place."""
    if lengths_B is None:
        return jnp.flip(x_BTD, 1)
    t, ends = jnp.arange(x_BTD.shape[1])[None], lengths_B[:, None]
    at_BT = jnp.where(t < ends, ends - 1 - t, t)
    return jnp.take_along_axis(x_BTD, at_BT.reshape(at_BT.shape + (1,) * (x_BTD.ndim - 2)), axis=1)


def without_padding(x_BTD: Array, lengths_B: Array | None) -> Array:
    """The inputs with zeros in padding, for loops that compute there too: a NaN in it would pass
    into the gradients, for 0 times NaN is NaN."""
    if lengths_B is None:
        return x_BTD
    return jnp.where(valid(lengths_B, x_BTD.shape[1])[..., None], x_BTD, 0)


def where_rows(chosen_B: Array, a: Any, b: Any) -> Any:
    """Trees of [B, ...]: `a` in the chosen rows, `b` in the others."""

    def pick(x: Array, y: Array) -> Array:
        return jnp.where(chosen_B.reshape(chosen_B.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(pick, a, b)
