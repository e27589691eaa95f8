# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers: `RNN` runs a cell over time, `Bidirectional` runs two, `Stack` puts layers on
each other.

Axes: B batch, T time, D input features, H hidden units, J hidden units of the previous step, G
gates. Every layer maps `(x_BTD, lengths_B, state)` to `(state, y_BTH)`. Sequences are padded on the
right; padding leaves the state untouched and outputs zero, so the final state is that after each
row's last valid step. What padding holds, be it NaN, reaches neither outputs nor gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError

from flax_lstm.errors import ArgumentError, UserError
from flax_lstm.machine.sharding import in_auto_axes, on_each_device, with_rows_of
from flax_lstm.nn import checks, recurrence
from flax_lstm.nn.cells import Cell, GRUCell, Weights
from flax_lstm.nn.recurrence import rows
from flax_lstm.nn.recurrence.primitives import alike

Array = jax.Array
Advance = Callable[[nn.Module, Any, Array], tuple[Any, Array]]  # (cell, state, x_t) -> (state, y_t)


def scan(
    advance: Advance,
    cell: nn.Module,
    state: Any,
    x_BT: Array,
    lengths_B: Array | None,
    reverse: bool,
    reset_BT: Array | None = None,
    states: bool = False,
) -> tuple[Any, Any]:
    """`flax.linen.scan` of `advance` over the time axis: the definition of every recurrence
    here. The final state, and outputs [B, T, H]; with `states` those and the state after every
    step."""
    fresh_BT = None if reset_BT is None else rows.fresh(reset_BT, lengths_B, reverse)
    state = jax.tree.unflatten(
        jax.tree.structure(state), alike(jax.tree.leaves(state), jax.tree.leaves(x_BT))
    )

    def body(cell: nn.Module, state: Any, inputs: tuple[Array, Array, Any]) -> tuple[Any, Any]:
        x, t, fresh_B = inputs
        begin = state
        if fresh_B is not None:
            begin = rows.where_rows(fresh_B, jax.tree.map(jnp.zeros_like, state), state)
        new, y = advance(cell, begin, x)
        if lengths_B is None:
            return new, (y, new) if states else y
        valid_B = t < lengths_B
        kept = rows.where_rows(valid_B, new, state)
        y = rows.where_rows(valid_B, y, jnp.zeros_like(y))
        return kept, (y, kept) if states else y

    loop = nn.scan(
        body,
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        in_axes=((1, 0, 1),),  # type: ignore[arg-type]
        out_axes=1,
        reverse=reverse,
    )
    return loop(cell, state, (x_BT, jnp.arange(x_BT.shape[1]), fresh_BT))


def turn(x: Array | None) -> Any:
    """Time and batch, the first two axes, in each other's place. Two turns that meet in a compiled
    program cancel, without a copy."""
    return None if x is None else jnp.swapaxes(x, 0, 1)


class Way(NamedTuple):
    """How a layer is run: the backend (None: the scan), the direction, and what is wanted."""

    backend: Any
    reverse: bool
    time_major: bool  # arrays over time are views of others that have time first
    states: bool  # outputs are followed by the state after every step


def run_cell(
    cell: Cell,
    way: Way,
    weights: Weights,
    state: Any,
    x_BTD: Array,
    lengths_B: Array | None,
    mask_BJ: Array | None,
    reset_BT: Array | None,
) -> tuple[Any, Any]:
    """One of our cells over time."""
    backend, reverse, states = way.backend, way.reverse, way.states
    if backend is not None:
        if not hasattr(backend, "ROUNDS"):
            weights = cell.cast(weights, x_BTD)
        arguments = (cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse, reset_BT)
        options = {"time_major": True} if way.time_major and hasattr(backend, "TIME_MAJOR") else {}
        run = backend.run_states if states else backend.run
        return run(*arguments, **options)

    def advance(cell: Any, state: Any, x_BGH: Array) -> tuple[Any, Array]:
        # Cast at every step, so that the gradients of all steps add up in the dtype of the weights
        # themselves.
        state = cell.step(cell.cast(weights, x_BTD), state, x_BGH, mask_BJ)
        return state, cell.output(state).astype(cell.compute_dtype(x_BTD))

    x_BTGH = cell.project(weights, rows.without_padding(x_BTD, lengths_B))
    return scan(advance, cell, state, x_BTGH, lengths_B, reverse, reset_BT, states)


