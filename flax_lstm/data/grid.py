# SPDX-License-Identifier: Apache-2.0
"""The regular grid of times behind a table: its frequency is inferred, and what is missing on it is
found and put in as absent values.

Axes: R rows of the table, G rows of the grid, D channels.
"""

import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.memory import require_room

Array = np.ndarray
Missing = Literal["error", "mask", "interpolate", "forward_fill", "drop"]

DAY = 86400.0  # seconds
HOLIDAYS = 5  # business days in a row that may be missing from their calendar
CHOICES = (
    "choose data.missing: mask (the model is told, nothing is invented for it), interpolate or "
    "forward_fill (filled in for the model), or drop (rows as they come, for calendars with gaps "
    "by nature); none of these scores what was not measured"
)


class Defaults(NamedTuple):
    """What is natural for a frequency, in steps."""

    season: int
    lookback: int
    horizon: int


@dataclass(frozen=True)
class Frequency:
    """The step of a regular grid of times."""

    name: str  # as pandas names it: "h", "D", "B" (business days), "15min", "MS"
    seconds: float  # median time between rows

    @property
    def unit(self) -> str:
        """The name without its multiple and anchor: "W" of "2W-SUN"."""
        return self.name.lstrip("0123456789").split("-")[0]

    @property
    def defaults(self) -> Defaults:
        """Season, look-back and horizon where nothing else is asked for; see also `with_season`."""
        known = {
            "W": Defaults(52, 104, 13),
            "B": Defaults(5, 60, 5),
            "D": Defaults(7, 56, 7),
        }
        if self.unit in known and self.name.startswith(self.unit):
            return known[self.unit]
        if self.seconds < DAY:
            season = round(DAY / self.seconds)
            if not 1 < season <= 288:
                return Defaults(1, 96, 24)
            return Defaults(season, 7 * season if season <= 96 else 2 * season, max(season, 24))
        steps = 365.25 * DAY / self.seconds  # a year
        season = round(steps) if 2 <= steps <= 53 and self.seconds > 8 * DAY else 1
        return Defaults(season, max(3 * season, 12), season if season > 1 else 4)

    def span(self, rows: int) -> float:
        """Seconds from the first to the last of so many rows and a step on; of business days five
        make a week."""
        return rows * self.seconds * (7 / 5 if self.unit == "B" else 1)

    def with_season(self, season: int) -> Defaults:
        """The same where the season is said: it is all that is known of steps that are counted."""
        if self.counted and season:
            return Defaults(season, max(4 * season, 48), season if season > 1 else 24)
        return self.defaults

    @property
    def counted(self) -> bool:
        """Whether times are whole numbers that count steps, kept as seconds from 1970 on."""
        return self.name == STEP.name

    def written(self, times: pd.DatetimeIndex) -> pd.Index:
        """The times as the table has them."""
        return pd.Index(times.as_unit("s").asi8) if self.counted else times

    def positions(self, times: pd.DatetimeIndex) -> Array:
        """The number of each time on the grid, counted from a fixed origin: differences are
        steps."""
        if self.unit == "B":
            days = times.tz_localize(None).to_numpy().astype("datetime64[D]")
            return np.busday_count(np.datetime64("1970-01-01"), days).astype(np.int64)
        if self.seconds > 27 * DAY:
            months = np.asarray(times.year * 12 + times.month, np.int64)
            return months // max(round(self.seconds / (30.44 * DAY)), 1)
        local = times.tz_localize(None) if self.seconds >= DAY else times
        seconds = local.as_unit("ns").asi8 / 1e9
        return np.floor_divide(seconds + self.seconds / 1e3, self.seconds).astype(np.int64)

    def following(self, last: pd.Timestamp, steps: int) -> pd.DatetimeIndex:
        """The times of the steps after `last`."""
        times = pd.date_range(last, periods=steps + 1, freq=self.through(last))
        return times[times > last][:steps]

    def through(self, time: pd.Timestamp) -> str:
        """The name of the grid that a time lies on: weeks of another day than those of the name
        count from their own."""
        if self.counted:
            return "s"
        if self.unit == "W" and time.normalize().day_name()[:3].upper() != self.name[-3:]:
            return f"{round(self.seconds / DAY)}D"
        return self.name


STEP = Frequency("step", 1.0)  # of whole numbers in the place of times


def infer(times: pd.DatetimeIndex) -> Frequency:
    """The frequency of times in order, with gaps or not: what pandas finds in the longest stretch
    without a gap, "B" where all days are weekdays, else the commonest step."""
    if len(times) < 2:
        return Frequency("D", DAY)
    steps = np.diff(times.as_unit("ns").asi8)
    seconds = float(np.median(steps)) / 1e9
    found = _pandas_name(times)
    if found is None and seconds == DAY and bool((times.day_of_week < 5).all()):
        found = "B"
    if found is None:
        edges = np.flatnonzero(steps > 1.5e9 * seconds) + 1
        stretches = np.split(np.arange(len(times)), edges)
        found = _pandas_name(times[max(stretches, key=len)])
    if found is not None:
        # The median is that of the holes where more than half is missing.
        with suppress(ValueError):  # months have no one length, business days are a day apart
            week = re.fullmatch(r"(\d*)W-\w+", found)
            days = 7 * int(week[1] or 1) if week else 0
            offset: Any = to_offset(found)
            seconds = days * DAY or pd.Timedelta(offset).total_seconds()
    else:
        values, counts = np.unique(steps, return_counts=True)
        commonest = int(values[np.argmax(counts)])
        found = str(to_offset(pd.Timedelta(commonest, unit="ns")).freqstr)
        if counts.max() > len(steps) / 5:
            seconds = commonest / 1e9
    return Frequency(found, seconds)


