# SPDX-License-Identifier: Apache-2.0
"""Time series from a table: look-back windows as inputs, the following steps as targets, the
calendar and other columns as covariates. Many series in one table: `panel.py`.

Axes: P series, R rows of the table, D input channels (the C targets first), U different times,
B windows of a batch, T steps of the look-back, N steps of the horizon, K covariates.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from flax_lstm.data.base import Batch, Known
from flax_lstm.data.covariates import CYCLES, Column, calendar, columns
from flax_lstm.data.grid import Frequency, Missing
from flax_lstm.data.measures import deviation, scaled
from flax_lstm.data.memory import InMemory, absolute_path
from flax_lstm.data.timetable import (
    counted_times,
    counts_steps,
    embedded,
    numeric_columns,
    read_series,
    require_columns,
    require_one_series,
    time_like,
)
from flax_lstm.data.tracks import Layout, Track
from flax_lstm.data.windows import SPLITS, Buffer, Held, Scale, WindowDataset, WindowForm, scored
from flax_lstm.errors import MOST, UserError, listing, require
from flax_lstm.machine.files import write_atomically

Array = np.ndarray
log = logging.getLogger(__name__)
REPEATS = 0.05  # autocorrelation of changes at the lag of a season, below which there is none


@dataclass(frozen=True, kw_only=True)
class SeriesInfo(Layout):
    """What a forecaster and its predictions need to know about the data. Statistics are of the
    training split."""

    lookback: int  # T
    horizon: int  # N
    season: int  # steps
    # Of each input channel, targets first. Of a panel, every series has a scale of its own, from
    # its own past: these are 0, and the largest scale of any series.
    mean: tuple[float, ...]
    std: tuple[float, ...]  # likewise; 1 for a constant channel
    # Of each target: mean |x[t] - x[t - season]|, scaled; 1 where that is 0 but for rounding. None
    # of a panel.
    naive_scale: tuple[float, ...]
    frequency: str  # as pandas names it: "h", "D", "B" (business days), "15min"
    step_seconds: float  # median time between rows
    cycles: tuple[str, ...]  # of the calendar; each gives two covariates, sine and cosine
    holidays: str = ""  # country whose holidays are a covariate; empty: none
    masked: bool = False  # batches say which values were observed

    @property
    def covariates(self) -> int:
        """K, the number of covariates known in advance; 0: a batch has none."""
        waves = 2 * len(self.cycles) + bool(self.holidays)
        return waves + sum(column.width for column in self.future)

    @property
    def categories(self) -> tuple[int, ...]:
        """Of each static category, how many codes there are; the first is for unknown ones."""
        return tuple(len(c.categories) + 1 for c in self.static if c.categories)

    @property
    def reference_C(self) -> Array:
        """The unit of each target in which sums over batches are taken, float64."""
        return np.array(self.std[: len(self.targets)])

    @property
    def grid(self) -> Frequency:
        """The step of the series."""
        return Frequency(self.frequency, self.step_seconds)

    @property
    def form(self) -> WindowForm:
        """The sizes of windows."""
        return WindowForm(self.lookback, self.horizon, self.season, self.masked)

    def sample(self, batch_size: int) -> Batch:
        """A batch of zeros."""
        steps, targets = self.lookback + self.horizon, len(self.targets)
        statics = sum(not column.categories for column in self.static)
        codes = len(self.static) - statics

        def zeros(*shape: int) -> Array:
            return np.zeros((batch_size, *shape), np.float32)

        return Batch(
            inputs=zeros(self.lookback, len(self.channels)),
            targets=zeros(self.horizon, targets),
            lengths=np.full(batch_size, self.lookback, np.int32),
            weights=zeros(self.horizon, targets),
            covariates=Known(
                phase=np.zeros(batch_size, np.int32),
                future=zeros(steps, self.covariates) if self.covariates else None,
                observed=zeros(self.lookback, targets) if self.masked else None,
                static=zeros(statics) if statics else None,
                codes=np.zeros((batch_size, codes), np.int32) if codes else None,
            ),
            units=zeros(4, targets),
        )

    def saved_scale(self) -> Scale:
        """The scale of the one series."""
        return Scale(*(np.array([x]) for x in (self.mean, self.std, self.naive_scale)))

    def scale_of(self, tracks: Sequence[Track], rows: Sequence[int]) -> Scale:
        """The scale of each series from its first rows. Deviations for a table of one series; for a
        panel, the targets' errors of the seasonal naive, so that every series weighs alike in the
        loss: but no less than a hundredth of the deviation, and the deviation where there is no
        season to compare with."""
        targets = len(self.targets)
        fitted = []
        for track, count in zip(tracks, rows, strict=True):
            mean_D, std_D, naive_C = _moments(track.values_RD[:count], self.season, targets)
            if self.id_column:
                wide = np.where(naive_C > 0, np.maximum(naive_C, 0.01 * std_D[:targets]), 0)
                unit_C = np.where(wide > 0, wide, std_D[:targets])
                std_D = np.concatenate([unit_C, std_D[targets:]])
            scaled_C = naive_C / std_D[:targets]
            fitted.append((mean_D, std_D, np.where(scaled_C > 1e-6, scaled_C, 1.0)))
        return Scale(*(np.stack(part) for part in zip(*fitted, strict=True)))

    def buffer(
        self, tracks: Sequence[Track], scale: Scale, static: pd.DataFrame, where: str
    ) -> Buffer:
        """All tracks in one buffer, scaled and filled. static: one row for each track. Raises
        UserError for a value, or a number of static, beyond all measure."""
        counts = [track.rows for track in tracks]
        begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        values_RD = np.empty((begins[-1], len(self.channels)), np.float32)
        observed_RC = np.empty((begins[-1], len(self.targets)), bool)
        held = None
        if self.missing == "interpolate" and any(np.isnan(t.values_RD).any() for t in tracks):
            held = Held(np.empty(values_RD.shape, bool), np.empty_like(values_RD))
        for n, track in enumerate(tracks):
            place = slice(begins[n], begins[n + 1])
            known_RD = ~np.isnan(track.values_RD)
            of = (scale.mean_PD[n], scale.std_PD[n], self.channels, track.row_R)
            values_RD[place] = scaled(track.filled(self.missing), *of, where)
            observed_RC[place] = known_RD[:, : len(self.targets)]
            if held is not None:
                held.known_RD[place] = known_RD
                held.values_RD[place] = scaled(track.filled("forward_fill"), *of, where)
        times, time_R = tracks[0].times, np.arange(counts[0], dtype=np.int32)
        if len(tracks) > 1:
            stamps_U, places = np.unique(
                np.concatenate([track.times.asi8 for track in tracks]), return_inverse=True
            )
            unit = tracks[0].times.unit
            times = pd.DatetimeIndex(stamps_U.view(f"M8[{unit}]"))
            zone = tracks[0].times.tz
            times = times if zone is None else times.tz_localize("UTC").tz_convert(zone)
            time_R = places.astype(np.int32)
        statics = [c.encode(static[c.name], where) for c in self.static if not c.categories]
        codes = [c.codes(static[c.name], where) for c in self.static if c.categories]
        return Buffer(
            ids=np.array([track.id for track in tracks], object),
            begins=begins,
            times=times,
            time_R=time_R,
            values_RD=values_RD,
            observed_RC=observed_RC,
            position_U=self.grid.positions(times),
            calendar_UK=calendar(times, self.cycles, self.holidays),
            future_RK=np.concatenate([t.future_RK[: t.rows] for t in tracks]),
            static_PF=np.concatenate(statics, axis=1)
            if statics
            else np.zeros((len(tracks), 0), np.float32),
            codes_PG=np.stack(codes, axis=1) if codes else np.zeros((len(tracks), 0), np.int32),
            held=held,
            units_P4C=dict.fromkeys(SPLITS, scale.units(self.reference_C)),
        )

    def ahead(self, frame: pd.DataFrame) -> "SeriesDataset":
        """The last look-back of every series of a new table, as the one window of each: split
        "test", in order of the table. Its targets are not known.

        Raises UserError for what is wrong with the table, one that is too short, or one of another
        frequency, and names the columns known in advance that do not reach over the horizon.
        """
        where = "the input"
        tracks, _ = self.tracks(frame, where, self.grid)
        for track in tracks:
            self._require_fit(track)
        extended = [self._extend(track) for track in tracks]
        rows = [track.rows for track in tracks]
        scale = self.scale_of(tracks, rows) if self.id_column else self.saved_scale()
        buffer = self.buffer(extended, scale, first_rows(frame, self), where)
        return SeriesDataset(self, buffer, scale, {"test": buffer.begins[1:] - self.horizon})

    def until(self, frame: pd.DataFrame, cutoff: str) -> tuple[pd.Timestamp, pd.DataFrame]:
        """A time as it is written, and the table as it was known then: later rows are left out, or
        have their targets and inputs emptied where columns are known in advance. Series that begin
        later are left out. Raises UserError for what is no time, and where nothing is left."""
        require_columns(frame, (self.time_column,), "the input")
        times = self.times(frame, "the input")
        stamp = self.moment(cutoff, times, f"--cutoffs {cutoff}")
        known = np.asarray(times <= stamp)
        require(
            bool(known.any()),
            f"--cutoffs {cutoff}: the input begins at {self.grid.written(times).min()}; choose a "
            "later time",
        )
        if not self.future:
            return stamp, frame[known]
        emptied = frame.copy()
        emptied.loc[~known, list(self.channels)] = np.nan
        if self.id_column:
            begun = frame.loc[known, self.id_column].unique()
            emptied = emptied[emptied[self.id_column].isin(begun)]
        return stamp, emptied

    def moment(self, written: str, times: pd.DatetimeIndex, where: str) -> pd.Timestamp:
        """A time as a user writes it. Raises UserError for what is none."""
        if not self.counted:
            return time_like(written, times, where)
        return counted_times(pd.Series([written], name=self.time_column), where)[0]

    def _require_fit(self, track: Track) -> None:
        where = f"series {track.id!r} of the input" if self.id_column else "the input"
        require(
            track.rows >= (1 if self.masked else self.lookback),
            f"{where} has {track.rows} rows; the model looks back on {self.lookback}"
            + ("; leave it out, or train with --data.missing mask" if self.id_column else ""),
        )

    def _extend(self, track: Track) -> Track:
        """The track with the N rows to forecast."""
        future = self.grid.following(track.times[-1], self.horizon)
        known = track.future_RK[track.rows :]
        if self.future:
            where = f"series {track.id!r} of the input" if self.id_column else "the input"
            names = [column.name for column in self.future for _ in range(column.width)]
            require(
                len(known) >= self.horizon,
                f"{where} ends {len(known)} row(s) after the last target; a forecast needs "
                f"{self.horizon} more rows, with the targets left empty and a value in every "
                f"column known in advance: {listing(dict.fromkeys(names))}",
            )
            absent_NK = np.isnan(known[: self.horizon])
            if absent_NK.any():
                step = int(np.argmax(absent_NK.any(axis=1)))
                absent = dict.fromkeys(np.array(names, object)[absent_NK[step]])
                raise UserError(
                    f"{where} has no value at {future[step]} in columns known in advance: "
                    f"{listing(absent)}; a forecast needs one at each of its {self.horizon} steps"
                )
        values = np.full((self.horizon, len(self.channels)), np.nan)
        return track._replace(
            times=pd.DatetimeIndex(track.times.append(future)),
            values_RD=np.concatenate([track.values_RD, values]),
            future_RK=track.future_RK[: track.rows + self.horizon],
            row_R=np.concatenate([track.row_R, np.zeros(self.horizon, np.int64)]),
        )

    def window(self, frame: pd.DataFrame) -> tuple[Batch, pd.DatetimeIndex]:
        """The last look-back of a table of one series as a batch of one row, and the N times to
        forecast; its targets are of weight 0. Raises UserError as `ahead` does."""
        dataset = self.ahead(frame)
        return dataset.batch("test", np.array([0])), dataset.buffer.times[-self.horizon :]

    def save(self, assets: Path) -> None:
        """Writes info.json into the folder, which is made."""
        assets.mkdir(parents=True, exist_ok=True)
        write_atomically(
            assets / "info.json", json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        )

    @classmethod
    def restore(cls, assets: Path) -> Self:
        """What `save` wrote into the folder."""
        try:
            saved = json.loads((assets / "info.json").read_text(encoding="utf-8"))
            fields: dict[str, Any] = {
                k: columns(v) if isinstance(v, list) else v for k, v in saved.items()
            }
            return cls(**fields)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(
                f"cannot read {assets / 'info.json'}, the scaler of a series run: {error}"
            ) from None


class SeriesDataset(WindowDataset):
    """Series in memory, scaled, and the windows of each split."""

    def __init__(self, info: SeriesInfo, buffer: Buffer, scale: Scale, windows: dict[str, Array]):
        super().__init__(info.form, buffer, windows)
        self.info, self.scale = info, scale

    def unscale(self, values: Array, series: int | Array = 0) -> Array:
        """Scaled target values (..., C) of one series, or (B, ..., C) of the series of B rows, in
        the units of the data."""
        count, values = len(self.info.targets), np.asarray(values, np.float64)
        shape = (-1, *(1,) * (values.ndim - 2), count) if np.ndim(series) else (count,)
        mean, std = (x[series][..., :count].reshape(shape) for x in self.scale[:2])
        return values * std + mean

    def from_time(self, split: str, written: str, where: str) -> Array:
        """The windows of a split that forecast from a time on, as it is written. Raises UserError
        for what is no time, and where there is none."""
        stamps = self.stamps(split)[:: self.info.horizon]
        found = np.flatnonzero(stamps == self.info.moment(written, stamps, where))
        shown = self.info.grid.written(stamps)
        require(
            len(found) > 0,
            f"{where}: no forecast begins then; they begin from {shown.min()} to {shown.max()}",
        )
        return found

    def around(self, split: str, windows_B: Array, past: int) -> Array:
        """The target values (B, past + N, C) of these windows and of the `past` steps before, in
        the units of the data; NaN where none was measured."""
        first_B, series_B = self.first_rows(split)[windows_B], self.series(split)[windows_B]
        rows_BS = first_B[:, None] + np.arange(-past, self.info.horizon)
        begin_B1 = self.buffer.begins[series_B][:, None]
        inside_BS, rows_BS = rows_BS >= begin_B1, np.maximum(rows_BS, begin_B1)
        known_BSC = self.buffer.observed_RC[rows_BS] & inside_BS[..., None]
        values_BSC = self.buffer.values_RD[rows_BS][..., : len(self.info.targets)]
        return np.where(known_BSC, self.unscale(values_BSC, series_B), np.nan)

    def measured(self) -> Array:
        """The target values of all series (R, C), in the units of the data; NaN where none was."""
        count, buffer = len(self.info.targets), self.buffer
        rows = np.diff(buffer.begins)
        mean_RC, std_RC = (np.repeat(x[:, :count], rows, axis=0) for x in self.scale[:2])
        values_RC = buffer.values_RD[:, :count] * std_RC + mean_RC
        return np.where(buffer.observed_RC, values_RC, np.nan)


def _moments(values_RD: Array, season: int, targets: int) -> tuple[Array, Array, Array]:
    """Mean and deviation of each channel over what was observed (1 for a constant one, 0 and 1
    where nothing was), and the targets' mean |x[t] - x[t - season]|, 0 where there is none."""
    absent = np.isnan(values_RD).any()
    known = [x[~np.isnan(x)] if absent else x for x in values_RD.T]
    mean_D, std_D = np.array([deviation(x) for x in known]).T
    steps = np.abs(values_RD[season:, :targets] - values_RD[:-season, :targets])
    found = [column[~np.isnan(column)] for column in steps.T]
    return mean_D, std_D, np.array([x.mean() if len(x) else 0.0 for x in found])


