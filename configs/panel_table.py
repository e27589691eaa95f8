"""Forecasts of many series with one model, from a long table: one row per series and time.

    python train.py --config panel_table --data.path sales.csv --data.horizon 14

The columns are unique_id, ds and y (else --data.id-column, --data.time-column, --data.targets). The
last horizon of every series tests, the one before validates (of few series, more origins). Columns
known in advance, such as prices: --data.future; known for the past only: --data.inputs; of a series
as a whole: --data.static. `flax-lstm predict` takes series that were never seen: nothing is learned
for a single one.
"""

from flax_lstm import Config, Forecasting, SegmentModel, TrainConfig
from flax_lstm.data import PanelTable


def get_config() -> Config:
    return Config(
        name="panel_table",
        data=PanelTable(path="panel.csv"),
        task=Forecasting(objective="quantile", quantiles=(0.1, 0.5, 0.9)),
        model=SegmentModel(
            cell="gru", hidden_size=128, window="seasonal", highway=True, dropout=0.1
        ),
        train=TrainConfig(
            steps=2000,
            batch_size=256,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=50,
            ema=0.995,
            eval_every=100,
            checkpoint_every=100,
            patience=6,
        ),
    )
