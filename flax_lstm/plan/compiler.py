# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step of a config for chips that are not there, and says what the program
holds and does.

    python -m flax_lstm.plan.compiler TOPOLOGY CONFIG [--SECTION.FIELD VALUE ...]       one JSON
    object on stdout

A process of its own, for it needs an environment of its own (`flax_lstm.plan.environment`). Nothing
is trained and no device but the CPU is touched.
"""

import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.interpreters import partial_eval

from flax_lstm.config import Config, load_config, override
from flax_lstm.errors import UserError, require
from flax_lstm.machine.sharding import abstract_batch
from flax_lstm.plan.chips import Topology, parse_topology
from flax_lstm.plan.program import Program
from flax_lstm.training.assembly import assemble


def described_devices(topology: Topology) -> list[Any]:
    """Devices that exist in description only (virtual ones for `cpu`). Raises UserError where there
    are none such."""
    chip = topology.chip
    if chip.compiler == "cpu":
        return jax.devices()[: topology.chips]
    host = [
        min(size, 2) for size in topology.sizes[:2]
    ]  # chips of a TPU's host: 2x2, unless there are fewer
    settings: dict[str, Any] = {"topology_name": topology.name, "chips_per_host_bounds": [*host, 1]}
    if chip.compiler == "cuda":
        require(
            topology.chips <= chip.host or topology.chips % chip.host == 0,
            f"--topology {topology.name}: more than {chip.host} come as whole machines of "
            f"{chip.host}",
        )
        # slices, machines, GPUs
        grid = f"1x{max(topology.chips // chip.host, 1)}x{min(topology.chips, chip.host)}"
        target = Path(__file__).with_name(f"{topology.kind}.txtpb").read_text()
        settings = {"topology_name": grid, "topology": grid, "target_config": target}
    try:
        return topologies.get_topology_desc(platform=chip.compiler, **settings).devices
    except Exception as error:  # of many types
        raise UserError(
            f"--topology {topology.name}: the compiler has no such thing ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def matmul_flops(jaxpr: Any, times: int = 1, in_loop: bool = False) -> dict[bool, int]:
    """Floating-point operations of the matrix products, within loops and outside, over all devices.
    A product is two for each of its multiplications; the steps of a loop are known here, as they
    are not to the compiler's analysis."""
    total = {False: 0, True: 0}
    for equation in jaxpr.eqns:
        parameters, repeat, loop = equation.params, times, in_loop
        if equation.primitive.name == "dot_general":
            (summed, _), _ = parameters["dimension_numbers"]
            length = math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
            total[in_loop] += times * 2 * length * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "scan":
            repeat, loop = times * parameters["length"], True
        elif equation.primitive.name == "shard_map":  # what follows is one device's part
            repeat = times * math.prod(
                parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"]
            )
        for inner in jax.tree.leaves(
            list(parameters.values()), is_leaf=lambda value: hasattr(value, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)  # closed or open
            if hasattr(inner, "eqns"):
                for where, flops in matmul_flops(inner, repeat, loop).items():
                    total[where] += flops
    return total


def held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def whole(tree: Any) -> list[str]:
    """The arrays of a tree, scalars excepted, that every device holds whole."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape}"
        for path, leaf in leaves
        if leaf.ndim and leaf.sharding.is_fully_replicated
    ]


def trace(config: Config, topology: Topology) -> tuple[Any, dict[str, Any]]:
    """The traced training step of the config on all of the topology's chips, and what is known
    without compiling it."""
    if topology.chip.compiler == "cpu" and config.backend in ("auto", "cpu"):
        # Stands in for an accelerator; and native code is a closed book.
        config = config.with_backend("fused")
    info = config.data.outline()
    if read := info is None:
        with tempfile.TemporaryDirectory() as assets:
            info = config.data.load(Path(assets)).info
    mesh, steps, backend = assemble(config, info, described_devices(topology))
    sample = info.sample(config.train.batch_size)
    state = steps.abstract
    step: Any = steps.train  # a jitted function
    traced = step.trace(state, abstract_batch(sample, mesh))
    jaxpr = traced.jaxpr.jaxpr
    # Without the products that nobody asks for.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    flops = matmul_flops(jaxpr)
    found = {
        "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size,
        "tokens": sample.inputs.size if sample.inputs.ndim == 2 else 0,
        "longest": sample.inputs.shape[1],
        "data": "read"
        if read
        else "as the settings say, at their largest: full vocabulary, full length",
        "backend": backend,
        "dtype": getattr(config.model, "dtype", "float32"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes": {
            "parameters": held(state.params),
            "optimizer": held((state.opt_state, state.ema)),
        },
        "whole": whole(
            {"parameters": state.params, "optimizer": state.opt_state, "averaged": state.ema}
        ),
        "flops": {"outside": flops[False], "in_loops": flops[True]},
    }
    return traced, found


def measure(config: Config, topology: Topology) -> dict[str, Any]:
    """What the compiled training step holds, computes and exchanges."""
    traced, found = trace(config, topology)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        found["bytes"]["total"] = out_of_memory(str(error))
        return {**found, "too_large": first_line(error)}
    memory = compiled.memory_analysis()
    found["bytes"] |= {
        "other_inputs": memory.argument_size_in_bytes - sum(found["bytes"].values()),
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "activations": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    found["bytes"]["total"] = sum(found["bytes"].values())
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jax {jax.__version__} cannot read the program of this compiler, which is of "
            "another time: "
            f"pip install 'flax_lstm[plan]' ({first_line(error)})"
        ) from error
    return {**found, **read_program(Program(text))}


def out_of_memory(message: str) -> int | None:
    """The bytes that a TPU's program would take, from the compiler's refusal."""
    used = re.search(r"(?:Used |memory required[^(]*\()([\d.]+)([KMG])\b", message)
    return int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]]) if used else None


def read_program(program: Program) -> dict[str, Any]:
    """What the compiled program launches, moves and exchanges in a step, within loops and
    outside."""
    counts = {name: {"outside": 0, "in_loops": 0} for name in ("kernels", "traffic", "cycles")}
    for executed in program.executed():
        where = "in_loops" if executed.in_loop else "outside"
        cycles = re.search(r'"estimated_cycles":"(\d+)"', executed.operation.line)
        counts["kernels"][where] += executed.times * executed.operation.is_kernel()
        counts["traffic"][where] += executed.times * program.traffic(executed)
        counts["cycles"][where] += executed.times * int(cycles[1]) if cycles else 0
    collectives = [
        {
            **c._asdict(),
            "groups": len(c.groups),
            "devices": c.groups.shape[1],
            "ids": c.groups[0].tolist(),
        }
        for c in program.collectives()
    ]
    return {**counts, "collectives": collectives}


def main(arguments: Sequence[str]) -> int:
    topology, config, *overrides = arguments
    try:
        found = measure(override(load_config(config), overrides), parse_topology(topology))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
