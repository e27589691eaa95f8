# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and where arrays live on it.

Axes of the mesh: `data` and `fsdp` split the batch; `fsdp` also shares out the storage of
parameters and optimiser; `model` splits hidden units and vocabulary. All of it is decided here: by
`RULES`, from the names that the modules give to the axes of their parameters, and by `fsdp`, from
sizes alone.

A parameter has two places. It is *stored* split over `fsdp` and `model`; for the length of a step
it is gathered over `fsdp` and *used* split over `model`. The recurrences run as one program per
device (`on_each_device`), so that nothing is exchanged inside their time loops but what hidden
units split over `model` need.

The mesh is known to the modules while the steps of `steps.py` are traced, and to nobody else: a
module used on its own is not touched by any of this.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_lstm.errors import UserError, listing, require

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

# Which axis of the mesh splits a named axis of a parameter. An axis of the mesh is used once in a
# parameter, by the first rule whose axis it divides: a vocabulary that does not divide leaves it to
# the hidden units or features.
RULES = (
    ("vocabulary", "model"),
    ("hidden", "model"),
    ("features", "model"),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the devices of all processes, or those given; one of the sizes may be -1: all
    devices that are left. A single process may name fewer devices than there are."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_sizes(data, fsdp, model, len(devices))
    total = int(np.prod(shape))
    require(
        total == len(devices) or jax.process_count() == 1,
        f"mesh {dict(zip(AXES, shape, strict=True))} takes {total} of {len(devices)} devices; "
        "with several processes "
        "it must take them all",
    )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices[:total])


