"""A language model of IMDB reviews (labelled for training and unlabelled ones, never a test
review), state carried.

    python train.py --config imdb_lm

Not trained to the end: 20,000 steps take about 14 hours on two cores. Made for a GPU or a TPU.
"""

from flax_lstm import Config, LanguageModeling, RecurrentModel, TrainConfig
from flax_lstm.data import ImdbLanguage


def get_config() -> Config:
    return Config(
        name="imdb_lm",
        data=ImdbLanguage(vocabulary_size=20_000, sequence_length=70),
        task=LanguageModeling(),
        model=RecurrentModel(
            cell="lstm",
            hidden_size=512,
            embed_size=256,
            embed_dropout=0.1,
            dropout=0.2,
            weight_dropout=0.2,
            head_dropout=0.3,
            tied=True,
        ),
        train=TrainConfig(
            steps=20_000,
            batch_size=64,
            learning_rate=2e-3,
            clip=1.0,
            warmup_steps=500,
            schedule="cosine",
            log_every=100,
            eval_every=2_000,
            checkpoint_every=500,
        ),
    )
