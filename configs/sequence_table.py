"""Your own sequences of numbers with a label each: sensors, gestures, clicks; .npz, Parquet or JSON
lines (see the help of --data.path).

    python train.py --config sequence_table --data.path gestures.npz

Targets that are fractions are predicted as numbers instead: say --config with a copy of this file
whose task is `SequenceRegression()`.
"""

from flax_lstm import Classification, Config, RecurrentModel, TrainConfig
from flax_lstm.data import Sequences


def get_config() -> Config:
    return Config(
        name="sequence_table",
        data=Sequences(path="sequences.npz"),
        task=Classification(),
        model=RecurrentModel(
            cell="gru",
            hidden_size=64,
            bidirectional=True,
            pooling="concat",
            dropout=0.1,
            head_dropout=0.3,
        ),
        train=TrainConfig(
            steps=2000,
            batch_size=32,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=50,
            patience=5,
            eval_every=100,
            checkpoint_every=100,
        ),
    )
