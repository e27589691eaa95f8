# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm evaluate`: the figures of a saved run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flax_lstm.commands.grammar import parse

ABOUT = "Prints the figures of a saved run."


@dataclass(frozen=True)
class Options:
    workdir: tyro.conf.Positional[Path]  # the folder of a run
    split: Literal["train", "validation", "test"] = "test"  # which part of the data
    checkpoint: str = "best"  # best, latest or a step
    json: bool = False  # one JSON object on standard output


def main(arguments: Sequence[str], prog: str = "flax-lstm evaluate") -> int:
    """Prints the figures; returns the exit status."""
    options = parse(Options, arguments, prog, ABOUT)
    from flax_lstm.inference import load
    from flax_lstm.runs.journal import finite

    figures = load(options.workdir).evaluate(options.split, options.checkpoint)
    if options.json:
        names = ("split", "step", "examples")
        numbers = {name: value for name, value in figures.items() if name not in names}
        print(json.dumps({**finite(numbers), **{name: figures[name] for name in names}}))
    else:
        for name, value in figures.items():
            print(f"{name:15} {value:.6g}" if isinstance(value, float) else f"{name:15} {value}")
    return 0
