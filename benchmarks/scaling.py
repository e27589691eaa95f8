# SPDX-License-Identifier: Apache-2.0
"""Weak scaling: the training step of a config on 1, 2, 4, ... of this machine's devices, each with
the same share.

    python benchmarks/scaling.py [--config quickstart] [--rounds 20]

The batch is the config's for one device, n times that for n. The sizes take turns; medians. Meant
for a machine with
several GPUs or TPUs: virtual CPU devices share the processor, and their times say nothing.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax

from flax_lstm import MeshConfig, load_config
from flax_lstm.machine.sharding import put_batch
from flax_lstm.training.assembly import assemble


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    config, devices = load_config(options.config), jax.devices()
    with tempfile.TemporaryDirectory() as folder:
        dataset = config.data.load(Path(folder))
    sizes = [2**n for n in range(len(devices).bit_length()) if 2**n <= len(devices)]
    steps, states, batches, times = {}, {}, {}, {n: [] for n in sizes}
    for n in sizes:
        rows = config.train.batch_size * n
        sized = replace(
            config, mesh=MeshConfig(data=n), train=replace(config.train, batch_size=rows)
        )
        mesh, steps[n], _ = assemble(sized, dataset.info, devices[:n])
        states[n], batches[n] = (
            steps[n].init(),
            put_batch(dataset.train(rows, config.seed)[0], mesh),
        )
    for turn in range(options.rounds + 2):
        for n in sizes:
            begin = time.perf_counter()
            states[n], metrics = steps[n].train(states[n], batches[n])
            jax.block_until_ready((states[n], metrics))
            if turn >= 2:  # the first compiles, the second warms up
                times[n].append(time.perf_counter() - begin)
    print(
        f"{config.name} on {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, "
        f"{options.rounds} rounds\n"
    )
    print(
        "| devices | batch | ms a step | examples/s | efficiency |\n| --- | --- | --- | --- | --- |"
    )
    for n in sizes:
        median, rows = statistics.median(times[n]), config.train.batch_size * n
        share = statistics.median(times[1]) / median
        print(f"| {n} | {rows} | {1e3 * median:.3g} | {rows / median:,.0f} | {share:.0%} |")


if __name__ == "__main__":
    main()
