# SPDX-License-Identifier: Apache-2.0
"""The mean of forecasters that differ in their look-back, which `flax-lstm evaluate` does not take:
figures of each on a split, and of all together.

    python benchmarks/lookbacks.py runs/a runs/b runs/c --split validation

Each reads the windows as it was trained to; the windows have to be the same but for the look-back.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flax_lstm import Forecasting, load
from flax_lstm.data.base import Batch
from flax_lstm.inference import Run


def read(run: Run, split: str) -> tuple[np.ndarray, Batch]:
    """Its forecasts of all windows of a split, calibrated, and the windows."""
    dataset = run.dataset()
    batch = dataset.batch(split, np.arange(dataset.size(split)))  # type: ignore[attr-defined]
    return run.config.task.final(run.forward()(batch), batch), batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that forecast")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    options = parser.parse_args()
    runs = [load(folder) for folder in options.runs]
    for run in runs:
        if not isinstance(run.config.task, Forecasting):
            raise SystemExit(f"{run.workdir} does not forecast")
    found, windows = zip(*(read(run, options.split) for run in runs), strict=True)
    first = windows[0]
    for folder, other in zip(options.runs, windows, strict=True):
        if not np.array_equal(other.targets, first.targets):
            raise SystemExit(f"{folder} has other windows than {options.runs[0]}")
    # What is calibrated already is not to be stretched again.
    task = replace(runs[0].config.task, stretch=())
    together = task.pooled(found) if len(found) > 1 else found[0]
    for name, outputs in zip([*options.runs, "together"], [*found, together], strict=True):
        sums = task.measure(jnp.asarray(outputs), first, runs[0].info)
        figures = {k: v for k, v in task.figures(sums, runs[0].info).items() if v is not None}
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
