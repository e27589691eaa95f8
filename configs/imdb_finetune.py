"""Sentiment of IMDB reviews by an LSTM that has read them before: the language model `imdb_lm`,
fine-tuned with a head on the last, largest and mean outputs (Howard & Ruder 2018), and joined by a
linear classifier of n-grams (`imdb_ngrams`).

    python train.py --config imdb_lm
    python train.py --config imdb_finetune --init-from runs/imdb_lm

The widths are those of `imdb_lm`; its vocabulary is taken over. Test accuracy 0.921 (seed 0), 32
minutes on two shared cores; 0.929 after three times the pretraining, 0.934 after `imdb_lm_1024`:
docs/results.md, beside the linear model.
"""

from flax_lstm import Classification, Config, TextModel, TrainConfig
from flax_lstm.data import Imdb


def get_config() -> Config:
    return Config(
        name="imdb_finetune",
        data=Imdb(vocabulary_size=30_000, max_length=600),
        task=Classification(label_smoothing=0.1),
        model=TextModel(
            cell="lstm",
            hidden_size=512,
            embed_size=256,
            embed_dropout=0.2,
            dropout=0.3,
            recurrent_dropout=0.1,
            pooling="concat",
            dense=50,
            head_dropout=0.3,
            ngrams=3,
        ),
        train=TrainConfig(
            steps=1_400,
            batch_size=32,
            learning_rate=2e-3,
            layer_decay=0.8,
            unfreeze_every=50,
            weight_decay=0.01,
            warmup_steps=50,
            schedule="cosine",
            ema=0.995,
            eval_every=350,
            checkpoint_every=175,
        ),
    )
