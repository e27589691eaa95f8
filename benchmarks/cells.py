# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU and simple RNN side by side: gates, parameters, time of a training step, accuracy.

    python benchmarks/cells.py [--seeds 0 1 2] [--runs runs/cells]

Time: steps of the model of configs/imdb_lstm.py (batch 32, 200 tokens), the cells taking turns in
one process, medians. Accuracy: configs/rotten_tomatoes.py read left to right and classified from
the last output (so that memory matters), trained to the end with each cell and seed; the best epoch
on validation, tested once.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from flax_lstm import Classification, load_config
from flax_lstm.data.base import Batch
from flax_lstm.machine.malloc import tune_malloc
from flax_lstm.machine.sharding import make_mesh, put_batch
from flax_lstm.nn.cells import CELLS
from flax_lstm.training.loop import fit
from flax_lstm.training.optim import learning_rate, make_optimizer
from flax_lstm.training.steps import make_steps


class Reviews:
    """What the model needs to know of IMDB, without the data."""

    labels, vocabulary_size = ("neg", "pos"), 20_000


def step_times(rounds: int) -> dict[str, tuple[float, int]]:
    """(median milliseconds, parameters of the recurrent layer) for each cell."""
    batch_size, steps = 32, 200
    rng = np.random.default_rng(0)
    ids = rng.integers(3, Reviews.vocabulary_size, (batch_size, steps)).astype(np.int32)
    labels, lengths = (
        rng.integers(0, 2, batch_size).astype(np.int32),
        np.full(batch_size, steps, np.int32),
    )
    batch = Batch(ids, labels, lengths, np.ones(batch_size, np.float32))
    config, task, mesh = load_config("imdb_lstm"), Classification(), make_mesh(1)
    schedule = learning_rate("constant", 1e-3, 0, 1)
    turns, states, times = {}, {}, {}
    for name in CELLS:
        module = task.build(replace(config.model, cell=name), Reviews)
        optimizer = make_optimizer("adamw", schedule, 0.0, 0.0)
        measure = lambda outputs, batch: task.measure(outputs, batch, Reviews)  # noqa: E731
        turns[name] = make_steps(module, task.loss, measure, optimizer, schedule, mesh, batch)
        states[name], times[name] = turns[name].init(), []
    placed = put_batch(batch, mesh)
    for turn in range(rounds + 2):
        for name, functions in turns.items():
            begin = time.perf_counter()
            states[name], metrics = functions.train(states[name], placed)
            jax.block_until_ready((states[name], metrics))
            if turn >= 2:  # the first compiles, the second warms up
                times[name].append(1e3 * (time.perf_counter() - begin))
    size = {n: sum(w.size for w in jax.tree.leaves(states[n].params["recurrent"])) for n in CELLS}
    return {name: (statistics.median(times[name]), size[name]) for name in CELLS}


def accuracies(name: str, seeds: list[int], runs: Path) -> list[float]:
    """Test accuracy of each seed."""
    config = load_config("rotten_tomatoes")
    model = replace(config.model, cell=name, bidirectional=False, pooling="last")
    results = (
        fit(replace(config, model=model, seed=seed), runs / f"{name}_{seed}") for seed in seeds
    )
    return [result["test"]["accuracy"] for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each cell")
    parser.add_argument("--runs", type=Path, default=Path("runs/cells"))
    options = parser.parse_args()
    tune_malloc()
    rows = []
    for name, (milliseconds, size) in step_times(options.rounds).items():
        scores = accuracies(name, options.seeds, options.runs)
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        rows.append(
            f"| {name} | {CELLS[name].gates} | {size:,} | {milliseconds:.0f} | "
            f"{statistics.mean(scores):.3f} +- {spread:.3f} |"
        )
    print(
        "| cell | gates | parameters of the layer | ms a step | accuracy |\n| --- | --- | --- | "
        "--- | --- |"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
