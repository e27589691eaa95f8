"""A language model of your own texts, without labels: what a classifier of few labels can begin
with (docs/text.md).

    python train.py --config text_lm --data.path unlabelled.csv --data.text-column text
    python train.py --config text_lm --data.path corpus.txt  # a text in each line
    python train.py --config text_table --data.path labelled.csv --init-from runs/text_lm
    --model.bidirectional False --model.hidden-size 256 --model.pooling concat

Steps: about one pass over 4 million tokens; give more for more texts.
"""

from flax_lstm import Config, LanguageModel, LanguageModeling, TrainConfig
from flax_lstm.data import LanguageTable


def get_config() -> Config:
    return Config(
        name="text_lm",
        data=LanguageTable(path="texts.csv", sequence_length=70, evaluation_tokens=100_000),
        task=LanguageModeling(candidates=512),
        model=LanguageModel(
            cell="lstm",
            hidden_size=256,
            embed_size=128,
            dropout=0.1,
            head_dropout=0.1,
            tied=True,
        ),
        train=TrainConfig(
            steps=2_000,
            batch_size=32,
            learning_rate=4e-3,
            warmup_steps=100,
            schedule="cosine",
            log_every=100,
            eval_every=500,
            checkpoint_every=500,
        ),
    )
