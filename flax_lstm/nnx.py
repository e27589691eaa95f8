# SPDX-License-Identifier: Apache-2.0
"""The recurrences as modules of Flax NNX, on the same kernels, under the names and calls of NNX:

    from flax import nnx
    from flax_lstm.nnx import RNN, LSTMCell

    rnn = RNN(LSTMCell(in_features=8, hidden_features=64, rngs=nnx.Rngs(0)))
    y_BTH = rnn(x_BTD, seq_lengths=lengths_B)

where `nnx.RNN(nnx.OptimizedLSTMCell(...))` stood. What differs from NNX's own: weights are one
array for all gates, with the names, shapes and initial values of this library's Linen cells;
outputs beyond a row's length are zero; a GRU's candidate has a recurrent bias. Carries are those of
NNX, (c, h) of an LSTM, and come back as they were given; with names where none was given.

A module here owns weights, and says by `linen()` which Linen module does the arithmetic with them;
`params()` gives the weights as that module's tree and `load(tree)` takes them from it. So
`flax_lstm.convert` serves both: `stack.load(convert.from_torch(state_dict))`,
`convert.to_torch(stack.params())`.

Axes: B batch, T time, D input features, H hidden units, G gates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.recurrent import flip_sequences

from flax_lstm.errors import ArgumentError, listing
from flax_lstm.nn import cells, layers
from flax_lstm.nn.recurrence import BackendName

Array = jax.Array
Initializer = Callable[..., Array]
Tree = dict[str, Any]


def drawn_per_gate(initializer: Initializer, key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """A weight whose last two axes are G and H, each gate drawn by itself, for NNX's initializers
    know matrices and vectors alone."""
    *rows, gates, hidden = shape
    keys = jax.random.split(key, gates)
    return jnp.stack([initializer(k, (*rows, hidden), dtype) for k in keys], axis=-2)


class Cell(nnx.RNNCellBase):
    """What the cells share; see `flax_lstm.nn.cells` for their equations and weights.

    in_features, hidden_features: D and H.
    kernel_init, recurrent_kernel_init, bias_init: NNX initializers, drawn for each gate by itself;
        None: as the Linen cell begins.
    carry_init: how a carry begins that is not given; None: zeros.
    settings: of the Linen cell, such as `activation_fn`.
    rngs: its stream `params` draws the weights; with `keep_rngs` its `carry` is kept for carries.
    """

    kind: ClassVar[type[cells.Cell]]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        kernel_init: Initializer | None = None,
        recurrent_kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        carry_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        keep_rngs: bool = False,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        self.in_features, self.hidden_features = in_features, hidden_features
        self.carry_init = carry_init
        self.rngs = rngs.carry.fork() if keep_rngs else nnx.data(None)
        self.module = self.kind(hidden_features, dtype=dtype, param_dtype=param_dtype, **settings)
        weights = self.module.init(rngs.params(), in_features, method="weights")["params"]
        self.names = tuple(weights)
        asked = {"input": kernel_init, "recurrent": recurrent_kernel_init, "bias": bias_init}
        for name, weight in weights.items():
            if (initializer := asked.get(name)) is not None:
                weight = drawn_per_gate(initializer, rngs.params(), weight.shape, param_dtype)
            setattr(self, name, nnx.Param(weight))

    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """The carry after one step, and its output, for inputs [..., D]."""
        if inputs.shape[-1] != self.in_features:
            raise ArgumentError(
                f"inputs: expected {self.in_features} features, got shape {inputs.shape}"
            )
        return self.module.apply({"params": self.params()}, carry, inputs)  # type: ignore[return-value]

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """The carry before inputs of this shape [..., D]: an array, or the plain pair (c, h), in
        whose place a derived cell may put another. `rngs` (its stream `carry`) is asked for by a
        `carry_init` alone."""
        zeros = self.module.initialize_carry(jax.random.key(0), input_shape)
        zeros = tuple(zeros) if isinstance(zeros, tuple) else zeros
        if (initializer := carry_init or self.carry_init) is None:
            return zeros
        stream = rngs or self.rngs
        if stream is None:
            raise ArgumentError("carry_init draws random numbers: pass rngs")
        draw = stream.carry if isinstance(stream, nnx.Rngs) else stream
        return jax.tree.map(lambda leaf: initializer(draw(), leaf.shape, leaf.dtype), zeros)

    @property
    def num_feature_axes(self) -> int:
        return 1

    def linen(self) -> cells.Cell:
        return self.module

    def params(self) -> Tree:
        return {name: getattr(self, name)[...] for name in self.names}

    def load(self, params: Mapping[str, Any]) -> None:
        """Takes the weights of a Linen cell; `ArgumentError` where they do not fit."""
        expected = {name: getattr(self, name).shape for name in self.names}
        found = {name: jnp.shape(weight) for name, weight in params.items()}
        if found != expected:
            raise ArgumentError(f"weights: expected {expected}, got {found}")
        for name, weight in params.items():
            param = getattr(self, name)
            param[...] = jnp.asarray(weight, param.dtype)


class LSTMCell(Cell):
    """Long short-term memory; the forget gate's bias begins at 1."""

    kind = cells.LSTMCell


