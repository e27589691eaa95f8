# SPDX-License-Identifier: Apache-2.0
"""Tables with one row per time, read strictly: whatever is wrong is said with its column and row
(counted from 1).

Axes: R rows, D channels.
"""

import gzip
import logging
import tempfile
import warnings
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from flax_lstm.data.tables import read_table
from flax_lstm.errors import UserError, listing, nearest, require

Array = np.ndarray
Missing = Literal["error", "drop", "interpolate", "forward_fill"]
log = logging.getLogger(__name__)

EMBEDDED = Path(str(resources.files("flax_lstm") / "data" / "embedded"))
DAY = 86400.0  # seconds
NO_VALUE = (
    "",
    "na",
    "n/a",
    "nan",
    "null",
    "none",
)  # how text files write an absent number, in any case


def read_series(path: str | Path) -> pd.DataFrame:
    """The table in a CSV, TSV, JSON-lines or Parquet file, also with .gz, or an embedded series by
    its name.

    Raises UserError for a file that is missing, empty, malformed, or of another kind.
    """
    file = EMBEDDED / f"{path}.csv.gz" if str(path) in embedded() else Path(path)
    require(not file.is_dir(), f"{file} is a folder; data.path names a table of a time series")
    require(
        file.exists(),
        f"{file} does not exist, nor is it an embedded series ({listing(embedded())})",
    )
    frame = _read_gzip(file) if file.suffix.lower() == ".gz" else read_table(file)
    if not isinstance(
        frame.index, pd.RangeIndex
    ):  # Parquet keeps an index of times apart from the columns
        frame = frame.reset_index()
    return frame.rename(columns=str)


def embedded() -> list[str]:
    """Names of the series that come with the package."""
    return sorted(path.name.removesuffix(".csv.gz") for path in EMBEDDED.glob("*.csv.gz"))


def _read_gzip(file: Path) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / file.stem
        try:
            plain.write_bytes(gzip.decompress(file.read_bytes()))
            return read_table(plain)
        except UserError as error:
            raise UserError(str(error).replace(str(plain), str(file))) from None
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read {file} as gzip: {error}") from None


def clean(
    frame: pd.DataFrame, time_column: str, channels: tuple[str, ...], missing: Missing, where: str
) -> tuple[pd.DatetimeIndex, Array]:
    """Times and float64 values (R, D) of the channels, checked; what is absent is treated as
    `missing` says.

    Raises UserError that names column and rows (counted from 1) of what is absent, no number,
    infinite or out of order.
    """
    there = list(frame.columns)
    for name in (time_column, *channels):
        if name not in there:
            raise UserError(
                f"{where} has no column {name!r}.{nearest(name, there)} Columns: {listing(there)}"
            )
    require(
        len({time_column, *channels}) == len(channels) + 1,
        f"{where}: a column is named twice: {listing(channels)}",
    )
    require(len(frame) > 0, f"{where} has no rows")
    times = _times(frame[time_column], where)
    steps = np.diff(times.asi8)
    if (steps <= 0).any():
        row = int(np.argmax(steps <= 0)) + 1
        kind = "repeats" if steps[row - 1] == 0 else "is earlier than"
        hint = (
            "one row per time is needed, sorted; times that repeat as clocks go back are written "
            "in UTC"
        )
        raise UserError(
            f"{where}: row {row + 1} ({times[row]}) {kind} the time of row {row}; {hint}"
        )
    values_RD = np.stack([_numbers(frame[name], where) for name in channels], axis=1)
    for name, values in zip(channels, values_RD.T, strict=True):
        infinite = np.flatnonzero(np.isinf(values)) + 1
        require(
            len(infinite) == 0,
            f"{where}: column {name!r} is infinite in row {listing(infinite, 5)}",
        )
    return _fill(times, values_RD, channels, missing, where)


