# SPDX-License-Identifier: Apache-2.0
"""From a table to tracks: series on their regular grids, each with what is known besides.

Axes: R rows of a table or of a track, D input channels (the C targets first), K covariates.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from flax_lstm.data.covariates import Column
from flax_lstm.data.grid import CHOICES, STEP, Frequency, Missing, absent, fill, infer, regular
from flax_lstm.data.measures import numbers
from flax_lstm.data.timetable import counted_times, read_times, require_columns, require_order
from flax_lstm.errors import UserError, listing, require

Array = np.ndarray
log = logging.getLogger(__name__)


class Track(NamedTuple):
    """One series in order of time."""

    id: str
    times: pd.DatetimeIndex
    values_RD: Array  # float64, NaN where absent
    future_RK: Array  # float32; as many rows more as are known ahead
    row_R: Array  # of the table, from 1; 0 for a time stamp that was put in

    @property
    def rows(self) -> int:
        return len(self.times)

    def filled(self, missing: Missing) -> Array:
        """The values (R, D) with numbers for what is absent, see `grid.fill`."""
        if not np.isnan(self.values_RD).any():
            return self.values_RD
        whole_RD = self.values_RD.copy()
        for channel in whole_RD.T:
            fill(channel, self.times.asi8, missing)
        return whole_RD


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns of a table are what, and how it is read."""

    time_column: str
    targets: tuple[str, ...]  # forecast channels
    inputs: tuple[str, ...]  # further input channels, known for the past only
    missing: Missing
    id_column: str = ""  # of a panel: which series a row belongs to; empty: there is one
    future: tuple[Column, ...] = ()  # known in advance
    static: tuple[Column, ...] = ()  # the same in all rows of a series
    time_zone: str = ""  # of times that are written without one
    counted: bool = False  # the times are whole numbers that count steps

    @property
    def channels(self) -> tuple[str, ...]:
        """The D input channels in order."""
        return self.targets + self.inputs

    def times(self, frame: pd.DataFrame, where: str) -> pd.DatetimeIndex:
        """The times of the rows. Raises UserError for what is none."""
        column = frame[self.time_column]
        if self.counted:
            return counted_times(column, where)
        return read_times(column, where, self.time_zone)

    def tracks(
        self, frame: pd.DataFrame, where: str, frequency: Frequency | None = None
    ) -> tuple[list[Track], Frequency]:
        """The series of a table on their grids, and the frequency, inferred from the longest
        unless given.

        Rows after the last target count as the future of the columns known in advance. Raises
        UserError for what is wrong with the table, and for missing values where `missing` says so.
        """
        ids = (self.id_column,) if self.id_column else ()
        known = tuple(c.name for c in self.future)
        statics = tuple(c.name for c in self.static)
        require_columns(frame, (*ids, self.time_column, *self.channels, *known, *statics), where)
        times = self.times(frame, where)
        if not self.id_column:
            require_order(frame, times, self.time_column, where)
        values_RD = numbers(frame, self.channels, where)
        encoded = [column.encode(frame[column.name], where) for column in self.future]
        future_RK = np.concatenate(encoded, axis=1) if encoded else np.zeros((len(frame), 0), "f4")
        pieces = list(self._pieces(frame, times, where))
        found = frequency is None
        if frequency is None:
            longest = max(pieces, key=lambda piece: len(piece[1]))
            frequency = STEP if self.counted else infer(times[longest[1]])
        tracks, reports = [], []
        for name, rows in pieces:
            place = f"{where}, series {name!r}" if self.id_column else where
            _require_step(times[rows], frequency, self.missing, place, found)
            track, report = self._track(
                name, times[rows], values_RD[rows], future_RK[rows], rows + 1, frequency, place
            )
            tracks.append(track)
            if report:
                reports.append((name, report))
        self._report(reports, where)
        return tracks, frequency

    def _pieces(
        self, frame: pd.DataFrame, times: pd.DatetimeIndex, where: str
    ) -> Iterator[tuple[str, Array]]:
        """The name and the rows, in order of time, of each series."""
        if not self.id_column:
            yield "", np.arange(len(frame))
            return
        codes_R, names = pd.factorize(frame[self.id_column])
        if (codes_R < 0).any():
            rows = np.flatnonzero(codes_R < 0) + 1
            raise UserError(
                f"{where}: column {self.id_column!r} is empty in row {listing(rows, 5)}"
            )
        stamps_R = times.asi8
        order_R = np.lexsort((stamps_R, codes_R))
        same = (np.diff(codes_R[order_R]) == 0) & (np.diff(stamps_R[order_R]) == 0)
        if same.any():
            at = int(np.argmax(same))
            first, second = sorted((order_R[at] + 1, order_R[at + 1] + 1))
            raise UserError(
                f"{where}: rows {first} and {second} are both of series "
                f"{str(names[codes_R[order_R[at]]])!r} at {times[order_R[at]]}; one row per series "
                "and time is needed"
            )
        edges = np.flatnonzero(np.diff(codes_R[order_R])) + 1
        for rows in np.split(order_R, edges):
            yield str(names[codes_R[rows[0]]]), rows

    def _track(
        self,
        name: str,
        times: pd.DatetimeIndex,
        values_RD: Array,
        future_RK: Array,
        row_R: Array,
        frequency: Frequency,
        where: str,
    ) -> tuple[Track, str]:
        """The series on its grid, and what was missing."""
        some = np.flatnonzero(~np.isnan(values_RD[:, : len(self.targets)]).all(axis=1))
        require(len(some) > 0, f"{where}: no target has any value")
        end = int(some[-1]) + 1 if self.future else len(times)
        ahead_RK = self._ahead(times, future_RK, end, frequency)
        grid = regular(times[:end], values_RD[:end], frequency, self.missing, where)
        absence = absent(values_RD[:end], self.channels)
        report = "; ".join(
            part for part in (grid.report, absence and f"absent values, {absence}") if part
        )
        hint = CLOCKS if skipped_an_hour(times[:end], grid.missing) else ""
        require(not report or self.missing != "error", f"{where}: {report}; {hint}{CHOICES}")
        times, values_RD = grid.times, grid.values_GD
        place_R = np.zeros(len(times), np.int64)
        place_R[grid.rows] = row_R[:end]
        past_RK = future_RK[:end]
        if grid.missing:
            whole = np.full((len(times), past_RK.shape[1]), np.nan, np.float32)
            whole[grid.rows] = past_RK
            for channel in whole.T:
                fill(channel, times.asi8, "forward_fill")
            past_RK = whole
        if self.missing == "drop" and absence:
            keep = ~np.isnan(values_RD).any(axis=1)
            require(bool(keep.any()), f"{where}: data.missing drop leaves no row: {absence}")
            times, values_RD, past_RK = times[keep], values_RD[keep], past_RK[keep]
            place_R = place_R[keep]
        if np.isnan(past_RK).any():
            row = int(np.argmax(np.isnan(past_RK).any(axis=1)))
            raise UserError(
                f"{where}: a column of data.future ({listing(c.name for c in self.future)}) has no "
                f"value at {times[row]}; what is known in advance must be there in every row"
            )
        known_RK = np.concatenate([past_RK, ahead_RK])
        return Track(name, times, values_RD, known_RK, place_R), report

    def _ahead(
        self, times: pd.DatetimeIndex, future_RK: Array, end: int, frequency: Frequency
    ) -> Array:
        """What is known after the last target, step by step: NaN where a time has no row. As the
        rows come where their calendar has gaps by nature."""
        rows, ahead_RK = times[end:], future_RK[end:]
        expected = frequency.following(times[end - 1], len(rows))
        if self.missing == "drop" or frequency.unit == "B" or (rows == expected).all():
            return ahead_RK
        aligned_RK = np.full_like(ahead_RK, np.nan)
        places = expected.get_indexer(rows)
        aligned_RK[places[places >= 0]] = ahead_RK[places >= 0]
        return aligned_RK

    def _report(self, reports: Sequence[tuple[str, str]], where: str) -> None:
        if not reports:
            return
        if not self.id_column:
            log.warning("%s: %s; data.missing: %s", where, reports[0][1], self.missing)
            return
        log.warning(
            "%s: %d series with missing values, such as %r: %s; data.missing: %s",
            *(where, len(reports), reports[0][0], reports[0][1], self.missing),
        )


