# SPDX-License-Identifier: Apache-2.0
"""Recurrent weights of 8 bits, for inference: each column (a gate of a unit) is whole numbers of
-127 to 127 times a scale of its own. The state h, between -1 and 1, is rounded to 127ths.

The kernel adds 128 to the rounded h, as its instruction wants numbers without a sign. What that
adds to a sum, the excess, depends on the weights alone. It is taken off Wx + b, and in the GRU's
candidate, whose recurrent part is apart, off that part's bias.

Axes: G gates, H hidden units, J hidden units of the previous step, N blocks of units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

COLUMNS, FOUR, DEPTH = 16, 4, 8  # of `native/int8.h`: a panel's columns, what is multiplied at once
LARGEST = 127


class Bytes(NamedTuple):
    """Recurrent weights as the kernel takes them."""

    panels: Array  # int8 [N, G, J / 4, 16, 4], filled up with zeros
    scale_GH: Array  # float32, of a weight times a rounded h


def whole_numbers(recurrent_JGH: Array) -> tuple[Array, Array]:
    """int8 [J, G, H], and the scale of each column [G, H]."""
    largest_GH = jnp.max(jnp.abs(recurrent_JGH), axis=0)
    scale_GH = jnp.where(largest_GH > 0, largest_GH, 1) / LARGEST
    return jnp.round(recurrent_JGH / scale_GH[None]).astype(jnp.int8), scale_GH


def pack(recurrent_JGH: Array) -> tuple[Bytes, Array]:
    """Weights as `Bytes`, and the excess [G, H]."""
    whole_JGH, scale_GH = whole_numbers(recurrent_JGH.astype(jnp.float32))
    scale_GH = scale_GH / LARGEST
    excess_GH = (LARGEST + 1) * jnp.sum(whole_JGH, axis=0, dtype=jnp.int32) * scale_GH
    units = len(whole_JGH)
    panels = jnp.pad(whole_JGH, [(0, -units % DEPTH), (0, 0), (0, -units % COLUMNS)])
    panels = panels.reshape(-1, FOUR, panels.shape[1], panels.shape[2] // COLUMNS, COLUMNS)
    return Bytes(panels.transpose(3, 2, 0, 4, 1), scale_GH), excess_GH


def panels_shape(gates: int, units: int) -> tuple[int, ...]:
    return (-(-units // COLUMNS), gates, -(-units // DEPTH) * DEPTH // FOUR, COLUMNS, FOUR)