def first_rows(frame: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """The static columns of each series, in order of the table, checked to be the same in all
    rows; none of a table of one series."""
    if not layout.static:
        return pd.DataFrame()
    names = [column.name for column in layout.static]
    groups = frame.groupby(layout.id_column, sort=False, observed=True)
    for name in names:
        counts = groups[name].nunique()
        if (counts > 1).any():
            raise UserError(
                f"column {name!r} of data.static changes within the series "
                f"{counts.index[int(np.argmax(counts > 1))]!r}; put it under data.future or "
                "data.inputs"
            )
    first = groups[names].first()
    for column in layout.static:
        absent = first.index[first[column.name].isna()]
        require(
            bool(column.categories) or len(absent) == 0,
            f"column {column.name!r} of data.static has no number for the series "
            f"{listing(absent, 5)}; give one, or leave the column out",
        )
    return first.reset_index(drop=True)


@dataclass(frozen=True)
class SeriesTable(InMemory):
    """Forecasting from a table with one row per time: CSV, TSV, JSON lines or Parquet, each also as
    gzip.

    The frequency is found in the times, and with it season, look-back and horizon where they are 0.
    Times that are missing are put in as absent values; `missing` says what becomes of these, and
    none is ever scored. Training windows lie wholly in the training rows. In validation and test
    the forecast steps lie in the split, while the look-back may reach into the split before (the
    protocol of the ETT benchmarks: Zhou et al. 2021); every window counts. Channels are scaled to
    mean 0 and standard deviation 1 by the training rows alone.
    """

    gives: ClassVar[type | None] = SeriesInfo

    path: str = "electricity"  # file, or an embedded series: electricity (hourly), stocks (daily)
    time_column: str = ""  # column with the times, in ISO 8601; empty: the first
    targets: tuple[str, ...] = ()  # columns to forecast; empty: every numeric column
    inputs: tuple[str, ...] = ()  # further columns to read, known for the past only
    future: tuple[str, ...] = ()  # columns known in advance: numbers or categories
    lookback: int = 0  # steps the model sees; 0: several seasons
    horizon: int = 0  # steps to forecast; 0: a season
    season: int = 0  # steps of a season; 0: natural for the frequency, if it repeats; 1: none
    # training, validation, test: shares, or numbers of rows
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)
    calendar: bool = True  # tell the model the time of day, week and year, as far as they repeat
    # tell the model the holidays of a country, such as DE, or a part of it, DE-BY; empty: none
    holidays: str = ""
    # absent values: error, mask (the model is told), interpolate (in time), forward_fill, drop (the
    # rows, and rows as they come)
    missing: Missing = "error"
    time_zone: str = ""  # of times written without one, such as Europe/Berlin; empty: none

    def __post_init__(self) -> None:
        require_sizes(self)
        rule = "give shares that sum to at most 1, such as 0.7 0.1 0.2, or whole numbers of rows"
        require(
            all(0 < share <= MOST for share in self.split),
            f"data.split {self.split}: all three must be positive, and finite; {rule}",
        )
        good = (
            all(n == int(n) for n in self.split)
            if max(self.split) > 1
            else sum(self.split) < 1 + 1e-6
        )
        require(good, f"data.split {self.split}: {rule}")

    def absolute(self) -> Self:
        """The same with an absolute path; the name of an embedded series stays."""
        return absolute(self)

    def read(self, path: str | Path) -> pd.DataFrame:
        """The table in a file, or an embedded series by its name. Raises UserError."""
        return read_series(path)

    def load(self, assets: Path) -> SeriesDataset:
        """Reads the series; the scaler comes from `assets`, or is fitted on the training rows and
        saved there."""
        frame = self.whole()
        fitted = SeriesInfo.restore(assets) if (assets / "info.json").exists() else None
        layout = fitted or self._layout(frame)
        tracks, frequency = layout.tracks(frame, self.path, fitted.grid if fitted else None)
        (track,) = tracks
        if fitted is None:
            info = self._fit(layout, track, frequency)
            info.save(assets)
        else:
            info = fitted
        scale = info.saved_scale()
        borders = self._borders(track.rows, info.lookback, info.horizon, info.season)
        begins = (borders[0] + info.lookback, *borders[1:3])
        buffer = info.buffer(tracks, scale, pd.DataFrame(), self.path)
        windows = {
            split: scored(np.arange(b, e - info.horizon + 1), info.horizon, buffer.observed_RC)
            for split, b, e in zip(SPLITS, begins, borders[1:], strict=True)
        }
        for split in SPLITS:
            require(
                len(windows[split]) > 0,
                f"the {split} split of {self.path} has no target that was measured",
            )
        return SeriesDataset(info, buffer, scale, windows)

    def restore(self, assets: Path) -> SeriesInfo:
        """What an earlier `load` saved. Raises UserError if it is not there."""
        return SeriesInfo.restore(assets)

    def _layout(self, frame: pd.DataFrame) -> Layout:
        require_one_series(frame, self.time_column, self.path)
        time_column = self.time_column or str(frame.columns[0])
        counted = counts(self, frame, time_column)
        others = self.inputs + self.future
        share = self.split[0] if max(self.split) <= 1 else self.split[0] / max(len(frame), 1)
        return Layout(
            time_column=time_column,
            targets=self.targets or numeric_columns(frame, time_column, others),
            inputs=self.inputs,
            missing=self.missing,
            future=fit_columns(frame[: max(int(share * len(frame)), 1)], self.future, self.path),
            time_zone=self.time_zone,
            counted=counted,
        )

    def _borders(self, rows: int, lookback: int, horizon: int, season: int) -> tuple[int, ...]:
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
        wanted = lookback + horizon
        require(
            train >= wanted,
            f"the training split of {self.path} has {train} rows, too few for data.lookback "
            f"{lookback} + data.horizon {horizon} = {wanted}; they may sum to {train} at most",
        )
        for name, size in zip(SPLITS[1:], others, strict=True):
            require(
                size >= horizon,
                f"the {name} split of {self.path} has {size} rows, too few for data.horizon "
                f"{horizon}; the longest that fits is {min(others)}, or change data.split",
            )
        require(season < train, f"data.season {season}: must be below the {train} rows of training")
        return tuple(borders)

    def _fit(self, layout: Layout, track: Track, frequency: Frequency) -> SeriesInfo:
        shares = np.array(self.split) if max(self.split) <= 1 else np.array(self.split) / track.rows
        train, *others = (int(share * track.rows) for share in shares)
        targets = len(layout.targets)
        repeating = partial(repeats, [track.values_RD[:train, :targets]])
        season, lookback, horizon = settle(self, frequency, train, min(others), repeating)
        say(self.path, track.times, frequency, season, lookback, horizon)
        borders = self._borders(track.rows, lookback, horizon, season)
        train_RD = track.values_RD[: borders[1]]
        mean_D, std_D, naive_C = _moments(train_RD, season, targets)
        _warn(train_RD, layout.channels, self.path)
        scaled_C = naive_C / std_D[: len(naive_C)]
        return SeriesInfo(
            **{name: getattr(layout, name) for name in Layout.__dataclass_fields__},
            lookback=lookback,
            horizon=horizon,
            season=season,
            mean=tuple(mean_D.tolist()),
            std=tuple(std_D.tolist()),
            naive_scale=tuple(np.where(scaled_C > 1e-6, scaled_C, 1.0).tolist()),
            frequency=frequency.name,
            step_seconds=frequency.seconds,
            cycles=cycles(frequency, borders[1]) if self.calendar else (),
            holidays=self.holidays,
            masked=self.missing == "mask",
        )


