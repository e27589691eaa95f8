# SPDX-License-Identifier: Apache-2.0
"""A kernel in C++ for CPUs, compiled at first use: LSTM, GRU and simple RNN, forward and backward.

Axes: B batch, T time, D input features, G gates, H hidden units, J hidden units of the previous
step. With `time_major`, arrays over time are [T, B, ...] where their names say [B, T, ...].

The equations are those of `cells.py` and `fused.py`; how they are computed is said in
`native/kernel.h`. The input projection and all gradients of weights are within the kernel: no
[B, T, G, H] array but that of the activated gates, for the backward pass, is ever written.
In bfloat16 the products' operands are rounded; sums, gates, states and the gradients of weights are
float32.
`primitives.py` makes it take every transformation; derivatives beyond those of `jax.grad` are taken
of `define`, in plain JAX.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_lstm.machine.sharding import by_rows, model_shards, platform
from flax_lstm.nn.cells import (
    GRUCell,
    LSTMCell,
    LSTMState,
    SimpleRNNCell,
    Weights,
    gru_step,
    input_matmul,
    lstm_step,
    not_textbook,
    rnn_step,
)
from flax_lstm.nn.recurrence import native, rows
from flax_lstm.nn.recurrence.int8 import Bytes
from flax_lstm.nn.recurrence.primitives import NOTHING, Derivable, written_out

Array = jax.Array
TIME_MAJOR = True  # `run` takes `time_major`
ROUNDS = True  # it rounds weights itself, and their gradients are not rounded
DTYPES = (jnp.float32, jnp.bfloat16)
NATIVE = True
MANY_STEPS = True  # a call lays the weights out for its loop, which one step does not repay
EQUATIONS: dict[type, Any] = {LSTMCell: lstm_step, GRUCell: gru_step, SimpleRNNCell: rnn_step}


class Inputs(NamedTuple):
    """What a gradient is taken of. None where a cell has no recurrent bias or no c, and where there
    is no mask. Without input weights and bias the inputs are Wx + b, [B, T, G * H]."""

    x_BTD: Array
    weights: Weights
    c_BH: Array | None
    h_BH: Array
    mask_BJ: Array | None


class Marks(NamedTuple):
    """What has no gradient."""

    lengths_B: Array
    reset_BT: Array | None


class Results(NamedTuple):
    y_BTH: Array
    c_BH: Array | None
    h_BH: Array
    c_BTH: Array | None  # after every step, where asked for


class Saved(NamedTuple):
    """For the backward pass: activated gates, and c of an LSTM or the recurrent part of a GRU's
    candidate (None for a simple RNN)."""

    gates_BTGH: Array
    kept_BTH: Array | None


class How(NamedTuple):
    equations: Callable[..., Any]  # of the cell
    reverse: bool
    time_major: bool
    states: bool  # whether c after every step is a result
    half: bool  # whether products multiply in bfloat16


def supports(cell: Any, x_BTD: Any, recurrent_dropout: Any, resets: bool = False) -> str | None:
    """None, or why not. Subclasses may have equations of their own, so only the three cells
    themselves are taken."""
    if reason := not_textbook(cell):
        return reason
    if platform() != "cpu":
        return f"the arrays are on a {platform()}, not on a CPU"
    if model_shards() > 1:
        return "hidden units are split over several devices"
    if cell.compute_dtype(x_BTD) not in DTYPES:
        return f"it computes in float32 or bfloat16, not {cell.compute_dtype(x_BTD)}"
    if (reason := native.unavailable()) is None and halved(cell, x_BTD):
        native.note_bfloat16()
    return reason


def run(
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    reverse: bool,
    reset_BT: Array | None = None,
    time_major: bool = False,
) -> tuple[Any, Array]:
    """See `flax_lstm.nn.recurrence`. time_major: arrays over time, all given as [B, T, ...], are
    views of others that have time first, and the kernel shall read and write those."""
    how = How(EQUATIONS[type(cell)], reverse, time_major, False, halved(cell, x_BTD))
    state, found, _ = call(how, weights, x_BTD, lengths_B, state, mask_BJ, reset_BT)
    return state, found.y_BTH.astype(cell.compute_dtype(x_BTD))


def halved(cell: Any, x_BTD: Any) -> bool:
    return bool(cell.compute_dtype(x_BTD) == jnp.bfloat16)


def run_states(
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    begin: Any,
    mask_BJ: Array | None,
    reverse: bool,
    reset_BT: Array | None = None,
    time_major: bool = False,
) -> tuple[Any, tuple[Array, Any]]:
    """`run`, with the state after every step; in padding, the one that is held there."""
    states = type(cell) is LSTMCell
    how = How(EQUATIONS[type(cell)], reverse, time_major, states, halved(cell, x_BTD))
    end, found, lengths_B = call(how, weights, x_BTD, lengths_B, begin, mask_BJ, reset_BT)
    valid_BT1 = rows.valid(lengths_B, x_BTD.shape[1])[..., None]
    over_time = [x for x in (found.c_BTH, found.y_BTH) if x is not None]
    held = [
        jnp.where(valid_BT1, x_BTH, rest_BH[:, None])
        for x_BTH, rest_BH in zip(
            over_time, jax.tree.leaves(begin if reverse else end), strict=True
        )
    ]
    y_BTH = found.y_BTH.astype(cell.compute_dtype(x_BTD))
    return end, (y_BTH, jax.tree.unflatten(jax.tree.structure(begin), held))


def run_words(
    cell: Any,
    weights: Weights,
    table_VGH: Array,
    words_BT: Array,
    lengths_B: Array | None,
    state: Any,
    reverse: bool,
) -> tuple[Any, Array]:
    """`run` without gradients, where Wx + b of a step is a row of a table, by its word. A word that
    is none takes the first or the last row."""
    recurrent = (weights.recurrent_JGH.astype(jnp.float32), placed(weights.recurrent_bias_H))
    ways = {"reverse": reverse, "half": halved(cell, table_VGH)}
    end, y_BTH = look_up("words", table_VGH, recurrent, words_BT, lengths_B, state, ways)
    return end, y_BTH.astype(cell.compute_dtype(table_VGH))


def run_bytes(
    weights: Bytes,
    recurrent_bias_H: Array | None,
    table_VGH: Array,
    words_BT: Array,
    lengths_B: Array | None,
    state: Any,
    reverse: bool,
) -> tuple[Any, Array]:
    """`run_words` with recurrent weights of 8 bits, from whose table and bias is taken what
    `int8.py` says."""
    recurrent = (*weights, placed(recurrent_bias_H))
    ways = {"reverse": reverse}
    return look_up("bytes", table_VGH, recurrent, words_BT, lengths_B, state, ways)


def look_up(
    name: str,
    table_VGH: Array,
    recurrent: tuple[Array, ...],
    words_BT: Array,
    lengths_B: Array | None,
    state: Any,
    ways: dict[str, bool],
) -> tuple[Any, Array]:
    """The kernel's call `name`, whose recurrent weights and their bias are `recurrent`."""
    leaves, structure = jax.tree.flatten(state)
    c_BH, h_BH = leaves if len(leaves) == 2 else (None, *leaves)
    if lengths_B is None:
        lengths_B = jnp.full(words_BT.shape[0], words_BT.shape[1])
    *weights, bias, c, h = (*recurrent, placed(c_BH), h_BH)
    whole = (
        words_BT.astype(jnp.int32),
        table_VGH.astype(jnp.float32),
        *weights,
        *(array.astype(jnp.float32) for array in (bias, c, h)),
        lengths_B.astype(jnp.int32),
    )
    shapes = [(*words_BT.shape, table_VGH.shape[2]), c.shape, h.shape]
    y_BTH, c, h = call_native(name, shapes, whole, ways)
    ends = [end for end in (there(c), h) if end is not None]
    return jax.tree.unflatten(structure, ends), y_BTH


