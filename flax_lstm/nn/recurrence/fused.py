# SPDX-License-Identifier: Apache-2.0
"""The recurrence with a backward pass of its own, in plain JAX: every cell of ours on every
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

A cell with other equations is taken where these reach R by one `recurrent_matmul` of its output
(`cells.Product`). What it does after the product is differentiated at every step, in parts that a
compiler makes quick arithmetic of (`derived.py`, `apart.py`); the gradients of its large weights
besides (of a projection) are taken once after the loop, of all steps together.

Resets. A step that begins a sequence of its own sees zeros in place of the state before, and hands
no gradient back.

Memory. A step keeps its gates and the state before it for the backward pass. Where that would be
more than `KEEP` bytes on a device, time is cut into about sqrt(T) chunks: only the states between
them are kept, and the backward pass runs each chunk once more (Chen et al. 2016, "Training deep
nets with sublinear memory cost").

`primitives.py` makes it take every transformation; derivatives beyond those of `jax.grad` are taken
of the forward pass as JAX sees it.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend.core import InconclusiveDimensionOperation

from flax_lstm.errors import ArgumentError
from flax_lstm.machine.sharding import current_mesh, model_shards, platform
from flax_lstm.nn.cells import (
    Cell,
    GRUCell,
    LSTMCell,
    SimpleRNNCell,
    Weights,
    masked,
    matmul,
    not_textbook,
)
from flax_lstm.nn.recurrence.derived import Derived, derive, rest_of
from flax_lstm.nn.recurrence.primitives import Derivable, alike
from flax_lstm.nn.recurrence.rows import fresh, where_rows, without_padding

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
    alike = len({a.shape for a in arrays}) == 1
    return jnp.stack(arrays) if on_gpu() and alike else arrays


def each(kept_T: Any, axis: int = 1) -> Kept:
    """The arrays [T, ...] that went `together` at each step (those of a step with axis 0)."""
    if isinstance(kept_T, tuple):
        return kept_T
    return tuple(
        jax.lax.index_in_dim(kept_T, n, axis, keepdims=False) for n in range(kept_T.shape[axis])
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


@dataclass(frozen=True)
class Rule:
    """One of the three cells: the factors folded into its gates, one step, and the step's gradient.

    step(state, Wx + b, Rh, recurrent bias) -> (state, what to keep besides the state before)
    gradient(kept and state before, gradient of the state after) -> (gradient of the state before
        but for its way through Rh, gradients of Rh for each gate, the same of Wx + b or None where
        equal)
    """

    scale: tuple[float, ...]
    step: Callable[..., Any]
    gradient: Callable[..., Any]

    again: ClassVar[bool] = False

    def forward(self, rest: Weights, state: State, x: Array, rh: Array) -> tuple[State, Kept]:
        return self.step(state, x, rh, rest.recurrent_bias_H)

    def backward(self, rest: Weights, kept: Kept, state: State, x: None, d: State) -> Any:
        return *self.gradient((*kept, *state), d), []

    def nothing(self, rest: Weights, rows: int, dtype: Any) -> list[Any]:
        return []

    def is_large(self, rest: Weights) -> list[bool]:
        return []

    def of_rest(
        self, rest: Weights, kept_T: Any, x_T: None, d_T: None, da_T: Array, sums: list[Array]
    ) -> Weights:
        """The gradient of the GRU's recurrent bias, whose gate is the last."""
        bias_H = rest.recurrent_bias_H
        if bias_H is None:
            return rest
        d_bias = jnp.sum(da_T[..., -bias_H.shape[0] :], (0, 1), kept_T[-1].dtype)
        return rest._replace(recurrent_bias_H=d_bias.astype(bias_H.dtype))


RULES: dict[type[Cell], Rule] = {
    LSTMCell: Rule((0.5, 0.5, 1.0, 0.5), lstm_forward, lstm_backward),
    GRUCell: Rule((0.5, 0.5, 1.0), gru_forward, gru_backward),
    SimpleRNNCell: Rule((1.0,), rnn_forward, rnn_backward),
}