def mesh_sizes(data: int, fsdp: int, model: int, devices: int) -> tuple[int, int, int]:
    """The sizes of the mesh's axes, where -1 is all that are left of so many devices."""
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    require(
        all(size >= 1 or size == -1 for size in sizes.values())
        and list(sizes.values()).count(-1) <= 1,
        f"mesh {sizes}: each size is a number of devices, and at most one is -1 (all that are "
        "left)",
    )
    named = int(np.prod([size for size in sizes.values() if size != -1]))
    data, fsdp, model = (devices // named if size == -1 else size for size in sizes.values())
    total = data * fsdp * model
    if total > devices or total == 0 or (-1 in sizes.values() and devices % named):
        raise UserError(f"mesh {sizes} does not fit the {devices} devices there are")
    return data, fsdp, model


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """A batch, cut into accumulated parts, must split evenly over the devices."""
    unit = batch_shards(mesh) * accumulate
    near = sorted({max(unit, batch_size // unit * unit), (batch_size // unit + 1) * unit})
    require(
        batch_size % unit == 0,
        f"train.batch-size {batch_size} does not divide by {batch_shards(mesh)} devices x "
        f"{accumulate} accumulated "
        f"parts; these sizes do: {listing(near)}",
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch on the devices, each holding its rows. Every process has the whole batch and hands
    over what belongs to its own devices, so that the order of examples does not depend on how many
    processes there are."""
    sharding = batch_sharding(mesh)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, x.shape)

    return jax.tree.map(put, batch)


def abstract_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch in shapes and places alone."""
    place = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place), batch
    )


def on_host(array: Any) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


# --- parameters


def named(initializer: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """The initializer of a parameter whose axes have these names, for `RULES`. The names come as
    Flax metadata around the array while the steps are traced; in a module used on its own, arrays
    stay plain."""
    with_names = nn.with_logical_partitioning(initializer, names)

    def initialize(*arguments: Any) -> Any:
        return (initializer if current_mesh() is None else with_names)(*arguments)

    return initialize


def split_named(
    shape: Sequence[int], names: Sequence[str | None], mesh: Mesh
) -> list[tuple[str, ...]]:
    """The axes of the mesh that split each axis of a parameter in use, by `RULES`."""
    split: list[tuple[str, ...]] = [()] * len(shape)
    for name, axis in RULES:
        for n, (size, own) in enumerate(zip(shape, names, strict=True)):
            if own == name and size % mesh.shape[axis] == 0 and (axis,) not in split:
                split[n] = (axis,)
    return split


def split_stored(
    shape: Sequence[int], used: list[tuple[str, ...]], mesh: Mesh
) -> list[tuple[str, ...]]:
    """The same in storage: `fsdp` splits the largest axis that it divides further, by what a device
    holds of it."""
    left = [
        size // int(np.prod([mesh.shape[axis] for axis in axes]))
        for size, axes in zip(shape, used, strict=True)
    ]
    divisible = [n for n, size in enumerate(left) if size % mesh.shape["fsdp"] == 0]
    split = list(used)
    if divisible:
        largest = max(divisible, key=lambda n: left[n])
        split[largest] = (*used[largest], "fsdp")
    return split


def parameter_shardings(named_params: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Where parameters, as `named` describes them, are stored and where they are used. Those of
    which nothing divides are whole on every device; one line of the log tells which."""
    shapes = nn.meta.unbox(named_params)
    names = nn.get_partition_spec(named_params)
    whole: list[str] = []

    def choose(path: Any, shape: Any, names: PartitionSpec) -> tuple[NamedSharding, NamedSharding]:
        axes = (*names, *[None] * (len(shape.shape) - len(names)))
        used = split_named(shape.shape, axes, mesh)
        stored = split_stored(shape.shape, used, mesh)
        wanted = {axis for name, axis in RULES if name in axes} | {"fsdp"}
        for axis in AXES:
            if (
                axis in wanted
                and mesh.shape[axis] > 1
                and not any(axis in split for split in stored)
            ):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                whole.append(f"{where} {shape.shape} over {axis}")
        return NamedSharding(mesh, PartitionSpec(*stored)), NamedSharding(
            mesh, PartitionSpec(*used)
        )

    both = jax.tree_util.tree_map_with_path(choose, shapes, names)
    if whole:
        log.info(
            "mesh %s does not divide, and so does not split: %s", dict(mesh.shape), listing(whole)
        )
    pair = jax.tree.structure((0, 0))
    return jax.tree.transpose(jax.tree.structure(shapes), pair, both)


def shard_like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Where the arrays of an optimiser's state live: what has the tree and the shapes of the
    parameters lives with them, all else (counts, the factors of Adafactor) is whole on every
    device."""
    structure: Any = jax.tree.structure(params)

    def is_copy(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def place(node: Any) -> Any:
        if not is_copy(node):
            return replicated(mesh)
        return jax.tree.map(
            lambda x, p, s: s if x.shape == p.shape else replicated(mesh), node, params, shardings
        )

    return jax.tree.map(place, tree, is_leaf=is_copy)


# --- what the modules know of the mesh


def current_mesh() -> Any:
    """The mesh of the steps that are being traced; None elsewhere, and where there is one
    device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def platform() -> str:
    """What the steps that are being traced are for, "cpu", "gpu" or "tpu": the devices of their
    mesh, which may exist in description only; elsewhere, where arrays are put by default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def model_shards() -> int:
    """Over how many devices hidden units are split."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape["model"]


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, traced with `current_mesh()` set."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def on_each_device(run: Callable[..., Any], partitioned: bool = False) -> Callable[..., Any]:
    """`run(weights, state, *arrays) -> (state, outputs)` as the program of one device: it sees the
    rows of the batch that are this device's, and the compiler need not understand it. The gradients
    of the weights are summed over the devices after it has run. Without a mesh, `run` itself.

    weights: a tree of arrays whose last axis is hidden units [..., H].
    state: a tree of [B, H]; arrays: [B, ...], or None; outputs: [B, T, H].
    partitioned: leave hidden units split over `model` to the compiler. Otherwise `run` sees its
    part of H and exchanges
        the rest itself over the axis "model" (or refuses `model_shards() > 1`); where H does not
        divide, it sees all.
    """
    mesh = current_mesh()
    if mesh is None:
        return run
    rows = PartitionSpec(BATCH_AXES)

    def spread(weights: Any, state: Any, *arrays: Any) -> Any:
        sizes = {w.shape[-1] for w in jax.tree.leaves(weights)}
        hidden = (
            None if partitioned or any(size % mesh.shape["model"] for size in sizes) else "model"
        )
        return jax.shard_map(
            run,
            in_specs=(
                jax.tree.map(lambda w: PartitionSpec(*[None] * (w.ndim - 1), hidden), weights),
                PartitionSpec(BATCH_AXES, hidden),
                *[rows] * len(arrays),
            ),
            out_specs=(PartitionSpec(BATCH_AXES, hidden), PartitionSpec(BATCH_AXES, None, hidden)),
            axis_names=set(BATCH_AXES if partitioned else AXES),
            check_vma=False,
        )(weights, state, *arrays)

    return spread


def in_auto_axes(run: Callable[..., Any], x_BTD: Any) -> Callable[..., Any]:
    """`run`, whose results all have rows first, where axis types are explicit (`jax.set_mesh`) and
    split the inputs: within it the compiler places arrays, and its results are split as the rows of
    the inputs are. Elsewhere `run` itself."""
    spec = jax.typeof(x_BTD).sharding.spec
    if not any(spec):
        return run
    return jax.sharding.auto_axes(run, out_sharding=PartitionSpec(spec[0]))


def with_rows_of(arrays: Any, x_BTD: Any) -> Any:
    """The arrays [B, ...], split as the rows of the inputs are where axis types are explicit."""
    spec = jax.typeof(x_BTD).sharding.spec
    if not any(spec):
        return arrays
    return jax.tree.map(lambda a: jax.sharding.reshard(a, PartitionSpec(spec[0])), arrays)


# Whether the program that is being lowered is one that the compiler splits over several devices.
_is_split: contextvars.ContextVar[bool] = contextvars.ContextVar("is_split", default=False)


@contextlib.contextmanager
def lowering(axis_context: Any) -> Iterator[None]:
    """While a primitive is lowered: lets `by_rows` know whether there is anything to split."""
    devices = getattr(axis_context, "device_assignment", None) or ()
    token = _is_split.set(len(devices) > 1)
    try:
        yield
    finally:
        _is_split.reset(token)


def by_rows(
    function: Callable[..., Any], arguments: Sequence[int], results: Sequence[int]
) -> Callable[..., Any]:
    """A function of arrays that the compiler cannot look into, such as a call of native code, with
    word of how it may be split: over the rows of a batch, as its first argument is, in a program
    that `jax.jit` splits over devices. Left alone, the compiler would gather the whole batch on
    each of them.

    arguments, results: the axis over rows in each array, -1 where it has none. Results without rows
    are sums over rows, and so are added up over the devices.
    """
    if not _is_split.get():
        return function
    split = custom_partitioning(lambda *arrays: tuple(function(*arrays)))

    def partition(mesh: Mesh, given: Any, wanted: Any) -> Any:
        batch, (first, *_) = given[0].shape[arguments[0]], given
        axes = first.sharding.spec[arguments[0]]
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        if batch % int(np.prod([mesh.shape[name] for name in names])):
            names = ()

        def placed(arrays: Any, rows: Sequence[int]) -> list[NamedSharding]:
            specs = [
                PartitionSpec(*(names or None if n == row else None for n in range(len(x.shape))))
                for x, row in zip(arrays, rows, strict=True)
            ]
            return [NamedSharding(mesh, spec) for spec in specs]

        def on_one(*arrays: Any) -> Any:
            found = function(*arrays)
            return tuple(
                jax.lax.psum(x, names) if names and row < 0 and x.size else x
                for x, row in zip(found, results, strict=True)
            )

        return mesh, on_one, tuple(placed(wanted, results)), tuple(placed(given, arguments))

    def called(*arrays: Any) -> Any:
        shapes = jax.eval_shape(function, *arrays)
        kept: list[str] = []

        def factors(x: Any, row: int) -> str:
            names = ["rows" if n == row else f"f{len(kept) + n}" for n in range(len(x.shape))]
            kept.extend(name for name in names if name != "rows")
            kept.append("")  # so that no two arrays share a name
            return " ".join(names)

        given = [factors(x, row) for x, row in zip(arrays, arguments, strict=True)]
        wanted = [factors(x, row) for x, row in zip(shapes, results, strict=True)]
        rule = f"{', '.join(given)} -> {', '.join(wanted)}"
        whole = tuple(name for name in kept if name)
        split.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
        return split(*arrays)

    return called
