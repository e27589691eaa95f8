# SPDX-License-Identifier: Apache-2.0
"""Test accuracy on IMDB against minutes of pretraining: a table, and a picture.

    python benchmarks/pretraining.py [--picture docs/images/pretraining.png]

Reads `results/imdb_finetune-after-MINUTES-minutes.test.json`, and `results/imdb-linear.json` for
the linear model of words and pairs. How the runs were made: docs/results.md.
"""

import argparse
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
RUNS = re.compile(r"imdb_finetune-after-(\d+)-minutes\.test\.json")


def curve(folder: Path) -> dict[int, float]:
    """Accuracy by minutes, ascending."""
    found = [(RUNS.fullmatch(path.name), path) for path in folder.iterdir()]
    return dict(
        sorted(
            (int(match[1]), json.loads(path.read_text())["accuracy"])
            for match, path in found
            if match
        )
    )


def linear(folder: Path) -> float:
    run = json.loads((folder / "imdb-linear.json").read_text())
    return float(run["baselines"]["linear"]["accuracy"])


def draw(by_minutes: dict[int, float], beside: float) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(by_minutes), list(by_minutes.values()), "o-", label="LSTM 512 and n-grams")
    axes.axhline(beside, color="grey", linestyle="--", label="words and pairs, linear")
    axes.set(xlabel="minutes of pretraining on two cores", ylabel="IMDB, test accuracy")
    axes.legend()
    return figure


def main() -> None:
    about, _, usage = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    by_minutes, beside = curve(RESULTS), linear(RESULTS)
    print("| minutes | test accuracy |\n| --- | --- |")
    for minutes, accuracy in by_minutes.items():
        print(f"| {minutes} | {accuracy:.4f} |")
    print(f"| linear | {beside:.4f} |")
    if options.picture:
        draw(by_minutes, beside).savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
