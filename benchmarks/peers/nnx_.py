# SPDX-License-Identifier: Apache-2.0
"""Flax NNX: `nnx.RNN` over `nnx.OptimizedLSTMCell` or `nnx.GRUCell`, or `flax_lstm.nnx` in its
place, by the functional API (split once, merge inside of jit), which has less overhead than
`nnx.jit`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from workloads import Work

import flax_lstm.nnx
from peers.linen import last_step
from peers.optax_step import make_step


class Model(nnx.Module):
    def __init__(self, work: Work, ours: bool):
        w, weights, rngs = work.workload, work.weights, nnx.Rngs(0)
        features, layers = w.features, []
        for tree, hidden in zip(weights.stack.values(), w.hidden, strict=True):
            sides = [tree] if "cell" in tree else [tree["forward"], tree["backward"]]
            make, kind = (our_cell, flax_lstm.nnx) if ours else (their_cell, nnx)
            rnns = [kind.RNN(make(w.cell, side["cell"], rngs), rngs=rngs) for side in sides]
            layers.append(kind.Bidirectional(*rnns, rngs=rngs) if w.bidirectional else rnns[0])
            features = hidden * len(sides)
        self.layers, self.bidirectional = nnx.List(layers), w.bidirectional
        self.embed = nnx.data(None)
        if weights.embedding is not None:
            self.embed = nnx.Embed(w.vocabulary, w.features, rngs=rngs)
            self.embed.embedding[...] = weights.embedding
        self.head = nnx.Linear(features, w.outputs, rngs=rngs)
        self.head.kernel[...], self.head.bias[...] = weights.head

    def __call__(self, inputs: Any, lengths_B: Any) -> Any:
        x_BTD = inputs if self.embed is None else self.embed(inputs)
        for layer in self.layers:
            x_BTD = layer(x_BTD, seq_lengths=lengths_B)
        return self.head(last_step(x_BTD, lengths_B, self.bidirectional))


def our_cell(kind: str, weights: dict[str, np.ndarray], rngs: nnx.Rngs) -> nnx.Module:
    features, _, hidden = weights["input"].shape
    cells = {"lstm": flax_lstm.nnx.LSTMCell, "gru": flax_lstm.nnx.GRUCell}
    cell = cells[kind](features, hidden, rngs=rngs)
    cell.load(weights)
    return cell


def their_cell(kind: str, weights: dict[str, np.ndarray], rngs: nnx.Rngs) -> nnx.Module:
    """The cell with these weights, gates in our order. The LSTM has its bias at `dense_h`, the GRU
    at `dense_i`."""
    features, gates, hidden = weights["input"].shape
    cell = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}[kind](features, hidden, rngs=rngs)
    cell.dense_i.kernel[...] = weights["input"].reshape(features, gates * hidden)
    cell.dense_h.kernel[...] = weights["recurrent"].reshape(hidden, gates * hidden)
    (cell.dense_h if kind == "lstm" else cell.dense_i).bias[...] = weights["bias"].reshape(-1)
    return cell


def make(work: Work, ours: bool = False) -> Callable[[int], Any]:
    work.workload.textbook_only()
    graph, params, rest = nnx.split(Model(work, ours), nnx.Param, ...)
    return make_step(
        work, params, lambda params, *inputs: nnx.merge(graph, params, rest, copy=True)(*inputs)
    )
