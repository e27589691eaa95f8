# SPDX-License-Identifier: Apache-2.0
"""A kernel in C++ for float32 on CPUs, compiled at first use: LSTM, GRU and simple RNN, forward and
backward.

Axes: B batch, T time, D input features, G gates, H hidden units, J hidden units of the previous
step.

The equations are those of `cells.py` and `fused.py`; how they are computed is said in
`native/kernel.h`. The input
projection and all gradients of weights are within the kernel: no [B, T, G, H] array but that of the
activated gates, for the backward pass, is ever written. The derivative is a `jax.custom_vjp`:
reverse mode only, as with `fused`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_lstm.machine.sharding import model_shards, platform
from flax_lstm.nn.cells import Weights, not_textbook
from flax_lstm.nn.recurrence import native

Array = jax.Array


class Inputs(NamedTuple):
    """What a gradient is taken of. A cell without recurrent bias or c has arrays without elements
    there, and so has a mask that is not used."""

    x_BTD: Array
    input_DGH: Array
    recurrent_JGH: Array
    bias_GH: Array
    recurrent_bias_H: Array
    c_BH: Array
    h_BH: Array
    mask_BJ: Array


def supports(cell: Any, x_BTD: Any, recurrent_dropout: bool, resets: bool = False) -> str | None:
    """None, or why not. Subclasses may have equations of their own, so only the three cells
    themselves are taken."""
    if reason := not_textbook(cell):
        return reason
    if resets:
        return "it has no resets"
    if platform() != "cpu":
        return f"the arrays are on a {platform()}, not on a CPU"
    if model_shards() > 1:
        return "hidden units are split over several devices"
    if cell.compute_dtype(x_BTD) != jnp.float32:
        return f"it computes in float32, not {cell.compute_dtype(x_BTD)}"
    return native.unavailable()


def run(
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    reverse: bool,
    reset_BT: Array | None = None,
) -> tuple[Any, Array]:
    """See `flax_lstm.nn.recurrence`."""
    none = jnp.zeros((0,))
    leaves, structure = jax.tree.flatten(state)  # (c, h) of an LSTM, (h,) of the others
    c_BH, h_BH = leaves if len(leaves) == 2 else (none, *leaves)
    if lengths_B is None:
        lengths_B = jnp.full(x_BTD.shape[0], x_BTD.shape[1])
    inputs = Inputs(
        x_BTD.astype(jnp.float32),
        weights.input_DGH,
        weights.recurrent_JGH,
        weights.bias_GH,
        none if weights.recurrent_bias_H is None else weights.recurrent_bias_H,
        c_BH,
        h_BH,
        none if mask_BJ is None else mask_BJ,
    )
    y_BTH, c_BH, h_BH = recur(reverse, inputs, lengths_B.astype(jnp.int32))
    return jax.tree.unflatten(structure, [c_BH, h_BH][-len(leaves) :]), y_BTH


def call(reverse: bool, inputs: Inputs, lengths_B: Array, save: bool) -> tuple[Array, ...]:
    """(y, c, h, gates, kept): outputs, final state, and where `save` what the backward pass
    needs."""
    batch, steps, _ = inputs.x_BTD.shape
    _, gates, hidden = inputs.recurrent_JGH.shape
    shapes = [
        (batch, steps, hidden),
        inputs.c_BH.shape,
        inputs.h_BH.shape,
        (batch, steps, gates, hidden) if save else (0,),
        (batch, steps, hidden) if save and gates > 1 else (0,),
    ]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    function = jax.ffi.ffi_call("flax_lstm_forward", results, vmap_method="sequential")
    return tuple(function(*inputs, lengths_B, reverse=reverse))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(reverse: bool, inputs: Inputs, lengths_B: Array) -> tuple[Array, Array, Array]:
    """Outputs and the final (c, h)."""
    y_BTH, c_BH, h_BH, _, _ = call(reverse, inputs, lengths_B, save=False)
    return y_BTH, c_BH, h_BH


def recur_forward(reverse: bool, inputs: Inputs, lengths_B: Array) -> Any:
    y_BTH, c_BH, h_BH, gates_BTGH, kept_BTH = call(reverse, inputs, lengths_B, save=True)
    return (y_BTH, c_BH, h_BH), (inputs, lengths_B, y_BTH, gates_BTGH, kept_BTH)


def recur_backward(reverse: bool, residuals: Any, gradients: tuple[Array, Array, Array]) -> Any:
    inputs, lengths_B, *saved = residuals
    results = [jax.ShapeDtypeStruct(like.shape, jnp.float32) for like in inputs]
    function = jax.ffi.ffi_call("flax_lstm_backward", results, vmap_method="sequential")
    found = function(*inputs[:3], *inputs[5:], lengths_B, *saved, *gradients, reverse=reverse)
    return Inputs(*found), None


recur.defvjp(recur_forward, recur_backward)