def call(
    how: How,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    reset_BT: Array | None,
) -> tuple[Any, "Results", Array]:
    """The final state, results, and the lengths."""

    def turn(x: Array | None) -> Any:
        return jnp.swapaxes(x, 0, 1) if how.time_major and x is not None else x

    leaves, structure = jax.tree.flatten(state)  # (c, h) of an LSTM, (h,) of the others
    c_BH, h_BH = leaves if len(leaves) == 2 else (None, *leaves)
    if lengths_B is None:
        lengths_B = jnp.full(x_BTD.shape[0], x_BTD.shape[1])
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    if x_BTD.shape[2] != weights.input_DGH.shape[0]:  # each gate has its own: not for the kernel
        x_BTD = rows.without_padding(x_BTD, lengths_B)
        x_BTD, weights = project(how, x_BTD.astype(jnp.float32), weights)
    inputs = Inputs(turn(x_BTD).astype(jnp.float32), weights, c_BH, h_BH, mask_BJ)
    found = recur(how, inputs, Marks(lengths_B.astype(jnp.int32), turn(reset_BT)))
    ends = [end for end in (found.c_BH, found.h_BH) if end is not None]
    found = found._replace(y_BTH=turn(found.y_BTH), c_BTH=turn(found.c_BTH))
    return jax.tree.unflatten(structure, ends), found, lengths_B


