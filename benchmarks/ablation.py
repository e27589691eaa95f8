# SPDX-License-Identifier: Apache-2.0
"""What each part of the ETTh1 forecaster does: `etth1` as it ships, and with one change at a time.

    python benchmarks/ablation.py ETTh1.csv [--horizons 96 336] [--folder runs/ablation]

Trains each with seed 0, unless its folder holds a finished run, and prints mae / mse on validation
and on the test. The test is shown to say what a part does; nothing is to be chosen by it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CHANGES: Mapping[str, tuple[str, ...]] = {
    "as it ships": (),
    "without the cycle": ("--model.cycle", "False"),
    "without the highway": ("--model.highway", "False"),
    "queries that do not see the look-back": ("--model.highway-seen", "False"),
    "a sparse highway": ("--model.highway-sparse", "True"),
    "without channel embeddings": ("--model.apart", "False"),
    "window none": ("--model.window", "none"),
    "window standard": ("--model.window", "standard"),
    "512 units": ("--model.hidden-size", "512"),
    "objective mse": ("--task.objective", "mse"),
    "objective huber": ("--task.objective", "huber"),
}
STEPS = {96: 680, 192: 680, 336: 476, 720: 272}  # validation chooses earlier ones


def figures(path: str, change: str, horizon: int, folder: Path) -> list[str]:
    """mae / mse of one run on validation and test."""
    place = folder / f"{change.replace(' ', '-')}-{horizon}"
    result = place / "result.json"
    if not result.exists():
        command = [sys.executable, "-m", "flax_lstm", "train", "--config", "etth1"]
        command += ["--data.path", path, "--data.horizon", str(horizon), "--no-report"]
        command += ["--train.steps", str(STEPS[horizon]), "--workdir", str(place)]
        subprocess.run([*command, *CHANGES[change]], check=True, stdout=sys.stderr)
    found = json.loads(result.read_text())
    pairs = ((found[split]["mae"], found[split]["mse"]) for split in ("validation", "test"))
    return [f"{mae:.4f} / {mse:.4f}" for mae, mse in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--horizons", type=int, nargs="+", choices=list(STEPS), default=[96, 336])
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    options = parser.parse_args()
    heads = [f"{n}, {split}" for n in options.horizons for split in ("validation", "test")]
    print("| | " + " | ".join(heads) + " |")
    print("| --- |" + " --- |" * len(heads))
    for change in options.only:
        rows = [figures(options.path, change, n, options.folder) for n in options.horizons]
        print(f"| {change} | " + " | ".join(text for row in rows for text in row) + " |")


if __name__ == "__main__":
    main()
