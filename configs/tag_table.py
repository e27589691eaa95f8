"""Your own texts with any number of tags each: JSON lines or Parquet with lists, or a CSV file in
which the tags stand with a separator between them.

    python train.py --config tag_table --data.path articles.jsonl --data.label-column tags
"""

from flax_lstm import Config, Tagging, TextModel, TrainConfig
from flax_lstm.data import TagTable


def get_config() -> Config:
    return Config(
        name="tag_table",
        data=TagTable(path="texts.jsonl", max_length=256),
        task=Tagging(),
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