def project(how: How, x: Array, weights: Weights) -> tuple[Array, Weights]:
    """Wx + b, [B, T, G * H], and the other weights."""
    input_DGH = weights.input_DGH
    if how.half:
        x, input_DGH = x.astype(jnp.bfloat16), input_DGH.astype(jnp.bfloat16)
    x_BTGH = input_matmul(x, input_DGH, jnp.float32)
    x_BTGH += jnp.broadcast_to(weights.bias_GH, x_BTGH.shape)
    rest = weights._replace(input_DGH=None, bias_GH=None)  # type: ignore[arg-type]
    return x_BTGH.reshape(*x.shape[:2], -1), rest


def define(how: How, inputs: Inputs, marks: Marks) -> Results:
    """The recurrence in plain JAX."""
    x_BTD, weights, c_BH, h_BH, mask_BJ = inputs
    turn = (lambda x: x) if how.time_major else (lambda x: jnp.swapaxes(x, 0, 1))
    x_TBD, (lengths_B, reset) = turn(x_BTD), marks
    steps = jnp.arange(len(x_TBD))
    valid_TB = steps[:, None] < lengths_B[None]
    x_TBD = jnp.where(valid_TB[..., None], x_TBD, 0)
    if weights.input_DGH is not None:
        x_TBD, weights = project(how, x_TBD, weights)
    x_TBGH = x_TBD.reshape(*x_TBD.shape[:2], *weights.recurrent_JGH.shape[1:])
    if how.half:
        weights = weights._replace(recurrent_JGH=weights.recurrent_JGH.astype(jnp.bfloat16))
    fresh_TB = jnp.zeros_like(valid_TB)
    if reset is not None:
        fresh_TB = rows.fresh(turn(reset).T, lengths_B, how.reverse).T
    begin: Any = h_BH if c_BH is None else LSTMState(c_BH, h_BH)

    def step(state: Any, given: Any) -> tuple[Any, Any]:
        x_BGH, valid_B, fresh_B = given
        before = rows.where_rows(fresh_B, jax.tree.map(jnp.zeros_like, state), state)
        new = how.equations(weights, before, x_BGH, mask_BJ)
        state = rows.where_rows(valid_B, new, state)
        return state, (jax.tree.leaves(new)[-1], jax.tree.leaves(new)[0])

    end: Any
    end, (h_TBH, c_TBH) = jax.lax.scan(
        step, begin, (x_TBGH, valid_TB, fresh_TB), reverse=how.reverse
    )
    y_TBH = jnp.where(valid_TB[..., None], h_TBH, 0)
    c_end, h_end = end if c_BH is not None else (None, end)
    return Results(turn(y_TBH), c_end, h_end, turn(c_TBH) if how.states else None)


# --- the kernel

NONE = NOTHING  # the shape of an array that is not there


def placed(array: Array | None, dtype: Any = jnp.float32) -> Array:
    return jnp.zeros(NONE, dtype) if array is None else array


def there(array: Array) -> Array | None:
    return None if array.shape == NONE else array


def operands(inputs: Inputs, marks: Marks) -> tuple[list[Array], list[Array]]:
    """Weights, and all that has rows, in the order of the kernel's arguments."""
    weights = [placed(weight) for weight in inputs.weights[:4]]
    state = [placed(inputs.c_BH), inputs.h_BH, placed(inputs.mask_BJ)]
    return weights, [*state, marks.lengths_B, placed(marks.reset_BT, bool)]


def call_native(name: str, shapes: Any, arrays: Any, settings: dict[str, bool]) -> Any:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    function = jax.ffi.ffi_call(f"flax_lstm_{name}", results, vmap_method="sequential")
    return tuple(function(*arrays, **settings))


def settings(how: How) -> dict[str, bool]:
    return {"reverse": how.reverse, "time_major": how.time_major, "half": how.half}


def native_forward(how: How, save: bool, *arrays: Array) -> Any:
    x, _, recurrent_JGH, _, _, c_BH, h_BH, *_ = arrays
    _, gates, hidden = recurrent_JGH.shape
    shapes = [
        (*x.shape[:2], hidden),
        c_BH.shape,
        h_BH.shape,
        (*x.shape[:2], gates, hidden) if save else NONE,
        (*x.shape[:2], hidden) if save and gates > 1 else NONE,
    ]
    return call_native("forward", shapes, arrays, settings(how))


