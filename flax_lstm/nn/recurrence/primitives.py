# SPDX-License-Identifier: Apache-2.0
"""Functions with a backward pass of their own that take every transformation of JAX.

`jax.custom_vjp` ends at the first derivative in reverse mode. `Derivable` is used like it and ends
nowhere: it has a definition in plain JAX beside the fast way, and three primitives,

    forward   the function, by the fast way; where a derivative is wanted, with what it leaves
    tangent   the linear map from tangents of the arrays to those of the results: `jax.jvp` of the
              definition. Its transpose is
    backward  the gradients of the arrays, by the fast way. Its transpose is the tangent map.

So `jax.grad` runs forward and backward; what needs the tangent map itself (`jax.jvp`,
`jax.jacfwd`) and every further derivative (`jax.hessian`, a gradient of a gradient) follow the
definition. What a forward pass saves has no derivatives of its own: those of backward and tangent
are taken of the definition, which does not use it.

`jax.vmap`: where all that is mapped has rows of a batch, the examples become rows of one batch,
one call of the forward pass. Otherwise (an ensemble's weights, gradients of single examples)
every `vmap` is a level around the primitive, by which its functions are mapped when it is run.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from flax_lstm.machine.sharding import lowering

Array = jax.Array
Leaves = tuple[Array, ...]


class Level(NamedTuple):
    """One `vmap` around a primitive. Mapped operands have axis 0, others None; results get axis 0,
    or are added up over it."""

    axes: tuple[int | None, ...]
    sums: tuple[bool, ...]

    def around(self, function: Callable[..., Leaves]) -> Callable[..., Leaves]:
        many = jax.vmap(function, in_axes=self.axes)

        def run(*operands: Array) -> Leaves:
            results = many(*operands)
            return tuple(jnp.sum(r, 0) if s else r for r, s in zip(results, self.sums, strict=True))

        return run

    def transposed(self, linear: int) -> "Level":
        """Of a map that is linear in its last `linear` operands: what was the same for all is
        added up, and the other way round."""
        axes = tuple(None if summed else 0 for summed in self.sums)
        sums = tuple(axis is None for axis in self.axes[len(self.axes) - linear :])
        return Level((*self.axes[: len(self.axes) - linear], *axes), sums)


Levels = tuple[Level, ...]


def nest(function: Callable[..., Leaves], levels: Levels) -> Callable[..., Leaves]:
    for level in levels:
        function = level.around(function)
    return function


class Derivable:
    """A function of arrays, `jax.custom_vjp` without its limits.

    definition(*static, *arrays) -> results, in plain JAX.
    forward(*static, *arrays) -> (results, saved)
    backward(*static, arrays, results, saved, gradients) -> the gradients of `arrays`; what has no
    gradient, such as lengths, gets None
    plain(*static, *arrays) -> results, where none are wanted; None: those of `forward`.
    rows(*static) -> (arrays, results, saved) with the axis over the rows of a batch in place of
    each array, -1 where an array has none; None: no two examples are put into one batch.

    spares: `backward` takes `NOTHING` in the place of gradients that are zero as is known, so that
    arrays of zeros are not made.

    The first `statics` arguments are hashable; arrays are trees. A definition that is the fast way
    itself, but for its derivative, is given for both.
    """

    def __init__(
        self,
        definition: Callable[..., Any],
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        statics: int,
        plain: Callable[..., Any] | None = None,
        rows: Callable[..., Any] | None = None,
        spares: bool = False,
    ) -> None:
        self.definition, self.forward, self.backward = definition, forward, backward
        self.plain = plain or (lambda *arguments: forward(*arguments)[0])
        self.statics, self.rows, self.spares = statics, rows, spares

    def __call__(self, *arguments: Any) -> Any:
        static, arrays = arguments[: self.statics], arguments[self.statics :]
        given, tree = jax.tree.flatten(arrays)
        leaves = alike(given)
        arrays = jax.tree.unflatten(tree, leaves)
        results, saved = jax.eval_shape(partial(self.forward, *static), *arrays)
        outputs = (jax.tree.structure(results), jax.tree.structure(saved))
        call = Call(self, static, tree, *outputs, split_here())
        found = bind(forward_p, *leaves, call=call, levels=(), save=False)
        return jax.tree.unflatten(call.results, found)


def alike(leaves: Any, like: Any = ()) -> Leaves:
    """All varying over the same axes of a `shard_map` (and those of `like`), so that gradients of
    what was whole are added up by JAX."""
    every = frozenset[Any]().union(*map(varying, (*leaves, *like)))
    lacking = [tuple(every - varying(leaf)) for leaf in leaves]
    return tuple(
        jax.lax.pcast(leaf, axes, to="varying") if axes else leaf
        for leaf, axes in zip(leaves, lacking, strict=True)
    )


def varying(x: Any) -> frozenset[Any]:
    """The axes of a `shard_map` over which an array varies: an attribute whose name changes with
    JAX."""
    kind = jax.typeof(x)
    kind = getattr(kind, "mat", kind)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


NOTHING = (0,)  # the shape of a gradient that is zero, see `Derivable`


def written_out(gradient: Array, result: Array) -> Array:
    """The gradient of a result, of its shape."""
    return jnp.zeros_like(result) if gradient.shape == NOTHING else gradient


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


@functools.cache
def split_here() -> Any:
    """A program that the compiler may split over devices. JAX tells the devices to the lowering of
    a primitive only where it finds such a one among its parameters."""
    same = custom_partitioning(lambda x: x)
    same.def_partition(lambda mesh, given, wanted: None, sharding_rule="i -> i")
    return jax.make_jaxpr(same)(jax.ShapeDtypeStruct((1,), jnp.float32))


class Call(NamedTuple):
    """What is known of a call when it is traced, and its functions on flat arrays."""

    of: Derivable
    static: tuple[Any, ...]
    arrays: Any  # structures, here and below
    results: Any
    saved: Any
    marker: Any  # see `split_here`

    def unflatten(self, leaves: Any) -> Any:
        return jax.tree.unflatten(self.arrays, leaves)

    def define(self, *leaves: Array) -> Leaves:
        found = self.of.definition(*self.static, *self.unflatten(leaves))
        return tuple(jax.tree.leaves(found))

    def run(self, save: bool, *leaves: Array) -> Leaves:
        """Results, followed by what is saved."""
        function = self.of.forward if save else self.of.plain
        return tuple(jax.tree.leaves(function(*self.static, *self.unflatten(leaves))))

    def split(self, operands: Any, floats: int) -> tuple[Any, Any, Any]:
        """Operands of the tangent and the backward primitive: arrays, all of the forward pass, and
        the last ones, in which they are linear."""
        inputs, last = self.arrays.num_leaves, len(operands) - floats
        return operands[:inputs], operands[inputs:last], operands[last:]

    def push(self, *operands: Array) -> Leaves:
        """Tangents of the results."""
        floats = sum(map(is_float, operands[: self.arrays.num_leaves]))
        leaves, _, tangents = self.split(operands, floats)
        define, chosen = self.of_floats(leaves)
        return jax.jvp(define, tuple(chosen), tuple(tangents))[1]

    def pull(self, *operands: Array) -> Leaves:
        """Gradients of the arrays, by the definition."""
        leaves, everything, gradients = self.split(operands, self.results.num_leaves)
        define, chosen = self.of_floats(leaves)
        return jax.vjp(define, *chosen)[1](tuple(map(written_out, gradients, everything)))

    def of_floats(self, leaves: Any) -> tuple[Callable[..., Leaves], list[Array]]:
        """The definition as a function of the floating arrays alone, and those."""
        places = [n for n, leaf in enumerate(leaves) if is_float(leaf)]

        def define(*chosen: Array) -> Leaves:
            every = list(leaves)
            for place, leaf in zip(places, chosen, strict=True):
                every[place] = leaf
            return self.define(*every)

        return define, [leaves[n] for n in places]

    def pull_fast(self, *operands: Array) -> Leaves:
        """Gradients of the arrays, by the backward pass."""
        leaves, everything, gradients = self.split(operands, self.results.num_leaves)
        count = self.results.num_leaves
        found = self.of.backward(
            *self.static,
            self.unflatten(leaves),
            jax.tree.unflatten(self.results, everything[:count]),
            jax.tree.unflatten(self.saved, everything[count:]),
            jax.tree.unflatten(self.results, gradients),
        )
        # In the places of `arrays`: what has no gradient, such as lengths, is left out.
        flat = self.arrays.flatten_up_to(tuple(found))
        return tuple(g for g, leaf in zip(flat, leaves, strict=True) if is_float(leaf))

    def rows(self, save: bool) -> tuple[list[int], list[int]] | None:
        """The axis over rows of each array, and of each result."""
        found = self.of.rows(*self.static) if self.of.rows else None
        if found is None:
            return None
        inputs, results, saved = found
        outputs = spread(results, self.results) + (spread(saved, self.saved) if save else [])
        return spread(inputs, self.arrays), outputs

    def size(self, save: bool) -> int:
        """How many arrays a forward pass gives."""
        return self.results.num_leaves + (self.saved.num_leaves if save else 0)


def spread(axes: Any, structure: Any) -> list[int]:
    """`axes`, a prefix of the structure, for each of its leaves."""
    tree = jax.tree.unflatten(structure, [0] * structure.num_leaves)
    each = jax.tree.map(lambda axis, part: jax.tree.map(lambda _: axis, part), axes, tree)
    return list(jax.tree.leaves(each))


# --- the three primitives

forward_p = Primitive("recurrence_forward")
tangent_p = Primitive("recurrence_tangent")
backward_p = Primitive("recurrence_backward")


def forward(*leaves: Array, call: Call, levels: Levels, save: bool) -> Leaves:
    return alike(nest(partial(call.run, save), levels)(*leaves), leaves)


def tangent(*operands: Array, call: Call, levels: Levels) -> Leaves:
    return nest(call.push, levels)(*operands)


def backward(*operands: Array, call: Call, levels: Levels) -> Leaves:
    return alike(nest(call.pull_fast, levels)(*operands), operands)


def bind(primitive: Primitive, *operands: Array, **static: Any) -> Any:
    """The primitive with what it runs as one of its parameters, for all that look into a program:
    counts of operations, for example."""
    jaxpr = None
    if primitive is not tangent_p:
        run = partial(RUN[primitive], **static)
        jaxpr = jax.make_jaxpr(run)(*map(jax.typeof, operands))
    return primitive.bind(*operands, jaxpr=jaxpr, **static)


RUN: dict[Primitive, Callable[..., Leaves]] = {
    forward_p: forward,
    tangent_p: tangent,
    backward_p: backward,
}


def define(primitive: Primitive, like: Callable[..., Any], *names: str) -> None:
    """A primitive of several results, run as `RUN` says. `like(call, avals)` are those of the
    results, where they are known without tracing."""
    primitive.multiple_results = True
    function = RUN[primitive]
    eager = jax.jit(partial(bind, primitive), static_argnames=("call", "levels", *names))
    primitive.def_impl(lambda *operands, jaxpr, **static: eager(*operands, **static))

    def shapes(*avals: Any, jaxpr: Any, **static: Any) -> list[Any]:
        known = None if static["levels"] else like(static["call"], avals)
        if known is None and primitive is not forward_p:
            jaxpr = jax.make_jaxpr(partial(function, **static))(*avals)
        return known or list(jaxpr.out_avals)

    primitive.def_abstract_eval(shapes)

    def lower(context: Any, *operands: Any, jaxpr: Any, **static: Any) -> Any:
        with lowering(context.module_context.axis_context):
            return mlir.lower_fun(function, multiple_results=True)(context, *operands, **static)

    mlir.register_lowering(primitive, lower)


def like_results(call: Call, avals: Any) -> Any:
    return list(avals[call.arrays.num_leaves :][: call.results.num_leaves])


def like_floats(call: Call, avals: Any) -> Any:
    return list(filter(is_float, avals[: call.arrays.num_leaves]))


define(forward_p, lambda call, avals: None, "save")
define(tangent_p, like_results)
define(backward_p, like_floats)


def forward_jvp(
    leaves: Any, tangents: Any, *, jaxpr: Any, call: Call, levels: Levels, save: bool
) -> tuple[Any, Any]:
    everything = bind(forward_p, *leaves, call=call, levels=levels, save=True)
    count = call.results.num_leaves
    floats = [
        ad.instantiate_zeros(t) for t, leaf in zip(tangents, leaves, strict=True) if is_float(leaf)
    ]
    # Those of the forward pass: what it saves has the axis of every vmap.
    inner = tuple(
        Level((*level.axes, *[0] * len(everything), *pick(level.axes, leaves)), (False,) * count)
        for level in levels
    )
    operands = alike([*leaves, *everything, *floats])
    moved = bind(tangent_p, *operands, call=call, levels=inner)
    if not save:
        return everything[:count], moved
    nothing = [ad.Zero(jax.typeof(s).to_tangent_aval()) for s in everything[count:]]
    return everything, [*moved, *nothing]


def pick(axes: Any, leaves: Any) -> list[Any]:
    return [axis for axis, leaf in zip(axes, leaves, strict=True) if is_float(leaf)]


def tangent_jvp(
    operands: Any, dots: Any, *, jaxpr: Any, call: Call, levels: Levels
) -> tuple[Any, Any]:
    moved = bind(tangent_p, *operands, call=call, levels=levels)
    return moved, derivative(nest(call.push, levels), operands, dots)


def backward_jvp(
    operands: Any, dots: Any, *, jaxpr: Any, call: Call, levels: Levels
) -> tuple[Any, Any]:
    gradients = bind(backward_p, *operands, call=call, levels=levels)
    return gradients, derivative(nest(call.pull, levels), operands, dots)


def derivative(function: Callable[..., Leaves], operands: Any, dots: Any) -> Leaves:
    """The tangents of a function of operands some of which are integers."""
    moving = [n for n, dot in enumerate(dots) if not isinstance(dot, ad.Zero)]

    def of_moving(*chosen: Array) -> Leaves:
        every = list(operands)
        for place, operand in zip(moving, chosen, strict=True):
            every[place] = operand
        return function(*every)

    return jax.jvp(of_moving, tuple(operands[n] for n in moving), tuple(dots[n] for n in moving))[1]


def transpose(to: Primitive) -> Callable[..., Any]:
    """The rule of a primitive that is linear in its last operands, and whose transpose is `to`."""

    def rule(cotangents: Any, *operands: Any, jaxpr: Any, call: Call, levels: Levels) -> list[Any]:
        linear = [ad.is_undefined_primal(operand) for operand in operands]
        count = (
            call.results.num_leaves
            if to is tangent_p
            else sum(is_float(leaf) for leaf in operands[: call.arrays.num_leaves])
        )
        constant = operands[: len(operands) - count]
        turned = tuple(level.transposed(count) for level in levels)
        spares = to is backward_p and call.of.spares and not levels

        def instantiate(cotangent: Any) -> Any:
            if spares and type(cotangent) is ad.Zero:
                aval: Any = cotangent.aval
                return jnp.zeros(NOTHING, aval.dtype)
            return ad.instantiate_zeros(cotangent)

        given = alike([*constant, *map(instantiate, cotangents)])
        found = bind(to, *given, call=call, levels=turned)
        every = [*[None] * len(constant), *found]
        return [x if wanted else None for x, wanted in zip(every, linear, strict=True)]

    return rule


def to_front(operands: Any, axes: Any) -> tuple[list[Any], tuple[Any, ...], int]:
    """Mapped operands with the mapped axis first, the axes, and how many examples there are."""
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    front = tuple(None if axis is None else 0 for axis in axes)
    (size,) = {x.shape[0] for x, axis in zip(moved, front, strict=True) if axis == 0}
    return moved, front, size


def forward_batch(
    operands: Any, axes: Any, *, jaxpr: Any, call: Call, levels: Levels, save: bool
) -> tuple[Any, Any]:
    moved, front, size = to_front(operands, axes)
    rows = None if levels else call.rows(save)
    if rows is not None and all(r >= 0 or a is None for r, a in zip(rows[0], front, strict=True)):
        folded = [fold(x, a, r, size) for x, a, r in zip(moved, front, rows[0], strict=True)]
        results = bind(forward_p, *folded, call=call, levels=(), save=save)
        return [unfold(x, r, size) for x, r in zip(results, rows[1], strict=True)], rows[1]
    count = call.size(save)
    level = Level(front, (False,) * count)
    results = bind(forward_p, *moved, call=call, levels=(*levels, level), save=save)
    return results, [0] * count


def fold(x: Array, axis: int | None, rows: int, size: int) -> Array:
    """Examples as rows: the mapped axis, first or None, goes into the axis `rows`."""
    if rows < 0:
        return x
    every = jnp.broadcast_to(x[None], (size, *x.shape)) if axis is None else x
    shape = (*every.shape[1 : rows + 1], size * every.shape[rows + 1], *every.shape[rows + 2 :])
    return jnp.moveaxis(every, 0, rows).reshape(shape)


def unfold(x: Array, rows: int, size: int) -> Array:
    return x.reshape(*x.shape[:rows], size, x.shape[rows] // size, *x.shape[rows + 1 :])


def batch(primitive: Primitive) -> Callable[..., Any]:
    def rule(
        operands: Any, axes: Any, *, jaxpr: Any, call: Call, levels: Levels
    ) -> tuple[Any, Any]:
        moved, front, _ = to_front(operands, axes)
        inputs = call.arrays.num_leaves
        floats = sum(map(is_float, operands[:inputs]))
        count = call.results.num_leaves if primitive is tangent_p else floats
        level = Level(front, (False,) * count)
        results = bind(primitive, *moved, call=call, levels=(*levels, level))
        return results, [0] * count

    return rule


def backward_dce(used: list[bool], *others: Any) -> tuple[list[bool], Any]:
    """What is shown to run is without gradients that nobody asks for, as what is compiled is.

    others: the equation, from jax 0.12 on after a list of which inputs are alive.
    """
    equation = others[-1]
    if not any(used):
        return [False] * len(equation.invars), None
    closed = equation.params["jaxpr"]
    inner, _ = partial_eval.dce_jaxpr(closed.jaxpr, list(used), instantiate=True)
    shown = {"jaxpr": ClosedJaxpr(inner, closed.consts)}
    return [True] * len(equation.invars), equation.replace(params=equation.params | shown)


partial_eval.dce_rules[backward_p] = backward_dce
ad.primitive_jvps[forward_p] = forward_jvp
ad.primitive_jvps[tangent_p] = tangent_jvp
ad.primitive_jvps[backward_p] = backward_jvp
ad.primitive_transposes[tangent_p] = transpose(backward_p)
ad.primitive_transposes[backward_p] = transpose(tangent_p)
batching.primitive_batchers[forward_p] = forward_batch
batching.primitive_batchers[tangent_p] = batch(tangent_p)
batching.primitive_batchers[backward_p] = batch(backward_p)
