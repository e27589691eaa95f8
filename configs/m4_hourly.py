"""The 414 hourly series of the M4 competition, 48 hours ahead, by one model, with the metrics of
GIFT-Eval: `mase`, and its CRPS, which is `wql` here.

    python tools/make_m4.py Hourly-train.csv Hourly-test.csv m4_hourly.parquet
    python train.py --config m4_hourly --data.path m4_hourly.parquet

The last 48 hours of each series test, the 48 before validate. Test mase 0.776 +- 0.002, wql 0.0235,
coverage 0.82 of 0.8 (seeds 0 to 2); the three averaged 0.769 and 0.0231, with three of a look-back
of 168 hours 0.757 and 0.0259; the seasonal naive has a mase of 1.193. Two to three minutes on two
shared cores: docs/results.md. A last run, once settings are chosen, may train on what validated:
--data.train-on-validation True --task.calibrate False.
"""

from flax_lstm import Config, Forecasting, SegmentModel, TrainConfig
from flax_lstm.data import PanelTable


def get_config() -> Config:
    return Config(
        name="m4_hourly",
        data=PanelTable(
            path="m4_hourly.parquet", lookback=336, horizon=48, season=24, calendar=False
        ),
        task=Forecasting(
            objective="quantile", quantiles=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        ),
        model=SegmentModel(
            cell="gru",
            hidden_size=128,
            segment=24,
            window="seasonal",
            highway=True,
            highway_seen=False,
            dropout=0.1,
        ),
        train=TrainConfig(
            steps=1000,
            batch_size=256,
            learning_rate=3e-3,
            schedule="cosine",
            ema=0.995,
            eval_every=125,
            checkpoint_every=125,
        ),
    )
