# SPDX-License-Identifier: Apache-2.0
"""The command line called in this process, and tables small enough to train on in a second or
two."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from flax_lstm import __main__ as command_line

ROOT = Path(__file__).parent.parent

KEEP = ["--no-tuned-malloc", "--no-compilation-cache"]  # what would last for the whole process
SMALL = (
    "--mesh.data 1 --model.hidden-size 4 --train.steps 4 --train.batch-size 8 "
    "--train.eval-every 2 --train.log-every 2"
)
STEPWISE = Path(__file__).parent / "fixtures" / "stepwise.py"
SERIES = f"--config {STEPWISE} --data.lookback 8 --data.horizon 2 --data.season 4 {SMALL}"


class Outcome(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


def call(capsys, command: str, *arguments: object) -> Outcome:
    """`python -m flax_lstm COMMAND`, the command split at spaces and the other arguments taken as
    they are."""
    given = [*command.split(), *(str(a) for a in arguments)]
    if given[:1] == ["train"]:
        given[1:1] = KEEP
    capsys.readouterr()
    try:
        code = command_line.main(given)
    except SystemExit as stop:
        code = stop.code
    return Outcome(code, *capsys.readouterr())


def series(rows: int = 120, **columns: object) -> pd.DataFrame:
    """An hourly table with columns `when`, `load`, `price`."""
    times = pd.date_range("2024-01-01", periods=rows, freq="h").strftime("%Y-%m-%d %H:%M")
    waves = {
        "load": np.sin(np.arange(rows) / 4).round(4),
        "price": 5 + np.cos(np.arange(rows) / 4).round(4),
    }
    return pd.DataFrame({"when": times, **waves, **columns})


def texts(rows: int = 80, **columns: object) -> pd.DataFrame:
    """Reviews that are `fine` or `awful`, with an id to tell them apart."""
    labels = ["good" if n % 2 else "bad" for n in range(rows)]
    words = [
        f"a {'fine' if label == 'good' else 'awful'} film, number {n}"
        for n, label in enumerate(labels)
    ]
    return pd.DataFrame({"id": np.arange(rows), "text": words, "label": labels, **columns})


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
