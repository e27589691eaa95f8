# SPDX-License-Identifier: Apache-2.0
"""One implementation in a process of its own, doing what it is told and nothing meanwhile."""

import importlib
import importlib.util
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from workloads import Unsupported, Work, loss_of


def serve(pipe: Connection, module: str, options: dict[str, Any], tuned: bool, work: Work) -> None:
    """Answers each message in the pipe by a dict; one with "failed" (or "missing", "unsupported")
    is the last.

    The first answer comes unasked when the implementation is ready. "warm-up": the losses of the
    first steps, how long the first took, memory before and at the peak. A number: the seconds of
    steps made for about so many seconds. None: memory, and the end.
    """
    os.dup2(2, 1)  # whatever libraries print: the table alone goes to standard output
    try:
        if tuned and not load_malloc().tune_malloc():
            raise Unsupported("malloc can be tuned with glibc only")
        step = importlib.import_module(f"peers.{module}").make(work, **options)
        pipe.send({})
        answers = {
            "warm-up": lambda: warm_up(step, work),
            None: lambda: {"peak_mb": memory("VmHWM")},
        }
        while True:
            message = pipe.recv()
            pipe.send(
                answers[message]()
                if message in answers
                else {"seconds": timed_steps(step, work, message)}
            )
            if message is None:
                return
    except ModuleNotFoundError as error:
        pipe.send({"missing": str(error)})
    except Unsupported as error:
        pipe.send({"unsupported": str(error)})
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


def load_malloc() -> ModuleType:
    """`flax_lstm.machine.malloc` alone: importing the package would bring JAX into the processes of
    the others."""
    package = importlib.util.find_spec("flax_lstm")
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name("machine") / "malloc.py"
    spec = importlib.util.spec_from_file_location("malloc", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory(field: str) -> float:
    """Megabytes that this process has ("VmRSS") or had at most ("VmHWM"); nan where there is no
    /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """The peak of memory is counted from now."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def warm_up(step: Any, work: Work) -> dict[str, Any]:
    """All batches once, which compiles all shapes, and the first again: three steps at least."""
    before = memory("VmRSS")
    forget_peak()
    began = time.perf_counter()
    results = [step(0)]
    first = time.perf_counter() - began
    results += [step(n % len(work.batches)) for n in range(1, max(3, len(work.batches) + 1))]
    peak = memory("VmHWM")
    forget_peak()
    workload, batch = work.workload, work.batches[0]
    losses = results if workload.train else [r if r is None else loss_of(r, batch) for r in results]
    return {"losses": losses, "first_step_s": first, "before_mb": before, "first_peak_mb": peak}


def timed_steps(step: Any, work: Work, seconds: float) -> list[float]:
    """Seconds a step, each figure a mean over all batches: as many as are begun in that time, one
    at least. A step before them, which is not counted, brings caches and threads back."""
    step(0)
    samples, end = [], time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        began = time.perf_counter()
        for n in range(len(work.batches)):
            step(n)
        samples.append((time.perf_counter() - began) / len(work.batches))
    return samples