def require_sizes(table: Any) -> None:
    """Raises UserError for a look-back, horizon or season that is none."""
    for name in ("lookback", "horizon", "season"):
        value = getattr(table, name)
        require(
            0 <= value <= MOST,
            f"data.{name} {value}: must be at least 1 and at most {MOST:,}, or 0 to be found",
        )


def counts(table: Any, frame: pd.DataFrame, time_column: str) -> bool:
    """Whether whole numbers take the place of times: where the season is said, for nothing else
    tells it. Raises UserError for settings that need dates."""
    counted = table.season > 0 and time_column in frame and counts_steps(frame[time_column])
    for name in ("holidays", "time_zone"):
        require(
            not (counted and getattr(table, name)),
            f"{table.path}: column {time_column!r} counts steps, of which data."
            f"{name.replace('_', '-')} says nothing: it needs dates",
        )
    return counted


def absolute(table: Any) -> Any:
    """A table's settings with an absolute path; the name of an embedded series stays."""
    return table if table.path in embedded() else replace(table, path=absolute_path(table.path))


def fit_columns(frame: pd.DataFrame, names: tuple[str, ...], where: str) -> tuple[Column, ...]:
    """The covariates of these columns; one that is not there is left to be reported with the
    others."""
    return tuple(Column.fit(frame[n], where) if n in frame.columns else Column(n) for n in names)


