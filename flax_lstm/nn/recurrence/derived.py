# SPDX-License-Identifier: Apache-2.0
"""What `fused` does at each step of a cell that it does not know, from the cell's own equations.

Axes: T time, B batch, D input features, G gates, H hidden units, J hidden units of the previous
step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from flax_lstm.nn.cells import Cell, Product, Weights, recurrent_matmul
from flax_lstm.nn.recurrence.apart import Copies, Parts, evaluate

Array = jax.Array
State = tuple[Array, ...]
Gates = tuple[Array, ...]
Kept = tuple[Array, ...]

# What is kept for the backward pass are results of these operations, and what enters the equations;
# everything else is computed again there.
DEAR = {
    *("cos", "dot_general", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow"),
    *("reduce_max", "reduce_sum", "rsqrt", "sin", "sqrt", "tanh"),
}


def is_dear(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in DEAR


class Given(NamedTuple):
    """What a step is differentiated in: of small weights, copies for all rows of the batch; large
    ones as they are (None in either where the other has it); the state; x and Rh, one array [B, H]
    for each gate."""

    small: Any
    large: Any
    state: State
    x: Gates
    rh: Gates


def split(x_BGH: Array) -> Gates:
    gates = range(x_BGH.shape[1])
    return tuple(jax.lax.index_in_dim(x_BGH, n, 1, keepdims=False) for n in gates)


def copied(weight: Array, rows: int) -> Any:
    """Copies [B, ...] of a weight, or of what it has along its first axis."""
    if weight.ndim > 1:
        return Parts(0, tuple(copied(piece, rows) for piece in weight))
    return Copies(jnp.broadcast_to(weight[None], (rows, *weight.shape)))


@dataclass(frozen=True)
class Derived:
    """The step of a cell after the product with R, and that differentiated. `order` are the places
    of a state's arrays, h last."""

    cell: Cell
    order: tuple[int, ...]

    again: ClassVar[bool] = True  # backward needs x, and of_rest the gradient after each step

    def after(self, rest: Weights, state: State, x: Array, rh: Array) -> State:
        leaves = [state[self.order.index(n)] for n in range(len(state))]
        before = jax.tree.unflatten(state_structure(self.cell), leaves)
        new = self.cell.step(rest._replace(recurrent_JGH=Product(rh)), before, x)
        return tuple(jax.tree.leaves(new)[n] for n in self.order)

    def is_large(self, rest: Weights) -> list[bool]:
        """Which of the weights besides are larger than what a step has for a row: matrices. The
        gradients of the others add up in the loop."""
        row = self.cell.gates * self.cell.features
        return [leaf.size > row for leaf in jax.tree.leaves(rest)]

    def given(self, rest: Weights, state: State, x: Array, rh: Array) -> Given:
        small, large = part(rest, self.is_large(rest))
        copies = [None if w is None else copied(w, x.shape[0]) for w in small]
        return Given(copies, large, state, split(x), split(rh))

    def apart(self, rest: Weights, x: Array, given: Given) -> State:
        """`after`, of what is given."""
        weights = join(rest, given.small, given.large)
        values = (weights, given.state, Parts(1, given.x), Parts(1, given.rh))
        rh = jax.ShapeDtypeStruct(x.shape, given.rh[0].dtype)
        found: State = evaluate(self.after, (rest, given.state, x, rh), values)
        return found

    def pull(self, rest: Weights, x: Array, given: Given) -> tuple[State, Any]:
        """The state after a step, and a function from the gradient of that to those of what was
        given."""
        step = partial(self.apart, rest, x)
        return jax.vjp(jax.checkpoint(step, policy=is_dear, prevent_cse=False), given)

    def adds(self, rest: Weights, x: Array, given: Given) -> bool:
        """Whether all that the equations do with x and Rh is to add them up: the gradients of both
        are the very same then."""
        jaxpr = jax.make_jaxpr(partial(self.apart, rest, x))(given).jaxpr
        sums = [set(map(id, e.invars)) for e in jaxpr.eqns if e.primitive.name == "add"]
        uses = [id(v) for v in (*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars)]
        places = jax.tree.unflatten(jax.tree.structure(given), jaxpr.invars)
        return all(
            {id(x), id(rh)} in sums and uses.count(id(x)) == uses.count(id(rh)) == 1
            for x, rh in zip(places.x, places.rh, strict=True)
        )

    def forward(self, rest: Weights, state: State, x: Array, rh: Array) -> tuple[State, Kept]:
        """Keeps what the gradient needs and does not have anyway."""
        given = self.given(rest, state, x, rh)
        new, pull = self.pull(rest, x, given)
        here = at_hand(given)
        return new, tuple(leaf for leaf in jax.tree.leaves(pull) if id(leaf) not in here)

    def gradients(self, rest: Weights, kept: Kept, state: State, x: Array, d: State) -> Given:
        """Of what a step was given, from that of the state after it."""
        # Traced again to learn which of what was kept goes where. Nothing else is taken from it,
        # so the compiler drops it.
        given = self.given(rest, state, x, jnp.zeros(x.shape, d[-1].dtype))
        _, pull = self.pull(rest, x, given)
        here, left = at_hand(given), iter(kept)
        pull = jax.tree.map(lambda leaf: leaf if id(leaf) in here else next(left), pull)
        found: Given = pull(d)[0]
        return found

    def backward(self, rest: Weights, kept: Kept, state: State, x: Array, d: State) -> Any:
        found = self.gradients(rest, kept, state, x, d)
        adds = self.adds(rest, x, self.given(rest, state, x, x.astype(d[-1].dtype)))
        return found.state, found.rh, None if adds else found.x, found.small

    def nothing(self, rest: Weights, rows: int, dtype: Any) -> Any:
        """Zeros for the sums of the gradients of the small weights' copies."""
        zeros = jax.tree.map(
            lambda w: jnp.zeros(w.shape, dtype), part(rest, self.is_large(rest))[0]
        )
        return [None if w is None else copied(w, rows) for w in zeros]

    def of_rest(
        self, rest: Weights, kept_T: Kept, x_T: Array, d_T: State, da_T: Array, sums: list[Any]
    ) -> Weights:
        d_large = part(rest, self.is_large(rest))[1]
        if any(self.is_large(rest)):
            last = len(kept_T) - len(self.order)
            own_T, before_T = kept_T[:last], kept_T[last:]
            each = jax.vmap(lambda *step: self.gradients(rest, *step).large)
            d_large = jax.tree.map(lambda d: jnp.sum(d, 0), each(own_T, before_T, x_T, d_T))
        d_small = [None if s is None else added(s) for s in sums]
        found = join(rest, d_small, d_large)
        return jax.tree.map(lambda d, w: d.astype(w.dtype), found, rest)


