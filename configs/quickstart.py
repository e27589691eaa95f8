"""Day-ahead forecasts of an hourly electricity load that is part of the package: the default of train.py.

    python train.py
"""

from flax_lstm import Config, Forecasting, RecurrentModel, TrainConfig
from flax_lstm.data.series import SeriesTable


def get_config() -> Config:
    return Config(
        name="quickstart",
        data=SeriesTable(path="electricity", lookback=168, horizon=24, season=24),
        task=Forecasting(objective="mse"),
        model=RecurrentModel(cell="lstm", hidden_size=64),
        train=TrainConfig(steps=1000, batch_size=64, learning_rate=2e-3, schedule="cosine", warmup_steps=50,
                          eval_every=200, checkpoint_every=200),
    )  # fmt: skip
