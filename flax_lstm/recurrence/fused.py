# SPDX-License-Identifier: Apache-2.0
"""The recurrence with a backward pass of its own, in plain JAX: LSTM, GRU and simple RNN on every platform.

Axes: T time, B batch, D input features, G gates, H hidden units, J hidden units of the previous step. Inside, time
comes first: a step then reads and writes one contiguous block.

Forward. Every gate is a tanh, for sigmoid(z) = 1/2 + 1/2 tanh(z/2); the inner halves are multiplied into the weights
before the loop. So one tanh over all gates gives u = tanh(a), a = Wx + b + Rh, and the sigmoid gates are (1 + u) / 2.
W x + b of all steps is one matmul before the loop, differentiated by JAX as it is.

Backward (backpropagation through time, Werbos 1990). Write d for the gradient of the loss with respect to what follows
it, primes for the state after a step. From dh' (what the next step hands back plus the output's own) and dc':

    LSTM   dc' += dh' o (1 - tanh(c')^2);  do = dh' tanh(c'), di = dc' g, dg = dc' i, df = dc' c;  dc = dc' f, dh = 0
    GRU    dn = dh' (1 - z), dz = dh' (h - n);  with q = R_n h + b_r:  dr = da_n q, dq = da_n r;  dh = dh' z
    RNN    dn = dh', n being h';  dh = 0

Then da_n = dn (1 - n^2) for a tanh (n and the LSTM's g), da_s = 2 ds s (1 - s) for a sigmoid gate s, whose a is half
its argument, and dh += R^T da (GRU: dq in place of da_n).
The loop carries only (dc, dh) and writes da; as a = Wx + b + Rh at every step, the weights' gradients are sums over
steps of outer products with da, hence one matmul each after the loop: dR = sum over t and b of h da^T.

The derivative is a `jax.custom_vjp`: reverse mode only. For forward mode (`jax.jvp`, `jax.linearize`, `jax.hessian`)
take the backend "scan".
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_lstm.cells import Cell, GRUCell, LSTMCell, SimpleRNNCell, Weights, recurrent_matmul
from flax_lstm.sharding import current_mesh

Array = jax.Array
State = tuple[Array, ...]  # (c, h) of an LSTM, (h,) of the others: h comes last
Gates = tuple[Array, ...] | None  # one [B, H] for each gate
Saved = tuple[Array, ...]  # what a step keeps for the backward pass, besides the state

# XLA:CPU evaluates a merged group of operations with vector instructions only where each index into memory is plain.
# Hence the barrier, which keeps the one tanh apart from the slices that follow, and gates that are saved one by one and
# put together as [B, G * H] for the matmul. Each of these is worth tens of microseconds a step.
barrier = jax.lax.optimization_barrier


def sigmoid(half: Array) -> Array:
    """The sigmoid of z from tanh(z / 2)."""
    return 0.5 + 0.5 * half


def lstm_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Saved]:
    u = barrier(jnp.tanh(x + rh))
    i, f, g, o = sigmoid(u[:, 0]), sigmoid(u[:, 1]), u[:, 2], sigmoid(u[:, 3])
    c = f * state[0] + i * g
    tanh_c = jnp.tanh(c)
    return (c, o * tanh_c), (i, f, g, o, state[0], tanh_c)


def lstm_backward(saved: Saved, h: Array, d: State) -> tuple[State, Gates, Gates]:
    i, f, g, o, c, tanh_c = saved
    dc, dh = d
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da = (dc * g * 2 * i * (1 - i), dc * c * 2 * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * 2 * o * (1 - o))
    return (dc * f, jnp.zeros_like(dh)), da, None


def gru_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Saved]:
    u = barrier(jnp.tanh(x[:, :2] + rh[:, :2]))
    r, z = sigmoid(u[:, 0]), sigmoid(u[:, 1])
    q = rh[:, 2] + bias[None]
    n = jnp.tanh(x[:, 2] + r * q)
    away = state[0] - n
    return (n + z * away,), (r, z, n, q, away)


def gru_backward(saved: Saved, h: Array, d: State) -> tuple[State, Gates, Gates]:
    r, z, n, q, away = saved
    (dh,) = d
    da_n = dh * (1 - z) * (1 - n * n)
    da_r, da_z = da_n * q * 2 * r * (1 - r), dh * away * 2 * z * (1 - z)
    return (dh * z,), (da_r, da_z, da_n * r), (da_r, da_z, da_n)


def rnn_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Saved]:
    return (jnp.tanh(x[:, 0] + rh[:, 0]),), ()


def rnn_backward(saved: Saved, h: Array, d: State) -> tuple[State, Gates, Gates]:
    (dh,) = d
    return (jnp.zeros_like(dh),), (dh * (1 - h * h),), None


class Rule(NamedTuple):
    """One cell: the factors folded into its gates, one step, and the step's gradient.

    forward(state, Wx + b, Rh, recurrent bias) -> (state, saved)
    backward(saved, h after the step, gradient of the state after) -> (gradient of the state before but for its way
        through Rh, gradients of Rh for each gate, the same of Wx + b or None where they are equal)
    """

    scale: tuple[float, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


RULES: dict[type[Cell], Rule] = {
    LSTMCell: Rule((0.5, 0.5, 1.0, 0.5), lstm_forward, lstm_backward),
    GRUCell: Rule((0.5, 0.5, 1.0), gru_forward, gru_backward),
    SimpleRNNCell: Rule((1.0,), rnn_forward, rnn_backward),
}


def supports(cell: Any, x_BTD: Any, mask_BJ: Any) -> str | None:
    """None, or why not. Subclasses may have equations of their own, so only the three cells themselves are taken."""
    return None if type(cell) in RULES else f"{type(cell).__name__} is none of LSTMCell, GRUCell and SimpleRNNCell"


def run(
    cell: Any, weights: Weights, x_BTD: Array, lengths_B: Array | None, state: Any, mask_BJ: Array | None, reverse: bool
) -> tuple[Any, Array]:
    """See `flax_lstm.recurrence`."""
    rule = RULES[type(cell)]
    scale = jnp.asarray(rule.scale, weights.recurrent_JGH.dtype)
    input_DGH, recurrent_JGH = (w * scale[None, :, None] for w in (weights.input_DGH, weights.recurrent_JGH))
    scaled = weights._replace(input_DGH=input_DGH, bias_GH=weights.bias_GH * scale[:, None])
    x_TBD = jnp.swapaxes(x_BTD, 0, 1)
    x_TBGH = cell.project(scaled, merge(x_TBD)).reshape(*x_TBD.shape[:2], *weights.bias_GH.shape)
    leaves, structure = jax.tree.flatten(state)
    final, h_TBH = recur(
        rule, reverse, x_TBGH, recurrent_JGH, weights.recurrent_bias_H, tuple(leaves), mask_BJ, lengths_B
    )
    y_TBH = h_TBH.astype(x_TBGH.dtype)
    if lengths_B is not None:
        valid_TB = jnp.arange(len(y_TBH))[:, None] < lengths_B[None]
        y_TBH = jnp.where(valid_TB[:, :, None], y_TBH, 0)
    return jax.tree.unflatten(structure, final), jnp.swapaxes(y_TBH, 0, 1)


def gather(h: Array, whole: int) -> Array:
    """All hidden units from those of this device, [..., H] -> [..., J]; as they are where all are here."""
    return h if h.shape[-1] == whole else jax.lax.all_gather(h, "model", axis=h.ndim - 1, tiled=True)


def scatter(h_BJ: Array, units: int) -> Array:
    """Sums over the devices, each of which keeps its own hidden units, [B, J] -> [B, H]."""
    return h_BJ if h_BJ.shape[1] == units else jax.lax.psum_scatter(h_BJ, "model", scatter_dimension=1, tiled=True)


def merge(x_TB: Array) -> Array:
    """[T, B, ...] as [T * B, ...] where these are the rows of one device: a matmul summing over one axis needs no
    transposed copy of its operand. Otherwise the batch may be sharded, and merged into time it would be gathered."""
    whole = jax.device_count() == 1 or current_mesh() is not None
    return x_TB.reshape(-1, *x_TB.shape[2:]) if whole else x_TB


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recur(
    rule: Rule,
    reverse: bool,
    x_TBGH: Array,
    recurrent_JGH: Array,
    bias_H: Array | None,
    state: State,
    mask_BJ: Array | None,
    lengths_B: Array | None,
) -> tuple[State, Array]:
    """The final state, and h after each step (held where a row has ended)."""
    final, (h_TBH, _) = forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B)
    return final, h_TBH


def forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B):  # type: ignore[no-untyped-def]
    """The final state, and h after each step and what the steps saved, [T, ...]."""

    def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, tuple[Array, Saved]]:
        x, t = inputs
        rh = recurrent_matmul(gather(state[-1], len(recurrent_JGH)), recurrent_JGH, mask_BJ)
        new, saved = rule.forward(state, x, rh, bias_H)
        if lengths_B is not None:
            new = keep_where(t < lengths_B, new, state)
        return new, (new[-1], saved)

    return jax.lax.scan(step, state, (x_TBGH, jnp.arange(len(x_TBGH))), reverse=reverse)


def recur_forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B):  # type: ignore[no-untyped-def]
    final, (h_TBH, saved) = forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B)
    return (final, h_TBH), (recurrent_JGH, bias_H, state, mask_BJ, lengths_B, h_TBH, saved)


def recur_backward(rule, reverse, residuals, gradients):  # type: ignore[no-untyped-def]
    recurrent_JGH, bias_H, state, mask_BJ, lengths_B, h_TBH, saved = residuals
    d_final, dh_TBH = gradients
    dtype, shape = recurrent_JGH.dtype, recurrent_JGH.shape
    # Transposed once: without the barrier the compiler moves it into the loop.
    transposed = barrier(recurrent_JGH.reshape(shape[0], -1).T)

    def through_matmul(da: Array) -> Array:
        return jnp.matmul(da, transposed, preferred_element_type=h_TBH.dtype)

    def step(d: State, inputs: Any) -> Any:
        t, saved, h, dh = inputs
        d_before, da, dx = rule.backward(saved, h, (*d[:-1], d[-1] + dh))
        if lengths_B is not None:
            valid = t < lengths_B
            d_before = keep_where(valid, d_before, d)
            da, dx = (a and keep_where(valid, a, (jnp.zeros_like(dh),) * shape[1]) for a in (da, dx))
        da, dx = (a and jnp.concatenate(a, 1).astype(dtype) for a in (da, dx))
        dh = through_matmul(da) if mask_BJ is None else through_matmul(da) * mask_BJ
        return (*d_before[:-1], d_before[-1] + scatter(dh, shape[2])), (da, dx)

    inputs = (jnp.arange(len(dh_TBH)), saved, h_TBH, dh_TBH)
    d_state, (da, dx) = jax.lax.scan(step, d_final, inputs, reverse=not reverse)
    dx_TBGH = (da if dx is None else dx).reshape(*h_TBH.shape[:2], *shape[1:])

    first_BH = state[-1][None]
    before_TBH = jnp.concatenate([h_TBH, first_BH])[1:] if reverse else jnp.concatenate([first_BH, h_TBH])[:-1]
    before_TBJ = gather(before_TBH, shape[0])
    h_TBJ = merge((before_TBJ if mask_BJ is None else before_TBJ * mask_BJ[None]).astype(dtype))
    steps = tuple(range(h_TBJ.ndim - 1))
    d_recurrent = jax.lax.dot_general(h_TBJ, merge(da), ((steps, steps), ((), ())), preferred_element_type=h_TBH.dtype)
    d_recurrent = d_recurrent.astype(dtype).reshape(shape)
    d_bias = None if bias_H is None else jnp.sum(da[..., -shape[2] :], (0, 1), h_TBH.dtype).astype(dtype)
    # The compiler drops this unless somebody asks for it.
    d_mask = None if mask_BJ is None else jnp.sum(before_TBJ * through_matmul(da), 0).astype(mask_BJ.dtype)
    return dx_TBGH, d_recurrent, d_bias, d_state, d_mask, None


recur.defvjp(recur_forward, recur_backward)


def keep_where(valid_B: Array, new: State, old: State) -> State:
    return tuple(jnp.where(valid_B[:, None], a, b) for a, b in zip(new, old, strict=True))
