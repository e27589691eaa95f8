# SPDX-License-Identifier: Apache-2.0
"""Whether a training fits into memory, told from shapes alone before any of it is allocated.

What is counted is a lower bound, so that nothing is refused that could run: the state, one
gradient, and what the forward pass keeps for the backward pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.config import Config
from flax_lstm.data.base import Batch
from flax_lstm.errors import require
from flax_lstm.machine.distributed import processes_here
from flax_lstm.machine.memory import UNLIMITED, free_memory, in_words, require_room
from flax_lstm.training.steps import Steps, TrainState, apply

# Numbers kept for the backward pass of each output of each matrix, at the very most: below, no
# trace is worth its second.
KEPT = 16


def sample_of(info: Any, batch_size: int) -> Batch:
    """A batch of zeros. Raises UserError where it does not fit into memory."""
    row = info.sample(1)
    needed = 2.0 * batch_size * bytes_of(row)
    steps = np.shape(row.inputs)[1]
    require_room(
        needed, f"train.batch-size {batch_size:,}: a batch of so many rows of {steps:,} steps"
    )
    return info.sample(batch_size)


def check_room(config: Config, info: Any, steps: Steps) -> None:
    """Raises UserError where the memory that is free cannot hold the training of these steps."""
    free, sharers = room()
    state = steps.abstract
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    stored = sharers * (shard_bytes(state) + shard_bytes(state.params))
    batch = sample_of(info, config.train.batch_size)
    kept = 0.0
    if KEPT * 4 * np.size(batch.inputs) * _outputs(state.params) > free:
        kept = kept_bytes(config, info, state, batch) / (jax.device_count() / sharers)
    require(
        stored + kept <= free,
        f"training needs at least {in_words(stored + kept)} of memory, and {in_words(free)} are "
        f"free: {in_words(stored)} for {parameters:,} parameters, their gradients and the "
        f"optimiser, and {in_words(kept)} of what a batch of {config.train.batch_size:,} keeps for "
        "its gradients. Take a smaller model, a smaller train.batch-size, or raise "
        "train.accumulate",
    )


def room() -> tuple[int, int]:
    """Bytes that are free where the arrays of this process lie, and how many devices share them:
    on CPUs the machine's memory, with the devices of the run's other processes there; each its own
    elsewhere."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return free_memory(), len(devices) * processes_here()
    said = [device.memory_stats() or {} for device in devices]
    left = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in said if "bytes_limit" in s]
    return min(left, default=UNLIMITED), 1


def kept_bytes(config: Config, info: Any, state: TrainState, batch: Batch) -> float:
    """Bytes that the forward pass of a batch keeps for the backward pass, parameters apart, on all
    devices together."""
    module = config.task.build(config.model, info)
    rows = config.train.batch_size // config.train.accumulate
    part = jax.tree.map(lambda x: x[:rows], batch)

    def backward(params: Any, carry: Any, key: jax.Array) -> Any:
        carry = jax.tree.map(lambda s: jnp.zeros((rows, *s.shape[1:]), s.dtype), carry)

        def loss(params: Any) -> jax.Array:
            return config.task.loss(apply(module, params, carry, part, key)[1], part).total

        return jax.vjp(loss, params)[1]  # a tree with all that it keeps

    kept = jax.eval_shape(backward, state.params, state.carry, jax.random.key(0))
    return max(bytes_of(kept) - bytes_of(state.params), 0)


def bytes_of(tree: Any) -> float:
    """Bytes of all arrays of a tree."""
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def shard_bytes(tree: Any) -> float:
    """Bytes of the parts of all arrays that lie on one device."""
    return float(
        sum(
            np.prod(x.sharding.shard_shape(x.shape), dtype=float) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def _outputs(params: Any) -> float:
    """Outputs of all matrices for one input of each."""
    return float(sum(x.size / max(x.shape[0], 1) for x in jax.tree.leaves(params) if x.ndim > 1))
