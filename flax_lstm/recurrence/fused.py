# SPDX-License-Identifier: Apache-2.0
"""The recurrence with a backward pass of its own, in plain JAX: LSTM, GRU and simple RNN on every platform.

Axes: T time, B batch, D input features, G gates, H hidden units, J hidden units of the previous step. Inside, time
comes first: a step then reads and writes one contiguous block.

Forward. Every gate is a tanh, for sigmoid(z) = 1/2 + 1/2 tanh(z/2); the inner halves are multiplied into the weights
before the loop. So one tanh over all gates gives u = tanh(a), a = Wx + b + Rh, and the sigmoid gates are (1 + u) / 2.
W x + b of all steps is one matmul before the loop, differentiated by JAX as it is.

Backward (backpropagation through time, Werbos 1990). Write d for the gradient of the loss with respect to what follows
it, primes for the state after a step. From dh' (what the next step hands back plus the output's own) and dc':

    LSTM   dc' += dh' o (1 - tanh(c')^2);  do = dh' tanh(c'), di = dc' g, dg = dc' i, df = dc' c;  dc = dc' f
    GRU    dn = dh' (1 - z), dz = dh' (h - n);  with q = R_n h + b_r:  dr = da_n q, dq = da_n r;  dh = dh' z + ...
    RNN    du = dh', u being h'

Then da = du (1 - u^2), where du is half the gradient of a sigmoid gate, and dh += R^T da (GRU: dq in place of da_n).
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

Array = jax.Array
State = tuple[Array, ...]  # (c, h) of an LSTM, (h,) of the others: h comes last
Saved = tuple[Array, ...]  # what a step keeps for the backward pass, besides the state

# XLA:CPU merges the activation with the slices of it that follow, and then evaluates it without vector instructions,
# five times slower; the barrier keeps them apart.
barrier = jax.lax.optimization_barrier


def lstm_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Saved]:
    u = barrier(jnp.tanh(x + rh))
    i, f, g, o = (u[:, gate] if gate == 2 else 0.5 + 0.5 * u[:, gate] for gate in range(4))
    c = f * state[0] + i * g
    return (c, o * jnp.tanh(c)), (u,)


def lstm_backward(saved: Saved, before: State, after: State, d: State) -> tuple[Array, Array, State]:
    (u,) = saved
    i, f, g, o = (u[:, gate] if gate == 2 else 0.5 + 0.5 * u[:, gate] for gate in range(4))
    dc, dh = d
    tanh_c = jnp.tanh(after[0])
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    du = jnp.stack([0.5 * dc * g, 0.5 * dc * before[0], dc * i, 0.5 * dh * tanh_c], axis=1)
    da = du * (1 - u * u)
    return da, da, (dc * f, jnp.zeros_like(dh))


def gru_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Saved]:
    u = barrier(jnp.tanh(x[:, :2] + rh[:, :2]))
    r, z = 0.5 + 0.5 * u[:, 0], 0.5 + 0.5 * u[:, 1]
    q = rh[:, 2] + bias
    n = jnp.tanh(x[:, 2] + r * q)
    return (n + z * (state[0] - n),), (u, n, q)


def gru_backward(saved: Saved, before: State, after: State, d: State) -> tuple[Array, Array, State]:
    u, n, q = saved
    r, z = 0.5 + 0.5 * u[:, 0], 0.5 + 0.5 * u[:, 1]
    (dh,) = d
    da_n = dh * (1 - z) * (1 - n * n)
    da_r = 0.5 * da_n * q * (1 - u[:, 0] * u[:, 0])
    da_z = 0.5 * dh * (before[0] - n) * (1 - u[:, 1] * u[:, 1])
    return jnp.stack([da_r, da_z, da_n], axis=1), jnp.stack([da_r, da_z, da_n * r], axis=1), (dh * z,)


def rnn_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Saved]:
    return (jnp.tanh(x + rh)[:, 0],), ()


def rnn_backward(saved: Saved, before: State, after: State, d: State) -> tuple[Array, Array, State]:
    (dh,), (h,) = d, after
    da = (dh * (1 - h * h))[:, None]
    return da, da, (jnp.zeros_like(dh),)


class Rule(NamedTuple):
    """One cell: the factors folded into its gates, one step, and the step's gradient.

    forward(state, Wx + b, Rh, recurrent bias) -> (state, saved)
    backward(saved, state before, state after, gradient of the state after)
        -> (gradient of Wx + b, gradient of Rh, gradient of the state before but for its way through Rh)
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
    x_TBGH = cell.project(scaled, jnp.swapaxes(x_BTD, 0, 1))
    leaves, structure = jax.tree.flatten(state)
    final, h_TBH = recur(
        rule, reverse, x_TBGH, recurrent_JGH, weights.recurrent_bias_H, tuple(leaves), mask_BJ, lengths_B
    )
    y_TBH = h_TBH.astype(x_TBGH.dtype)
    if lengths_B is not None:
        y_TBH = jnp.where((jnp.arange(len(y_TBH))[:, None] < lengths_B)[:, :, None], y_TBH, 0)
    return jax.tree.unflatten(structure, final), jnp.swapaxes(y_TBH, 0, 1)


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
    final, (states, _) = forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B)
    return final, states[-1]


def forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B):  # type: ignore[no-untyped-def]
    """The final state, and the states after each step and what the steps saved, [T, ...]."""

    def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, tuple[State, Saved]]:
        x, t = inputs
        rh = recurrent_matmul(state[-1], recurrent_JGH, mask_BJ)
        new, saved = rule.forward(state, x, rh, bias_H)
        if lengths_B is not None:
            new = keep_where(t < lengths_B, new, state)
        return new, (new, saved)

    return jax.lax.scan(step, state, (x_TBGH, jnp.arange(len(x_TBGH))), reverse=reverse)


def recur_forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B):  # type: ignore[no-untyped-def]
    final, (states, saved) = forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B)
    return (final, states[-1]), (recurrent_JGH, bias_H, state, mask_BJ, lengths_B, states, saved)


def recur_backward(rule, reverse, residuals, gradients):  # type: ignore[no-untyped-def]
    recurrent_JGH, bias_H, state, mask_BJ, lengths_B, states, saved = residuals
    d_final, dh_TBH = gradients
    dtype = recurrent_JGH.dtype
    before = tuple(shift(first, after, reverse) for first, after in zip(state, states, strict=True))

    def through_matmul(da_BGH: Array) -> Array:
        return jnp.einsum("...gh,jgh->...j", da_BGH, recurrent_JGH, preferred_element_type=state[-1].dtype)

    def step(d: State, inputs: Any) -> tuple[State, tuple[Array, Array]]:
        t, saved, before, after, dh = inputs
        dx, da, d_before = rule.backward(saved, before, after, (*d[:-1], d[-1] + dh))
        if lengths_B is not None:
            valid = t < lengths_B
            dx, da = (jnp.where(valid[:, None, None], a, 0) for a in (dx, da))
            d_before = keep_where(valid, d_before, d)
        dx, da = dx.astype(dtype), da.astype(dtype)
        dh = through_matmul(da) if mask_BJ is None else through_matmul(da) * mask_BJ
        return (*d_before[:-1], d_before[-1] + dh), (dx, da)

    inputs = (jnp.arange(len(dh_TBH)), saved, before, states, dh_TBH)
    d_state, (dx_TBGH, da_TBGH) = jax.lax.scan(step, d_final, inputs, reverse=not reverse)

    h_TBJ = before[-1] if mask_BJ is None else before[-1] * mask_BJ
    d_recurrent = jnp.einsum(
        "tbj,tbgh->jgh", h_TBJ.astype(dtype), da_TBGH, preferred_element_type=state[-1].dtype
    ).astype(dtype)
    d_bias = None if bias_H is None else jnp.sum(da_TBGH[:, :, 2], (0, 1), state[-1].dtype).astype(dtype)
    # Dropped by the compiler unless somebody asks for it.
    d_mask = None if mask_BJ is None else jnp.sum(before[-1] * through_matmul(da_TBGH), 0).astype(mask_BJ.dtype)
    return dx_TBGH, d_recurrent, d_bias, d_state, d_mask, None


recur.defvjp(recur_forward, recur_backward)


def keep_where(valid_B: Array, new: State, old: State) -> State:
    return tuple(jnp.where(valid_B[:, None], a, b) for a, b in zip(new, old, strict=True))


def shift(first_BH: Array, after_TBH: Array, reverse: bool) -> Array:
    """The states before each step, from the first one and those after each step."""
    if reverse:
        return jnp.concatenate([after_TBH, first_BH[None]])[1:]
    return jnp.concatenate([first_BH[None], after_TBH])[:-1]
