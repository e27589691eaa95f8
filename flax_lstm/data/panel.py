# SPDX-License-Identifier: Apache-2.0
"""Many series in one long table, for one model: one row per series and time.

Axes: P series, W windows, D input channels (the C targets first).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pandas as pd

from flax_lstm.data.grid import Frequency, Missing
from flax_lstm.data.memory import InMemory
from flax_lstm.data.series import (
    SeriesDataset,
    SeriesInfo,
    absolute,
    counts,
    cycles,
    first_rows,
    fit_columns,
    repeats,
    require_sizes,
    say,
    settle,
)
from flax_lstm.data.timetable import read_series
from flax_lstm.data.tracks import Layout, Track
from flax_lstm.data.windows import SPLITS, scored
from flax_lstm.errors import MOST, listing, require

Array = np.ndarray
log = logging.getLogger(__name__)
VALIDATED = 256  # windows that validate, if the rows allow it


@dataclass(frozen=True)
class PanelTable(InMemory):
    """Forecasting many series of different lengths, starts and scales with one model, from a long
    table: CSV, TSV, JSON lines or Parquet, also with .gz.

    The last steps of every series test, those before validate, all before train. Nothing is learned
    for a single series, so that new ones can be forecast. Each is scaled from its own past: the
    deviation is replaced by the error of the seasonal naive, so that no series outweighs the
    others, and scaled figures are of the kind of MASE. Series too short for the look-back are
    padded in front, and the model is told; those too short to be forecast are left out, by name.
    """

    gives: ClassVar[type | None] = SeriesInfo

    path: str = "panel.csv"  # the file
    id_column: str = "unique_id"  # column that says which series a row belongs to
    time_column: str = "ds"  # column with the times, in ISO 8601
    targets: tuple[str, ...] = ("y",)  # columns to forecast
    inputs: tuple[str, ...] = ()  # further columns to read, known for the past only
    future: tuple[str, ...] = ()  # columns known in advance: numbers or categories
    static: tuple[str, ...] = ()  # columns that stay the same along a series: numbers or categories
    lookback: int = 0  # steps the model sees; 0: several seasons
    horizon: int = 0  # steps to forecast; 0: a season
    season: int = 0  # steps of a season; 0: natural for the frequency, if it repeats; 1: none
    # steps of each series before the test that validate; 0: one horizon, more for few series
    validation: int = 0
    test: int = 0  # last steps of each series that test; 0: one horizon
    # Train on the steps that validate as well, for a last run once all settings are chosen
    train_on_validation: bool = False
    calendar: bool = True  # tell the model the time of day, week and year, as far as they repeat
    # tell the model the holidays of a country, such as DE, or a part of it, DE-BY; empty: none
    holidays: str = ""
    # absent values: error, mask (the model is told), interpolate (in time), forward_fill, drop (the
    # rows, and rows as they come)
    missing: Missing = "error"
    time_zone: str = ""  # of times written without one, such as Europe/Berlin; empty: none

    def __post_init__(self) -> None:
        require_sizes(self)
        require(self.id_column != "", "data.id-column: name the column that tells series apart")
        require(len(self.targets) > 0, "data.targets: name the columns to forecast")
        for name in ("validation", "test"):
            steps = getattr(self, name)
            require(
                steps == 0 or max(self.horizon, 1) <= steps <= MOST,
                f"data.{name} {steps}: must be at least data.horizon {self.horizon}, or 0 for one "
                "horizon",
            )

    def absolute(self) -> Self:
        """The same with an absolute path."""
        return absolute(self)

    def read(self, path: str | Path) -> pd.DataFrame:
        """The table in a file. Raises UserError."""
        return read_series(path)

    def load(self, assets: Path) -> SeriesDataset:
        """Reads the series; what was settled comes from `assets`, or is saved there."""
        frame = self.whole()
        fitted = SeriesInfo.restore(assets) if (assets / "info.json").exists() else None
        layout = fitted or self._layout(frame)
        tracks, frequency = layout.tracks(frame, self.path, fitted.grid if fitted else None)
        static = first_rows(frame, layout)
        info = fitted or self._settle(layout, tracks, frequency)
        validation, test = self._held_out(tracks, info.horizon)
        long = [t.rows > info.horizon for t in tracks]
        validation_P = self._validation(tracks, validation, info.horizon)
        self._say_left_out(tracks, long, validation_P + test, info)
        tracks = [t for t, kept in zip(tracks, long, strict=True) if kept]
        require(len(tracks) > 0, f"{self.path}: no series is longer than the horizon")
        static = static[long].reset_index(drop=True) if layout.static else static
        ends = np.array([track.rows for track in tracks])
        before_test = np.maximum(ends - test, 1)
        train = np.maximum(before_test - validation_P[long], 1)
        learned = before_test if self.train_on_validation else train
        # Too few rows have no scale: a series that none trains on has that of all before its test.
        seen = np.where(train > info.horizon, learned, before_test)
        scale = info.scale_of(tracks, [int(n) for n in seen])
        if fitted is None:
            # The largest scale of any series is the unit of sums over all of them.
            info = replace(info, std=tuple(scale.std_PD.max(axis=0).tolist()))
            info.save(assets)
        buffer = info.buffer(tracks, scale, static, self.path)
        judged = info.scale_of(tracks, [int(n) for n in before_test])
        naive_PC = judged.naive_PC * judged.std_PD[:, : len(info.targets)]
        at_test = scale._replace(naive_PC=naive_PC / scale.std_PD[:, : len(info.targets)])
        buffer = buffer._replace(
            units_P4C={**buffer.units_P4C, "test": at_test.units(info.reference_C)}
        )
        windows = {
            split: scored(first_W, info.horizon, buffer.observed_RC)
            for split, first_W in _windows(
                info, learned, (train, before_test, ends), buffer.begins
            ).items()
        }
        for split in SPLITS:
            require(
                len(windows[split]) > 0,
                f"{self.path}: no series is long enough for the {split} split: {validation} + "
                f"{test} steps are held out, and a window needs {info.horizon} more besides its "
                "look-back",
            )
        return SeriesDataset(info, buffer, scale, windows)

    def restore(self, assets: Path) -> SeriesInfo:
        """What an earlier `load` saved. Raises UserError if it is not there."""
        return SeriesInfo.restore(assets)

    def _held_out(self, tracks: Sequence[Track], horizon: int) -> tuple[int, int]:
        """Steps of each series that validate and that test. Few series are validated on more
        origins than one, as far as their rows allow: a handful of windows chooses by luck."""
        rows = int(np.median([track.rows for track in tracks]))
        wanted = min(horizon - 1 + -(-VALIDATED // len(tracks)), rows // 8)
        return self.validation or max(wanted, horizon), self.test or horizon

    def _validation(self, tracks: Sequence[Track], steps: int, horizon: int) -> Array:
        """The steps of each series that validate: as many as of the others, but no more origins
        than its own rows allow, for a short series shall train as well."""
        own_P = np.array([max(track.rows // 8, horizon) for track in tracks])
        return np.full(len(tracks), steps) if self.validation else np.minimum(steps, own_P)

    def _layout(self, frame: pd.DataFrame) -> Layout:
        require(
            self.id_column in frame or not {*self.targets}.isdisjoint(frame),
            f"{self.path} has no column {self.id_column!r} that tells series apart, nor any of "
            f"{listing(self.targets)}. A table with a column for each series is for --config "
            f"series_table; name others with --data.id-column, --data.targets. Columns: "
            f"{listing(frame.columns)}",
        )
        return Layout(
            id_column=self.id_column,
            time_column=self.time_column,
            targets=self.targets,
            inputs=self.inputs,
            missing=self.missing,
            future=fit_columns(frame, self.future, self.path),
            static=fit_columns(frame, self.static, self.path),
            time_zone=self.time_zone,
            counted=counts(self, frame, self.time_column),
        )

    def _settle(self, layout: Layout, tracks: Sequence[Track], frequency: Frequency) -> SeriesInfo:
        rows = int(np.median([track.rows for track in tracks]))
        held = max(rows // 4, 1)
        # As many rows train as the horizon leaves, which is known by then.
        _, _, horizon = settle(self, frequency, max(rows - 2 * held, 1), held, lambda season: True)
        held_out = sum(self._held_out(tracks, horizon))
        past = [t.values_RD[: max(t.rows - held_out, 0), : len(layout.targets)] for t in tracks]
        train, repeating = max(rows - held_out, 1), partial(repeats, past)
        season, lookback, _ = settle(self, frequency, train, horizon, repeating)
        log.info("%s: %d series of %d rows (median)", self.path, len(tracks), rows)
        longest = max(tracks, key=lambda track: track.rows)
        say(self.path, longest.times, frequency, season, lookback, horizon)
        short = any(t.rows - held_out < lookback + horizon for t in tracks)
        return SeriesInfo(
            **{name: getattr(layout, name) for name in Layout.__dataclass_fields__},
            lookback=lookback,
            horizon=horizon,
            season=season,
            mean=(0.0,) * len(layout.channels),
            std=(1.0,) * len(layout.channels),
            naive_scale=(),
            frequency=frequency.name,
            step_seconds=frequency.seconds,
            cycles=cycles(frequency, longest.rows - held_out) if self.calendar else (),
            holidays=self.holidays,
            masked=short or self.missing == "mask",
        )

    def _say_left_out(
        self, tracks: Sequence[Track], long: Sequence[bool], held_out_P: Array, info: SeriesInfo
    ) -> None:
        short = [t.id for t, kept in zip(tracks, long, strict=True) if not kept]
        if short:
            log.warning(
                "%s: %d series with no more rows than the horizon of %d are left out: %s",
                *(self.path, len(short), info.horizon, listing(short, 5)),
            )
        least_P = held_out_P + info.horizon + 1
        untrained = [
            t.id for t, n in zip(tracks, least_P, strict=True) if info.horizon < t.rows < n
        ]
        if untrained:
            log.warning(
                "%s: %d series are too short to train on and only forecast: %s",
                *(self.path, len(untrained), listing(untrained, 5)),
            )


def _windows(
    info: SeriesInfo, learned_P: Array, borders: tuple[Array, Array, Array], begins: Array
) -> dict[str, Array]:
    """The windows of each split. Those of training end with `learned_P` rows and have a whole
    look-back before them, except where a series has no such window; validation, test and the end
    of the series are where `borders` say."""
    found: dict[str, list[Array]] = {split: [] for split in SPLITS}
    for learned, *edges, begin in zip(learned_P, *borders, begins[:-1], strict=True):
        whole = info.lookback <= learned - info.horizon
        least = info.lookback if whole else min(info.lookback, max(info.season, info.horizon))
        validation, test, end = edges
        splits = {"train": (least, learned), "validation": (validation, test), "test": (test, end)}
        for split, (first, last) in splits.items():
            found[split].append(begin + np.arange(max(first, 1), last - info.horizon + 1))
    return {split: np.concatenate(parts).astype(np.int64) for split, parts in found.items()}
