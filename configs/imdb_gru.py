"""`imdb_lstm` with a GRU in place of the LSTM: a quarter fewer recurrent weights.

    python train.py --config imdb_gru

Test accuracy 0.874 (seed 0), seven minutes on one core of a busy machine: docs/results.md.
"""

from flax_lstm import Classification, Config, TextModel, TrainConfig
from flax_lstm.data import Imdb

EPOCH = 705  # steps: 22,558 training reviews in batches of 32


def get_config() -> Config:
    return Config(
        name="imdb_gru",
        data=Imdb(vocabulary_size=20_000, max_length=200),
        task=Classification(),
        model=TextModel(
            cell="gru",
            hidden_size=128,
            embed_size=128,
            dropout=0.2,
            recurrent_dropout=0.2,
            pooling="last",
            dense=64,
            head_dropout=0.5,
        ),
        train=TrainConfig(
            steps=10 * EPOCH,
            batch_size=32,
            learning_rate=1e-3,
            epsilon=1e-7,  # as Keras has it
            clip=0.0,
            patience=3,
            eval_every=EPOCH,
            checkpoint_every=EPOCH // 4,
        ),
    )