def native_backward(how: How, *arrays: Array) -> Any:
    x, input_DGH, recurrent_JGH, c_BH, h_BH, mask_BJ, *_ = arrays
    _, gates, hidden = recurrent_JGH.shape
    bias = NONE if input_DGH.shape == NONE else (gates, hidden)
    bias_H = (hidden,) if gates == 3 else NONE
    weights = [input_DGH.shape, recurrent_JGH.shape, bias, bias_H]
    shapes = [x.shape, *weights, c_BH.shape, h_BH.shape, mask_BJ.shape]
    return call_native("backward", shapes, arrays, settings(how))


# Where the rows of the batch are in the arguments and results of both: nowhere in weights, first in
# states and lengths, and over time first or, with time first, second.
W, S, T = -1, 0, 1
FORWARD = (T, W, W, W, W, S, S, S, S, T), (T, S, S, T, T)
BACKWARD = (T, W, W, S, S, S, S, T, T, T, T, T, S, S, T), (T, W, W, W, W, S, S, S)


def split_by_rows(function: Callable[..., Any], how: How, kinds: Any, *arrays: Array) -> Any:
    """A call of the kernel, on each device with its rows. Under `vmap`, one after the other."""

    def rows_of(x: Any, kind: int) -> int:
        return -1 if x.shape == NONE else kind if kind != T else int(how.time_major)

    results = jax.eval_shape(function, *arrays)
    places = [list(map(rows_of, *pair)) for pair in zip((arrays, results), kinds, strict=True)]
    run = jax.custom_batching.custom_vmap(by_rows(function, *places))

    @run.def_vmap
    def one_by_one(size: int, mapped: Any, *arrays: Array) -> Any:
        found = jax.vmap(function, [0 if one else None for one in mapped])(*arrays)
        return tuple(found), (True,) * len(found)

    return run(*arrays)


def call_forward(how: How, save: bool, inputs: Inputs, marks: Marks) -> tuple[Results, Saved]:
    (input_DGH, recurrent_JGH, bias_GH, bias_H), others = operands(inputs, marks)
    arrays = (inputs.x_BTD, input_DGH, recurrent_JGH, bias_GH, bias_H, *others)
    run = partial(native_forward, how, save)
    y, c, h, gates_BTGH, kept = split_by_rows(run, how, FORWARD, *arrays)
    return Results(y, there(c), h, kept if how.states else None), Saved(gates_BTGH, there(kept))


def forward(how: How, inputs: Inputs, marks: Marks) -> tuple[Results, Saved]:
    return call_forward(how, True, inputs, marks)


def plain(how: How, inputs: Inputs, marks: Marks) -> Results:
    return call_forward(how, how.states, inputs, marks)[0]


def backward(
    how: How, arrays: tuple[Inputs, Marks], results: Results, saved: Saved, gradients: Results
) -> tuple[Inputs, Marks]:
    inputs, marks = arrays
    (input_DGH, recurrent_JGH, _, _), others = operands(inputs, marks)
    y_BTH, dy = results.y_BTH, gradients.y_BTH
    ends = (gradients.c_BH, gradients.h_BH), (results.c_BH, results.h_BH)
    dc, dh = jax.tree.map(written_out, *ends)
    first = (inputs.x_BTD, input_DGH, recurrent_JGH, *others)
    saves = (y_BTH, saved.gates_BTGH, placed(saved.kept_BTH))
    given = (dy, placed(dc), dh, placed(gradients.c_BTH))
    run = partial(native_backward, how)
    found = split_by_rows(run, how, BACKWARD, *first, *saves, *given)
    dx, d_input, d_recurrent, d_bias, d_bias_H, dc0, dh0, d_mask = found
    d_weights = (there(d_input), d_recurrent, there(d_bias), there(d_bias_H))
    weights = Weights(*d_weights)  # type: ignore[arg-type]
    return Inputs(dx, weights, there(dc0), dh0, there(d_mask)), Marks(None, None)  # type: ignore[arg-type]


def axes(how: How) -> Any:
    """Where the rows of the batch are in arrays, results and what is saved."""
    time = 1 if how.time_major else 0
    inputs = Inputs(time, -1, 0, 0, 0)  # type: ignore[arg-type]
    marks = Marks(0, time)  # type: ignore[arg-type]
    return (inputs, marks), Results(time, 0, 0, time), Saved(time, time)  # type: ignore[arg-type]


recur = Derivable(define, forward, backward, statics=1, plain=plain, rows=axes, spares=True)
