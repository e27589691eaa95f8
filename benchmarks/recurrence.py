# SPDX-License-Identifier: Apache-2.0
"""Times the backends of the recurrence against each other, forward and backward, interleaved in one
process.

    python benchmarks/recurrence.py [--repeats 15] [--backends fused scan] [--dtype float32]
    [--ragged]

Prints the median milliseconds of a training-like step (outputs, and the gradients of inputs and
weights) of each backend, and its speed relative to the scan. `taskset -c 0 python ...` shows one
core. On a busy machine compare the processor's time (`--cpu-time`), which waiting for others does
not lengthen. malloc is tuned as in `train.py`.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.machine.malloc import tune_malloc
from flax_lstm.nn.cells import CELLS, Cell
from flax_lstm.nn.layers import RNN, Stack
from flax_lstm.nn.variants import LayerNormGRUCell, LayerNormLSTMCell, ProjectedLSTMCell

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from own_cells import CoupledLSTMCell, MinimalGatedCell, PeepholeLSTMCell

# By name: a cell of so many hidden units, and settings.
MAKE: dict[str, Callable[..., Cell]] = {
    **CELLS,
    "layernorm-lstm": LayerNormLSTMCell,
    "layernorm-gru": LayerNormGRUCell,
    "projected-lstm": lambda hidden, **s: ProjectedLSTMCell(hidden, projection=hidden // 2, **s),
    "coupled-lstm": CoupledLSTMCell,
    "peephole-lstm": PeepholeLSTMCell,
    "minimal-gated": MinimalGatedCell,
}

# cell, layers, batch B, time T, input features D, hidden units H
CASES = [
    ("lstm", 1, 32, 200, 128, 128),
    ("gru", 1, 32, 200, 128, 128),
    ("rnn", 1, 32, 200, 128, 128),
    ("lstm", 2, 32, 60, 7, 50),
    ("gru", 2, 32, 60, 7, 50),
    ("lstm", 1, 64, 400, 64, 64),
    ("gru", 1, 64, 400, 64, 64),
    ("lstm", 1, 64, 200, 256, 256),
    ("gru", 1, 64, 200, 256, 256),
    *((cell, 1, 32, 200, 128, 128) for cell in list(MAKE)[3:]),
]


def make_step(
    backend: str, cell: str, layers: int, hidden: int, dtype: str, x_BTD: jax.Array, lengths_B
) -> Callable:
    """A compiled function that does one step and waits for it."""
    stack = Stack([RNN(MAKE[cell](hidden, dtype=dtype), backend=backend) for _ in range(layers)])
    variables = stack.init(jax.random.key(0), x_BTD, lengths_B)

    def loss(variables, x_BTD):
        _, y_BTH = stack.apply(variables, x_BTD, lengths_B)
        return jnp.mean(jnp.square(y_BTH.astype(jnp.float32)))

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(step(variables, x_BTD))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each backend")
    parser.add_argument("--backends", nargs="+", default=["fused", "scan"])
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the matmuls"
    )
    parser.add_argument("--ragged", action="store_true", help="rows of different lengths")
    parser.add_argument("--only", default="", help="a cell")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, summed over cores, not wall time"
    )
    arguments = parser.parse_args()
    clock = cpu_seconds if arguments.cpu_time else time.perf_counter
    tune_malloc()
    for cell, layers, batch, time_steps, features, hidden in CASES:
        if arguments.only not in cell:
            continue
        x_BTD = jax.random.normal(jax.random.key(1), (batch, time_steps, features))
        lengths_B = jnp.linspace(1, time_steps, batch).astype(int) if arguments.ragged else None
        steps = {
            name: make_step(name, cell, layers, hidden, arguments.dtype, x_BTD, lengths_B)
            for name in arguments.backends
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(arguments.repeats):
            for name, step in steps.items():
                start = clock()
                step()
                seconds[name].append(clock() - start)
        medians = {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}
        case = f"{cell:4} {layers} x H{hidden:<4} B{batch:<4} T{time_steps:<4} D{features:<4}"
        figures = "  ".join(f"{name} {ms:7.1f} ms" for name, ms in medians.items())
        base = medians.get("scan", next(iter(medians.values())))
        ratios = "  ".join(
            f"{name} {base / ms:4.2f}x" for name, ms in medians.items() if name != "scan"
        )
        print(f"{case} {figures}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
