# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm evaluate`: the figures of a saved run, and what a classifier gets wrong."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flax_lstm.commands.grammar import Folders, named, parse

ABOUT = """Prints the figures of a saved run.

For a classifier of texts also what it gets right and wrong, by class or tag and by length, how sure
it is, and its worst errors: printed, and written to DIR/evaluation as JSON and as a picture.

Of several folders, or one that --seeds filled, the mean of the models is judged."""


@dataclass(frozen=True)
class Options:
    workdir: Folders  # the folder of a run; of several the mean is judged
    split: Literal["train", "validation", "test"] = "test"  # which part of the data
    input: Path | None = None  # new labelled data instead, with the columns of the training data
    checkpoint: str = "best"  # best, latest or a step
    json: bool = False  # one JSON object on standard output


def main(arguments: Sequence[str], prog: str = "flax-lstm evaluate") -> int:
    """Prints the figures; returns the exit status."""
    options = parse(Options, arguments, prog, ABOUT)
    from flax_lstm.inference import load
    from flax_lstm.runs.journal import finite
    from flax_lstm.tasks.base import Examiner

    run = load(*named(options.workdir))
    figures, found = run.examine(options.split, options.checkpoint, file=options.input)
    names = ("split", "step", "examples")
    numbers = {name: value for name, value in figures.items() if name not in names}
    whole = {**finite(numbers), **{name: figures[name] for name in names}, **found}
    task = run.config.task
    if found and isinstance(task, Examiner):
        name = f"input.{options.input.stem}" if options.input is not None else options.split
        if len(options.workdir) == 1:
            keep(run.workdir, whole, name, task.plot)
    if options.json:
        print(json.dumps(whole))
        return 0
    for name, value in figures.items():
        print(f"{name:15} {value:.6g}" if isinstance(value, float) else f"{name:15} {value}")
    if found:
        show(found)
    return 0


def keep(folder: Path, whole: Mapping[str, Any], name: str, plot: Callable[..., object]) -> None:
    """Writes what was found into the run's folder, as JSON and as a picture."""
    path = folder / "evaluation" / f"{name}.json"
    picture = path.parent / f"{name}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        plot(whole, picture)
    except OSError as error:  # of a folder that can only be read; what was found is printed
        print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr)
        return
    print(f"In {path.parent.absolute()}: {path.name}, {picture.name}", file=sys.stderr)


def show(found: Mapping[str, Any]) -> None:
    """Prints what a classifier gets right and wrong; of rows with tags the accuracy is the share of
    rows whose tags are all right."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)  # labels and texts as they are
    labels: list[str] = []
    counts: list[list[int]] = [[] for _ in found["classes"]]
    title = "by tag"
    if "confusion" in found:
        labels, counts = found["confusion"]["labels"], found["confusion"]["actual_by_predicted"]
        title = "by class; then how often each was predicted"
    table = Table(title=title)
    for heading in ("actual", "examples", "precision", "recall", "f1", *labels):
        table.add_column(heading, justify="left" if heading == "actual" else "right")
    for row, line in zip(found["classes"], counts, strict=True):
        figures = (row[name] for name in ("precision", "recall", "f1"))
        shown = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        table.add_row(row["label"], str(row["examples"]), *shown, *map(str, line))
    console.print(table)
    for group in found["lengths"]:
        console.print(
            f"{group['shortest']} to {group['longest']} tokens: accuracy "
            f"{group['accuracy']:.3f} of {group['examples']}",
        )
    calibration = found["calibration"]
    told = f"calibration error {calibration['ece']:.3f}"
    if "temperature" in calibration:
        told += (
            f"; {calibration['ece_calibrated']:.3f} at temperature "
            f"{calibration['temperature']:.2f}, fitted on validation"
        )
    console.print(told)
    for error in found["errors"][:5]:
        console.print(
            f"{error['label']}, predicted {error['predicted']} with {error['probability']:.3f}: "
            f"{error['text']}",
        )
