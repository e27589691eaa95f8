"""Forecasts of your own series: a CSV, TSV, JSON-lines or Parquet file with one row per time.

    python train.py --config series_table --data.path measurements.csv --data.targets load price

The first column holds the times (else --data.time-column NAME), in ISO 8601. Without --data.targets
every numeric column is forecast. The frequency is found in the times, and with it the season, the
look-back and the horizon where they are not given (--data.season, --data.lookback, --data.horizon).
Missing times and values are an error until --data.missing says what to do with them. Columns known
in advance: --data.future; holidays: --data.holidays DE. Many series in one table: panel_table. The
report names the errors of naive forecasts, which are hard to beat where a series is close to a
random walk. On the embedded hourly load (--data.path electricity): test mae 0.0775, seasonal naive
0.0968 (docs/results.md).
"""

from flax_lstm import Config, Forecasting, SegmentModel, TrainConfig
from flax_lstm.data import SeriesTable


def get_config() -> Config:
    return Config(
        name="series_table",
        data=SeriesTable(path="series.csv"),
        task=Forecasting(objective="mae"),
        model=SegmentModel(cell="gru", hidden_size=128, window="seasonal", dropout=0.2),
        train=TrainConfig(
            steps=2000,
            batch_size=64,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=50,
            ema=0.99,
            eval_every=200,
            checkpoint_every=200,
            patience=5,
        ),
    )
