# SPDX-License-Identifier: Apache-2.0
"""Time series from a table: look-back windows as inputs, the following steps as targets, the
calendar as covariates.

Axes: R rows of the table, D input channels (the C targets first), B windows of a batch, T steps of
the look-back, N steps of the horizon, K covariates.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from flax_lstm.data.base import Batch, Data
from flax_lstm.data.order import EpochOrder, in_order
from flax_lstm.data.timetable import (
    DAY,
    Missing,
    clean,
    embedded,
    frequency,
    median_step,
    numeric_columns,
    read_series,
)
from flax_lstm.data.vocabulary import write_atomically
from flax_lstm.errors import UserError, listing, require

Array = np.ndarray
log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
CYCLES = {
    "day": DAY,
    "week": 7 * DAY,
    "year": 365.25 * DAY,
}  # of the calendar, with their length in seconds


@dataclass(frozen=True)
class SeriesInfo:
    """What a forecaster and its predictions need to know about the data. Statistics are of the
    training split."""

    time_column: str
    targets: tuple[str, ...]  # forecast channels
    inputs: tuple[str, ...]  # further input channels, known for the past only
    lookback: int  # T
    horizon: int  # N
    season: int  # steps
    mean: tuple[float, ...]  # of each input channel, targets first
    std: tuple[float, ...]  # likewise; 1 for a constant channel
    # Of each target: mean |x[t] - x[t - season]|, scaled; 1 where that is 0 but for rounding
    naive_scale: tuple[float, ...]
    frequency: str  # as pandas names it: "h", "D", "B" (business days), "15min"
    step_seconds: float  # median time between rows
    cycles: tuple[str, ...]  # of the calendar; each gives two covariates, sine and cosine
    missing: Missing

    @property
    def covariates(self) -> int:
        """K, the number of covariates known in advance; 0: a batch has none."""
        return 2 * len(self.cycles)

    @property
    def channels(self) -> tuple[str, ...]:
        """The D input channels in order."""
        return self.targets + self.inputs

    def sample(self, batch_size: int) -> Batch:
        """A batch of zeros."""
        known = self.lookback + self.horizon
        return Batch(
            inputs=np.zeros((batch_size, self.lookback, len(self.channels)), np.float32),
            targets=np.zeros((batch_size, self.horizon, len(self.targets)), np.float32),
            lengths=np.full(batch_size, self.lookback, np.int32),
            weights=np.zeros(batch_size, np.float32),
            covariates=np.zeros((batch_size, known, self.covariates), np.float32)
            if self.cycles
            else None,
        )

    def scale(self, values_RD: Array) -> Array:
        """Values of all channels in the units of the data as the model sees them: float32, mean 0,
        deviation 1."""
        return ((values_RD - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def unscale(self, values: Array) -> Array:
        """Scaled target values (..., C) in the units of the data."""
        count = len(self.targets)
        return np.asarray(values, np.float64) * np.array(self.std[:count]) + np.array(
            self.mean[:count]
        )

    def calendar(self, times: pd.DatetimeIndex) -> Array:
        """The covariates (rows, K) of these times: sine and cosine of the position in each
        cycle."""
        day = ((times - times.normalize()) / pd.Timedelta(days=1)).to_numpy(np.float64)
        phases = {
            "day": day,
            "week": (times.day_of_week + day) / 7,
            "year": (times.day_of_year - 1 + day) / (365 + times.is_leap_year),
        }
        angles = [2 * np.pi * np.asarray(phases[cycle]) for cycle in self.cycles]
        columns = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
        return (
            np.stack(columns, axis=1).astype(np.float32)
            if columns
            else np.zeros((len(times), 0), np.float32)
        )

    def future_times(self, last: pd.Timestamp) -> pd.DatetimeIndex:
        """The times of the N steps after `last`."""
        times = pd.date_range(last, periods=self.horizon + 1, freq=self.frequency)
        return times[times > last][: self.horizon]

    def window(self, frame: pd.DataFrame) -> tuple[Batch, pd.DatetimeIndex]:
        """The last look-back of a new table as a batch of one row, and the N times to forecast; its
        targets are 0.

        Raises UserError for what is wrong with the table, one that is too short, or one of another
        frequency.
        """
        times, values_RD = clean(frame, self.time_column, self.channels, self.missing, "the input")
        rows = len(times)
        require(
            rows >= self.lookback,
            f"the input has {rows} rows; the model looks back on {self.lookback}",
        )
        if rows > 1 and not 0.9 < (step := median_step(times)) / self.step_seconds < 1.1:
            here, there = (pd.Timedelta(seconds=s) for s in (step, self.step_seconds))
            raise UserError(
                f"the input has a row every {here}; the model was trained on one every {there}"
            )
        future = self.future_times(times[-1])
        inputs = self.scale(values_RD[-self.lookback :])[None]
        targets = np.zeros((1, self.horizon, len(self.targets)), np.float32)
        known = pd.DatetimeIndex(times[-self.lookback :].append(future))
        covariates = self.calendar(known)[None] if self.cycles else None
        return Batch(
            inputs, targets, np.array([self.lookback], np.int32), np.ones(1, np.float32), covariates
        ), future

    def save(self, assets: Path) -> None:
        """Writes info.json into the folder."""
        write_atomically(
            assets / "info.json", json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        )

    @classmethod
    def restore(cls, assets: Path) -> Self:
        """What `save` wrote into the folder."""
        try:
            saved = json.loads((assets / "info.json").read_text(encoding="utf-8"))
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
            }
            return cls(**fields)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read {assets / 'info.json'}, the scaler of a series run: {error}"
            ) from None


@dataclass(frozen=True)
class SeriesTable(Data):
    """Forecasting from a table with one row per time: CSV, TSV, JSON lines or Parquet, also with
    .gz.

    Training windows lie wholly in the training rows. In validation and test the forecast steps lie
    in the split, while the look-back may reach into the split before (the protocol of the ETT
    benchmarks: Zhou et al. 2021); every window counts. Channels are scaled to mean 0 and standard
    deviation 1 by the training rows alone.
    """

    gives: ClassVar[type | None] = SeriesInfo

    path: str = "electricity"  # file, or an embedded series: electricity (hourly), stocks (daily)
    time_column: str = ""  # column with the times, in ISO 8601; empty: the first
    targets: tuple[str, ...] = ()  # columns to forecast; empty: every numeric column
    inputs: tuple[str, ...] = ()  # further columns to read, known for the past only
    lookback: int = 168  # steps the model sees
    horizon: int = 24  # steps to forecast
    season: int = 24  # steps of a season, for the seasonal-naive baseline and MASE; 1: none
    split: tuple[float, float, float] = (
        0.7,
        0.1,
        0.2,
    )  # training, validation, test: shares, or numbers of rows
    calendar: bool = True  # tell the model the time of day, week and year, as far as they vary
    # Absent values: error, drop (the rows), interpolate (in time), forward_fill
    missing: Missing = "error"

    def __post_init__(self) -> None:
        for name in ("lookback", "horizon", "season"):
            require(
                getattr(self, name) >= 1, f"data.{name} {getattr(self, name)}: must be at least 1"
            )
        rule = "give shares that sum to at most 1, such as 0.7 0.1 0.2, or whole numbers of rows"
        require(min(self.split) > 0, f"data.split {self.split}: all three must be positive; {rule}")
        good = (
            all(n == int(n) for n in self.split)
            if max(self.split) > 1
            else sum(self.split) < 1 + 1e-6
        )
        require(good, f"data.split {self.split}: {rule}")

    def absolute(self) -> Self:
        """The same with an absolute path; the name of an embedded series stays."""
        return (
            self
            if self.path in embedded()
            else replace(self, path=str(Path(self.path).expanduser().absolute()))
        )

    def read(self, path: str | Path) -> pd.DataFrame:
        """The table in a file, or an embedded series by its name. Raises UserError."""
        return read_series(path)

    def load(self, assets: Path) -> "SeriesDataset":
        """Reads the series; the scaler comes from `assets`, or is fitted on the training rows and
        saved there."""
        frame = self.read(self.path)
        time_column = self.time_column or str(frame.columns[0])
        fitted = SeriesInfo.restore(assets) if (assets / "info.json").exists() else None
        targets = (
            fitted.targets
            if fitted
            else self.targets or numeric_columns(frame, time_column, self.inputs)
        )
        times, values_RD = clean(frame, time_column, targets + self.inputs, self.missing, self.path)
        borders = self._borders(len(times))
        info = fitted or self._fit(times, values_RD[: borders[1]], time_column, targets)
        if not fitted:
            assets.mkdir(parents=True, exist_ok=True)
            info.save(assets)
        return SeriesDataset(info, times, info.scale(values_RD), borders)

    def restore(self, assets: Path) -> SeriesInfo:
        """What an earlier `load` saved. Raises UserError if it is not there."""
        return SeriesInfo.restore(assets)

    def _borders(self, rows: int) -> tuple[int, ...]:
        """Rows where training begins, validation begins, test begins, and test ends."""
        counts = max(self.split) > 1
        borders = [
            round(share) if counts else round(share * rows)
            for share in (0.0, *np.cumsum(self.split))
        ]
        require(
            borders[-1] <= rows, f"data.split asks for {borders[-1]} rows; {self.path} has {rows}"
        )
        train, *others = np.diff(borders)
        wanted = self.lookback + self.horizon
        require(
            train >= wanted,
            f"the training split of {self.path} has {train} rows, too few for data.lookback "
            f"{self.lookback} + "
            f"data.horizon {self.horizon} = {wanted}; they may sum to {train} at most",
        )
        for name, size in zip(SPLITS[1:], others, strict=True):
            require(
                size >= self.horizon,
                f"the {name} split of {self.path} has {size} rows, too few for data.horizon "
                f"{self.horizon}; "
                f"the longest that fits is {min(others)}, or change data.split",
            )
        require(
            self.season < train,
            f"data.season {self.season}: must be below the {train} rows of training",
        )
        return tuple(borders)

    def _fit(
        self, times: pd.DatetimeIndex, train_RD: Array, time_column: str, targets: tuple[str, ...]
    ) -> SeriesInfo:
        constant = np.ptp(train_RD, axis=0) == 0
        if constant.any():
            names = np.array(targets + self.inputs)[constant]
            log.warning(
                "%s: constant in the training split, left unscaled: %s", self.path, listing(names)
            )
        std = np.where(constant, 1.0, train_RD.std(axis=0))
        naive = np.abs(train_RD[self.season :] - train_RD[: -self.season]).mean(axis=0) / std
        step = median_step(times)
        return SeriesInfo(
            time_column=time_column,
            targets=targets,
            inputs=self.inputs,
            lookback=self.lookback,
            horizon=self.horizon,
            season=self.season,
            mean=tuple(train_RD.mean(axis=0).tolist()),
            std=tuple(std.tolist()),
            naive_scale=tuple(np.where(naive > 1e-6, naive, 1.0)[: len(targets)].tolist()),
            frequency=frequency(times, self.path),
            step_seconds=step,
            cycles=tuple(name for name, length in CYCLES.items() if step <= length / 2)
            if self.calendar
            else (),
            missing=self.missing,
        )


class SeriesDataset:
    """A series in memory, scaled, with its borders (see `SeriesTable`); the windows of a split
    count from 0."""

    def __init__(
        self, info: SeriesInfo, times: pd.DatetimeIndex, values_RD: Array, borders: tuple[int, ...]
    ):
        self.info = info
        self._times, self._values_RD, self._calendar_RK = times, values_RD, info.calendar(times)
        begins = (borders[0] + info.lookback, *borders[1:3])
        self._targets = {
            split: range(b, e - info.horizon + 1)
            for split, b, e in zip(SPLITS, begins, borders[1:], strict=True)
        }

    def size(self, split: str) -> int:
        """Windows of a split."""
        return len(self._targets[split])

    def times(self, split: str) -> Array:
        """The times (windows, N) of the forecast steps, datetime64 without time zone, in the order
        of `evaluation`."""
        first, rows = self._targets[split], self._times.tz_localize(None).to_numpy()
        return np.lib.stride_tricks.sliding_window_view(rows, self.info.horizon)[
            first.start : first.stop
        ]

    def train(self, batch_size: int, seed: int) -> "SeriesBatches":
        """Shuffled batches without end; each window once an epoch."""
        return SeriesBatches(self, EpochOrder(self.size("train"), batch_size, seed))

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Each window of a split once, in time order; rows that fill the last batch have weight
        0."""
        return (
            self.batch(split, windows_B) for windows_B in in_order(self.size(split), batch_size)
        )

    def batch(self, split: str, windows_B: Array) -> Batch:
        """These windows of a split; -1 gives a row of weight 0."""
        lookback, horizon = self.info.lookback, self.info.horizon
        first_B = self._targets[split].start - lookback + np.maximum(windows_B, 0)
        rows_BS = first_B[:, None] + np.arange(lookback + horizon)
        values_BSD = self._values_RD[rows_BS]
        return Batch(
            inputs=np.ascontiguousarray(values_BSD[:, :lookback]),
            targets=np.ascontiguousarray(values_BSD[:, lookback:, : len(self.info.targets)]),
            lengths=np.full(len(windows_B), lookback, np.int32),
            weights=(windows_B >= 0).astype(np.float32),
            covariates=self._calendar_RK[rows_BS] if self.info.cycles else None,
        )


@dataclass(frozen=True)
class SeriesBatches:
    """Training batches by global step (`BatchSource`)."""

    dataset: SeriesDataset
    order: EpochOrder

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Batch:
        return self.dataset.batch("train", self.order[step])
