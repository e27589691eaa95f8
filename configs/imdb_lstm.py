"""The tutorial's sentiment model on IMDB: embedding 128, LSTM 128 (dropout .2, recurrent dropout
.2), dense 64.

    python train.py --config imdb_lstm

Test accuracy 0.846 +- 0.009 (seeds 0 to 2); the same model in Keras, benchmarks/keras_imdb.py:
0.853 +- 0.002. Four to thirteen minutes on one core of a busy machine, as early stopping has it.
"""

from flax_lstm import Classification, Config, TextModel, TrainConfig
from flax_lstm.data import Imdb

EPOCH = 705  # steps: 22,558 training reviews in batches of 32


def get_config() -> Config:
    return Config(
        name="imdb_lstm",
        data=Imdb(vocabulary_size=20_000, max_length=200),
        task=Classification(),
        model=TextModel(
            cell="lstm",
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