CLOCKS = (
    "an hour that is missing as clocks go forward comes of local times: name their zone, as in "
    "--data.time-zone Europe/Berlin; else "
)


def skipped_an_hour(times: pd.DatetimeIndex, missing: int) -> bool:
    """Whether what is missing looks like the hour that local clocks skip: an hour and a step by
    night from a Saturday or Sunday on, no more than twice in 4,000 rows."""
    steps = np.diff(times.as_unit("ns").asi8) / 3.6e12  # hours
    if times.tz is not None or not missing or not len(steps):
        return False
    step = float(np.median(steps))
    holes = np.flatnonzero(steps > 1.5 * step)
    before = times[holes]
    weekend = (before.day_of_week >= 5) & ((before.hour < 4) | (before.hour == 23))
    hour = np.abs(steps[holes] - step - 1) < 1e-6
    return step <= 1 and len(holes) <= 2 + len(times) // 4000 and bool((weekend & hour).all())


def _require_step(
    times: pd.DatetimeIndex, frequency: Frequency, missing: Missing, where: str, found: bool
) -> None:
    """Raises UserError for a series of another frequency, which was `found` in the table itself or
    is that of training: by its median step, or by its shortest
    where times that are missing are put in, for these may be more than half."""
    if len(times) < 3:
        return
    # Increasing times of centuries apart: their difference has no sign.
    steps = np.diff(times.as_unit("ns").asi8).view(np.uint64)
    step = float(np.median(steps) if missing in ("error", "drop") else steps.min()) / 1e9
    if step < frequency.seconds <= 1.2 * step:  # the shortest month
        return
    here, there = (pd.Timedelta(seconds=s) for s in (step, frequency.seconds))
    require(
        0.9 < step / frequency.seconds < 1.1,
        f"{where} has a row every {here}; "
        + (
            f"the longest series has one every {there}: a panel has one frequency"
            if found
            else f"the model was trained on one every {there}"
        ),
    )
