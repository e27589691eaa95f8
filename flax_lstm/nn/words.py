# SPDX-License-Identifier: Apache-2.0
"""Reading words faster when weights are fixed: what the first layer's gates get from a word depends
on the word alone, so it is computed once for each and then looked up. No embedding is gathered, and
no input is multiplied.

Axes: B batch, T time, V words, E features of an embedding, G gates, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.nn import checks
from flax_lstm.nn.cells import Cell, GRUCell, Weights, input_matmul
from flax_lstm.nn.layers import RNN, Bidirectional, Stack, scan
from flax_lstm.nn.models import SequenceModel
from flax_lstm.nn.recurrence import BackendName, cpu, int8, resolve

Array = jax.Array

LARGEST = 256 << 20  # bytes of the tables of a layer


class WordLayer(nn.Module):
    """A recurrent layer over words [B, T], with a table in place of input weights.

    cells: one, or two of which the second reads backward, their outputs side by side.
    words: entries V of the tables, whose rows are Wx + b.
    backend: as of `RNN`.
    """

    cells: tuple[Cell, ...]
    words: int
    backend: BackendName = "auto"

    @nn.compact
    def __call__(
        self,
        words_BT: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        """Final state (of each direction, where there are two) and outputs [B, T, H]; see `RNN`."""
        batch = words_BT.shape[0]
        lengths_B = checks.lengths(lengths_B, batch)
        several = len(self.cells) > 1
        given = checks.parts(state, "directions", 2) if several else (state,)
        ends, outputs = [], []
        for n, (cell, begin) in enumerate(zip(self.cells, given, strict=True)):
            shape = (self.words, cell.gates, cell.features)
            table_VGH = self.param(f"table_{n}", nn.initializers.zeros, shape)
            zeros = cell.initial_state(batch)
            begin = zeros if begin is None else checks.state(begin, zeros)
            end, y_BTH = self.read(cell, table_VGH, words_BT, lengths_B, begin, reverse=n > 0)
            ends.append(end)
            outputs.append(y_BTH)
        return tuple(ends) if several else ends[0], jnp.concatenate(outputs, axis=-1)

    def read(
        self,
        cell: Cell,
        table_VGH: Array,
        words_BT: Array,
        lengths_B: Array | None,
        state: Any,
        reverse: bool,
    ) -> tuple[Any, Array]:
        weights, dtype = cell.weights(1), like(cell)  # of one input, which nothing reads
        backend: Any = resolve(self.backend, cell, dtype, layer="/".join(self.path))
        if hasattr(backend, "run_words"):
            arguments = (weights, table_VGH, words_BT, lengths_B, state, reverse)
            return backend.run_words(cell, *arguments)

        def advance(cell: Any, state: Any, x_BGH: Array) -> tuple[Any, Array]:
            state = cell.step(cell.cast(weights, dtype), state, x_BGH)
            return state, cell.output(state).astype(cell.compute_dtype(dtype))

        return scan(advance, cell, state, table_VGH[words_BT], lengths_B, reverse)


class ByteLayer(WordLayer):
    """The same with recurrent weights of 8 bits (`recurrence/int8.py`), by the backend `cpu`."""

    def read(
        self,
        cell: Cell,
        table_VGH: Array,
        words_BT: Array,
        lengths_B: Array | None,
        state: Any,
        reverse: bool,
    ) -> tuple[Any, Array]:
        n, zeros, units = int(reverse), nn.initializers.zeros, cell.features
        shape = int8.panels_shape(cell.gates, units)
        panels = self.param(f"panels_{n}", zeros, shape, jnp.int8)
        scale_GH = self.param(f"scale_{n}", zeros, (cell.gates, units))
        apart = isinstance(cell, GRUCell)
        bias_H = self.param(f"recurrent_bias_{n}", zeros, (units,)) if apart else None
        weights = int8.Bytes(panels, scale_GH)
        return cpu.run_bytes(weights, bias_H, table_VGH, words_BT, lengths_B, state, reverse)


def like(cell: Cell) -> Array:
    """Inputs, of more steps than one, that ask for nothing but the dtype that a cell has by
    itself."""
    return jnp.zeros((1, 2, 1), cell.dtype or cell.param_dtype)


def table(cell: Cell, embedding_VE: Array, weights: Weights) -> Array:
    """Wx + b for every word, [V, G, H], added up in float32."""
    dtype = cell.compute_dtype(like(cell))
    x_VE, input_EGH = embedding_VE.astype(dtype), weights.input_DGH.astype(dtype)
    return input_matmul(x_VE, input_EGH, jnp.float32) + weights.bias_GH[None]


def cells_for_tables(module: nn.Module) -> tuple[Cell, ...]:
    """The cells of the layer that reads words, of each direction; none where `with_tables` leaves a
    module as it is."""
    if not (isinstance(module, SequenceModel) and isinstance(module.embed, nn.Embed)):
        return ()
    stack, embed = module.recurrent, module.embed
    if module.tied or not isinstance(stack, Stack) or stack.residual:
        return ()
    first = stack.layers[0]
    if not isinstance(first, RNN | Bidirectional):
        return ()
    rnns = first.directions()
    cells = tuple(rnn.cell for rnn in rnns if fits(rnn) and isinstance(rnn.cell, Cell))
    size = sum(4 * embed.num_embeddings * cell.gates * cell.features for cell in cells)
    return cells if len(cells) == len(rnns) and size <= LARGEST else ()


def with_tables(
    module: nn.Module, params: Any, eight_bits: bool = False
) -> tuple[nn.Module, Any] | None:
    """A module and parameters that give the same outputs, but for rounding, without dropout and
    from no state: the embedding and the input weights of its first layer are tables. None where
    that is not possible, or would be no faster: it is for words, and for the backend `cpu`.

    eight_bits: whether that layer's recurrent weights become int8."""
    cells = cells_for_tables(module)
    if not cells:
        return None
    stack, embed = module.recurrent, module.embed
    first, *rest = stack.layers
    rnns = first.directions()

    layers = params["recurrent"]
    below = layers["layers_0"]
    sides = [below] if len(rnns) == 1 else [below["forward"], below["backward"]]
    words: dict[str, Any] = {}
    for n, (cell, side) in enumerate(zip(cells, sides, strict=True)):
        own = side["cell"]
        weights = Weights(own["input"], own["recurrent"], own["bias"])
        table_VGH = table(cell, params["embed"]["embedding"], weights)
        if eight_bits:
            words |= bytes_of(n, table_VGH, own)
        else:
            words |= {f"table_{n}": table_VGH, f"cells_{n}": own | {"input": own["input"][:1]}}
    kind = ByteLayer if eight_bits else WordLayer
    layer = kind(cells, embed.num_embeddings, rnns[0].backend)
    reader = module.clone(
        recurrent=stack.clone(layers=(layer, *rest)), embed=None, embed_dropout=0.0
    )
    others = {name: value for name, value in params.items() if name != "embed"}
    return reader, others | {"recurrent": layers | {"layers_0": words}}


def bytes_of(n: int, table_VGH: Array, own: Any) -> dict[str, Array]:
    """The parameters of direction n of a `ByteLayer`."""
    (panels, scale_GH), excess_GH = int8.pack(own["recurrent"])
    rest: dict[str, Array] = {}
    if "recurrent_bias" in own:  # of a GRU, whose candidate's recurrent part is apart
        rest[f"recurrent_bias_{n}"] = own["recurrent_bias"] - excess_GH[-1]
        excess_GH = excess_GH.at[-1].set(0)
    return {
        f"table_{n}": table_VGH - excess_GH[None],
        f"panels_{n}": panels,
        f"scale_{n}": scale_GH,
    } | rest


def fits(rnn: RNN) -> bool:
    """Whether a layer's backend reads words."""
    if not isinstance(rnn.cell, Cell) or rnn.time_major or rnn.return_states:
        return False
    return hasattr(resolve(rnn.backend, rnn.cell, like(rnn.cell)), "run_words")
