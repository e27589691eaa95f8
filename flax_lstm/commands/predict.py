# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm predict`: predictions of a saved run, for a text or for a file of inputs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_lstm.commands.grammar import Folders, named, parse
from flax_lstm.commands.tables import check_output, write_table
from flax_lstm.errors import require

if TYPE_CHECKING:
    from flax_lstm.data.text import TextInfo
    from flax_lstm.inference import Run

ABOUT = """Predictions of a saved run.

One text, printed as JSON: --text TEXT

A table with the columns of the training data: --input FILE --output FILE

A text that a language model continues: --prompt TEXT

Of several folders, or one that --seeds filled, the mean of the models is predicted."""


@dataclass(frozen=True)
class Options:
    workdir: Folders  # the folder of a run; of several the mean is predicted
    text: str | None = None  # one text to classify
    input: Path | None = None  # a table of inputs
    output: Path | None = None  # where to write: .csv, .tsv, .jsonl or .parquet
    cutoffs: tuple[str, ...] = ()  # forecast from these times, instead of the end of the table
    paths: bool = False  # write the sample paths as well, of a model that draws them
    # say which words each answer rests on (flax-lstm explain: of one text, also in colours)
    explain: bool = False
    prompt: str | None = None  # the beginning of a text
    tokens: int = 100  # words at most that follow the prompt
    temperature: float = 1.0  # below 1: likelier words more often; 0: always the likeliest
    top_p: float = 1.0  # draw from the likeliest words with this share together
    seed: int = 0  # of what is drawn
    checkpoint: str = "best"  # best, latest or a step
    overwrite: bool = False  # replace an existing output


OF_PROMPTS = ("tokens", "temperature", "top_p", "seed")


def main(arguments: Sequence[str], prog: str = "flax-lstm predict") -> int:
    """Predicts; returns the exit status."""
    options = parse(Options, arguments, prog, ABOUT)
    ways = [way for way in (options.text, options.input, options.prompt) if way is not None]
    require(
        not options.explain or options.prompt is None,
        "--explain: of what a classifier answers, --text or --input",
    )
    require(
        len(ways) == 1 and (options.input is None) == (options.output is None),
        "give either --text TEXT, or --prompt TEXT, or --input FILE and --output FILE",
    )
    for name in OF_PROMPTS:
        require(
            options.prompt is not None or getattr(options, name) == getattr(Options, name),
            f"--{name.replace('_', '-')}: for a text that a language model continues, --prompt",
        )
    if options.output is not None:
        check_output(options.output, options.overwrite, options.input)
    from flax_lstm.inference import load

    run = load(*named(options.workdir))
    if options.prompt is not None:
        drawn = (options.temperature, options.top_p, options.seed)
        print(run.generate(options.prompt, options.tokens, *drawn, options.checkpoint))
    elif options.text is not None:
        answer = classify(run, options.text, options.checkpoint)
        if options.explain:
            answer["words"] = contributions(run, [options.text], options.checkpoint)[0]
        print(json.dumps(answer))
    else:
        answer_table(run, options)
    return 0


def answer_table(run: "Run", options: Options) -> None:
    """Writes the answers beside the rows of a table."""
    from flax_lstm.tasks.base import beside

    assert options.output is not None and options.input is not None
    table = run.config.data.read(options.input)
    texts = explicable(run).inputs(table) if options.explain else []
    result = run.predict(table, options.checkpoint, options.cutoffs, options.paths)
    if options.explain:
        found = contributions(run, texts, options.checkpoint)
        result = beside(result, {"words": [json.dumps(words) for words in found]})
    write_table(result, options.output)
    print(f"{len(result)} rows in {options.output}", file=sys.stderr)


def explicable(run: "Run") -> "TextInfo":
    """What a run knows of its texts. Raises UserError where it does not classify them."""
    from flax_lstm.data.text import TextInfo

    require(
        isinstance(run.info, TextInfo),
        f"--explain: {run.workdir} is no classifier of texts with one label each",
    )
    assert isinstance(run.info, TextInfo)
    return run.info


def contributions(run: "Run", texts: Sequence[str], checkpoint: str) -> list[list[Any]]:
    """Of each text its words, each with what it adds to the log-probability of the answer; of a
    text without words nothing."""
    from rich.console import Console
    from rich.progress import track

    ids = explicable(run).encode(texts)
    # As many forward passes a text as it has words: of a large table that takes long.
    pairs, console = [*zip(texts, ids, strict=True)], Console(stderr=True)
    shown = track(pairs, "explaining", console=console, disable=len(pairs) < 2)
    found = [run.explain(t, checkpoint=checkpoint) if len(i) else None for t, i in shown]
    return [
        [] if f is None else [*zip(f.words, np.round(f.contributions, 4).tolist(), strict=True)]
        for f in found
    ]


def classify(run: "Run", text: str, checkpoint: str) -> dict[str, Any]:
    """What a model says of one text."""
    from flax_lstm.data.language import LanguageInfo
    from flax_lstm.data.text import TextForm

    require(
        not isinstance(run.info, LanguageInfo),
        f"--text: {run.workdir} is a language model, which continues a text: --prompt TEXT",
    )
    require(
        isinstance(run.info, TextForm),
        f"--text: {run.workdir} is not a run on texts; give --input and --output",
    )
    result = run.predict(text, checkpoint)
    answer: dict[str, Any] = run.config.task.answer(result.iloc[0], run.info)
    return answer
