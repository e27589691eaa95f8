# SPDX-License-Identifier: Apache-2.0
"""Flax Linen: `nn.RNN` over `OptimizedLSTMCell` or `GRUCell`."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn
from workloads import Work

from peers.optax_step import make_step


class Model(nn.Module):
    layers: Sequence[nn.Module]
    head: nn.Module
    embed: nn.Module | None
    bidirectional: bool

    def __call__(self, inputs: Any, lengths_B: Any = None) -> Any:
        x_BTD = inputs if self.embed is None else self.embed(inputs)
        for layer in self.layers:
            x_BTD = layer(x_BTD, seq_lengths=lengths_B)
        return self.head(last_step(x_BTD, lengths_B, self.bidirectional))


def last_step(y_BTH: Any, lengths_B: Any, bidirectional: bool) -> Any:
    """The last valid output of each row; of the backward half the first, which has read
    everything."""
    import jax.numpy as jnp

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
        return nn.RNN({"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[w.cell](hidden))

    layers = [
        nn.Bidirectional(rnn(hidden), rnn(hidden)) if w.bidirectional else rnn(hidden)
        for hidden in w.hidden
    ]
    embed = nn.Embed(w.vocabulary, w.features) if w.vocabulary else None
    model = Model(layers, nn.Dense(w.outputs), embed, w.bidirectional)
    kernel, bias = weights.head
    params = {f"layers_{n}": layer for n, layer in enumerate(weights.flax)} | {
        "head": {"kernel": kernel, "bias": bias}
    }
    if weights.embedding is not None:
        params["embed"] = {"embedding": weights.embedding}
    return make_step(work, params, lambda params, *inputs: model.apply({"params": params}, *inputs))
