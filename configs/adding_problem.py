"""Add two numbers up to 400 steps apart: can the model remember?

    python train.py --config adding_problem

Guessing the mean has a mean squared error of 1/6 = 0.167 (the baseline `mean`); a model that has
found the rule falls far below 0.01, abruptly, after a long while in which nothing seems to happen.
Test 0.0003 (seed 0; GRU 0.0005 after 4,000 steps, simple RNN 0.16), 25 minutes on one core of a
busy machine: docs/results.md.
"""

from flax_lstm import Config, RecurrentModel, SequenceRegression, TrainConfig
from flax_lstm.data import AddingProblem


def get_config() -> Config:
    return Config(
        name="adding_problem",
        data=AddingProblem(length=400),
        task=SequenceRegression(),
        model=RecurrentModel(cell="lstm", hidden_size=64),
        train=TrainConfig(
            steps=8000,
            batch_size=64,
            learning_rate=5e-3,
            clip=1.0,
            schedule="cosine",
            warmup_steps=100,
            log_every=100,
            eval_every=250,
            checkpoint_every=500,
        ),
    )