class GRUCell(Cell):
    """Gated recurrent unit, whose reset gate acts after the matmul."""

    kind = cells.GRUCell


class SimpleRNNCell(Cell):
    """The simple recurrent network."""

    kind = cells.SimpleRNNCell


OptimizedLSTMCell = LSTMCell  # the names that NNX has for them
SimpleCell = SimpleRNNCell


class Layer:
    """Linen's arithmetic with the weights of NNX's modules. A subclass says what it is in Linen
    (`linen`), the parts that own the weights, by their names there (`parts`), and the `RNN`s among
    them (`rnns`)."""

    deterministic: bool

    def linen(self) -> Any:
        raise NotImplementedError

    def parts(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def rnns(self) -> Sequence["RNN"]:
        raise NotImplementedError

    def params(self) -> Tree:
        return {name: part.params() for name, part in self.parts().items()}

    def load(self, params: Mapping[str, Any]) -> None:
        """Takes the weights of the Linen layer; `ArgumentError` where they do not fit."""
        parts = self.parts()
        if set(params) != set(parts):
            raise ArgumentError(f"weights: expected {listing(parts)}, got {listing(params)}")
        for name, part in parts.items():
            part.load(params[name])

    def run(
        self,
        inputs: Array,
        seq_lengths: Array | None,
        carry: Any,
        reset: Array | None,
        time_major: bool,
        deterministic: bool | None,
        **options: Any,
    ) -> tuple[Any, Array]:
        """The carry at the end and the outputs, for inputs [..., T, D] with any number of batch
        axes, or [T, ..., D]. Linen has one batch axis, which comes first."""
        x_BTD = jnp.moveaxis(inputs, 0, -2) if time_major else inputs
        batch, time = x_BTD.shape[:-2], x_BTD.shape[-2]
        one_axis, rows = len(batch) == 1, math.prod(batch)

        def merge(array: Any) -> Any:
            return array if one_axis else array.reshape(rows, *array.shape[len(batch) :])

        def spread(array: Array) -> Array:
            return array if one_axis else array.reshape(*batch, *array.shape[1:])

        if reset is not None and time_major:
            reset = jnp.moveaxis(reset, 0, -1)
        lengths_B, state, reset_BT = jax.tree.map(merge, (seq_lengths, carry, reset))
        deterministic = self.deterministic if deterministic is None else deterministic
        dropping = [rnn for rnn in self.rnns() if rnn.drops and not deterministic]
        state, y_BTH = self.linen().apply(
            {"params": self.params()},
            merge(x_BTD),
            lengths_B,
            state,
            reset_BT=reset_BT,
            deterministic=not dropping,
            rngs={"dropout": dropping[0].dropout_key()} if dropping else {},
            **options,
        )
        leaves = [spread(leaf) for leaf in jax.tree.leaves(state)]
        structure = jax.tree.structure(state if carry is None else carry)
        y = y_BTH.reshape(*batch, time, y_BTH.shape[-1])
        return jax.tree.unflatten(structure, leaves), jnp.moveaxis(y, -2, 0) if time_major else y


class RNN(Layer, nnx.RNN):
    """Runs a cell over time, where `nnx.RNN` stood: a cell of this module by the fastest way there
    is, any other (also a subclass with a `__call__` of its own) by `nnx.RNN` itself.

    dropout, recurrent_dropout, weight_dropout, masks_per_gate, backend: see `flax_lstm.RNN`; masks
        are drawn from the stream `dropout` of `rngs`, and `model.train()` and `model.eval()` turn
        them on and off.
    The other options are those of `nnx.RNN`; `unroll`, `state_axes` and `broadcast_rngs` concern
    `nnx.RNN` alone.
    """

    cell: Any

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        *,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        masks_per_gate: bool = False,
        backend: BackendName = "auto",
        deterministic: bool = False,
        rngs: Any = True,
        **options: Any,
    ) -> None:
        super().__init__(cell, rngs=rngs, **options)
        self.dropout, self.recurrent_dropout = dropout, recurrent_dropout
        self.weight_dropout, self.backend = weight_dropout, backend
        self.masks_per_gate = masks_per_gate
        self.deterministic = deterministic
        self.dropout_rngs = nnx.data(None)
        if self.drops and isinstance(rngs, nnx.Rngs):
            self.dropout_rngs = rngs.dropout.fork()

    @property
    def drops(self) -> bool:
        return max(self.dropout, self.recurrent_dropout, self.weight_dropout) > 0

    @property
    def ours(self) -> bool:
        """Whether the cell is one of this module, and called as these are."""
        return isinstance(self.cell, Cell) and type(self.cell).__call__ is Cell.__call__

    def dropout_key(self) -> Array:
        if self.dropout_rngs is None:
            raise ArgumentError("dropout draws random numbers: pass rngs=nnx.Rngs(...) to RNN")
        return self.dropout_rngs()

    def linen(self) -> layers.RNN:
        return layers.RNN(
            self.cell.linen(),
            dropout=self.dropout,
            recurrent_dropout=self.recurrent_dropout,
            weight_dropout=self.weight_dropout,
            masks_per_gate=self.masks_per_gate,
            backend=self.backend,
        )

    def parts(self) -> Mapping[str, Any]:
        return {"cell": self.cell}

    def rnns(self) -> Sequence["RNN"]:
        return (self,)

    def __call__(  # type: ignore[override]
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
        reset: Array | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Outputs [..., T, H], or (carry, outputs), as of `nnx.RNN`.

        reset: true at steps [..., T] that are the first of a sequence of their own; see
        `flax_lstm.RNN`.
        """
        if not self.ours:
            if self.drops or reset is not None or self.backend not in ("auto", "scan"):
                raise ArgumentError(
                    f"{type(self.cell).__name__} is run by nnx.RNN, which has no dropout, resets "
                    "or backends"
                )
            return super().__call__(
                inputs,
                initial_carry=initial_carry,
                seq_lengths=seq_lengths,
                return_carry=return_carry,
                time_major=time_major,
                reverse=reverse,
                keep_order=keep_order,
                rngs=rngs,
            )
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        if initial_carry is None and self.cell.carry_init is not None:
            one_step = inputs.shape[1:] if time_major else (*inputs.shape[:-2], inputs.shape[-1])
            initial_carry = self.cell.initialize_carry(one_step, rngs or self.rngs)
        carry, y = self.run(
            inputs, seq_lengths, initial_carry, reset, time_major, deterministic, reverse=reverse
        )
        if reverse and not keep_order:
            y = flip_sequences(y, seq_lengths, num_batch_dims=y.ndim - 2, time_major=time_major)
        return (carry, y) if (self.return_carry if return_carry is None else return_carry) else y


def concatenate(a: Array, b: Array) -> Array:
    return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Layer, nnx.Module):
    """Reads in both directions, where `nnx.Bidirectional` stood; the carry is the pair of theirs.

    merge_fn: puts the outputs of the two together.
    """

    def __init__(
        self,
        forward_rnn: RNN,
        backward_rnn: RNN,
        *,
        merge_fn: Callable[[Array, Array], Array] = concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.forward_rnn, self.backward_rnn, self.merge_fn = forward_rnn, backward_rnn, merge_fn
        self.time_major, self.return_carry = time_major, return_carry
        self.deterministic = deterministic

    def linen(self) -> layers.Bidirectional:
        return layers.Bidirectional(self.forward_rnn.linen(), self.backward_rnn.linen())

    def parts(self) -> Mapping[str, Any]:
        return {"forward": self.forward_rnn, "backward": self.backward_rnn}

    def rnns(self) -> Sequence[RNN]:
        return self.forward_rnn, self.backward_rnn

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        rngs: Any = None,
        reset: Array | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Outputs [..., T, 2 H], or ((carry forward, carry backward), outputs)."""
        time_major = self.time_major if time_major is None else time_major
        plain = all(rnn.ours and rnn.cell.carry_init is None for rnn in self.rnns())
        if plain and self.merge_fn is concatenate:
            carry, y = self.run(
                inputs, seq_lengths, initial_carry, reset, time_major, deterministic
            )
        else:
            begin = (None, None) if initial_carry is None else initial_carry
            options: Any = {
                "seq_lengths": seq_lengths,
                "return_carry": True,
                "time_major": time_major,
                "rngs": rngs,
                "reset": reset,
                "deterministic": self.deterministic if deterministic is None else deterministic,
            }
            first, y = self.forward_rnn(
                inputs, initial_carry=begin[0], reverse=False, keep_order=False, **options
            )
            second, z = self.backward_rnn(
                inputs, initial_carry=begin[1], reverse=True, keep_order=True, **options
            )
            carry, y = (first, second), self.merge_fn(y, z)
        return (carry, y) if (self.return_carry if return_carry is None else return_carry) else y


class Stack(Layer, nnx.Module):
    """`RNN`s and `Bidirectional`s on each other; the carry is the tuple of theirs.

    residual: add a layer's input to its output where their widths agree.
    """

    def __init__(
        self,
        layers: Sequence[RNN | Bidirectional],
        *,
        residual: bool = False,
        time_major: bool = False,
        return_carry: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.layers, self.residual = nnx.List(layers), residual
        self.time_major, self.return_carry = time_major, return_carry
        self.deterministic = deterministic
        for rnn in self.rnns():
            if not rnn.ours or rnn.cell.carry_init is not None:
                raise ArgumentError("a Stack takes cells of flax_lstm.nnx without carry_init")

    def linen(self) -> layers.Stack:
        return layers.Stack([layer.linen() for layer in self.layers], residual=self.residual)

    def parts(self) -> Mapping[str, Any]:
        return {f"layers_{n}": layer for n, layer in enumerate(self.layers)}

    def rnns(self) -> Sequence[RNN]:
        return [rnn for layer in self.layers for rnn in layer.rnns()]

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reset: Array | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Outputs [..., T, H] of the last layer, or (carries, outputs)."""
        time_major = self.time_major if time_major is None else time_major
        carry, y = self.run(inputs, seq_lengths, initial_carry, reset, time_major, deterministic)
        return (carry, y) if (self.return_carry if return_carry is None else return_carry) else y
