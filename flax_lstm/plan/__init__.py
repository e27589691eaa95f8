# SPDX-License-Identifier: Apache-2.0
"""What a run would take on chips that are not there: `python -m flax_lstm plan`.

The training step is compiled by the real compiler of these chips, in a process of its own
(`compiler.py`); what its program holds and does is read from it (`program.py`). Bytes and FLOPs are
facts about this program. Times are predictions, from it and from the makers' figures (`chips.py`):
nothing was run, and nothing runs faster than that.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from flax_lstm.config import Config, MeshConfig
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.sharding import mesh_sizes
from flax_lstm.plan.chips import GIB, Chip, Topology

Found = dict[
    str, Any
]  # what the compiler's process says, and what is predicted from it; see `--json`

ASSUMPTIONS = (
    "Predictions, not measurements: the makers' peak figures, which no program reaches.",
    "Roofline: within the loops and outside, the longest of compute (matrix products), memory "
    "traffic and launches "
    "(the least time of every operation; GPU); then all exchanges, none of them hidden behind "
    "the others.",
    "An exchange: bytes over the rate of one ring, or the latency, whichever is longer.",
    "Compiler (TPU): the cycles that it estimates for every operation, as often as it runs, then "
    "the exchanges. The "
    "longer of the two counts.",
    "Efficiency (eff.): per chip, against the smallest size that fits; every chip has the same "
    "share of the batch.",
)


def environment(topology: Topology) -> dict[str, str]:
    """Of the process that compiles. Raises UserError where the compiler is not installed."""
    chip, devices = topology.chip, topology.chips if topology.chip.compiler == "cpu" else 1
    settings = {
        "JAX_PLATFORMS": "cpu",  # whatever there is, it is left alone
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    stand_in = f"--topology cpu:{topology.chips} needs none, and tells bytes, FLOPs and exchanges."
    if chip.compiler == "tpu":
        found = importlib.util.find_spec("libtpu")
        if found is None or not found.submodule_search_locations:
            raise UserError(
                f"--topology {topology.name}: the TPU compiler is not installed: pip install "
                "'flax_lstm[plan]' "
                f"(Linux, 140 MB; no TPU is needed). {stand_in}"
            )
        settings |= {
            "TPU_LIBRARY_PATH": str(Path(found.submodule_search_locations[0]) / "libtpu.so"),
            "TPU_SKIP_MDS_QUERY": "1",  # else it asks Google's cloud what machine this is
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time, or one beside a training
        }
    elif chip.compiler == "cuda" and not any(
        map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))
    ):
        import jax

        wheels = (
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
            "nvidia-cuda-nvcc absl-py"
        )
        raise UserError(
            f"--topology {topology.name}: the GPU compiler is not installed: pip install "
            f"{wheels} (no GPU is needed; "
            f"'flax_lstm[cuda]' has it, too). {stand_in}"
        )
    return {**os.environ, **settings}


def compile_for(topology: Topology, config: str, overrides: Sequence[str]) -> Found:
    """What `compiler.py` finds, by its process. Raises UserError with what it says of the user's
    mistakes."""
    command = [sys.executable, "-m", "flax_lstm.plan.compiler", topology.name, config, *overrides]
    done = subprocess.run(
        command, env=environment(topology), capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        raise UserError(done.stderr[done.stderr.rfind("error: ") :].removeprefix("error: ").strip())
    if done.returncode:
        raise RuntimeError(
            f"compiling for {topology.name} ended with status "
            f"{done.returncode}:\n{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def scaled(config: Config, topology: Topology, smaller: Topology) -> Config | None:
    """The config for fewer chips, each with its share of the batch; first `data` shrinks, then
    `fsdp`, then `model`. None where it does not divide."""
    data, fsdp, model = mesh_sizes(
        config.mesh.data, config.mesh.fsdp, config.mesh.model, topology.chips
    )
    require(
        data * fsdp * model == topology.chips,
        f"mesh data {data}, fsdp {fsdp}, model {model} takes {data * fsdp * model} of the "
        f"{topology.chips} chips of "
        f"{topology.name}; a plan takes them all (--mesh.data -1: what is left)",
    )
    chips = smaller.chips
    model = min(model, chips)
    fsdp = min(fsdp, chips // model)
    mesh = MeshConfig(chips // (model * fsdp), fsdp, model)
    rows, rest = divmod(config.train.batch_size * chips, topology.chips)
    if (
        mesh.data * fsdp * model != chips
        or rest
        or rows % (mesh.data * fsdp * config.train.accumulate)
    ):
        return (
            config if smaller == topology else None
        )  # the whole: the compiler's process says what is wrong
    return replace(config, mesh=mesh, train=replace(config.train, batch_size=rows))


def plan(
    config: Config, topology: Topology, arguments: tuple[str, Sequence[str]], scaling: bool = True
) -> list[Found]:
    """The topology, then a quarter of it, and so on to a single chip or to what no longer fits.

    arguments: the config's name and flags, as on the command line.
    """
    sizes = [
        t for t in topology.smaller() if (topology.chips // t.chips).bit_length() % 2
    ]  # 1, 4, 16 ...
    if topology.chips > 1 and sizes[-1].chips > 1:
        sizes += [t for t in topology.smaller() if t.chips == 1]
    plans: list[Found] = []
    for size in sizes if scaling and topology.kind != "cpu" else sizes[:1]:
        smaller = scaled(config, topology, size)
        if smaller is None:
            continue
        mesh = {f"mesh.{axis}": getattr(smaller.mesh, axis) for axis in ("data", "fsdp", "model")}
        flags = {**mesh, "train.batch-size": smaller.train.batch_size}
        print(f"compiling for {size.name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            found = compile_for(
                size, arguments[0], [*arguments[1], *(f"--{name}={n}" for name, n in flags.items())]
            )
        except UserError as error:
            if size == topology:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        found |= {
            "topology": size.name,
            "chips": size.chips,
            "compile_seconds": round(time.monotonic() - began, 1),
        }
        found["fits"] = "too_large" not in found and found["bytes"]["total"] <= size.chip.memory
        if found["fits"] and size.kind != "cpu":
            found["predicted"] = predict(found, size.chip)
        plans.append(found)
        if not found["fits"]:
            break
    fitting = [found["predicted"] for found in plans if "predicted" in found]
    rate = "examples_per_second_and_chip"
    for predicted in fitting:
        predicted["efficiency"] = predicted[rate] / fitting[-1][rate]
    return plans


def exchange_seconds(exchange: Found, chip: Chip) -> float:
    """Of one collective, as often as it runs: the time of a ring (twice round for an all-reduce),
    or the latency."""
    devices = exchange["devices"]
    if devices == 1:
        return 0.0
    rounds = 2 if exchange["kind"] == "all-reduce" else 1
    hosts = {n // chip.host for n in exchange["ids"]} if chip.host else {0}
    rate, latency = chip.link, chip.latency * (devices // 2 if chip.sides > 1 else 1)
    if len(hosts) > 1:
        rate, latency = min(rate, chip.network * devices / len(hosts)), chip.network_latency
    moved = exchange["bytes"] * (
        1 if exchange["kind"] == "collective-permute" else (devices - 1) / devices
    )
    return exchange["times"] * rounds * max(latency, moved / rate)


def predict(found: Found, chip: Chip) -> dict[str, float]:
    """Seconds of a step and what follows from them."""
    peak = chip.bfloat16 if found["dtype"] == "bfloat16" else chip.float32
    parts = {
        where: {
            "compute": found["flops"][where] / found["chips"] / peak,
            "memory": found["traffic"][where] / chip.bandwidth,
            "launches": found["kernels"][where] * chip.kernel,
        }
        for where in ("outside", "in_loops")
    }
    exchange = sum(exchange_seconds(one, chip) for one in found["collectives"])
    roofline = sum(max(part.values()) for part in parts.values()) + exchange
    cycles = sum(found["cycles"].values())
    compiler = cycles / chip.clock + exchange if cycles else None
    step = max(roofline, compiler or 0.0)
    sums = {
        name: sum(part[name] for part in parts.values())
        for name in ("compute", "memory", "launches")
    }
    return {
        **sums,
        "in_loops": max(parts["in_loops"].values()),
        "exchange": exchange,
        "roofline": roofline,
        **({"compiler": compiler} if compiler else {}),
        "step": step,
        "examples_per_second": found["batch_size"] / step,
        "examples_per_second_and_chip": found["batch_size"] / step / found["chips"],
        **({"tokens_per_second": found["tokens"] / step} if found["tokens"] else {}),
        "peak_share": sums["compute"] / step,
    }


# --- what is printed


def amount(count: float | None) -> str:
    """Bytes, readably."""
    if count is None:
        return "?"
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def exchanges(found: Found, chip: Chip) -> Iterator[tuple[str, ...]]:
    """Rows of the table of collectives, like ones together."""
    groups: dict[Any, list[Found]] = {}
    for one in found["collectives"]:
        groups.setdefault(
            (not one["in_loop"], one["kind"], one["devices"], one["times"]), []
        ).append(one)
    for (outside, kind, devices, times), ones in sorted(groups.items()):
        total = sum(one["bytes"] * times for one in ones)
        where = "once a step" if outside else f"in a loop, {times} times"
        seconds = sum(exchange_seconds(one, chip) for one in ones)
        milliseconds = "" if math.isnan(seconds) else f"{1e3 * seconds:.3g}"
        yield kind, str(devices), where, str(len(ones)), amount(total), milliseconds


PARTS = (
    "parameters",
    "optimizer",
    "other_inputs",
    "activations",
    "outputs",
    "program",
    "total",
)
TIMES = ("compute", "memory", "launches", "exchange", "roofline", "compiler")


def report(name: str, plans: list[Found], topology: Topology) -> None:
    """Prints a plan."""
    console = Console(highlight=False, width=max(Console().width, 115))
    chip, found = topology.chip, plans[0]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    console.print(
        f"{name} on {topology.name}: mesh {mesh}; batch {found['batch_size']} of "
        f"{found['longest']} steps; "
        f"{found['parameters']:,} parameters, {found['dtype']}, backend {found['backend']}. "
        f"Data: {found['data']}."
    )
    report_memory(plans, chip, console)
    flops = found["flops"]
    total = sum(flops.values())
    console.print(
        f"FLOPs of matrix products a step: {total:.4g}, {flops['in_loops'] / total:.0%} of them "
        "in time loops; "
        f"{total / found['chips']:.4g} a chip."
    )
    if "collectives" in found:
        table = Table("exchange", "devices", "where", "how many", "bytes", "ms", box=SIMPLE)
        for line in exchanges(found, chip):
            table.add_row(*line)
        console.print(table)
    if predicted := [row for row in plans if "predicted" in row]:
        report_predictions(predicted, topology, console)


def report_memory(plans: list[Found], chip: Chip, console: Console) -> None:
    """Prints the bytes a device needs, and what is not divided among devices."""
    found = plans[0]
    table = Table("bytes a device", *(row["topology"] for row in plans), box=SIMPLE)
    for part in PARTS:
        table.add_row(part.replace("_", " "), *(amount(row["bytes"].get(part)) for row in plans))
    fits = ["fits" if row["fits"] else "DOES NOT FIT" for row in plans]
    table.add_row(f"fits in {amount(chip.memory)}" if chip.memory < float("inf") else "fits", *fits)
    console.print(table)
    for row in plans:
        if "too_large" in row:
            console.print(f"{row['topology']}: {row['too_large']}")
    if found["mesh"]["fsdp"] * found["mesh"]["model"] > 1:
        arrays = listing(found["whole"], 6) or "no parameter, no moment of the optimiser"
        console.print(f"Whole on every device: {arrays}.")


def report_predictions(rows: list[Found], topology: Topology, console: Console) -> None:
    """Prints the time of a step, as it is predicted for each number of chips."""
    unit = "tokens" if rows[0]["tokens"] else "examples"
    heads = ("chips", "mesh", "batch", *TIMES, f"{unit}/s", "eff.")
    table = Table(*heads, title="predicted, ms a step", box=SIMPLE)
    for row in rows:
        p = row["predicted"]
        times = [f"{1e3 * p[part]:.3g}" if part in p else "-" for part in TIMES]
        sizes = "x".join(str(size) for size in row["mesh"].values())
        rate = f"{p[f'{unit}_per_second']:,.0f}"
        table.add_row(
            str(row["chips"]), sizes, str(row["batch_size"]), *times, rate, f"{p['efficiency']:.0%}"
        )
    console.print(table)
    for assumption in (*ASSUMPTIONS, f"Figures of {topology.kind}: {topology.chip.sources}."):
        console.print(f"- {assumption}")
