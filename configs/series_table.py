"""Forecasts of your own series: a CSV, TSV, JSON-lines or Parquet file with one row per time.

    python train.py --config series_table --data.path measurements.csv --data.targets load price
    --data.horizon 48

The first column holds the times (else --data.time-column NAME), in ISO 8601. Without --data.targets
every numeric column is forecast. --data.season is the length of a season in rows: 24 for hourly
data with a daily rhythm. Gaps are an error until --data.missing says what to do with them. The
report names the errors of naive forecasts: where whole seasons are forecast and the seasonal one is
better, take the `SegmentModel` of configs/electricity.py.
"""

from flax_lstm import Config, Forecasting, RecurrentForecaster, TrainConfig
from flax_lstm.data import SeriesTable


def get_config() -> Config:
    return Config(
        name="series_table",
        data=SeriesTable(path="series.csv", lookback=168, horizon=24, season=24),
        task=Forecasting(objective="mse"),
        model=RecurrentForecaster(cell="lstm", hidden_size=128, dropout=0.1),
        train=TrainConfig(
            steps=3000,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=100,
            eval_every=300,
            checkpoint_every=300,
            patience=5,
        ),
    )
