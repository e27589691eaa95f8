# SPDX-License-Identifier: Apache-2.0
"""Numbers out of the columns of a table, and their scale: each is finite, also as float32, or
refused by column and row (counted from 1).

Axes: R rows, D channels.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from flax_lstm.errors import UserError, listing, require

Array = np.ndarray

# How text files write an absent number, in any case.
NO_VALUE = ("", "na", "n/a", "nan", "null", "none")
LARGEST = 1e37  # of a measurement: float32 ends at 3.4e38
SMALLEST = 1e-37  # a spread below is none
# Deviations from the mean of what was trained on: squares of more, added up, leave float32.
FARTHEST = 1e15
# Numbers as people write them, and how they are to be written.
WRITTEN = {
    r"[+-]?\d+,\d+": "with a comma, of thousands or of decimals: write 1234.5 for 1,234.5 or 1234,5"
    " (pandas.read_csv(FILE, thousands=',') or decimal=',' reads it)",
    r"[+-]?\d{1,3}(?:[, '_\u00a0\u202f]\d{3})+(?:\.\d+)?": "with marks between thousands: write "
    "1234.5 for 1,234.5 (pandas.read_csv(FILE, thousands=',') reads it)",
    r"[+-]?\d{1,3}(?:\.\d{3})*,\d+": "with a decimal comma: write 1234.5 for 1.234,5 "
    "(pandas.read_csv(FILE, thousands='.', decimal=',') reads it)",
    r"[+-]?[\d.,]+ ?[%\u2030]": "with a per cent sign: leave it out",
    r"[$\u20ac\u00a3\u00a5] ?[+-]?[\d.,]+|[+-]?[\d.,]+ ?[$\u20ac\u00a3\u00a5]": "with a currency: "
    "leave it out",
}


def parse(column: pd.Series) -> tuple[Array, Array]:
    """Float64 values, NaN where absent, and where there is something that is no number."""
    kind = pd.api.types
    if (
        kind.is_numeric_dtype(column)
        and not kind.is_bool_dtype(column)
        and not kind.is_complex_dtype(column)
    ):
        values = column.to_numpy(np.float64, na_value=np.nan)
        return values, np.zeros(len(values), bool)
    words = words_of(column)
    absent = np.array([word.lower() in NO_VALUE for word in words], bool)
    given = [None if out else word for word, out in zip(words, absent, strict=True)]
    numeric = pd.to_numeric(pd.Series(given, dtype=object), errors="coerce")
    values = numeric.to_numpy(np.float64)
    return values, np.isnan(values) & ~absent


def words_of(column: pd.Series) -> list[str]:
    """The values as texts without space around them, absent ones empty. What holds several values
    is no text of one: it becomes `[...]`."""
    return [
        "" if absent else "[...]" if is_several(value) else str(value).strip()
        for value, absent in zip(column.astype(object), column.isna(), strict=True)
    ]


def is_several(value: Any) -> bool:
    """Whether a value of a table is a collection of values, or raw bytes."""
    return isinstance(value, Collection | np.ndarray) and not isinstance(value, str)


def shown(value: Any) -> str:
    """A value as a message shows it: not too long, and however deep."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} within itself"
    return text if len(text) <= 60 else f"{text[:57]}..."


def how_written(column: pd.Series) -> str:
    """How the numbers of a column of texts are written, and should be; empty where most of it is
    no number at all."""
    words = [word for word in words_of(column) if word.lower() not in NO_VALUE]
    for pattern, kind in WRITTEN.items():
        matching = [word for word in words if re.fullmatch(pattern, word)]
        if len(matching) > len(words) / 2:
            return kind
    return ""


def numbers(frame: pd.DataFrame, channels: tuple[str, ...], where: str) -> Array:
    """Float64 values (R, D) of the channels, NaN where absent. Raises UserError that names column
    and rows of what is no number or no measurement."""
    values_RD = np.empty((len(frame), len(channels)))
    for n, name in enumerate(channels):
        values_RD[:, n] = numbers_of(frame[name], where)
    return values_RD


def numbers_of(column: pd.Series, where: str) -> Array:
    """The same (R,) of one column."""
    values, wrong = parse(column)
    place = f"{where}: column {column.name!r}"
    if wrong.any():
        rows = np.flatnonzero(wrong)
        found = listing((f"{shown(column.iloc[row])} (row {row + 1})" for row in rows), 3)
        written = how_written(column[wrong])
        hint = f"it is text, numbers {written}" if written else "mend it or leave it empty"
        raise UserError(f"{place} holds what is no number: {found}; {hint}")
    infinite = np.flatnonzero(np.isinf(values)) + 1
    require(len(infinite) == 0, f"{place} is infinite in row {listing(infinite, 5)}")
    huge = np.flatnonzero(np.abs(values) > LARGEST) + 1
    require(
        len(huge) == 0,
        f"{place} holds {values[huge[0] - 1] if len(huge) else 0:g} in row {listing(huge, 5)}: too "
        "large to be a measurement; leave absent values empty",
    )
    known = values[~np.isnan(values)]
    spread = np.ptp(known) if len(known) else 0.0
    require(
        spread == 0 or spread > SMALLEST,
        f"{place} varies by {spread:g} only; write it in a smaller unit",
    )
    return values


def deviation(known: Array) -> tuple[float, float]:
    """Mean and standard deviation of finite values; 1 for a constant, 0 and 1 where there is
    none."""
    if not len(known):
        return 0.0, 1.0
    constant = np.ptp(known) <= SMALLEST
    return float(known.mean()), 1.0 if constant else float(known.std())


def scaled(
    values_RD: Array, mean_D: Any, std_D: Any, names: Sequence[str], rows_R: Array, where: str
) -> Array:
    """(values - mean) / deviation as float32. Raises UserError that names column and row of a value
    so far from the mean of training that no figure of it could be finite."""
    scaled_RD = (values_RD - mean_D) / std_D
    far_RD = np.abs(scaled_RD) > FARTHEST
    if far_RD.any():
        row, n = (int(place[0]) for place in np.nonzero(far_RD))
        raise UserError(
            f"{where}: column {names[n]!r} holds {values_RD[row, n]:g} in row {rows_R[row]}, "
            f"{abs(scaled_RD[row, n]):.1g} deviations away from what was trained on: too far to be "
            "a measurement; mend it or leave it empty"
        )
    return scaled_RD.astype(np.float32)