def supports(cell: Any, x_BTD: Any, recurrent_dropout: Any, resets: bool = False) -> str | None:
    """None, or why not."""
    if not_textbook(cell) is None:
        return None
    if model_shards() > 1:
        return f"{type(cell).__name__} may need all hidden units, which are split over devices"
    rule = derive(cell, x_BTD)
    return rule if isinstance(rule, str) else None


def rule_of(cell: Cell, x_BTD: Array) -> Rule | Derived:
    if not_textbook(cell) is None:
        return RULES[type(cell)]
    rule = derive(cell, x_BTD)
    if isinstance(rule, str):
        raise ArgumentError(f"fused cannot run this layer: {rule}")
    return rule


def run(*case: Any) -> tuple[Any, Array]:
    """See `flax_lstm.nn.recurrence`."""
    end, (y_BTH, _) = run_over(False, *case)
    return end, y_BTH


def run_states(*case: Any) -> tuple[Any, tuple[Array, Any]]:
    """`run`, with the state after every step; in padding, the one that is held there."""
    return run_over(True, *case)


def run_over(
    states: bool,
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    reverse: bool,
    reset_BT: Array | None = None,
) -> tuple[Any, tuple[Array, Any]]:
    """Both; without `states`, None in their place."""
    batch, time, _ = x_BTD.shape
    x_BTD = without_padding(x_BTD, lengths_B)
    fresh_BT = None if reset_BT is None else fresh(reset_BT, lengths_B, reverse)
    rule = rule_of(cell, x_BTD)
    way = Way(rule, reverse, states)
    units = weights.recurrent_JGH.shape[-1]  # that are this device's
    # Of a derived rule about three arrays for each gate.
    arrays = (3 if rule.again else 1) * cell.gates + 2
    kept = time * batch * units * arrays * cell.state_dtype(x_BTD).itemsize
    if fits(kept, KEEP * (jax.device_count() if current_mesh() is None else 1)):
        return run_chunk(way, cell, weights, x_BTD, lengths_B, state, mask_BJ, fresh_BT)
    # In the dtype of the state, so that the gradients of all chunks add up in it.
    wide_weights = jax.tree.map(lambda w: w.astype(cell.state_dtype(x_BTD)), weights)
    ends_B = jnp.full(batch, time) if lengths_B is None else lengths_B

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(state: Any, inputs: tuple[Array, Array | None, Array]) -> tuple[Any, Any]:
        x_BCD, fresh_BC, start = inputs
        cast = cell.cast(wide_weights, x_BTD)
        return run_chunk(way, cell, cast, x_BCD, ends_B - start, state, mask_BJ, fresh_BC)

    steps = math.isqrt(time)
    starts = jnp.arange(0, time, steps)

    def cut(x_BT: Array) -> Array:
        """In chunks, [C, B, steps, ...]."""
        beyond = ((0, 0), (0, len(starts) * steps - time), *[(0, 0)] * (x_BT.ndim - 2))
        padded = jnp.pad(x_BT, beyond)
        return jnp.swapaxes(padded.reshape(batch, len(starts), steps, *x_BT.shape[2:]), 0, 1)

    def join(x_chunks: Array) -> Array:
        return jnp.swapaxes(x_chunks, 0, 1).reshape(batch, -1, x_chunks.shape[-1])[:, :time]

    chunks = (cut(x_BTD), None if fresh_BT is None else cut(fresh_BT), starts)
    state, found = jax.lax.scan(chunk, state, chunks, reverse=reverse)
    return state, jax.tree.map(join, found)


def fits(bytes_kept: Any, limit: int) -> bool:
    """Whether so many bytes are within a limit; a number that is not known yet, in a program
    exported for any batch and time, is taken to be."""
    try:
        return bool(bytes_kept <= limit)
    except InconclusiveDimensionOperation:
        return True


class Way(NamedTuple):
    """How a recurrence is run: the rule of the cell, the direction, and whether the states after
    all steps are wanted."""

    rule: Rule | Derived
    reverse: bool
    states: bool