class RNN(nn.Module):
    """Runs a cell over the time axis.

    cell: one of `flax_lstm`'s cells, or any Flax `RNNCellBase` (scanned as it is, without dropout
    on its weights).
    dropout: share of the input features dropped, one mask [B, D] a sequence.
    recurrent_dropout: share of the hidden units dropped where they enter the recurrent matmul, one
    mask [B, J] a
        sequence, shared by the gates, never applied to the carried state (Gal & Ghahramani 2016).
    weight_dropout: share of the recurrent weights dropped, one mask a batch (DropConnect, Merity et
    al. 2018).
    masks_per_gate: `dropout` and `recurrent_dropout` have a mask for each gate, [B, G, D] and
        [B, G, J], as Keras' layers with `recurrent_dropout` draw them. With flax_lstm's cells only.
    backend: how to run it; see `flax_lstm.backends()`. All give the same result.
    time_major: inputs, resets, outputs and states are [T, B, ...]; no copy is made for `cpu`.
    return_states: a call gives three things: final state, outputs, and the state after every step,
    with leaves [B, T, H]; in padding, the state that is held there.

    Example: a layer of 64 units over 8 sequences of up to 20 steps.

        rnn = RNN(LSTMCell(64))
        variables = rnn.init(key, x_BTD)
        state, y_BTH = rnn.apply(variables, x_BTD, lengths_B)     # state.h_BH: the last valid
        output of each row
    """

    cell: nn.RNNCellBase
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    masks_per_gate: bool = False
    backend: recurrence.BackendName = "auto"
    time_major: bool = False
    return_states: bool = False

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        *,
        reset_BT: Array | None = None,
        reverse: bool = False,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        """Final state and outputs [B, T, H].

        lengths_B: valid steps of each row, from 0 to T; None: all T.
        state: where to begin, with leaves [B, H], or [1, H] for all rows; None: the cell's state of
        zeros.
        reset_BT: true at steps that are the first of a sequence of their own, in the middle of a
        row: no state, and no gradient, crosses the border before such a step, in whichever
        direction the row is read; the step read behind the border begins from zeros.
        reverse: read each row from its last valid step to its first; outputs stay in their places.
        deterministic: no dropout; otherwise the caller gives an rng named "dropout".

        Raises ArgumentError where shapes or dtypes do not fit.
        """
        x_BTD = checks.inputs(x_BTD, self.time_major)
        batch, time = x_BTD.shape[:2][:: -1 if self.time_major else 1]
        lengths_B = checks.lengths(lengths_B, batch)
        reset_BT = checks.resets(reset_BT, batch, time, self.time_major)
        if self.time_major:
            x_BTD, reset_BT = turn(x_BTD), turn(reset_BT)
        state, y = self.run(x_BTD, lengths_B, state, reset_BT, reverse, deterministic)
        if self.time_major:
            y = jax.tree.map(turn, y)
        return (state, *y) if self.return_states else (state, y)

    def run(
        self,
        x_BTD: Array,
        lengths_B: Array | None,
        state: Any,
        reset_BT: Array | None,
        reverse: bool,
        deterministic: bool,
    ) -> tuple[Any, Any]:
        cell, backend = self.cell, self.resolve(x_BTD, reset_BT is not None)
        weights, state, x_BTD, mask_BJ = self.prepare(x_BTD, state, deterministic)
        if not isinstance(cell, Cell):
            x_BTD = rows.without_padding(x_BTD, lengths_B)
            state, lengths_B, reset_BT = with_rows_of((state, lengths_B, reset_BT), x_BTD)
            arrays = (x_BTD, lengths_B, reverse, reset_BT, self.return_states)
            return scan(lambda cell, state, x: cell(state, x), cell, state, *arrays)

        way = Way(backend, reverse, self.time_major, self.return_states)
        run = in_auto_axes(functools.partial(run_cell, cell, way), x_BTD)
        return on_each_device(run, partitioned=backend is None)(
            weights, state, x_BTD, lengths_B, mask_BJ, reset_BT
        )

    @nn.nowrap
    def resolve(self, x_BTD: Any, resets: bool = False) -> Any:
        """The backend for these inputs; None: the scan. Foreign cells have no other."""
        if isinstance(self.cell, Cell):
            dropout: recurrence.Masks = "tied" if self.recurrent_dropout > 0 else None
            if self.masks_per_gate and (self.dropout or self.recurrent_dropout):
                dropout = "per gate"
            layer = "/".join(self.path)
            case = (x_BTD, dropout, resets, self.return_states)
            return recurrence.resolve(self.backend, self.cell, *case, layer=layer)
        if self.backend not in ("auto", "scan"):
            raise UserError(
                f"backend {self.backend} cannot run {type(self.cell).__name__}: it is none of "
                "flax_lstm's cells, and so is scanned as it is. Use auto or scan."
            )
        return None

    @nn.compact
    def prepare(
        self, x_BTD: Any, state: Any, deterministic: bool
    ) -> tuple[Any, Any, Any, Array | None]:
        """Weights as they are kept, state, inputs and mask of recurrent dropout; dropout applied to
        each."""
        features = x_BTD.shape[-1]
        if self.dropout and not self.masks_per_gate:
            x_BTD = nn.Dropout(self.dropout, broadcast_dims=(1,))(
                x_BTD, deterministic=deterministic
            )
        cell, batch = self.cell, x_BTD.shape[0]
        if not isinstance(cell, Cell):
            if self.recurrent_dropout or self.weight_dropout or self.masks_per_gate:
                raise ArgumentError(
                    "recurrent_dropout, weight_dropout and masks_per_gate work with flax_lstm's "
                    "cells only"
                )
            begin = cell.initialize_carry(jax.random.key(0), (batch, x_BTD.shape[2]))
            if getattr(cell, "dtype", None) is None:  # it computes in the wider of both dtypes
                wider = functools.partial(jnp.promote_types, x_BTD.dtype)
                begin = jax.tree.map(lambda leaf: leaf.astype(wider(leaf.dtype)), begin)
            return None, begin if state is None else checks.state(state, begin), x_BTD, None

        weights = self.weights(features)
        if self.dropout and self.masks_per_gate and not deterministic:
            ones = jnp.ones((batch, 1, cell.gates, features), x_BTD.dtype)
            mask_B1GD = nn.Dropout(self.dropout, deterministic=False)(ones)
            x_BTGD = x_BTD[:, :, None] * mask_B1GD
            x_BTD = x_BTGD.reshape(*x_BTD.shape[:2], -1)  # see `cells.input_matmul`
        if self.weight_dropout:
            drop = nn.Dropout(self.weight_dropout)
            weights = weights._replace(
                recurrent_JGH=drop(weights.recurrent_JGH, deterministic=deterministic)
            )
        dtype = cell.state_dtype(x_BTD)
        zeros = cell.initial_state(batch, dtype)
        state = zeros if state is None else checks.state(state, zeros)
        mask_BJ = None
        if self.recurrent_dropout and not deterministic:
            gates = (cell.gates,) if self.masks_per_gate else ()
            ones = jnp.ones((batch, *gates, cell.outputs), dtype)
            mask_BJ = nn.Dropout(self.recurrent_dropout, deterministic=False)(ones)
        return weights, state, x_BTD, mask_BJ

    def weights(self, input_size: int) -> Any:
        """The cell's weights; inputs of another width than theirs are refused."""
        try:
            return self.cell.weights(input_size)
        except ScopeParamShapeError:
            kept: Any = self.cell.get_variable("params", "input").shape[0]
            raise ArgumentError(
                f"inputs: expected {kept} features, as the weights of this layer have them, got "
                f"{input_size}"
            ) from None

    @nn.nowrap
    def directions(self) -> tuple["RNN", ...]:
        return (self,)


