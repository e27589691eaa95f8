# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm prepare`: texts larger than memory, to files of tokens to train from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flax_lstm.commands.grammar import parse_with_config
from flax_lstm.errors import UserError

ABOUT = """Encodes texts once, into files.

Train from them: flax-lstm train --config text_lm --data.prepared DIR

Given again, it goes on where it was. A flag with a dot overrides that field."""


@dataclass(frozen=True)
class Options:
    out: Path  # folder for the tokens, their index and the vocabulary
    config: str = "text_lm"  # a file, or the name of a shipped config
    verify: bool = False  # compare every byte that is there with its hash, and write nothing


def main(arguments: Sequence[str], prog: str = "flax-lstm prepare") -> int:
    """Prepares, or verifies; returns the exit status."""
    options, config = parse_with_config(Options, arguments, prog, ABOUT)
    from flax_lstm.data.corpus import Corpus
    from flax_lstm.data.prepared import Prepared

    if options.verify:
        Prepared.open(options.out).verify()
        print(f"{options.out}: every byte as it was prepared")
        return 0
    data = config.data
    if not isinstance(data, Corpus):
        raise UserError(
            f"prepare is for texts; {type(data).__name__} gives none. Configs that do: text_lm, "
            "imdb_lm, text_table"
        )
    data.prepare(options.out)
    return 0