def _pandas_name(times: pd.DatetimeIndex) -> str | None:
    if len(times) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 announces an offset in place of its name
        found: Any = pd.infer_freq(times)
    return None if found is None else str(getattr(found, "freqstr", found))


class Regular(NamedTuple):
    """A table on its grid."""

    times: pd.DatetimeIndex
    values_GD: Array  # float64, absent ones NaN
    rows: Array  # (R,): where the rows of the table went
    missing: int  # time stamps put in
    report: str  # what was missing, in words; empty: nothing


def regular(
    times: pd.DatetimeIndex, values_RD: Array, frequency: Frequency, missing: Missing, where: str
) -> Regular:
    """The table with a row for every time of its grid from the first to the last.

    With `missing` "drop" the rows stay as they come. Holidays of business days are no gaps, up to
    `HOLIDAYS` in a row. Raises UserError for times that lie off the grid.
    """
    if missing == "drop" or len(times) < 3:
        return Regular(times, values_RD, np.arange(len(times)), 0, "")
    steps = np.diff(times.as_unit("ns").asi8)
    if frequency.seconds <= 7 * DAY and (steps == round(frequency.seconds * 1e9)).all():
        return Regular(times, values_RD, np.arange(len(times)), 0, "")
    expected = (times[-1] - times[0]).total_seconds() / frequency.seconds
    require_room(
        8 * expected * (values_RD.shape[1] + 4),
        f"{where}: a grid of one row every {_plain(frequency)} from {times[0]} to {times[-1]} has "
        f"{expected:,.0f} rows, the table {len(times):,}; is a time wrong?",
    )
    grid = pd.date_range(times[0], times[-1], freq=frequency.through(times[0]))
    places = grid.get_indexer(times)
    if (places < 0).any():
        rows = np.flatnonzero(places < 0)
        require(
            times[0].day == 1 or not monthly(times),
            f"{where}: a row on day {times[0].day} of every month: write the times of months as "
            "their first day, such as 2024-02-01",
        )
        raise UserError(
            f"{where}: uneven times: {len(rows)} of {len(times)} rows lie off the grid of one row "
            f"every {_plain(frequency)}, row {listing(rows[:3] + 1)} ({times[rows[0]]}) first; "
            "resample the table to one grid, or take the rows as they come with data.missing drop"
        )
    gaps = np.diff(places) - 1
    if frequency.unit == "B":
        gaps = np.where(gaps <= HOLIDAYS, 0, gaps)
    if not gaps.any():
        return Regular(times, values_RD, np.arange(len(times)), 0, "")
    kept = np.zeros(len(grid), bool)
    kept[places] = True
    for row in np.flatnonzero(gaps):
        kept[places[row] : places[row + 1]] = True
    longest = int(np.argmax(gaps))
    report = (
        f"{int(gaps.sum())} time stamps of the grid of one row every {_plain(frequency)} are "
        f"missing, in {np.count_nonzero(gaps)} hole(s), the longest {int(gaps[longest])} long "
        f"after {frequency.written(times)[longest]} (row {longest + 1})"
    )
    rows = np.cumsum(kept) - 1
    values_GD = np.full((int(kept.sum()), values_RD.shape[1]), np.nan)
    values_GD[rows[places]] = values_RD
    return Regular(grid[kept], values_GD, rows[places], int(gaps.sum()), report)


def monthly(times: pd.DatetimeIndex) -> bool:
    """Whether there is a row at the same day of every month."""
    months = np.asarray(times.year * 12 + times.month)
    return bool((times.day == times[0].day).all() and (np.diff(months) == 1).all())


def _plain(frequency: Frequency) -> str:
    names = {"h": "hour", "D": "day", "B": "business day", "min": "minute"}
    return names.get(frequency.name, frequency.name)


def fill(values: Array, stamps: Array, missing: Missing) -> None:
    """Fills what is NaN of one channel in place: in time, from the value before (also for "mask",
    so that the network sees a plausible number beside its mark), and from the first value where
    there is none before. Nothing observed at all gives zeros."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        values[:] = 0.0
    elif missing == "interpolate":
        values[:] = np.interp(stamps, stamps[known], values[known])
    else:
        before = np.maximum(np.searchsorted(known, np.arange(len(values)), side="right") - 1, 0)
        values[:] = values[known[before]]


def absent(values_RD: Array, channels: tuple[str, ...]) -> str:
    """Which channels lack values, and in which rows (counted from 1); empty: none."""
    found = {
        name: np.flatnonzero(np.isnan(values)) + 1
        for name, values in zip(channels, values_RD.T, strict=True)
    }
    return "; ".join(
        f"column {name!r} in {len(rows)} row(s): {listing(rows, 5)}"
        for name, rows in found.items()
        if len(rows)
    )
