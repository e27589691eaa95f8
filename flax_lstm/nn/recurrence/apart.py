# SPDX-License-Identifier: Apache-2.0
"""A function of arrays, traced and computed again with some of them in parts.

The equations of a cell take gates out of [B, G, H] by slices, and their gradients are put together
from padded slices; they use a weight [H] in all rows, and its gradient is a sum over rows at every
step. In a loop, a compiler makes a slow operation of each. Here an axis of gates is a list of
arrays, and a weight has a copy for each row: what is left is arithmetic on arrays of one shape, and
the gradient of a copy is elementwise too. Whatever an operation is not known to do with parts, it
does with the whole array: so any function gives what it gave.

Axes: B batch (rows of a step); others are those of the function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

Array = jax.Array

# Operations by the names of their primitives. Of what is missing here no part is known.
ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "clamp", "convert_element_type", "copy", "cos", "div", "eq"),
    *("erf", "exp", "exp2", "expm1", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p"),
    *("logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt", "select_n"),
    *("sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh"),
}
STRUCTURAL = {"broadcast_in_dim", "reduce_sum", "reshape", "slice", "squeeze"}


@partial(jax.tree_util.register_dataclass, data_fields=["pieces"], meta_fields=["axis"])
@dataclass(frozen=True)
class Parts:
    """An array in pieces: those that it has along an axis, without that axis."""

    axis: int
    pieces: tuple[Any, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclass(frozen=True)
class Copies:
    """An array that has a copy for each row, [B, ...]."""

    rows: Array


def shape_of(value: Any) -> tuple[int, ...]:
    if isinstance(value, Parts):
        shape = shape_of(value.pieces[0])
        return (*shape[: value.axis], len(value.pieces), *shape[value.axis :])
    return value.rows.shape[1:] if isinstance(value, Copies) else jnp.shape(value)


def whole(value: Any) -> Any:
    """The array itself. Of copies one will do: the gradients of all are added up in the end."""
    if isinstance(value, Parts):
        return jnp.stack([whole(piece) for piece in value.pieces], value.axis)
    return value.rows[0] if isinstance(value, Copies) else value


def evaluate(function: Callable[..., Any], shapes: Sequence[Any], values: Sequence[Any]) -> Any:
    """`function` of arrays of these shapes, computed from the same in parts."""
    closed, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
    found = run(closed.jaxpr, closed.consts, jax.tree.leaves(values, is_leaf=is_value))
    return jax.tree.unflatten(jax.tree.structure(result), list(map(whole, found)))


def is_value(value: Any) -> bool:
    return isinstance(value, Parts | Copies)


def run(jaxpr: Any, constants: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *values), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        given = list(map(read, equation.invars))
        if equation.primitive.name in ("jit", "pjit", "closed_call"):
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            results = run(inner.jaxpr, inner.consts, given)
        elif equation.primitive.multiple_results:
            arrays = {v: whole(read(v)) for v in equation.invars if not hasattr(v, "val")}
            alone = jaxpr.replace(
                constvars=[], invars=list(arrays), outvars=equation.outvars, eqns=[equation]
            )
            results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*arrays.values())
        else:
            results = [apply(equation.primitive, equation.params, given)]
        known.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def apply(primitive: Any, params: Any, values: list[Any]) -> Any:
    """One operation with one result."""
    found = None
    if any(isinstance(value, Parts) for value in values):
        if primitive.name in ELEMENTWISE:
            found = by_piece(primitive, params, values)
        elif primitive.name in RULES:
            found = RULES[primitive.name](primitive, params, values[0])
    elif any(isinstance(value, Copies) for value in values):
        if primitive.name in ELEMENTWISE:
            found = by_row(primitive, params, values)
        elif primitive.name in STRUCTURAL:
            one = partial(primitive.bind, **params)
            found = Copies(jax.vmap(one)(values[0].rows))
    return primitive.bind(*map(whole, values), **params) if found is None else found


def expanded(value: Any) -> Any:
    """A single piece as an array of one more axis, so that it is the same for what has many."""
    if not isinstance(value, Parts) or len(value.pieces) > 1:
        return value
    (piece,) = value.pieces
    if isinstance(piece, Copies):
        return Copies(jnp.expand_dims(piece.rows, value.axis + 1))
    return jnp.expand_dims(whole(piece), value.axis)


def by_piece(primitive: Any, params: Any, values: list[Any]) -> Any:
    """Parts along one axis, of one number, with whatever is the same for all of them, or has an
    element for each."""
    values = list(map(expanded, values))
    parts = [value for value in values if isinstance(value, Parts)]
    if not parts:
        return apply(primitive, params, values)
    axis, count = parts[0].axis, max(len(value.pieces) for value in parts)
    counts = {shape_of(value)[axis] for value in values if shape_of(value)}
    if any(value.axis != axis for value in parts) or not counts <= {1, count}:
        return None

    def piece(value: Any, n: int) -> Any:
        if not shape_of(value):
            return value
        if isinstance(value, Parts):
            return value.pieces[n]
        if isinstance(value, Copies):
            return Copies(without_axis(value.rows, axis + 1, n))
        return without_axis(value, axis, n)

    pieces = ([piece(value, n) for value in values] for n in range(count))
    return Parts(axis, tuple(apply(primitive, params, each) for each in pieces))


def without_axis(array: Array, axis: int, n: int) -> Array:
    if array.shape[axis] == 1:
        return jax.lax.squeeze(array, (axis,))
    return jax.lax.index_in_dim(array, n, axis, keepdims=False)


def by_row(primitive: Any, params: Any, values: list[Any]) -> Any:
    """Copies with copies and numbers are copies; with arrays [B, ...] they are rows of such."""
    values = [value if shape_of(value) else whole(value) for value in values]
    others = [value for value in values if not isinstance(value, Copies) and shape_of(value)]
    if not others:
        rows = [value.rows if isinstance(value, Copies) else value for value in values]
        return Copies(primitive.bind(*rows, **params))
    rows_of_others = shape_of(others[0])[0]

    def row(value: Any) -> Any:
        if isinstance(value, Copies) and value.rows.shape[:2] == (rows_of_others, 1):
            return jax.lax.squeeze(value.rows, (1,))
        return whole(value)

    return primitive.bind(*map(row, values), **params)


def slice_parts(primitive: Any, params: Any, value: Parts) -> Any:
    begin, end = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(begin)
    chosen = value.pieces[begin[value.axis] : end[value.axis] : steps[value.axis]]
    begin, end, steps = (without(each, value.axis) for each in (begin, end, steps))
    if (begin, end) == ((0,) * len(begin), shape_of(chosen[0])):
        return Parts(value.axis, chosen)
    rest = params | {"start_indices": begin, "limit_indices": end, "strides": steps}
    return Parts(value.axis, tuple(apply(primitive, rest, [piece]) for piece in chosen))


def squeeze_parts(primitive: Any, params: Any, value: Parts) -> Any:
    others, axis = reduced(params["dimensions"], value.axis)

    def squeezed(piece: Any) -> Any:
        return apply(primitive, params | {"dimensions": others}, [piece]) if others else piece

    pieces = tuple(map(squeezed, value.pieces))
    return pieces[0] if axis is None else Parts(axis, pieces)


def sum_parts(primitive: Any, params: Any, value: Parts) -> Any:
    others, axis = reduced(params["axes"], value.axis)

    def summed(piece: Any) -> Any:
        return apply(primitive, params | {"axes": others}, [piece]) if others else piece

    if axis is not None:
        return Parts(axis, tuple(map(summed, value.pieces)))
    return summed(reduce(lambda a, b: apply(jax.lax.add_p, {}, [a, b]), value.pieces))


def broadcast_parts(primitive: Any, params: Any, value: Parts) -> Any:
    shape, places = params["shape"], params["broadcast_dimensions"]
    axis = places[value.axis]
    if shape[axis] != len(value.pieces):
        return None
    moved = [place - (place > axis) for place in without(places, value.axis)]
    rest = {"shape": without(shape, axis), "broadcast_dimensions": tuple(moved)}
    return Parts(axis, tuple(apply(primitive, params | rest, [piece]) for piece in value.pieces))


RULES: dict[str, Callable[[Any, Any, Parts], Any]] = {
    "slice": slice_parts,
    "squeeze": squeeze_parts,
    "reduce_sum": sum_parts,
    "broadcast_in_dim": broadcast_parts,
}


def without(values: Sequence[int], place: int) -> tuple[int, ...]:
    return (*values[:place], *values[place + 1 :])


def reduced(axes: Sequence[int], axis: int) -> tuple[tuple[int, ...], int | None]:
    """Axes that vanish, in a piece; and where the pieces' axis is then, or None if it vanishes."""
    others = tuple(a - (a > axis) for a in axes if a != axis)
    return others, None if axis in axes else axis - sum(a < axis for a in axes)
