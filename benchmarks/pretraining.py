# SPDX-License-Identifier: Apache-2.0
"""Test accuracy on IMDB against minutes of pretraining: a table, and a picture.

    python benchmarks/pretraining.py [--picture docs/images/pretraining.png]

Reads `results/imdb_finetune-after-MINUTES-minutes.test.json`. How the runs were made:
docs/results.md.
"""

import argparse
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
RUNS = re.compile(r"imdb_finetune-after-(\d+)-minutes\.test\.json")

LINEAR = 0.9046  # of words and pairs, fitted on the same reviews: docs/results.md


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


def draw(by_minutes: dict[int, float]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(by_minutes), list(by_minutes.values()), "o-", label="LSTM 512 and n-grams")
    axes.axhline(LINEAR, color="grey", linestyle="--", label="words and pairs, linear")
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
    by_minutes = curve(RESULTS)
    print("| minutes | test accuracy |\n| --- | --- |")
    for minutes, accuracy in by_minutes.items():
        print(f"| {minutes} | {accuracy:.4f} |")
    print(f"| linear | {LINEAR:.4f} |")
    if options.picture:
        draw(by_minutes).savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
