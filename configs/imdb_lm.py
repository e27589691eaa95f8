"""A language model of IMDB reviews (labelled for training and unlabelled ones, never a test
review), state carried: what `imdb_finetune` begins with.

    python train.py --config imdb_lm

One pass over 20 million tokens, with 1,024 of 30,000 words in the softmax of a training step:
perplexity 98 after 51 minutes on two cores (docs/results.md).
"""

from flax_lstm import Config, LanguageModel, LanguageModeling, TrainConfig
from flax_lstm.data import ImdbLanguage

PASS = 4_500  # steps: 20 million tokens in 64 lanes of 70


def get_config() -> Config:
    return Config(
        name="imdb_lm",
        data=ImdbLanguage(vocabulary_size=30_000, sequence_length=70, evaluation_tokens=100_000),
        task=LanguageModeling(candidates=1_024),
        model=LanguageModel(
            cell="lstm",
            hidden_size=512,
            embed_size=256,
            dropout=0.1,
            head_dropout=0.1,
            tied=True,
        ),
        train=TrainConfig(
            steps=PASS,
            batch_size=64,
            learning_rate=3e-3,
            clip=1.0,
            warmup_steps=200,
            schedule="cosine",
            log_every=100,
            eval_every=1_000,
            checkpoint_every=500,
        ),
    )
