"""Day-ahead forecasts of an hourly electricity load that is part of the package: the default of
train.py.

    python train.py

A week of hours is read as seven segments of a day, relative to the last one, with the calendar as
covariates. Test mae 0.0788 +- 0.0003 (scaled; seeds 0 to 2), seasonal naive 0.0968, in 15 seconds
on two cores; docs/results.md has the rest.
"""

from flax_lstm import Config, Forecasting, SegmentModel, TrainConfig
from flax_lstm.data import SeriesTable


def get_config() -> Config:
    return Config(
        name="quickstart",
        data=SeriesTable(path="electricity", lookback=168, horizon=24, season=24),
        task=Forecasting(objective="mae"),
        model=SegmentModel(cell="lstm", hidden_size=96, window="seasonal", dropout=0.1),
        train=TrainConfig(
            steps=2000,
            batch_size=64,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=50,
            ema=0.99,
            log_every=50,
            eval_every=200,
            checkpoint_every=200,
        ),
    )
