"""Closing prices of Apple, IBM and Microsoft for the next five trading days, from 60 days (2000 to 2013).

    python train.py --config stocks

The series is part of the package. Prices are close to a random walk: expect no more than the baseline `last_value`
reaches. A model that seems far better has seen the future.
"""

from flax_lstm import Config, Forecasting, RecurrentModel, TrainConfig
from flax_lstm.data.series import SeriesTable


def get_config() -> Config:
    return Config(
        name="stocks",
        data=SeriesTable(path="stocks", targets=("AAPL", "IBM", "MSFT"), lookback=60, horizon=5, season=1),
        task=Forecasting(objective="mae"),
        model=RecurrentModel(cell="lstm", hidden_size=32, dropout=0.2),
        train=TrainConfig(steps=1000, batch_size=64, learning_rate=1e-3, weight_decay=1e-4, schedule="cosine",
                          warmup_steps=50, log_every=50, eval_every=100, checkpoint_every=100, patience=5),
    )  # fmt: skip
