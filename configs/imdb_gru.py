"""`imdb_lstm` with a GRU in place of the LSTM: a quarter fewer recurrent weights.

    python train.py --config imdb_gru

Test accuracy 0.874 (seed 0), seven minutes on one core of a busy machine: docs/results.md.
"""

from dataclasses import replace

from flax_lstm import Config, load_config


def get_config() -> Config:
    base = load_config("imdb_lstm")
    return replace(base, name="imdb_gru", model=replace(base.model, cell="gru"))
