# SPDX-License-Identifier: Apache-2.0
"""The training step of flax_lstm beside those of PyTorch, Keras, Flax and Haiku, in one interleaved
run.

    pip install -e '.[bench]'
    python benchmarks/run.py --json figures.json                    # everything: hours
    python benchmarks/run.py --workloads anchors --peers 'ours-*' torch-fused linen --malloc tuned

The machine's own peak is measured first; every figure stands beside the least time that it allows.
Every implementation has a process of its own, and one of them works at a time, in turns. Each must
first give the same loss from the same weights. Prints a table in Markdown; docs/benchmarks.md
explains it.
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from worker import serve
from workloads import GROUPS, WORKLOADS, Work, make_work, reference_loss

PACKAGES = (
    "flax-lstm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "torch",
    "tensorflow",
    "keras",
    "dm-haiku",
)
FIRST_LOSS = 1e-4  # relative difference allowed at the given weights
# and of what the loss falls by in the first updates; PyTorch learns a second bias, which is a third
# faster
FALL = 0.6
PAUSE = 0.05  # seconds between turns, for threads that wait in a loop to go to sleep


class Peer(NamedTuple):
    """A file of `peers/` and what it is told; `default`: what a user has who changes nothing;
    `first_loss`: the relative difference allowed at the given weights."""

    module: str
    options: dict[str, Any] = {}  # noqa: RUF012
    default: bool = True
    first_loss: float = FIRST_LOSS


PEERS = {
    "torch": Peer("pytorch"),
    "torch-fused": Peer("pytorch", {"fused": True}, default=False),
    "torch-packed": Peer("pytorch", {"fused": True, "packed": True}, default=False),
    "keras-tf": Peer("keras_", {"backend": "tensorflow"}),
    "keras-jax": Peer("keras_", {"backend": "jax"}),
    "linen": Peer("linen"),
    "nnx": Peer("nnx_"),
    "ours-nnx": Peer("nnx_", {"ours": True}),
    "haiku": Peer("haiku_"),
}
FLOORS = {f"floor-{library}": Peer("floor", {"library": library}) for library in ("torch", "numpy")}


def all_peers() -> dict[str, Peer]:
    """Ours with each backend there is, the others, and the floors."""
    from flax_lstm import (
        backends,  # here: the workers read this file, and not all of them shall load JAX
    )

    ours = {f"ours-{name}": Peer("ours", {"backend": name}) for name in ("auto", *backends())}
    # Rounding what enters products moves this loss by some 2**-9 of the logits.
    half = Peer("ours", {"backend": "cpu", "dtype": "bfloat16"}, first_loss=1e-2)
    return {**ours, "ours-cpu-bfloat16": half, **PEERS, **FLOORS}


class Entrant:
    """An implementation with or without tuned malloc, its process, and what came of it."""

    def __init__(self, name: str, peer: Peer, tuned: bool, work: Work):
        self.name, self.peer, self.tuned = name, peer, tuned
        self.is_floor, self.is_ours = name in FLOORS, name.startswith("ours-")
        self.trouble: dict[str, str] = {}  # "missing", "unsupported" or "failed", and why
        self.report: dict[str, Any] = {}
        self.rounds: list[float] = []  # median milliseconds of each turn
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, peer.module, peer.options, tuned, work)
        )
        self._process.start()
        theirs.close()
        self._receive()

    def ask(self, message: Any) -> dict[str, Any]:
        self._pipe.send(message)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer = {"failed": f"its process ended with status {self._process.exitcode}"}
        self.trouble = {
            k: v for k, v in answer.items() if k in ("missing", "unsupported", "failed")
        }
        return answer

    def fail(self, why: str) -> None:
        self.trouble = {"failed": why}
        self.stop()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def label(self) -> str:
        return self.name + " + malloc" * self.tuned

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.rounds)


def compete(work: Work, entrants: list[Entrant], rounds: int, seconds: float, log: Any) -> None:
    """Warms all up, checks their losses, and lets them take turns."""
    for entrant in running(entrants):
        log(f"  {entrant.label}: first steps")
        entrant.report = entrant.ask("warm-up")
    check_losses(work, entrants)
    for number in range(rounds):
        log(f"  round {number + 1} of {rounds}")
        for entrant in running(entrants):
            time.sleep(PAUSE)
            answer = entrant.ask(seconds)
            if not entrant.trouble:
                entrant.rounds.append(1e3 * statistics.median(answer["seconds"]))
    for entrant in running(entrants):
        entrant.report |= entrant.ask(None)
        entrant.stop()


def running(entrants: Iterable[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if not entrant.trouble]


def check_losses(work: Work, entrants: list[Entrant]) -> None:
    """Ends those whose first loss is not that of NumPy, or whose updates do not lower it as those
    of the others do."""
    reference = reference_loss(work)
    learners = [entrant for entrant in running(entrants) if not entrant.is_floor]
    for entrant in learners:
        loss = entrant.report["losses"][0]
        if not math.isclose(loss, reference, rel_tol=entrant.peer.first_loss):
            entrant.fail(f"its loss is {loss:.6f}, it should be {reference:.6f}")
    falls = {entrant: reference - entrant.report["losses"][-1] for entrant in running(learners)}
    typical = statistics.median(falls.values()) if falls else 0.0
    for entrant, fall in falls.items():
        if abs(fall - typical) > FALL * abs(typical) + FIRST_LOSS * reference:
            entrant.fail(
                f"its loss falls by {fall:.6f} in the first updates, that of the others by "
                f"{typical:.6f}"
            )


def rows_of(
    name: str, work: Work, entrants: list[Entrant], limit_ms: float
) -> list[dict[str, Any]]:
    """One row an entrant: figures, and ratios to the best of the others and to the limit."""
    timed = [entrant for entrant in entrants if entrant.rounds and not entrant.trouble]
    peers = [entrant for entrant in timed if not entrant.is_ours and not entrant.is_floor]
    best = min(peers, key=lambda e: e.milliseconds, default=None)
    defaults = (e for e in peers if e.peer.default and not e.tuned)
    best_default = min(defaults, key=lambda e: e.milliseconds, default=None)
    floor = min((e for e in timed if e.is_floor), key=lambda e: e.milliseconds, default=None)

    def row(entrant: Entrant) -> dict[str, Any]:
        about = {
            "workload": name,
            "implementation": entrant.name,
            "malloc": "tuned" if entrant.tuned else "default",
        }
        status = next(iter(entrant.trouble), "ok")
        about |= {"status": status, "reason": entrant.trouble.get(status)}
        if entrant not in timed:
            return about
        linen = next((e for e in peers if e.name == "linen" and e.tuned == entrant.tuned), None)
        others = {
            "times_best_peer": best,
            "times_best_default_peer": best_default,
            "times_linen": linen,
        }
        ratios = {
            k: e and e.milliseconds / entrant.milliseconds
            for k, e in others.items()
            if not entrant.is_floor
        }
        report, ms = entrant.report, entrant.milliseconds
        low, _, high = quartiles(entrant.rounds)
        return about | {
            "ms": ms,
            "ms_quartiles": [low, high],
            "ms_rounds": entrant.rounds,
            "first_step_s": report["first_step_s"],
            "before_mb": report["before_mb"],
            "memory_mb": report["peak_mb"] - report["before_mb"],
            "memory_with_first_steps_mb": max(report["first_peak_mb"], report["peak_mb"])
            - report["before_mb"],
            "losses": report["losses"],
            **{k: ratios.get(k) for k in others},
            "over_floor": floor and ms / floor.milliseconds,
            "over_limit": ms / limit_ms,
        }

    return [row(entrant) for entrant in entrants]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


COLUMNS = {
    "ms a step": lambda r: figure(r["ms"]),
    "quartiles": lambda r: " - ".join(map(figure, r["ms_quartiles"])),
    "first step, s": lambda r: figure(r["first_step_s"]),
    "memory, MB": lambda r: f"{r['memory_mb']:.0f} ({r['memory_with_first_steps_mb']:.0f})",
    "x best peer": lambda r: figure(r["times_best_peer"]),
    "x best default": lambda r: figure(r["times_best_default_peer"]),
    "x nn.RNN": lambda r: figure(r["times_linen"]),
    "/ floor": lambda r: figure(r["over_floor"]),
    "/ limit": lambda r: figure(r["over_limit"]),
}


def figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "implementation", *COLUMNS]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if row["status"] == "ok":
            label = row["implementation"] + " + malloc" * (row["malloc"] == "tuned")
            lines.append([row["workload"], label, *(form(row) for form in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def absences(rows: list[dict[str, Any]]) -> str:
    """Who is not in the table, and why, once for all workloads with the same reason."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["implementation"], row["status"], row["reason"])
            names = grouped.setdefault(key, [])
            names += [row["workload"]] * (row["workload"] not in names)
    return "\n".join(
        f"- {who}: {status} ({', '.join(names)}): {why}"
        for (who, status, why), names in grouped.items()
    )


def machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def chosen(patterns: list[str], names: Iterable[str], parser: argparse.ArgumentParser) -> list[str]:
    """The names that match one of the patterns, in their own order."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            parser.error(f"{pattern} is none of {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workloads", nargs="+", default=["all"], help="names, patterns as 'bi-*', or all, anchors"
    )
    parser.add_argument("--peers", nargs="+", default=["*"], help="names, or patterns as 'ours-*'")
    parser.add_argument(
        "--malloc", nargs="+", default=["default", "tuned"], choices=["default", "tuned"]
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each implementation")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="at least so long a turn, and one step"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--list", action="store_true", help="print the names of workloads and implementations"
    )
    options = parser.parse_args()
    options.known = all_peers()
    asked = [name for pattern in options.workloads for name in GROUPS.get(pattern, [pattern])]
    options.workloads = chosen(asked, WORKLOADS, parser)
    options.peers = chosen(options.peers, options.known, parser)
    return options


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def contest(name: str, work: Work, options: argparse.Namespace, limit_ms: float) -> list[Any]:
    """The rows of one workload."""
    log(name)
    entrants = []
    try:
        for peer in options.peers:
            # A floor allocates nothing.
            for malloc in options.malloc if peer not in FLOORS else ["default"]:
                entrants.append(Entrant(peer, options.known[peer], malloc == "tuned", work))
        compete(work, entrants, options.rounds, options.seconds, log)
    finally:
        for entrant in entrants:
            entrant.stop()
    return rows_of(name, work, entrants, limit_ms)


def own_core_type(instructions: list[str]) -> None:
    """NumPy's OpenBLAS chooses its kernels by the processor, or by a variable that may be left from
    elsewhere; not every release knows every processor that has AVX-512, so it is told."""
    for ours, theirs in {"avx512": "SkylakeX", "avx2": "Haswell"}.items():
        if ours in instructions:
            os.environ["OPENBLAS_CORETYPE"] = theirs
            return
    os.environ.pop("OPENBLAS_CORETYPE", None)


def report(about: dict[str, Any], peak: str, rows: list[dict[str, Any]]) -> None:
    place, load = about["machine"], about["load_average"]
    named = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(
        f"{about['date']}, {place['cores']} cores of {place['cpu']}, Python {place['python']}, "
        f"{named}; load {load['start'][0]:.1f} before, {load['end'][0]:.1f} after; "
        f"{about['rounds']} rounds"
    )
    print("".join(f"\n{note}" for note in about["notes"]))
    print(peak, table(rows), absences(rows), sep="\n\n")


def main() -> None:
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="2")
    options = parse()
    if options.list:
        print(f"workloads: {' '.join(WORKLOADS)}\ngroups: {' '.join(GROUPS)}")
        print(f"implementations: {' '.join(options.known)}")
        return
    from limit import Machine  # here, as in `all_peers`

    began, load = datetime.datetime.now(datetime.UTC), os.getloadavg()
    peak = Machine.measured()
    own_core_type(list(peak.flops))
    rows, notes, limits = [], [], {}
    for name in options.workloads:
        work = make_work(WORKLOADS[name], options.seed)
        notes += [work.note] * bool(work.note and work.note not in notes)
        limits[name] = peak.milliseconds(work)
        rows += contest(name, work, options, limits[name])
    about = {
        "date": began.isoformat(timespec="seconds"),
        "minutes": round((datetime.datetime.now(datetime.UTC) - began).total_seconds() / 60, 1),
        "machine": machine(),
        "peak": asdict(peak),
        "limit_ms": limits,
        "load_average": {"start": load, "end": os.getloadavg()},
        "versions": versions(),
        "seed": options.seed,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "notes": notes,
        "workloads": {name: asdict(WORKLOADS[name]) for name in options.workloads},
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    report(about, peak.table(), rows)


if __name__ == "__main__":
    main()