def _fill(
    times: pd.DatetimeIndex,
    values_RD: Array,
    channels: tuple[str, ...],
    missing: Missing,
    where: str,
) -> tuple[pd.DatetimeIndex, Array]:
    absent_RD = np.isnan(values_RD)
    if not absent_RD.any():
        return times, values_RD
    gaps = {
        name: np.flatnonzero(absent) + 1
        for name, absent in zip(channels, absent_RD.T, strict=True)
        if absent.any()
    }
    report = "; ".join(
        f"column {name!r} in {len(rows)} row(s): {listing(rows, 5)}" for name, rows in gaps.items()
    )
    choices = "choose data.missing: drop (those rows), interpolate (in time) or forward_fill"
    require(missing != "error", f"{where}: absent values, {report}; {choices}")
    log.warning("%s: absent values, %s; data.missing: %s", where, report, missing)
    if missing == "drop":
        keep = ~absent_RD.any(axis=1)
        require(bool(keep.any()), f"{where}: data.missing drop leaves no row: {report}")
        return times[keep], values_RD[keep]
    for name, values in zip(channels, values_RD.T, strict=True):  # views: filled in place
        known = np.flatnonzero(~np.isnan(values))
        require(len(known) > 0, f"{where}: column {name!r} has no value at all")
        if missing == "interpolate":
            values[:] = np.interp(times.asi8, times.asi8[known], values[known])
        else:
            require(
                known[0] == 0,
                f"{where}: column {name!r} has no value before row {known[0] + 1} to fill forward",
            )
            values[:] = values[
                known[np.searchsorted(known, np.arange(len(values)), side="right") - 1]
            ]
    return times, values_RD


def _times(column: pd.Series, where: str) -> pd.DatetimeIndex:
    if not pd.api.types.is_datetime64_any_dtype(column):
        text = column.astype(object).where(column.notna(), "").astype(str).str.strip()
        bad = np.flatnonzero(
            pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).isna()
        )
        if len(bad):
            value = f"{text.iloc[bad[0]]!r} in row {bad[0] + 1}"
            hint = (
                "write times as 2024-12-31 or 2024-12-31 23:00, or name the right column with "
                "--data.time-column"
            )
            raise UserError(
                f"{where}: column {column.name!r} holds {value}, no time in ISO 8601; {hint}"
            )
        try:
            column = pd.to_datetime(text, format="ISO8601")
        except ValueError:
            raise UserError(
                f"{where}: column {column.name!r} mixes time zones; write all times in UTC"
            ) from None
    absent = np.flatnonzero(column.isna()) + 1
    require(
        len(absent) == 0, f"{where}: column {column.name!r} has no time in row {listing(absent, 5)}"
    )
    return pd.DatetimeIndex(column)


def _parse(column: pd.Series) -> tuple[Array, Array]:
    """Float64 values, NaN where absent, and where there is something that is no number."""
    text = column.astype(object).where(column.notna(), "").astype(str).str.strip()
    absent = text.str.lower().isin(NO_VALUE).to_numpy()
    values = pd.to_numeric(text.where(~absent), errors="coerce").to_numpy(np.float64)
    return values, np.isnan(values) & ~absent


def _numbers(column: pd.Series, where: str) -> Array:
    values, wrong = _parse(column)
    if wrong.any():
        rows = np.flatnonzero(wrong)
        found = listing((f"{column.iloc[row]!r} (row {row + 1})" for row in rows), 3)
        raise UserError(
            f"{where}: column {column.name!r} holds what is no number: {found}; mend it or leave "
            "it empty"
        )
    return values


def numeric_columns(
    frame: pd.DataFrame, time_column: str, inputs: tuple[str, ...]
) -> tuple[str, ...]:
    """Columns that hold numbers, apart from the times and those that are inputs only."""
    rest = [name for name in frame.columns if name not in (time_column, *inputs)]
    # One bad value does not make a column text: such a column stays in, and is reported when its
    # numbers are read.
    numeric = tuple(name for name in rest if not np.isnan(_parse(frame[name])[0]).all())
    require(
        len(numeric) > 0,
        f"no numeric column to forecast besides {time_column!r}; columns: {listing(frame.columns)}",
    )
    if len(numeric) < len(rest):
        log.warning(
            "columns without numbers are left out: %s",
            listing(name for name in rest if name not in numeric),
        )
    return numeric


def median_step(times: pd.DatetimeIndex) -> float:
    """Median seconds between rows."""
    return float(np.median((times[1:] - times[:-1]).total_seconds()))


def frequency(times: pd.DatetimeIndex, where: str) -> str:
    """What pandas calls the frequency; "B" for business days with gaps (holidays), else that of the
    median step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 announces an offset in place of its name
        found = pd.infer_freq(times)
    if found is not None:
        return str(getattr(found, "freqstr", found))
    step = median_step(times)
    if step == DAY and (times.day_of_week < 5).all():
        return "B"
    name = str(to_offset(pd.Timedelta(seconds=step)).freqstr)
    log.warning(
        "%s: uneven times; future times are counted in steps of %s, the median", where, name
    )
    return name