class ScannedRNN(nn.Module):
    """The recurrent layer of reinforcement learning, as PureJaxRL, JaxMARL and Stoix write it:
    `(carry, (ins_TBD, resets_TB)) -> (carry, out_TBH)`, where a step whose reset is true begins
    from zeros.

    cell: any of RNN's; None: a GRU as wide as its inputs, as in PureJaxRL.
    backend: as of `RNN`.

    The carry begins as zeros: `ScannedRNN.initialize_carry(batch, hidden)` for a GRU,
    `cell.initial_state(batch)` for any cell. It comes back in the structure and dtypes in which it
    was given, so that it can be the carry of a `jax.lax.scan`.
    """

    cell: nn.RNNCellBase | None = None
    backend: recurrence.BackendName = "auto"

    @nn.compact
    def __call__(self, carry: Any, x: tuple[Array, Array]) -> tuple[Any, Array]:
        ins_TBD, resets_TB = x
        ins_TBD = checks.inputs(ins_TBD, time_major=True)
        cell = GRUCell(ins_TBD.shape[-1], name="cell") if self.cell is None else self.cell
        rnn = RNN(cell, backend=self.backend, time_major=True)
        state, out_TBH = rnn(ins_TBD, None, carry, reset_BT=resets_TB)
        given, structure = jax.tree.flatten(carry)
        after = [
            new.astype(old.dtype) for new, old in zip(jax.tree.leaves(state), given, strict=True)
        ]
        return jax.tree.unflatten(structure, after), out_TBH

    @staticmethod
    def initialize_carry(batch_size: int, hidden_size: int) -> Array:
        """Zeros [B, H]."""
        return jnp.zeros((batch_size, hidden_size), jnp.float32)


