"""Classify your own texts: a CSV, TSV, JSON-lines or Parquet file, or a folder `label/*.txt`.

    python train.py --config text_table --data.path reviews.csv --data.text-column text
    --data.label-column label

Labels may have any names and number. Give --name, or --workdir, to keep several runs apart.
"""

from flax_lstm import Classification, Config, TextModel, TrainConfig
from flax_lstm.data import TextTable


def get_config() -> Config:
    return Config(
        name="text_table",
        data=TextTable(path="texts.csv", max_length=256),
        task=Classification(),
        model=TextModel(
            cell="lstm",
            hidden_size=128,
            bidirectional=True,
            embed_size=128,
            embed_dropout=0.2,
            dropout=0.2,
            pooling="max",
            head_dropout=0.5,
        ),
        train=TrainConfig(
            steps=2_000,
            batch_size=64,
            learning_rate=2e-3,
            schedule="cosine",
            ema=0.99,
            patience=5,
            eval_every=100,
            checkpoint_every=100,
        ),
    )
