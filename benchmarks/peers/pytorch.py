# SPDX-License-Identifier: Apache-2.0
"""PyTorch: `nn.LSTM` and `nn.GRU`, time first, which spares them a copy.

Rows of different lengths are read padded, the backward direction by a module of its own over rows
reversed by an index: on the CPU that is several times as fast as `pack_padded_sequence`, which
`packed` takes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from workloads import Unsupported, Work


class Model(torch.nn.Module):
    def __init__(self, work: Work, packed: bool):
        super().__init__()
        w, weights = work.workload, work.weights
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[w.cell]
        self.packed, self.embed = packed, None
        if weights.embedding is not None:
            self.embed = torch.nn.Embedding.from_pretrained(
                torch.tensor(weights.embedding), freeze=False
            )
        self.layers, self.backwards, features = (
            torch.nn.ModuleList(),
            torch.nn.ModuleList(),
            w.features,
        )
        for hidden, arrays in zip(w.hidden, weights.torch, strict=True):
            if packed:
                self.layers.append(
                    load(kind(features, hidden, bidirectional=w.bidirectional), arrays)
                )
            else:
                self.layers.append(load(kind(features, hidden), select(arrays, backward=False)))
                if w.bidirectional:
                    self.backwards.append(
                        load(kind(features, hidden), select(arrays, backward=True))
                    )
            features = hidden * (1 + w.bidirectional)
        kernel, bias = weights.head
        self.head = load(torch.nn.Linear(features, w.outputs), {"weight": kernel.T, "bias": bias})

    def forward(
        self, inputs_TB: torch.Tensor, lengths_B: torch.Tensor | None, reversed_TB: Any
    ) -> torch.Tensor:
        if self.packed:
            x_TBD = self.embed(inputs_TB)
            packed = torch.nn.utils.rnn.pack_padded_sequence(x_TBD, lengths_B, enforce_sorted=False)
            _, (h_LBH, _) = self.layers[0](packed)
            return self.head(torch.cat(list(h_LBH), dim=-1))
        x_TBD = inputs_TB if self.embed is None else self.embed(inputs_TB)
        y_TBH = x_TBD
        for layer in self.layers:
            y_TBH, _ = layer(y_TBH)
        ends = [last(y_TBH, lengths_B)]
        if self.backwards:  # a single layer, so that no output needs to be put back in order
            z_TBH, _ = self.backwards[0](self.embed(reversed_TB))
            ends.append(last(z_TBH, lengths_B))
        return self.head(torch.cat(ends, dim=-1))


def load(module: torch.nn.Module, arrays: dict[str, np.ndarray]) -> torch.nn.Module:
    module.load_state_dict(
        {name: torch.tensor(np.ascontiguousarray(array)) for name, array in arrays.items()}
    )
    return module


def select(arrays: dict[str, np.ndarray], backward: bool) -> dict[str, np.ndarray]:
    """The weights of one direction, under the names of a module that has no other."""
    return {
        k.removesuffix("_reverse"): a
        for k, a in arrays.items()
        if k.endswith("_reverse") == backward
    }


def last(y_TBH: torch.Tensor, lengths_B: torch.Tensor | None) -> torch.Tensor:
    return y_TBH[-1] if lengths_B is None else y_TBH[lengths_B - 1, torch.arange(y_TBH.shape[1])]


def make(work: Work, fused: bool = False, packed: bool = False) -> Callable[[int], Any]:
    w = work.workload
    w.textbook_only()
    if packed and not w.ragged:
        raise Unsupported("every row is full: nothing to pack")
    model = Model(work, packed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    placed = []
    for batch in work.batches:
        time = batch.inputs.shape[1]
        lengths_B = torch.tensor(batch.lengths, dtype=torch.int64) if w.ragged else None
        inputs, reversed_TB = torch.tensor(batch.inputs.swapaxes(0, 1)).contiguous(), None
        if w.vocabulary:
            inputs = inputs.long()
        if w.bidirectional:
            order_TB = (lengths_B - 1 - torch.arange(time)[:, None]) % time
            reversed_TB = torch.gather(inputs, 0, order_TB)
        targets = torch.tensor(batch.targets)
        placed.append(
            ((inputs, lengths_B, reversed_TB), targets.long() if w.vocabulary else targets)
        )
    loss = torch.nn.functional.cross_entropy if w.vocabulary else torch.nn.functional.mse_loss

    def step(n: int) -> float:
        inputs, targets = placed[n]
        optimizer.zero_grad()
        value = loss(model(*inputs), targets)
        value.backward()
        optimizer.step()
        return value.item()

    def forward(n: int) -> np.ndarray:
        with torch.inference_mode():
            return model(*placed[n][0]).numpy()

    return step if w.train else forward