class Bidirectional(nn.Module):
    """Reads a sequence in both directions and concatenates the outputs on the last axis (Schuster &
    Paliwal 1997).

    forward, backward: two `RNN`s with cells of their own. The state is the pair of theirs.
    """

    forward: RNN
    backward: RNN

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        *,
        reset_BT: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        together = run_together([self], x_BTD, lengths_B, (state,), reset_BT, deterministic)
        if together is not None:
            (state,), y_BTH = together
            return state, y_BTH
        first, second = checks.parts(state, "directions", 2)
        options: Any = {"reset_BT": reset_BT, "deterministic": deterministic}
        first, y_BTH = self.forward(x_BTD, lengths_B, first, **options)
        second, z_BTH = self.backward(x_BTD, lengths_B, second, reverse=True, **options)
        return (first, second), jnp.concatenate([y_BTH, z_BTH], axis=-1)

    @nn.nowrap
    def directions(self) -> tuple[RNN, ...]:
        return self.forward, self.backward


class Stack(nn.Module):
    """Layers on each other, of any widths; each reads the outputs of the one below. The state is
    the tuple of theirs.

    residual: add a layer's input to its output where their widths agree (He et al. 2016).
    """

    layers: Sequence[nn.Module]
    residual: bool = False

    def __post_init__(self) -> None:
        # So that a Stack can be hashed, and be a static argument of jax.jit.
        object.__setattr__(self, "layers", tuple(self.layers))
        super().__post_init__()

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        *,
        reset_BT: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        before = checks.parts(state, "layers", len(self.layers))
        if not self.residual:
            together = run_together(self.layers, x_BTD, lengths_B, before, reset_BT, deterministic)
            if together is not None:
                return together
        # Layers of others need not know resets.
        options = {} if reset_BT is None else {"reset_BT": reset_BT}
        after = []
        for layer, begin in zip(self.layers, before, strict=True):
            end, y_BTH = layer(x_BTD, lengths_B, begin, deterministic=deterministic, **options)
            x_BTD = x_BTD + y_BTH if self.residual and x_BTD.shape == y_BTH.shape else y_BTH
            after.append(end)
        return tuple(after), x_BTD


def run_together(
    layers: Sequence[Any],
    x_BTD: Array,
    lengths_B: Array | None,
    states: Sequence[Any],
    reset_BT: Array | None,
    deterministic: bool,
) -> tuple[Any, Array] | None:
    """Layers on each other by one call of their backend. None where it has no such call, and where
    the layers differ or some of their inputs are dropped: then they run one after the other."""
    if reset_BT is not None or not all(isinstance(one, RNN | Bidirectional) for one in layers):
        return None
    if any(rnn.time_major or rnn.return_states for one in layers for rnn in one.directions()):
        return None
    x_BTD = checks.inputs(x_BTD)
    lengths_B = checks.lengths(lengths_B, x_BTD.shape[0])
    stack = [layer.directions() for layer in layers]
    rnns = [rnn for layer in stack for rnn in layer]
    backends = [rnn.resolve(x_BTD) for rnn in rnns]
    backend: Any = backends[0] if rnns else None
    if not hasattr(backend, "run_stack") or any(other is not backend for other in backends):
        return None
    cells = {(type(rnn.cell), rnn.cell.features, rnn.cell.compute_dtype(x_BTD)) for rnn in rnns}
    dropped = not deterministic and any(rnn.dropout for rnn in rnns)
    if len(cells) > 1 or len({*map(len, stack)}) > 1 or dropped:
        return None

    cell, weights, begin = rnns[0].cell, [], []
    inputs: Any = x_BTD
    for layer, state in zip(stack, states, strict=True):
        given = (state,) if len(layer) == 1 else checks.parts(state, "directions", 2)
        both = [rnn.prepare(inputs, s, deterministic) for rnn, s in zip(layer, given, strict=True)]
        weights.append([one[0] for one in both])
        begin.append([one[1] for one in both])
        inputs = jax.ShapeDtypeStruct(
            (*x_BTD.shape[:2], len(layer) * cell.features), cell.compute_dtype(x_BTD)
        )

    def run(weights: Any, states: Any, x_BTD: Array, lengths_B: Any) -> tuple[Any, Array]:
        return backend.run_stack(cell, cell.cast(weights, x_BTD), x_BTD, lengths_B, states)

    ends, y_BTH = on_each_device(run)(weights, begin, x_BTD, lengths_B)
    return tuple(end if len(end) == 2 else end[0] for end in ends), y_BTH