def run_chunk(
    way: Way,
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    fresh_BT: Array | None,
) -> tuple[Any, tuple[Array, Any]]:
    """`run_over`, keeping what every step leaves."""
    rule = way.rule
    rest, (leaves, structure) = rest_of(weights), jax.tree.flatten(state)
    order = tuple(range(len(leaves))) if isinstance(rule, Rule) else rule.order
    if isinstance(rule, Rule):
        scale = jnp.asarray(rule.scale, weights.recurrent_JGH.dtype)
        input_DGH, recurrent_JGH = (
            w * scale[None, :, None] for w in (weights.input_DGH, weights.recurrent_JGH)
        )
        weights = weights._replace(
            input_DGH=input_DGH,
            recurrent_JGH=recurrent_JGH,
            bias_GH=weights.bias_GH * scale[:, None],
        )
    else:
        order = rule.order
    x_TBD = jnp.swapaxes(x_BTD, 0, 1)
    x_TBGH = cell.project(weights, merge(x_TBD)).reshape(*x_TBD.shape[:2], *weights.bias_GH.shape)
    final, after_T = recur(
        way,
        x_TBGH,
        weights.recurrent_JGH,
        rest,
        tuple(leaves[n] for n in order),
        mask_BJ,
        lengths_B,
        None if fresh_BT is None else fresh_BT.T,
    )
    y_TBH = after_T[-1].astype(x_TBGH.dtype)
    if lengths_B is not None:
        valid_TB = jnp.arange(y_TBH.shape[0])[:, None] < lengths_B[None]
        y_TBH = jnp.where(valid_TB[:, :, None], y_TBH, 0)

    def as_given(leaves: State) -> Any:
        return jax.tree.unflatten(structure, [leaves[order.index(n)] for n in range(len(leaves))])

    states = as_given(tuple(jnp.swapaxes(a, 0, 1) for a in after_T)) if way.states else None
    return as_given(final), (jnp.swapaxes(y_TBH, 0, 1), states)


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


def recur_define(way: Way, *arrays: Any) -> tuple[State, State]:
    """The final state, and h after each step (held where a row has ended), after the other arrays
    of the state where these are wanted."""
    return recur_forward(way, *arrays)[0]


def recur_forward(way, x_TBGH, recurrent_JGH, rest, state, mask_BJ, lengths_B, fresh_TB):  # type: ignore[no-untyped-def]
    rule, reverse, states = way
    dtype = recurrent_JGH.dtype

    def entering(h: Array) -> Array | None:
        """h as it enters the matmul, or None for h itself. Made at the end of a step, it is not a
        kernel of its own."""
        if mask_BJ is None and h.dtype == dtype and h.shape[-1] == len(recurrent_JGH):
            return None
        return masked(gather(h, len(recurrent_JGH)), mask_BJ).astype(dtype)

    def step(carry: Any, inputs: tuple[Array, Array, Array | None]) -> Any:
        (state, h_in), (x, t, fresh_B) = carry, inputs
        begin, (h_in,) = from_zeros(fresh_B, state), from_zeros(fresh_B, (h_in,))
        h_in = begin[-1] if h_in is None else h_in
        rh = matmul(h_in, recurrent_JGH, state[-1].dtype, per_gate(mask_BJ))
        new, kept = rule.forward(rest, begin, x, rh)
        if lengths_B is not None:
            new = keep_where(t < lengths_B, new, state)
        return (new, entering(new[-1])), together((*kept, *state))

    inputs = (x_TBGH, jnp.arange(x_TBGH.shape[0]), fresh_TB)
    (final, _), kept_T = jax.lax.scan(step, (state, entering(state[-1])), inputs, reverse=reverse)
    # What is kept is the state before a step: a step that also read the one after could not write
    # it in place.
    shown = len(final) if states else 1

    def after(before: Array, last: Array) -> Array:
        ends = [last[None], before] if reverse else [before, last[None]]
        return jnp.concatenate(ends)[:-1] if reverse else jnp.concatenate(ends)[1:]

    after_T = tuple(map(after, each(kept_T)[-shown:], final[-shown:]))
    return (final, after_T), kept_T