def cycles(frequency: Frequency, rows: int) -> tuple[str, ...]:
    """The cycles of the calendar that such steps can show, and that come round twice in `rows` of
    them: the year of two months of hours would be a trend, which ends somewhere else."""
    if frequency.counted:
        return ()
    step, whole = frequency.seconds, frequency.span(rows)
    return tuple(name for name, x in CYCLES.items() if step <= x / 2 and 2 * x <= whole)


def settle(
    table: Any, frequency: Frequency, train: int, others: int, repeats: Callable[[int], bool]
) -> tuple[int, int, int]:
    """Season, look-back and horizon: as given, or natural for the frequency, but no more than the
    rows of training and of the other splits allow, and a season only where it `repeats`."""
    natural = frequency.with_season(table.season)
    horizon = table.horizon or max(min(natural.horizon, others, max(train // 4, 1)), 1)
    room = max((train - horizon) // 2, 1)
    two_seasons = 2 * (table.season or natural.season)
    if two_seasons + horizon <= train:
        # Without two seasons in it no look-back tells the season: that is worth more than windows.
        room = max(room, two_seasons)
    lookback = table.lookback or min(natural.lookback, room)
    fits = 2 * natural.season <= lookback and repeats(natural.season)
    return table.season or (natural.season if fits else 1), lookback, horizon


def repeats(series: Sequence[Array], season: int) -> bool:
    """Whether the changes from step to step of these series (R, C) repeat after a season: their
    autocorrelation at that lag, the mean over series and channels by length, is at least `REPEATS`
    (of changes, for a level that wanders looks like any season). True where nothing is known."""
    total, count = 0.0, 0
    for value_R in (column for value_RC in series for column in value_RC.T):
        change_R = np.diff(value_R)
        known_R = change_R[~np.isnan(change_R)]
        if not len(known_R) or known_R.var() == 0:
            continue
        change_R = (change_R - known_R.mean()) / known_R.std()
        product_R = change_R[season:] * change_R[:-season]
        total += float(np.nansum(product_R))
        count += int((~np.isnan(product_R)).sum())
    return not count or total / count >= REPEATS


def say(
    where: str,
    times: pd.DatetimeIndex,
    frequency: Frequency,
    season: int,
    lookback: int,
    horizon: int,
) -> None:
    """Logs what was found in the times."""
    log.info(
        "%s: frequency %s, from %s to %s; season %d, look-back %d, horizon %d (steps; set them "
        "with --data.season, --data.lookback, --data.horizon)",
        *(where, frequency.name, *frequency.written(times)[[0, -1]], season, lookback, horizon),
    )


def _warn(train_RD: Array, channels: tuple[str, ...], where: str) -> None:
    """Says which channels are constant, and which hold values far outside their usual range."""
    names = np.array(channels, object)
    empty = np.isnan(train_RD).all(axis=0)
    require(
        not empty.any(),
        f"{where}: no value in the training split: {listing(names[empty])}; leave these columns "
        "out, or change data.split",
    )
    constant = np.nanmax(train_RD, axis=0) == np.nanmin(train_RD, axis=0)
    if constant.any():
        log.warning(
            "%s: constant in the training split, left unscaled: %s",
            *(where, listing(names[constant])),
        )
    for name, values in zip(names, train_RD.T, strict=True):
        known = values[~np.isnan(values)]
        low, middle, high = np.quantile(known, (0.25, 0.5, 0.75))
        far = np.abs(values - middle)
        row = int(np.nanargmax(far))
        if high > low and far[row] > 1e6 * (high - low):
            log.warning(
                "%s: column %r holds %g in row %d, %g times the usual range away from the rest: "
                "figures scaled by the deviation will look far too good; is it a mark of something "
                "absent?",
                *(where, name, values[row], row + 1, far[row] / (high - low)),
            )
