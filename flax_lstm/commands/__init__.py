# SPDX-License-Identifier: Apache-2.0
"""The commands: a module each, with its flags as a dataclass and a `main(arguments, prog)`."""

# What each command does, in a line. A module is imported when its command is called.
COMMANDS = {
    "train": "train, or resume a run: flax-lstm train --config imdb_lstm",
    "evaluate": "figures of a run: flax-lstm evaluate DIR --split test",
    "predict": "predictions of a run: flax-lstm predict DIR --text 'A fine film.'",
    "backtest": "forecasts from rolling origins: flax-lstm backtest DIR",
    "checkpoints": "what is kept of a run: flax-lstm checkpoints DIR --verify",
    "explain": "words behind an answer: flax-lstm explain DIR --text 'So fine.'",
    "prepare": "texts larger than memory, to files: flax-lstm prepare --out DIR",
    "plan": "training on chips not here yet: flax-lstm plan --config imdb_lm",
}
