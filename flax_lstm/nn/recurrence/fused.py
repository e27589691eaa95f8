# SPDX-License-Identifier: Apache-2.0
"""The recurrence with a backward pass of its own, in plain JAX: LSTM, GRU and simple RNN on every
platform.

Axes: T time, B batch, D input features, G gates, H hidden units, J hidden units of the previous
step, C time in chunks.
Inside, time comes first: a step then reads and writes one contiguous block.

Forward. Every gate is a tanh, for sigmoid(z) = 1/2 + 1/2 tanh(z/2); the inner halves are multiplied
into the weights before the loop. So one tanh over all gates gives u = tanh(a), a = Wx + b + Rh, and
the sigmoid gates are (1 + u) / 2. W x + b of all steps is one matmul before the loop,
differentiated by JAX as it is.

Backward (backpropagation through time, Werbos 1990). Write d for the gradient of the loss with
respect to what follows it, primes for the state after a step. From dh' (what the next step hands
back plus the output's own) and dc':

    LSTM   dc' += dh' o (1 - tanh(c')^2);  do = dh' tanh(c'), di = dc' g, dg = dc' i, df = dc' c;
    dc = dc' f, dh = 0 GRU    dn = dh' (1 - z), dz = dh' (h - n);  with q = R_n h + b_r:  dr = da_n
    q, dq = da_n r;  dh = dh' z RNN    dn = dh', n being h';  dh = 0

Then da_n = dn (1 - n^2) for a tanh (n and the LSTM's g), da_s = 2 ds s (1 - s) for a sigmoid gate
s, whose a is half its argument, and dh += R^T da (GRU: dq in place of da_n). The loop carries only
(dc, dh) and da and writes da; as a = Wx + b + Rh at every step, the weights' gradients are sums
over steps of outer products with da, hence one matmul each after the loop: dR = sum over t and b of
h da^T.

Memory. A step keeps its gates and the state before it for the backward pass. Where that would be
more than `KEEP` bytes on a device, time is cut into about sqrt(T) chunks: only the states between
them are kept, and the backward pass runs each chunk once more (Chen et al. 2016, "Training deep
nets with sublinear memory cost").

The derivative is a `jax.custom_vjp`: reverse mode only. For forward mode (`jax.jvp`,
`jax.linearize`, `jax.hessian`) take the backend "scan".
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_lstm.machine.sharding import current_mesh, platform
from flax_lstm.nn.cells import Cell, GRUCell, LSTMCell, SimpleRNNCell, Weights, not_textbook
from flax_lstm.nn.recurrence.rows import without_padding

Array = jax.Array
NATIVE = False
State = tuple[Array, ...]  # (c, h) of an LSTM, (h,) of the others: h comes last
Gates = tuple[Array, ...]  # one [B, H] for each gate
Kept = tuple[
    Array, ...
]  # what a step keeps for the backward pass: first of its own, then the state before it

KEEP = (
    512 << 20
)  # bytes; a forward pass more costs little beside the time to read and write so many

barrier = jax.lax.optimization_barrier


def on_gpu() -> bool:
    """Whether the time of a step is that of launching its kernels. Every array that is written for
    later is a kernel of
    its own, and whatever is left to the compiler to merge is none: a step then keeps one array, and
    has no barriers."""
    return platform() == "gpu"


# XLA:CPU evaluates a merged group of operations with vector instructions only where each index into
# memory is plain. Hence the barrier, which keeps a tanh apart from the slices around it, arrays
# that are kept one by one, and gradients of gates that are put together as [B, G * H] for the
# matmul. Each of these is worth tens of microseconds a step.
def apart(x: Array) -> Array:
    return x if on_gpu() else barrier(x)


def together(arrays: Kept) -> Any:
    return jnp.stack(arrays) if on_gpu() else arrays


def each(kept_T: Any) -> Kept:
    """The arrays [T, ...] that went `together` at each step."""
    return (
        kept_T if isinstance(kept_T, tuple) else tuple(kept_T[:, n] for n in range(kept_T.shape[1]))
    )


def sigmoid(half: Array) -> Array:
    """The sigmoid of z from tanh(z / 2)."""
    return 0.5 + 0.5 * half


def lstm_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Kept]:
    u = apart(jnp.tanh(x + rh))
    i, f, g, o = sigmoid(u[:, 0]), sigmoid(u[:, 1]), u[:, 2], sigmoid(u[:, 3])
    c = f * state[0] + i * g
    return (c, o * jnp.tanh(c)), (i, f, g, o)


def lstm_backward(kept: Kept, d: State) -> tuple[State, Gates, Gates | None]:
    i, f, g, o, c, _ = kept
    dc, dh = d
    tanh_c = apart(jnp.tanh(f * c + i * g))
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da = (
        dc * g * 2 * i * (1 - i),
        dc * c * 2 * f * (1 - f),
        dc * i * (1 - g * g),
        dh * tanh_c * 2 * o * (1 - o),
    )
    return (dc * f, 0 * dh), da, None  # plain zeros would be a kernel of their own


def gru_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Kept]:
    u = apart(jnp.tanh(x[:, :2] + rh[:, :2]))
    r, z = sigmoid(u[:, 0]), sigmoid(u[:, 1])
    q = rh[:, 2] + bias[None]
    n = jnp.tanh(x[:, 2] + r * q)
    return (n + z * (state[0] - n),), (r, z, n, q)


def gru_backward(kept: Kept, d: State) -> tuple[State, Gates, Gates | None]:
    r, z, n, q, h = kept
    (dh,) = d
    da_n = dh * (1 - z) * (1 - n * n)
    da_r, da_z = da_n * q * 2 * r * (1 - r), dh * (h - n) * 2 * z * (1 - z)
    return (dh * z,), (da_r, da_z, da_n * r), (da_r, da_z, da_n)


def rnn_forward(state: State, x: Array, rh: Array, bias: Any) -> tuple[State, Kept]:
    n = jnp.tanh(x[:, 0] + rh[:, 0])
    return (n,), (n,)


def rnn_backward(kept: Kept, d: State) -> tuple[State, Gates, Gates | None]:
    (n, _), (dh,) = kept, d
    return (0 * dh,), (dh * (1 - n * n),), None


class Rule(NamedTuple):
    """One cell: the factors folded into its gates, one step, and the step's gradient.

    forward(state, Wx + b, Rh, recurrent bias) -> (state, what to keep besides the state before)
    backward(kept, gradient of the state after) -> (gradient of the state before but for its way
    through Rh, gradients
        of Rh for each gate, the same of Wx + b or None where they are equal)
    """

    scale: tuple[float, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


RULES: dict[type[Cell], Rule] = {
    LSTMCell: Rule((0.5, 0.5, 1.0, 0.5), lstm_forward, lstm_backward),
    GRUCell: Rule((0.5, 0.5, 1.0), gru_forward, gru_backward),
    SimpleRNNCell: Rule((1.0,), rnn_forward, rnn_backward),
}


def supports(cell: Any, x_BTD: Any, recurrent_dropout: bool, resets: bool = False) -> str | None:
    """None, or why not. Subclasses may have equations of their own, so only the three cells
    themselves are taken."""
    if resets:
        return "it has no resets"
    return not_textbook(cell)


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
    batch, time, _ = x_BTD.shape
    x_BTD = without_padding(x_BTD, lengths_B)
    units = weights.recurrent_JGH.shape[-1]  # that are this device's
    kept = time * batch * units * (cell.gates + 2) * cell.state_dtype(x_BTD).itemsize
    if kept <= KEEP * (jax.device_count() if current_mesh() is None else 1):
        return run_chunk(cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse)
    # In the dtype of the state, so that the gradients of all chunks add up in it.
    wide_weights = jax.tree.map(lambda w: w.astype(cell.state_dtype(x_BTD)), weights)
    ends_B = jnp.full(batch, time) if lengths_B is None else lengths_B

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(state: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        x_BCD, start = inputs
        return run_chunk(
            cell, cell.cast(wide_weights, x_BTD), x_BCD, ends_B - start, state, mask_BJ, reverse
        )

    steps = math.isqrt(time)
    starts = jnp.arange(0, time, steps)
    padded = jnp.pad(x_BTD, ((0, 0), (0, len(starts) * steps - time), (0, 0)))
    x_chunks = jnp.swapaxes(padded.reshape(batch, len(starts), steps, -1), 0, 1)
    state, y_chunks = jax.lax.scan(chunk, state, (x_chunks, starts), reverse=reverse)
    return state, jnp.swapaxes(y_chunks, 0, 1).reshape(batch, -1, y_chunks.shape[-1])[:, :time]


def run_chunk(
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    reverse: bool,
) -> tuple[Any, Array]:
    """`run`, keeping what every step leaves."""
    rule = RULES[type(cell)]
    scale = jnp.asarray(rule.scale, weights.recurrent_JGH.dtype)
    input_DGH, recurrent_JGH = (
        w * scale[None, :, None] for w in (weights.input_DGH, weights.recurrent_JGH)
    )
    scaled = weights._replace(input_DGH=input_DGH, bias_GH=weights.bias_GH * scale[:, None])
    x_TBD = jnp.swapaxes(x_BTD, 0, 1)
    x_TBGH = cell.project(scaled, merge(x_TBD)).reshape(*x_TBD.shape[:2], *weights.bias_GH.shape)
    leaves, structure = jax.tree.flatten(state)
    final, h_TBH = recur(
        rule,
        reverse,
        x_TBGH,
        recurrent_JGH,
        weights.recurrent_bias_H,
        tuple(leaves),
        mask_BJ,
        lengths_B,
    )
    y_TBH = h_TBH.astype(x_TBGH.dtype)
    if lengths_B is not None:
        valid_TB = jnp.arange(len(y_TBH))[:, None] < lengths_B[None]
        y_TBH = jnp.where(valid_TB[:, :, None], y_TBH, 0)
    return jax.tree.unflatten(structure, final), jnp.swapaxes(y_TBH, 0, 1)


def gather(h: Array, whole: int) -> Array:
    """All hidden units from those of this device, [..., H] -> [..., J]; as they are where all are
    here."""
    return (
        h if h.shape[-1] == whole else jax.lax.all_gather(h, "model", axis=h.ndim - 1, tiled=True)
    )


def scatter(h_BJ: Array, units: int) -> Array:
    """Sums over the devices, each of which keeps its own hidden units, [B, J] -> [B, H]."""
    return (
        h_BJ
        if h_BJ.shape[1] == units
        else jax.lax.psum_scatter(h_BJ, "model", scatter_dimension=1, tiled=True)
    )


def merge(x_TB: Array) -> Array:
    """[T, B, ...] as [T * B, ...] where these are the rows of one device: a matmul summing over one
    axis needs no transposed copy of its operand. Otherwise the batch may be sharded, and merged
    into time it would be gathered."""
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
    return recur_forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B)[0]


def recur_forward(rule, reverse, x_TBGH, recurrent_JGH, bias_H, state, mask_BJ, lengths_B):  # type: ignore[no-untyped-def]
    dtype = recurrent_JGH.dtype

    def entering(h: Array) -> Array | None:
        """h as it enters the matmul, or None for h itself. Made at the end of a step, it is not a
        kernel of its own."""
        if mask_BJ is None and h.dtype == dtype and h.shape[-1] == len(recurrent_JGH):
            return None
        h_BJ = gather(h, len(recurrent_JGH))
        return (h_BJ if mask_BJ is None else h_BJ * mask_BJ).astype(dtype)

    def step(carry: Any, inputs: tuple[Array, Array]) -> Any:
        (state, h_in), (x, t) = carry, inputs
        h_in = state[-1] if h_in is None else h_in
        rh = jnp.einsum("bj,jgh->bgh", h_in, recurrent_JGH, preferred_element_type=state[-1].dtype)
        new, kept = rule.forward(state, x, rh, bias_H)
        if lengths_B is not None:
            new = keep_where(t < lengths_B, new, state)
        return (new, entering(new[-1])), together((*kept, *state))

    inputs = (x_TBGH, jnp.arange(len(x_TBGH)))
    (final, _), kept_T = jax.lax.scan(step, (state, entering(state[-1])), inputs, reverse=reverse)
    # What is kept is the state before a step: a step that also read the one after could not write
    # it in place.
    before, last = each(kept_T)[-1], final[-1][None]
    h_TBH = jnp.concatenate([last, before])[:-1] if reverse else jnp.concatenate([before, last])[1:]
    return (final, h_TBH), (recurrent_JGH, bias_H, mask_BJ, lengths_B, kept_T)


def recur_backward(rule, reverse, residuals, gradients):  # type: ignore[no-untyped-def]
    recurrent_JGH, bias_H, mask_BJ, lengths_B, kept_T = residuals
    d_final, dh_TBH = gradients
    dtype, state_dtype, shape = recurrent_JGH.dtype, dh_TBH.dtype, recurrent_JGH.shape
    # Transposed once: without the barrier the compiler moves it into the loop.
    transposed = barrier(recurrent_JGH.reshape(shape[0], -1).T)

    def through_matmul(da: Array) -> Array:
        return jnp.matmul(da, transposed, preferred_element_type=state_dtype)

    def through(d: State, da: Array) -> State:
        """The gradient of a state, from that of the step after it: `d` directly, and `da` through
        Rh. It is made at the beginning of a step, where it is one kernel with what follows."""
        dh = through_matmul(da)
        return (*d[:-1], d[-1] + scatter(dh if mask_BJ is None else dh * mask_BJ, shape[2]))

    def step(carry: tuple[State, Array], inputs: Any) -> Any:
        t, kept, dh = inputs
        d = through(*carry)
        d_before, da, dx = rule.backward(kept, (*d[:-1], d[-1] + dh))
        if lengths_B is not None:
            valid = t < lengths_B
            d_before = keep_where(valid, d_before, d)
            da, dx = (
                a and keep_where(valid, a, (jnp.zeros_like(dh),) * shape[1]) for a in (da, dx)
            )
        da, *dx = (jnp.concatenate(a, 1).astype(dtype) for a in (da, dx) if a)
        return (d_before, da), together((da, *dx))

    inputs = (jnp.arange(len(dh_TBH)), kept_T, dh_TBH)
    nothing = jnp.zeros((dh_TBH.shape[1], transposed.shape[0]), dtype)
    last, written_T = jax.lax.scan(step, (d_final, nothing), inputs, reverse=not reverse)
    da_T, dx_T = each(written_T)[0], each(written_T)[-1]

    before_TBJ = gather(each(kept_T)[-1], shape[0])
    h_TBJ = merge((before_TBJ if mask_BJ is None else before_TBJ * mask_BJ[None]).astype(dtype))
    steps = tuple(range(h_TBJ.ndim - 1))
    d_recurrent = jax.lax.dot_general(
        h_TBJ, merge(da_T), ((steps, steps), ((), ())), preferred_element_type=state_dtype
    )
    d_recurrent = d_recurrent.astype(dtype).reshape(shape)
    d_bias = None
    if bias_H is not None:
        d_bias = jnp.sum(da_T[..., -shape[2] :], (0, 1), state_dtype).astype(dtype)
    # The compiler drops this unless somebody asks for it.
    d_mask = (
        None
        if mask_BJ is None
        else jnp.sum(before_TBJ * through_matmul(da_T), 0).astype(mask_BJ.dtype)
    )
    dx_TBGH = dx_T.reshape(*dh_TBH.shape[:2], *shape[1:])
    return dx_TBGH, d_recurrent, d_bias, through(*last), d_mask, None


recur.defvjp(recur_forward, recur_backward)


def keep_where(valid_B: Array, new: State, old: State) -> State:
    return tuple(jnp.where(valid_B[:, None], a, b) for a, b in zip(new, old, strict=True))
