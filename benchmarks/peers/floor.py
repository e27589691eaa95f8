# SPDX-License-Identifier: Apache-2.0
"""No implementation: the matrix products alone that every one of them needs, with nothing between
them.

For each layer and direction: the projection of the inputs and the weight gradients over all steps
at once, and step by step, in order, the recurrent product forward and its transpose backward.
Written into arrays that exist already.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from workloads import Work


def make(work: Work, library: str) -> Callable[[int], None]:
    if library == "torch":
        import torch

        product: Callable[..., Any] = torch.mm
        from_numpy = torch.from_numpy
    else:
        product = np.matmul
        from_numpy = np.asarray
    w, rng = work.workload, np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return from_numpy(rng.normal(size=shape).astype(np.float32))

    def directions(time: int, batch: int) -> list[Callable[[], None]]:
        made, features = [], w.features
        for number, hidden in enumerate(w.hidden):
            columns = hidden * w.gates
            input_grad = bool(number or w.vocabulary)  # real inputs need none
            made += [
                direction(time, batch, features, hidden, columns, input_grad)
                for _ in range(1 + w.bidirectional)
            ]
            features = hidden * (1 + w.bidirectional)
        return made

    def direction(
        time: int, batch: int, features: int, hidden: int, columns: int, input_grad: bool
    ) -> Callable[[], None]:
        x, h, gates = (array(time * batch, width) for width in (features, hidden, columns))
        weights, recurrent = array(features, columns), array(hidden, columns)
        x_grad, h_grad = array(time * batch, features), array(time * batch, hidden)
        weights_grad, recurrent_grad = array(features, columns), array(hidden, columns)
        steps = [slice(t * batch, (t + 1) * batch) for t in range(time)]
        hs, gs, hs_grad = [[a[s] for s in steps] for a in (h, gates, h_grad)]

        def run() -> None:
            product(x, weights, out=gates)
            for t in range(time):
                product(hs[t], recurrent, out=gs[t])
            if not w.train:
                return
            for t in reversed(range(time)):
                product(gs[t], recurrent.T, out=hs_grad[t])
            product(x.T, gates, out=weights_grad)
            product(h.T, gates, out=recurrent_grad)
            if input_grad:
                product(gates, weights.T, out=x_grad)

        return run

    batches = [directions(batch.inputs.shape[1], w.batch) for batch in work.batches]

    def step(n: int) -> None:
        for run in batches[n]:
            run()

    return step
