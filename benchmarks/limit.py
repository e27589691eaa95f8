# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, measured by small kernels of our own (`peak.cc`), and the least
time in which it could do a workload.

    python benchmarks/limit.py      # the rates of each instruction set, by one thread and by all

A workload takes at least its operations / rate of arithmetic, and at least its bytes / bandwidth.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from workloads import Work

from flax_lstm.nn.recurrence import native

SOURCES = [Path(__file__).with_name("peak.cc")]
SECONDS = 0.1  # of each measurement, of which the best turn counts
MEMORY = 256 << 20  # bytes of an array that no cache holds
OPTIMISER = 24  # bytes a parameter: it and two moments are read and written

DType = Literal["float32", "bfloat16"]


@functools.cache
def load(instructions: str) -> Any:
    """The compiled kernels. Raises `native.Unavailable`."""
    library = ctypes.CDLL(str(native.build(SOURCES, instructions, "peak")))
    for name in ("multiply_add_rate", "bfloat16_rate", "update_rate"):
        getattr(library, name).restype = ctypes.c_double
    return library


def together(threads: int, measure: Callable[[], float]) -> float:
    """The sum of what so many threads measure at the same time."""
    found: list[float] = []
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait()
        found.append(measure())

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(found)


def arithmetic(library: Any, dtype: DType, threads: int) -> float:
    """Operations a second (a multiplication and an addition are two), 0 where there is no
    instruction for that dtype."""
    rate = {"float32": library.multiply_add_rate, "bfloat16": library.bfloat16_rate}[dtype]
    return together(threads, lambda: rate(ctypes.c_double(SECONDS)))


def bandwidth(library: Any, size: int, threads: int) -> float:
    """Bytes a second that are read and written by threads which have so many bytes among them."""
    floats = max(size // 4 // threads, 1)

    def measure() -> float:
        data = np.ones(floats, np.float32)
        address = data.ctypes.data_as(ctypes.c_void_p)
        return float(library.update_rate(address, ctypes.c_long(floats), ctypes.c_double(SECONDS)))

    return together(threads, measure)


@dataclass(frozen=True)
class Machine:
    """Rates by instruction set, dtype and number of threads, and the best library's bandwidth."""

    flops: dict[str, dict[DType, dict[int, float]]]
    memory: dict[int, float]  # bytes a second by number of threads, in arrays that no cache holds
    threads: int  # processors that this process may use

    @classmethod
    def measured(cls) -> "Machine":
        threads = len(os.sched_getaffinity(0))
        counts = sorted({1, threads})
        dtypes: tuple[DType, ...] = ("float32", "bfloat16")
        flops = {
            name: {d: {n: arithmetic(load(name), d, n) for n in counts} for d in dtypes}
            for name in native.possible()
        }
        best = load(native.possible()[0])
        return cls(flops, {n: bandwidth(best, MEMORY, n) for n in counts}, threads)

    def best(self, dtype: DType = "float32") -> float:
        """Operations a second on all processors, by the best instruction set."""
        return max(rates[dtype][self.threads] for rates in self.flops.values())

    def milliseconds(self, work: Work) -> float:
        """The least time of a step: an average over the batches. The optimiser's arrays may stay in
        a cache that is large enough: the bandwidth is that of arrays of their size."""
        size = OPTIMISER * parameters(work) // 2 if work.workload.train else 0
        seconds = size and 2 * size / bandwidth(load(native.possible()[0]), size, self.threads)
        return 1e3 * max(operations(work) / self.best(), seconds)

    def table(self) -> str:
        """Markdown."""
        counts = sorted(self.memory)
        heads = [f"{d}, {n} thread{'s' * (n > 1)}" for d in ("float32", "bfloat16") for n in counts]
        lines = [["GFLOP/s", *heads], ["---"] * (1 + len(heads))]
        for name, rates in self.flops.items():
            figures = [rates[d][n] for d in rates for n in counts]
            lines.append([name, *(f"{f / 1e9:.0f}" if f else "-" for f in figures)])
        rates = ", ".join(f"{self.memory[n] / 1e9:.1f} by {n}" for n in counts)
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\nMemory, GB/s read and written: {rates}."


def parameters(work: Work) -> int:
    weights = work.weights
    arrays = [weights.embedding, *weights.head]
    for layer in weights.stack.values():
        sides = [layer] if "cell" in layer else layer.values()
        arrays += [array for side in sides for array in side["cell"].values()]
    return sum(array.size for array in arrays if array is not None)


def operations(work: Work) -> float:
    """Multiplications and additions of the recurrent layers' matrix products over all valid steps,
    which no implementation can leave out: an average over the batches."""
    w, total = work.workload, 0.0
    steps = sum(int(batch.lengths.sum()) for batch in work.batches) / len(work.batches)
    features, directions = w.features, 1 + w.bidirectional
    for number, hidden in enumerate(w.hidden):
        inputs, recurrent = features * w.gates * hidden, hidden * w.gates * hidden
        products = [inputs, recurrent]
        if w.train:
            products += [inputs, recurrent, recurrent]  # gradients of both weights, and of h
            if number or w.vocabulary:
                products.append(inputs)  # real inputs need no gradient
        total += 2 * steps * directions * sum(products)
        features = hidden * directions
    return total


if __name__ == "__main__":
    print(Machine.measured().table())