def at_hand(given: Given) -> set[int]:
    """The arrays that the backward pass has anyway."""
    return set(map(id, jax.tree.leaves(given._replace(rh=()))))


def added(copies: Any) -> Array:
    """The gradient of a weight from those of its copies."""
    if isinstance(copies, Parts):
        return jnp.stack([added(piece) for piece in copies.pieces])
    return jnp.sum(copies.rows, 0)


def part(rest: Weights, chosen: list[bool]) -> tuple[list[Any], list[Any]]:
    """The leaves that are not chosen and those that are, with None in the places of the others."""
    leaves = list(zip(jax.tree.leaves(rest), chosen, strict=True))
    return [None if c else w for w, c in leaves], [w if c else None for w, c in leaves]


def join(rest: Weights, small: list[Any], large: list[Any]) -> Weights:
    leaves = [b if a is None else a for a, b in zip(small, large, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(rest), leaves)


def state_structure(cell: Cell) -> Any:
    return jax.tree.structure(jax.eval_shape(lambda: cell.initial_state(1)))


def derive(cell: Cell, x_BTD: Any) -> Derived | str:
    """The rule of a cell with equations of its own, or why there is none: they must come to R by
    one `recurrent_matmul` of the cell's output, with the mask as it was given."""
    cell = cell.clone(parent=None)
    batch, _, features = x_BTD.shape
    name, mask = type(cell).__name__, object()
    structure = state_structure(cell)
    places = list(range(structure.num_leaves))
    last: Any = cell.output(jax.tree.unflatten(structure, places))
    if last not in places:
        return f"the output of {name} is none of the arrays of its state"

    def trace(key: Array) -> Any:
        x_BD = jnp.zeros((batch, features), x_BTD.dtype)
        weights, _ = cell.init_with_output(key, features, method="weights")
        weights = cell.cast(weights, x_BD)
        state = cell.initial_state(batch, cell.state_dtype(x_BD))
        h_BJ = cell.output(state)
        product = Product(recurrent_matmul(h_BJ, weights.recurrent_JGH, None))
        rest = rest_of(weights)._replace(recurrent_JGH=product)
        new = cell.step(rest, state, cell.project(weights, x_BD), mask)  # type: ignore[arg-type]
        if len(product.asked) != 1 or any(h is not h_BJ for h, _ in product.asked):
            raise TypeError("they multiply another array than its output, or several")
        if product.asked[0][1] is not mask:
            raise TypeError("recurrent dropout is left out of the product")
        return new

    try:
        new = jax.eval_shape(trace, jax.random.key(0))
    except Exception as error:  # the equations are anybody's; the scan says what is wrong with them
        return f"the equations of {name} are not those of a product with R alone ({error})"
    if jax.tree.structure(new) != structure:
        return f"{name} gives another state than it begins with"
    others = [n for n in places if n != last]
    return Derived(cell, (*others, last))


def rest_of(weights: Weights) -> Weights:
    """The weights that a step has besides the product and the projected input."""
    return Weights(None, None, None, weights.recurrent_bias_H, weights.own)  # type: ignore[arg-type]
