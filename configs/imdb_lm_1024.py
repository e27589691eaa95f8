"""`imdb_lm` with 1,024 units, for a GPU: twenty passes, 0.4 billion tokens.

    python train.py --config imdb_lm_1024

Perplexity 61 after three minutes on one NVIDIA H200 (docs/results.md).
"""

from dataclasses import replace

from flax_lstm import Config, load_config


def get_config() -> Config:
    base = load_config("imdb_lm")
    return replace(
        base,
        name="imdb_lm_1024",
        data=replace(base.data, sequence_length=100),
        task=replace(base.task, candidates=4_096),
        model=replace(
            base.model, hidden_size=1024, dropout=0.25, head_dropout=0.25, weight_dropout=0.2
        ),
        train=replace(
            base.train,
            steps=16_000,
            batch_size=256,
            learning_rate=2e-3,
            warmup_steps=500,
            log_every=250,
            eval_every=4_000,
            checkpoint_every=4_000,
        ),
    )
