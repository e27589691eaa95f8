# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and where arrays live on it.

Axes of the mesh: `data` and `fsdp` split the batch; `model` is for hidden units. Parameters are held whole on every
device; what `fsdp` and `model` shard of them is decided in `state_sharding` alone.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_lstm.data.base import Batch
from flax_lstm.errors import UserError, listing, require

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1) -> Mesh:
    """A mesh over the devices; one of the sizes may be -1: all devices that are left. Fewer devices than there are may
    be named."""
    devices = jax.devices()
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    require(
        all(size >= 1 or size == -1 for size in sizes.values()) and list(sizes.values()).count(-1) <= 1,
        f"mesh {sizes}: each size is a number of devices, and at most one is -1 (all that are left)",
    )
    named = int(np.prod([size for size in sizes.values() if size != -1]))
    shape = [len(devices) // named if size == -1 else size for size in sizes.values()]
    total = int(np.prod(shape))
    if total > len(devices) or total == 0 or (-1 in sizes.values() and len(devices) % named):
        raise UserError(f"mesh {sizes} does not fit the {len(devices)} devices there are")
    return jax.make_mesh(tuple(shape), tuple(sizes), (AxisType.Auto,) * 3, devices=devices[:total])


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """A batch, cut into accumulated parts, must split evenly over the devices."""
    unit = batch_shards(mesh) * accumulate
    near = sorted({max(unit, batch_size // unit * unit), (batch_size // unit + 1) * unit})
    require(
        batch_size % unit == 0,
        f"train.batch-size {batch_size} does not divide by {batch_shards(mesh)} devices x {accumulate} accumulated "
        f"parts; these sizes do: {listing(near)}",
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Batch, mesh: Mesh) -> Any:
    """The batch on the devices, each holding its rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Where each array of a `TrainState` lives: the carried recurrent state with the rows of the batch, the rest whole
    on every device."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), state)
    return everywhere._replace(carry=jax.tree.map(lambda _: batch_sharding(mesh), state.carry))
