# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm explain`: which words a classifier's answer rests on."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flax_lstm.commands.grammar import Folder, parse
from flax_lstm.errors import require

ABOUT = """Says which words the answer of a text classifier rests on."""


@dataclass(frozen=True)
class Options:
    workdir: Folder  # the folder of a run
    text: str  # the text that is classified
    label: str | None = None  # the class that is explained; default: the answer
    # leave-one-out: what is lost without the word; gradients: integrated along its embedding
    method: Literal["leave-one-out", "gradients"] = "leave-one-out"
    html: Path | None = None  # where to write the text with coloured words
    json: bool = False  # one JSON object on standard output
    checkpoint: str = "best"  # best, latest or a step


def main(arguments: Sequence[str], prog: str = "flax-lstm explain") -> int:
    """Explains; returns the exit status."""
    options = parse(Options, arguments, prog, ABOUT)
    if options.html is not None:
        there = options.html.parent.is_dir() and not options.html.is_dir()
        require(there, f"--html {options.html}: name a file in a folder that is there")
    from flax_lstm.inference import load

    run = load(options.workdir)
    found = run.explain(options.text, options.label, options.method, options.checkpoint)
    if options.html is not None:
        options.html.write_text(found.as_html(), encoding="utf-8")
        print(f"In {options.html.absolute()}", file=sys.stderr)
    if options.json:
        print(json.dumps(found._asdict(), ensure_ascii=False))
        return 0
    print(f"{found.label}  {found.probability:.3f}")
    for word, contribution in zip(found.words, found.contributions, strict=True):
        print(f"{contribution:+8.3f}  {word}")
    return 0