def recur_backward(way, arrays, results, kept_T, gradients):  # type: ignore[no-untyped-def]
    rule, reverse, _ = way
    x_TBGH, recurrent_JGH, rest, _, mask_BJ, lengths_B, fresh_TB = arrays
    x_TBGH = x_TBGH if rule.again else None
    d_final, d_after_T = gradients
    dh_TBH = d_after_T[-1]
    dtype, state_dtype, shape = recurrent_JGH.dtype, dh_TBH.dtype, recurrent_JGH.shape
    through_matmul = transposed_matmul(recurrent_JGH, mask_BJ, state_dtype)

    def through(d: State, da: Array, fresh_B: Array | None) -> State:
        """The gradient of a state, from that of the step after it: `d` directly, and `da` through
        Rh, unless that step began from zeros. It is made at the beginning of a step, where it is
        one kernel with what follows."""
        (dh,) = from_zeros(fresh_B, (scatter(through_matmul(da), d[-1].shape[1]),))
        return (*d[:-1], d[-1] + dh)

    def step(carry: Any, inputs: Any) -> Any:
        t, kept, d_after, x, fresh_B = inputs
        sums = carry[3]
        kept = each(kept, axis=0)
        own, state = kept[: -len(d_final)], kept[-len(d_final) :]
        d = through(*carry[:3])
        rest_of_d = len(d) - len(d_after)
        d = used = (*d[:rest_of_d], *map(operator.add, d[rest_of_d:], d_after))
        valid = None if lengths_B is None else t < lengths_B
        if valid is not None and rule.again:
            used = keep_where(valid, d, tuple(map(jnp.zeros_like, d)))
        d_before, da, dx, more = rule.backward(rest, own, from_zeros(fresh_B, state), x, used)
        d_before = from_zeros(fresh_B, d_before)
        if valid is not None:
            d_before = keep_where(valid, d_before, d)
            da, dx = (a and keep_where(valid, a, tuple(map(jnp.zeros_like, a))) for a in (da, dx))
        da, *dx = (jnp.concatenate(a, 1).astype(dtype) for a in (da, dx) if a)
        sums = jax.tree.map(lambda s, w: s + w.astype(s.dtype), sums, more)
        written = together((da, *dx)), used if any(large) else None
        return (d_before, da, fresh_B, sums), written

    large = rule.is_large(rest)
    inputs = (jnp.arange(dh_TBH.shape[0]), kept_T, d_after_T, x_TBGH, fresh_TB)
    nothing = jnp.zeros((dh_TBH.shape[1], shape[1] * shape[2]), dtype)
    sums = rule.nothing(rest, dh_TBH.shape[1], state_dtype)
    begin = (d_final, nothing, None if fresh_TB is None else fresh_TB[0], sums)
    ends: Any
    leaves, structure = jax.tree.flatten(begin)
    begin = jax.tree.unflatten(structure, alike(leaves, (dh_TBH,)))
    ends, (written_T, d_T) = jax.lax.scan(step, begin, inputs, reverse=not reverse)
    sums = ends[3]
    da_T, dx_T = each(written_T)[0], each(written_T)[-1]

    own_T, state_T = each(kept_T)[: -len(d_final)], each(kept_T)[-len(d_final) :]
    if fresh_TB is not None:
        state_T = tuple(jnp.where(fresh_TB[:, :, None], 0, s) for s in state_T)
    before_TBJ = gather(state_T[-1], shape[0])
    d_recurrent = outer_products(before_TBJ, da_T, mask_BJ, shape, dtype).astype(dtype)
    # The compiler drops this unless somebody asks for it.
    d_mask = None if mask_BJ is None else of_mask(recurrent_JGH, before_TBJ, da_T, mask_BJ)
    d_rest = rule.of_rest(rest, (*own_T, *state_T), x_TBGH, d_T, da_T, sums)
    dx_TBGH = dx_T.reshape(*dh_TBH.shape[:2], *shape[1:])
    return dx_TBGH, d_recurrent, d_rest, through(*ends[:3]), d_mask, None, None


def recur_rows(way: Way) -> Any:
    """Where the rows of a batch are in arrays, results and what is kept; on a GPU that is one
    array of another form, and an ensemble's matmuls are better batched."""
    return None if on_gpu() else ((1, -1, -1, 0, 0, 0, 1), (0, 1), 1)


