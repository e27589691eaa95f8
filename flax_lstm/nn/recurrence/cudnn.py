# SPDX-License-Identifier: Apache-2.0
"""cuDNN for float32 LSTMs on NVIDIA GPUs, layers on each other and both directions in one call.

Axes: B batch, T time, D input features, G gates, H hidden units, J hidden units of the previous
step, L directions of all layers, in cuDNN's order: layer by layer, forward before backward.

`jax.experimental.rnn` calls cuDNN, which takes all weights as one vector, knows no empty rows, and
reads backwards only beside a forward direction. So weights are packed and rows without steps given
one, whose results are thrown away; JAX differentiates through both. A lone backward direction reads
reversed rows forwards.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from flax_lstm.machine.sharding import model_shards
from flax_lstm.nn.cells import LSTMCell, LSTMState, Weights, not_textbook
from flax_lstm.nn.recurrence.rows import reverse_rows

Array = jax.Array
NATIVE = True


def supports(cell: Any, x_BTD: Any, recurrent_dropout: Any, resets: bool = False) -> str | None:
    """None, or why not. A subclass may have equations of its own, so only `LSTMCell` itself is
    taken."""
    if type(cell) is not LSTMCell:
        return f"{type(cell).__name__} is not LSTMCell"
    if reason := not_textbook(cell):
        return reason
    if cell.compute_dtype(x_BTD) != jnp.float32:
        return f"it computes in float32, not {cell.compute_dtype(x_BTD)}"
    if resets:
        return "it has no resets"
    if recurrent_dropout:
        return "it has no recurrent dropout"
    if model_shards() > 1:
        return "hidden units are split over several devices"
    return unavailable()


def unavailable() -> str | None:
    """None on an NVIDIA GPU, or why not: without one, the call fails as soon as it is traced."""
    if jax.default_backend() != "gpu":
        return f"the arrays are on a {jax.default_backend()}, not on a GPU"
    version = jax.local_devices()[0].client.platform_version
    return None if "cuda" in version.lower() else f"it needs CUDA, and this is {version}"


def run(
    cell: Any,
    weights: Weights,
    x_BTD: Array,
    lengths_B: Array | None,
    state: Any,
    mask_BJ: Array | None,
    reverse: bool,
    reset_BT: Array | None = None,
) -> tuple[Any, Array]:
    """See `flax_lstm.nn.recurrence`."""
    turn = (lambda x: reverse_rows(x, lengths_B)) if reverse else (lambda x: x)
    ((state,),), y_BTH = run_stack(cell, [[weights]], turn(x_BTD), lengths_B, [[state]])
    return state, turn(y_BTH)


def run_stack(
    cell: Any,
    weights: Sequence[Sequence[Weights]],
    x_BTD: Array,
    lengths_B: Array | None,
    states: Sequence[Sequence[LSTMState]],
) -> tuple[Any, Array]:
    """See `flax_lstm.nn.recurrence`."""
    batch, time, features = x_BTD.shape
    directions = len(weights[0])
    lengths_B = jnp.full(batch, time) if lengths_B is None else lengths_B
    valid_BT1 = (jnp.arange(time)[None] < lengths_B[:, None])[:, :, None]
    begin_LBH = jax.tree.map(
        lambda *s: jnp.stack(s), *[state for layer in states for state in layer]
    )
    y_BTH, h_LBH, c_LBH = rnn.lstm(
        jnp.where(
            valid_BT1, x_BTD.astype(jnp.float32), 0
        ),  # and no gradient from what cuDNN leaves in padding
        begin_LBH.h_BH,
        begin_LBH.c_BH,
        pack([direction for layer in weights for direction in layer]),
        jnp.clip(lengths_B, 1, time).astype(jnp.int32),
        features,
        cell.features,
        len(weights),
        0.0,
        directions == 2,
        precision(),
    )
    begun_B1 = (lengths_B > 0)[None, :, None]
    end_LBH = jax.tree.map(
        lambda new, old: jnp.where(begun_B1, new, old), LSTMState(c_LBH, h_LBH), begin_LBH
    )
    ends = [jax.tree.map(lambda s, n=n: s[n], end_LBH) for n in range(len(h_LBH))]
    pairs = tuple(tuple(ends[n : n + directions]) for n in range(0, len(ends), directions))
    return pairs, jnp.where(valid_BT1, y_BTH, 0)


def pack(weights: Sequence[Weights]) -> Array:
    """All weights as the vector that cuDNN takes: the matrices [G * H, D] and [G * H, J] of each
    direction of each layer, then their biases, of which it adds two. Its gates have our order."""
    matrices = [
        w.reshape(len(w), -1).T for one in weights for w in (one.input_DGH, one.recurrent_JGH)
    ]
    biases = [b for one in weights for b in (one.bias_GH, jnp.zeros_like(one.bias_GH))]
    return jnp.concatenate([array.reshape(-1) for array in (*matrices, *biases)])


def precision() -> str:
    """float32 where `jax_default_matmul_precision` asks for it; otherwise TF32, as in other matmuls
    on a GPU."""
    exact = ("highest", "float32", "F32_F32_F32")
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return "highest" if asked in exact else "high"
