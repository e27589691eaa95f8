# SPDX-License-Identifier: Apache-2.0
"""Haiku: `hk.dynamic_unroll` over `hk.LSTM`. It knows no lengths: a backward layer reads rows
reversed by an index."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax.numpy as jnp
import numpy as np
from workloads import Unsupported, Work

from peers.optax_step import make_step


def make(work: Work) -> Callable[[int], Any]:
    w, weights = work.workload, work.weights
    w.textbook_only()
    if w.cell == "gru":
        raise Unsupported("Haiku's GRU is another one: it resets before the matmul")

    def last(y_TBH: Any, lengths_B: Any) -> Any:
        if lengths_B is None:
            return y_TBH[-1]
        return jnp.take_along_axis(y_TBH, (lengths_B - 1)[None, :, None], axis=0)[0]

    def forward(inputs: Any, lengths_B: Any) -> Any:
        x = hk.Embed(w.vocabulary, w.features, name="embed")(inputs) if w.vocabulary else inputs
        x_TBD = x.swapaxes(0, 1)
        for n, hidden in enumerate(w.hidden):
            core = hk.LSTM(hidden, name=f"layer_{n}_0")
            y_TBH, _ = hk.dynamic_unroll(core, x_TBD, core.initial_state(x_TBD.shape[1]))
            ends = [last(y_TBH, lengths_B)]
            if w.bidirectional:  # a single layer, so that no output needs to be put back in order
                order_TB = (lengths_B - 1 - jnp.arange(len(x_TBD))[:, None]) % len(x_TBD)
                reversed_TBD = jnp.take_along_axis(x_TBD, order_TB[..., None], axis=0)
                core = hk.LSTM(hidden, name=f"layer_{n}_1")
                z_TBH, _ = hk.dynamic_unroll(core, reversed_TBD, core.initial_state(x_TBD.shape[1]))
                ends.append(last(z_TBH, lengths_B))
            x_TBD = y_TBH
        return hk.Linear(w.outputs, name="head")(jnp.concatenate(ends, axis=-1))

    params = {"head": dict(zip("wb", weights.head, strict=True))}
    if weights.embedding is not None:
        params["embed"] = {"embeddings": weights.embedding}
    for n, tree in enumerate(weights.stack.values()):
        for side, part in enumerate(
            [tree] if "cell" in tree else [tree["forward"], tree["backward"]]
        ):
            params[f"layer_{n}_{side}/linear"] = convert(part["cell"])
    apply = hk.without_apply_rng(hk.transform(forward)).apply
    return make_step(work, params, apply)


def convert(cell: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One matrix for input and state, gates i, g, f, o instead of i, f, g, o; it adds 1 to the
    forget gate itself."""
    order = [0, 2, 1, 3]
    w_KGH, b_GH = (
        np.concatenate([cell["input"], cell["recurrent"]])[:, order],
        cell["bias"][order].copy(),
    )
    b_GH[2] -= 1
    return {"w": w_KGH.reshape(len(w_KGH), -1), "b": b_GH.reshape(-1)}
