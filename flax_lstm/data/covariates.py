# SPDX-License-Identifier: Apache-2.0
"""Columns that are known besides the series themselves: in advance, or of a series as a whole; and
the calendar.

Axes: R rows, K covariates.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from flax_lstm.data.grid import DAY
from flax_lstm.data.measures import deviation, how_written, numbers_of, parse, scaled, shown
from flax_lstm.errors import UserError, listing, require

Array = np.ndarray
log = logging.getLogger(__name__)

# Cycles of the calendar, with their length in seconds.
CYCLES = {"day": DAY, "week": 7 * DAY, "year": 365.25 * DAY}
CATEGORIES = 200  # at most, of one column


@dataclass(frozen=True)
class Column:
    """A column of covariates: numbers, scaled by training rows, or categories."""

    name: str
    categories: tuple[str, ...] = ()  # none: numbers
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def fit(cls, values: pd.Series, where: str) -> Self:
        """Numbers where all values are, categories elsewhere."""
        name = str(values.name)
        _, wrong = parse(values)
        if not wrong.any():
            numbers = numbers_of(values, where)
            known = numbers[~np.isnan(numbers)]
            require(len(known) > 0, f"{where}: column {name!r} has no value at all")
            return cls(name, (), *deviation(known))
        written = how_written(values[wrong])
        require(not written, f"{where}: column {name!r} is text, numbers {written}")
        words = tuple(sorted({str(value) for value in values.dropna()}))
        require(
            len(words) <= CATEGORIES,
            f"{where}: column {name!r} has {len(words)} different values; {CATEGORIES} are the "
            f"most that categories may have ({listing(words, 3)})",
        )
        return cls(name, words)

    @property
    def width(self) -> int:
        """Covariates that the column gives: one for numbers, one for each category."""
        return max(len(self.categories), 1)

    def encode(self, values: pd.Series, where: str) -> Array:
        """(R, width) float32: scaled numbers, or one column for each category (all 0 for one that
        was not seen); NaN where absent."""
        if self.categories:
            codes_R = self.codes(values, where)
            encoded = (codes_R[:, None] == np.arange(1, self.width + 1)).astype(np.float32)
            encoded[values.isna().to_numpy()] = np.nan
            return encoded
        _, wrong = parse(values)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"{where}: column {self.name!r} holds {shown(values.iloc[row])} in row {row + 1}, "
                "no number as in training"
            )
        rows_R = np.arange(1, len(values) + 1)
        values_R1 = numbers_of(values, where)[:, None]
        return scaled(values_R1, self.mean, self.std, (self.name,), rows_R, where)

    def codes(self, values: pd.Series, where: str) -> Array:
        """(R,) int32: 1, 2, ... for the categories in order, 0 for one that was not seen, which is
        said, and for an absent one."""
        index = pd.Index(self.categories).get_indexer(
            pd.Index([str(value) for value in values], dtype=object)
        )
        if new := {str(value) for value in values[index < 0].dropna()}:
            log.warning(
                "%s: column %r holds what was not there in training, and says nothing to the "
                "model: %s",
                *(where, self.name, listing(sorted(new), 5)),
            )
        return (index + 1).astype(np.int32)


def columns(saved: Any) -> tuple[Column, ...]:
    """Columns as they were written to JSON."""
    return tuple(
        Column(**{**fields, "categories": tuple(fields["categories"])})
        if isinstance(fields, Mapping)
        else fields
        for fields in saved
    )


def calendar(times: pd.DatetimeIndex, cycles: tuple[str, ...], country: str = "") -> Array:
    """Covariates (rows, K) of these times: sine and cosine of the position in each cycle, and
    whether the day is a holiday of the country, where one is given."""
    day = ((times - times.normalize()) / pd.Timedelta(days=1)).to_numpy(np.float64)
    phases = {
        "day": day,
        "week": (times.day_of_week + day) / 7,
        "year": (times.day_of_year - 1 + day) / (365 + times.is_leap_year),
    }
    angles = [2 * np.pi * np.asarray(phases[cycle]) for cycle in cycles]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    if country:
        waves.append(_holiday(times, country))
    if not waves:
        return np.zeros((len(times), 0), np.float32)
    return np.stack(waves, axis=1).astype(np.float32)


def _holiday(times: pd.DatetimeIndex, country: str) -> Array:
    """1 on holidays, 0 elsewhere."""
    try:
        import holidays
    except ImportError:
        raise UserError(
            f"data.holidays {country}: needs the package holidays: "
            "pip install 'flax-lstm[holidays]'"
        ) from None
    name, _, part = country.partition("-")
    parts = holidays.list_supported_countries()
    require(
        name in parts,
        f"data.holidays {country}: no such country; known: {listing(sorted(parts), 300)}",
    )
    require(
        not part or part in parts[name],
        f"data.holidays {country}: no such part of {name}; known: {listing(parts[name], 100)}",
    )
    days = holidays.country_holidays(name, subdiv=part or None, years=sorted(set(times.year)))
    dates = times.normalize().tz_localize(None)
    return dates.isin(pd.DatetimeIndex(sorted(days))).astype(np.float64)
