"""The short film reviews of `rotten_tomatoes` by an LSTM that has read IMDB reviews before: the
language model `imdb_lm`, fine-tuned as in `imdb_finetune`.

    python train.py --config imdb_lm
    python train.py --config rotten_tomatoes_finetune --init-from runs/imdb_lm

Test accuracy 0.789 +- 0.001 (seeds 0 to 2), 0.756 without the language model; 4 to 11 minutes on
two cores that other work shared: docs/results.md.
"""

from flax_lstm import Classification, Config, TextModel, TrainConfig
from flax_lstm.data import RottenTomatoes

EPOCH = 140  # steps: 8,932 training reviews in batches of 64


def get_config() -> Config:
    return Config(
        name="rotten_tomatoes_finetune",
        data=RottenTomatoes(vocabulary_size=20_000),
        task=Classification(),
        model=TextModel(
            cell="lstm",
            hidden_size=512,
            embed_size=256,
            embed_dropout=0.1,
            dropout=0.2,
            pooling="concat",
            dense=50,
            head_dropout=0.5,
        ),
        train=TrainConfig(
            steps=4 * EPOCH,
            batch_size=64,
            learning_rate=2e-3,
            layer_decay=0.8,
            unfreeze_every=30,
            weight_decay=0.01,
            warmup_steps=30,
            schedule="cosine",
            ema=0.99,
            eval_every=EPOCH,
            checkpoint_every=EPOCH,
        ),
    )