recur = Derivable(recur_define, recur_forward, recur_backward, statics=1, rows=recur_rows)


def per_gate(mask_BJ: Array | None) -> TypeGuard[Array]:
    """Whether it is a mask [B, G, J], one for each gate."""
    return mask_BJ is not None and mask_BJ.ndim == 3


def by_gates(axes: str, a: Array, b: Array, dtype: Any) -> Array:
    """A product for each gate, added up in a dtype. Numbers that are rounded to bfloat16 are
    multiplied in that: XLA for CPUs has no batch of products of them that adds up in float32."""
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype))


def transposed_matmul(
    recurrent_JGH: Array, mask_BJ: Array | None, state_dtype: Any
) -> Callable[[Array], Array]:
    """From gradients of Rh, [B, G * H], to those of h, [B, J]. R is transposed once: without the
    barrier the compiler moves that into the loop."""
    inputs, gates, hidden = recurrent_JGH.shape
    if per_gate(mask_BJ):
        transposed_GHJ = barrier(jnp.transpose(recurrent_JGH, (1, 2, 0)))
        mask_BGJ = mask_BJ

        def by_gate(da: Array) -> Array:
            da_BGH = da.reshape(-1, gates, hidden)
            dh_BGJ = by_gates("bgh,ghj->bgj", da_BGH, transposed_GHJ, state_dtype)
            return jnp.sum(dh_BGJ * mask_BGJ, 1)

        return by_gate
    transposed = barrier(recurrent_JGH.reshape(inputs, -1).T)

    def tied(da: Array) -> Array:
        dh = jnp.matmul(da, transposed, preferred_element_type=state_dtype)
        return dh if mask_BJ is None else dh * mask_BJ

    return tied


def outer_products(
    h_TBJ: Array, da_T: Array, mask_BJ: Array | None, shape: tuple[int, ...], dtype: Any
) -> Array:
    """The gradient of R, [J, G, H]: the sum over steps and rows of h da^T, in the dtype of h."""
    if per_gate(mask_BJ):
        h_TBGJ = (h_TBJ[:, :, None] * mask_BJ[None]).astype(dtype)
        da_TBGH = da_T.reshape(*da_T.shape[:2], *shape[1:])
        return by_gates("tbgj,tbgh->jgh", h_TBGJ, da_TBGH, h_TBJ.dtype)
    h = merge((h_TBJ if mask_BJ is None else h_TBJ * mask_BJ[None]).astype(dtype))
    steps = tuple(range(h.ndim - 1))
    return jax.lax.dot_general(
        h, merge(da_T), ((steps, steps), ((), ())), preferred_element_type=h_TBJ.dtype
    ).reshape(shape)


def of_mask(recurrent_JGH: Array, h_TBJ: Array, da_T: Array, mask_BJ: Array) -> Array:
    """The gradient of a mask, in its shape."""
    da_TBGH = da_T.reshape(*da_T.shape[:2], *recurrent_JGH.shape[1:])
    if per_gate(mask_BJ):
        dh = by_gates("tbgh,jgh->tbgj", da_TBGH, recurrent_JGH, h_TBJ.dtype)
        return jnp.sum(h_TBJ[:, :, None] * dh, 0).astype(mask_BJ.dtype)
    dh = jnp.einsum("tbgh,jgh->tbj", da_TBGH, recurrent_JGH, preferred_element_type=h_TBJ.dtype)
    return jnp.sum(h_TBJ * dh, 0).astype(mask_BJ.dtype)


def keep_where(valid_B: Array, new: State, old: State) -> State:
    return tuple(jnp.where(valid_B[:, None], a, b) for a, b in zip(new, old, strict=True))


def from_zeros(fresh_B: Array | None, arrays: Any) -> Any:
    """Zeros in the rows [B, ...] that begin a sequence."""
    if fresh_B is None:
        return arrays
    return jax.tree.map(lambda a: where_rows(fresh_B, jnp.zeros_like(a), a), arrays)
