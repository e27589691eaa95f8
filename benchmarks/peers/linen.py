# SPDX-License-Identifier: Apache-2.0
"""Flax Linen: `nn.RNN` over `OptimizedLSTMCell` or `GRUCell`; over our own cell with layer
normalisation, for it has none; with resets the scan that recurrent agents in JAX write."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from workloads import Work

from flax_lstm import LayerNormLSTMCell
from peers.optax_step import make_step

CELLS = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "layernorm_lstm": LayerNormLSTMCell}


class Model(nn.Module):
    layers: Sequence[nn.Module]
    head: nn.Module
    embed: nn.Module | None
    bidirectional: bool

    def __call__(self, inputs: Any, lengths_B: Any = None, resets_BT: Any = None) -> Any:
        x_BTD = inputs if self.embed is None else self.embed(inputs)
        for layer in self.layers:
            if resets_BT is None:
                x_BTD = layer(x_BTD, seq_lengths=lengths_B)
            else:
                x_BTD = layer(x_BTD, resets_BT)
        return self.head(last_step(x_BTD, lengths_B, self.bidirectional))


class Resetting(nn.Module):
    """A scan over a GRU that begins from zeros where it is told to."""

    cell: nn.Module

    @nn.compact
    def __call__(self, x_BTD: Any, resets_BT: Any) -> Any:
        @partial(
            nn.scan,
            variable_broadcast="params",
            in_axes=1,
            out_axes=1,
            split_rngs={"params": False},
        )
        def scan(cell: nn.Module, carry: Any, step: Any) -> Any:
            x_BD, reset_B = step
            return cell(jnp.where(reset_B[:, None], jnp.zeros_like(carry), carry), x_BD)

        begin_BH = jnp.zeros((len(x_BTD), self.cell.features))
        return scan(self.cell, begin_BH, (x_BTD, resets_BT))[1]


def last_step(y_BTH: Any, lengths_B: Any, bidirectional: bool) -> Any:
    """The last valid output of each row; of the backward half the first, which has read
    everything."""
    if lengths_B is None:
        return y_BTH[:, -1]
    last_BH = jnp.take_along_axis(y_BTH, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    if not bidirectional:
        return last_BH
    hidden = y_BTH.shape[-1] // 2
    return jnp.concatenate([last_BH[:, :hidden], y_BTH[:, 0, hidden:]], axis=-1)


def make(work: Work) -> Callable[[int], Any]:
    w, weights = work.workload, work.weights

    def rnn(hidden: int) -> nn.Module:
        return (Resetting if w.resets else nn.RNN)(CELLS[w.cell](hidden))

    layers = [
        nn.Bidirectional(rnn(hidden), rnn(hidden)) if w.bidirectional else rnn(hidden)
        for hidden in w.hidden
    ]
    embed = nn.Embed(w.vocabulary, w.features) if w.vocabulary else None
    model = Model(layers, nn.Dense(w.outputs), embed, w.bidirectional)
    kernel, bias = weights.head
    layers_of = [*weights.stack.values()] if w.cell == "layernorm_lstm" else weights.flax
    params = {f"layers_{n}": layer for n, layer in enumerate(layers_of)} | {
        "head": {"kernel": kernel, "bias": bias}
    }
    if weights.embedding is not None:
        params["embed"] = {"embedding": weights.embedding}
    return make_step(work, params, lambda params, *inputs: model.apply({"params": params}, *inputs))
