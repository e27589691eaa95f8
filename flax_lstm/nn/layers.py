# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers: `RNN` runs a cell over time, `Bidirectional` runs two, `Stack` puts layers on
each other.

Axes: B batch, T time, D input features, H hidden units, J hidden units of the previous step, G
gates. Every layer maps `(x_BTD, lengths_B, state)` to `(state, y_BTH)`. Sequences are padded on the
right; padding leaves the state untouched and outputs zero, so the final state is that after each
row's last valid step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.machine.sharding import on_each_device
from flax_lstm.nn import recurrence
from flax_lstm.nn.cells import Cell

Array = jax.Array
Advance = Callable[[nn.Module, Any, Array], tuple[Any, Array]]  # (cell, state, x_t) -> (state, y_t)


def scan(
    advance: Advance,
    cell: nn.Module,
    state: Any,
    x_BT: Array,
    lengths_B: Array | None,
    reverse: bool,
) -> tuple[Any, Array]:
    """`flax.linen.scan` of `advance` over the time axis: the definition of every recurrence
    here."""

    def body(cell: nn.Module, state: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        x, t = inputs
        new, y = advance(cell, state, x)
        if lengths_B is None:
            return new, y
        valid = t < lengths_B
        keep = jax.tree.map(lambda a, b: jnp.where(_like(valid, a), a, b), new, state)
        return keep, jnp.where(_like(valid, y), y, 0)

    loop = nn.scan(
        body,
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        in_axes=((1, 0),),  # type: ignore[arg-type]
        out_axes=1,
        reverse=reverse,
    )
    return loop(cell, state, (x_BT, jnp.arange(x_BT.shape[1])))


def _like(valid_B: Array, x: Array) -> Array:
    return valid_B.reshape(valid_B.shape + (1,) * (x.ndim - 1))


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
    backend: how to run it; see `flax_lstm.backends()`. All give the same result.

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
    backend: recurrence.BackendName = "auto"

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        *,
        reverse: bool = False,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        """Final state and outputs [B, T, H].

        lengths_B: valid steps of each row, from 0 to T; None: all T.
        state: where to begin; None: the cell's state of zeros.
        reverse: read each row from its last valid step to its first; outputs stay in their places.
        deterministic: no dropout; otherwise the caller gives an rng named "dropout".
        """
        cell, backend = self.cell, self.resolve(x_BTD)
        weights, state, x_BTD, mask_BJ = self.prepare(x_BTD, state, deterministic)
        if not isinstance(cell, Cell):
            return scan(
                lambda cell, state, x: cell(state, x), cell, state, x_BTD, lengths_B, reverse
            )

        def run(
            weights: Any, state: Any, x_BTD: Array, lengths_B: Any, mask_BJ: Any
        ) -> tuple[Any, Array]:
            if backend is not None:
                return backend.run(
                    cell, cell.cast(weights, x_BTD), x_BTD, lengths_B, state, mask_BJ, reverse
                )

            def advance(cell: Any, state: Any, x_BGH: Array) -> tuple[Any, Array]:
                # Cast at every step, so that the gradients of all steps add up in the dtype of the
                # weights themselves.
                state = cell.step(cell.cast(weights, x_BTD), state, x_BGH, mask_BJ)
                return state, cell.output(state).astype(cell.compute_dtype(x_BTD))

            return scan(advance, cell, state, cell.project(weights, x_BTD), lengths_B, reverse)

        return on_each_device(run, partitioned=backend is None)(
            weights, state, x_BTD, lengths_B, mask_BJ
        )

    def resolve(self, x_BTD: Any) -> Any:
        """The backend for these inputs; None: the scan. Foreign cells have no other."""
        if x_BTD.ndim != 3:
            raise ValueError(
                f"RNN takes inputs [batch, time, features]; these have shape {x_BTD.shape}"
            )
        if not isinstance(self.cell, Cell):
            return None
        return recurrence.resolve(
            self.backend, self.cell, x_BTD, self.recurrent_dropout > 0, "/".join(self.path)
        )

    @nn.compact
    def prepare(
        self, x_BTD: Any, state: Any, deterministic: bool
    ) -> tuple[Any, Any, Any, Array | None]:
        """Weights as they are kept, state, inputs and mask of recurrent dropout; dropout applied to
        each."""
        if self.dropout:
            x_BTD = nn.Dropout(self.dropout, broadcast_dims=(1,))(
                x_BTD, deterministic=deterministic
            )
        cell = self.cell
        if not isinstance(cell, Cell):
            if self.recurrent_dropout or self.weight_dropout:
                raise ValueError(
                    "recurrent_dropout and weight_dropout work with flax_lstm's cells only"
                )
            if state is None:
                state = cell.initialize_carry(jax.random.key(0), x_BTD[:, 0].shape)
            return None, state, x_BTD, None

        weights = cell.weights(x_BTD.shape[-1])
        if self.weight_dropout:
            drop = nn.Dropout(self.weight_dropout)
            weights = weights._replace(
                recurrent_JGH=drop(weights.recurrent_JGH, deterministic=deterministic)
            )
        batch, dtype = x_BTD.shape[0], cell.state_dtype(x_BTD)
        if state is None:
            state = cell.initial_state(batch, dtype)
        state = jax.tree.map(lambda s: s.astype(dtype), state)
        mask_BJ = None
        if self.recurrent_dropout and not deterministic:
            ones = jnp.ones((batch, cell.features), dtype)
            mask_BJ = nn.Dropout(self.recurrent_dropout, deterministic=False)(ones)
        return weights, state, x_BTD, mask_BJ

    def directions(self) -> tuple["RNN", ...]:
        return (self,)


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
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        together = run_together([self], x_BTD, lengths_B, (state,), deterministic)
        if together is not None:
            (state,), y_BTH = together
            return state, y_BTH
        first, second = (None, None) if state is None else state
        first, y_BTH = self.forward(x_BTD, lengths_B, first, deterministic=deterministic)
        second, z_BTH = self.backward(
            x_BTD, lengths_B, second, reverse=True, deterministic=deterministic
        )
        return (first, second), jnp.concatenate([y_BTH, z_BTH], axis=-1)

    def directions(self) -> tuple[RNN, ...]:
        return self.forward, self.backward


class Stack(nn.Module):
    """Layers on each other, of any widths; each reads the outputs of the one below. The state is
    the tuple of theirs.

    residual: add a layer's input to its output where their widths agree (He et al. 2016).
    """

    layers: Sequence[nn.Module]
    residual: bool = False

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        before = state if state is not None else (None,) * len(self.layers)
        if not self.residual:
            together = run_together(self.layers, x_BTD, lengths_B, before, deterministic)
            if together is not None:
                return together
        after = []
        for layer, begin in zip(self.layers, before, strict=True):
            end, y_BTH = layer(x_BTD, lengths_B, begin, deterministic=deterministic)
            x_BTD = x_BTD + y_BTH if self.residual and x_BTD.shape == y_BTH.shape else y_BTH
            after.append(end)
        return tuple(after), x_BTD


def run_together(
    layers: Sequence[Any],
    x_BTD: Array,
    lengths_B: Array | None,
    states: Sequence[Any],
    deterministic: bool,
) -> tuple[Any, Array] | None:
    """Layers on each other by one call of their backend. None where it has no such call, and where
    the layers differ or
    some of their inputs are dropped: then they run one after the other."""
    if not all(isinstance(layer, RNN | Bidirectional) for layer in layers):
        return None
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
        given = (state,) if len(layer) == 1 else state or (None,) * 2
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
