"""A language model of IMDB reviews for many chips: two LSTM layers of 8192 units, 0.9 billion
parameters.

    python train.py --config imdb_lm_large --mesh.fsdp 4 --mesh.model 8

Look first, on any laptop, what it would take:

    python -m flax_lstm plan --config imdb_lm_large --mesh.fsdp 4 --mesh.model 8 --topology
    v5e:16x16 python -m flax_lstm plan --config imdb_lm_large --mesh.data 2 --mesh.fsdp 2
    --mesh.model 2 --topology h200:8

Parameters and AdamW's two moments alone are 10 GiB, with gradients 14 GiB: one v5e chip (16 GiB)
refuses, four hold it. The widths are those of Jozefowicz et al. 2016 ("Exploring the limits of
language modeling", LSTM-8192-1024). It was
planned, never trained: docs/scaling.md has the predictions.
"""

from flax_lstm import Config, LanguageModel, LanguageModeling, TrainConfig
from flax_lstm.data import ImdbLanguage


def get_config() -> Config:
    return Config(
        name="imdb_lm_large",
        data=ImdbLanguage(vocabulary_size=60_000, sequence_length=100),
        task=LanguageModeling(),
        model=LanguageModel(
            cell="lstm",
            hidden_size=8192,
            num_layers=2,
            embed_size=1024,
            dropout=0.1,
            tied=True,
            dtype="bfloat16",
        ),
        train=TrainConfig(
            steps=5_000,
            batch_size=1024,
            learning_rate=1e-3,
            clip=1.0,
            warmup_steps=500,
            schedule="cosine",
            log_every=50,
            eval_every=500,
            checkpoint_every=250,
        ),
    )
