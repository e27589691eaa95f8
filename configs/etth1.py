"""The benchmark ETTh1: all seven channels, 96 hours ahead from 720, with the segment-wise forecaster of SegRNN.

    python train.py --config etth1 --data.path ETTh1.csv

ETTh1.csv is in the repository zhouhaoyi/ETDataset (CC BY-ND 4.0). The usual split: 12 months, 4 months, 4 months.
"""

from flax_lstm import Config, Forecasting, SegmentModel, TrainConfig
from flax_lstm.data.series import SeriesTable

STEPS_PER_EPOCH = 31  # 8,640 - 720 - 96 + 1 = 7,825 windows of 256 a step


def get_config() -> Config:
    return Config(
        name="etth1",
        data=SeriesTable(path="ETTh1.csv", lookback=720, horizon=96, season=24, split=(8640, 2880, 2880),
                         calendar=False),
        task=Forecasting(objective="mae"),
        model=SegmentModel(cell="gru", hidden_size=512, segment=48, dropout=0.5),
        train=TrainConfig(steps=20 * STEPS_PER_EPOCH, batch_size=256, learning_rate=1e-3, clip=0.0, schedule="cosine",
                          log_every=STEPS_PER_EPOCH, eval_every=STEPS_PER_EPOCH, checkpoint_every=STEPS_PER_EPOCH,
                          patience=10),
    )  # fmt: skip
