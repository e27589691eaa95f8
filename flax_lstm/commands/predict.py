# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm predict`: predictions of a saved run, for a text or for a file of inputs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_lstm.commands.grammar import parse
from flax_lstm.commands.tables import check_output, write_table
from flax_lstm.errors import listing, require

ABOUT = """Predictions of a saved run.

One text, printed as JSON: --text TEXT

A table with the columns of the training data: --input FILE --output FILE"""


@dataclass(frozen=True)
class Options:
    workdir: tyro.conf.Positional[Path]  # the folder of a run
    text: str | None = None  # one text to classify
    input: Path | None = None  # a table of inputs
    output: Path | None = None  # where to write: .csv, .tsv, .jsonl or .parquet
    checkpoint: str = "best"  # best, latest or a step
    overwrite: bool = False  # replace an existing output


def main(arguments: Sequence[str], prog: str = "flax-lstm predict") -> int:
    """Predicts; returns the exit status."""
    options = parse(Options, arguments, prog, ABOUT)
    one_way = (options.text is None) != (options.input is None)
    require(
        one_way and (options.input is None) == (options.output is None),
        "give either --text TEXT, or --input FILE and --output FILE",
    )
    if options.output is not None:
        check_output(options.output, options.overwrite)
    import pandas as pd

    from flax_lstm.inference import load

    run = load(options.workdir)
    if options.text is not None:
        column = getattr(run.info, "text_column", None)
        require(
            column is not None,
            f"--text: {options.workdir} is not a run on texts; give --input and --output",
        )
        result = run.predict(pd.DataFrame({column: [options.text]}), options.checkpoint)
        answer = {
            "label": str(result["predicted"].iloc[0]),
            "probability": result["probability"].iloc[0].item(),
            "probabilities": result.attrs["probabilities"][0],
        }
        warn_of_empty(result.attrs["empty"])
        print(json.dumps(answer))
        return 0
    assert options.output is not None and options.input is not None
    result = run.predict(run.config.data.read(options.input), options.checkpoint)
    warn_of_empty(result.attrs.get("empty", []))
    write_table(result, options.output)
    print(f"{len(result)} rows in {options.output}", file=sys.stderr)
    return 0


def warn_of_empty(rows: Sequence[int]) -> None:
    """Says which texts have no words, counted from 1."""
    if rows:
        print(
            f"warning: no words in the text of {len(rows)} row(s), "
            f"{listing([n + 1 for n in rows])}: the answer is a guess",
            file=sys.stderr,
        )
