"""Day-ahead quantile forecasts of an hourly electricity load (the mean of 321 clients in Portugal,
2012 to 2014).

    python train.py --config electricity

The series is part of the package. Figures to look at: `mase` below 1 beats the load of the day
before, `crps` judges the quantiles. Test crps 0.062 +- 0.001, mae 0.090 +- 0.001 (scaled; seeds 0
to 2); the day before: 0.097 for both. One
minute on one core: docs/results.md.
"""

from flax_lstm import Config, Forecasting, SegmentModel, TrainConfig
from flax_lstm.data import SeriesTable


def get_config() -> Config:
    return Config(
        name="electricity",
        data=SeriesTable(path="electricity", lookback=168, horizon=24, season=24),
        task=Forecasting(objective="quantile", quantiles=(0.1, 0.5, 0.9)),
        model=SegmentModel(cell="lstm", hidden_size=96, segment=24, dropout=0.1),
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
