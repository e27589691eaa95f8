# SPDX-License-Identifier: Apache-2.0
"""The commands: a module each, with its flags as a dataclass and a `main(arguments, prog)`."""

# What each command does, in a line. A module is imported when its command is called.
COMMANDS = {
    "train": "train a config, or resume its run: flax-lstm train --config imdb_lstm",
    "evaluate": "figures of a run: flax-lstm evaluate runs/imdb_lstm --split test",
    "predict": "predictions of a run: flax-lstm predict runs/imdb_lstm --text 'A fine film.'",
    "backtest": "forecasts from rolling origins, beside naive ones: flax-lstm backtest DIR",
    "checkpoints": "what is kept of a run, byte by byte: flax-lstm checkpoints DIR --verify",
    "explain": "the words behind an answer: flax-lstm explain runs/imdb_lstm --text 'A fine film.'",
    "prepare": "texts larger than memory, as files: flax-lstm prepare --config text_lm --out DIR",
    "plan": "what training would take on chips that are not there: flax-lstm plan --config imdb_lm",
}
