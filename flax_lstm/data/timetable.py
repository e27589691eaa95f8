# SPDX-License-Identifier: Apache-2.0
"""Tables with one row per time, read strictly: whatever is wrong is said with its column and row
(counted from 1).
"""

import logging
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from flax_lstm.data.measures import how_written, is_several, parse, shown, words_of
from flax_lstm.data.memory import with_index
from flax_lstm.data.tables import read_table
from flax_lstm.errors import UserError, listing, nearest, require
from flax_lstm.machine.files import expanded, found_at

Array = np.ndarray
log = logging.getLogger(__name__)

EMBEDDED = Path(str(resources.files("flax_lstm") / "data" / "embedded"))
# Of times: nanoseconds from 1970 on in 64 bits reach so far.
EARLIEST, LATEST = pd.Timestamp.min, pd.Timestamp.max


def read_series(path: str | Path) -> pd.DataFrame:
    """The table in a CSV, TSV, JSON-lines or Parquet file, also with .gz, or an embedded series by
    its name.

    Raises UserError for a file that is missing, empty, malformed, or of another kind.
    """
    file = EMBEDDED / f"{path}.csv.gz" if str(path) in embedded() else expanded(path)
    found = found_at(file)
    require(
        found is not None,
        f"{file} does not exist, nor is it an embedded series ({listing(embedded())})",
    )
    frame = read_table(file)
    if not isinstance(
        frame.index, pd.RangeIndex
    ):  # Parquet keeps an index of times apart from the columns
        frame = with_index(frame, str(file))
    return frame.rename(columns=str)


def embedded() -> list[str]:
    """Names of the series that come with the package."""
    return sorted(path.name.removesuffix(".csv.gz") for path in EMBEDDED.glob("*.csv.gz"))


def require_columns(frame: pd.DataFrame, names: tuple[str, ...], where: str) -> None:
    """Raises UserError for a column that is not there, or asked for in two roles."""
    there = list(frame.columns)
    for name in names:
        if name not in there:
            raise UserError(
                f"{where} has no column {name!r}.{nearest(name, there)} Columns: {listing(there)}"
            )
        require(there.count(name) == 1, f"{where} has more than one column named {name}")
        require_plain(frame[name], where)
    require(len(set(names)) == len(names), f"{where}: a column is named twice: {listing(names)}")
    require(len(frame) > 0, f"{where} has no rows")


def require_plain(column: pd.Series, where: str) -> None:
    """Raises UserError for a value that holds several."""
    if column.dtype != object:
        return
    row = next((n for n, value in enumerate(column, start=1) if is_several(value)), None)
    if row is not None:
        raise UserError(
            f"{where}: column {column.name!r} holds {shown(column.iloc[row - 1])} in row {row}; a "
            "single value is needed"
        )


def require_order(frame: pd.DataFrame, times: pd.DatetimeIndex, name: str, where: str) -> None:
    """Raises UserError for times that repeat or go back; says so where it looks like many series
    in one table."""
    steps = np.diff(times.asi8)
    if (steps > 0).all():
        return
    row = int(np.argmax(steps <= 0)) + 1
    hint = "one row per time is needed, sorted"
    if _clocks_went_back(times):
        hint += (
            "; times that repeat as clocks go back need their zone: --data.time-zone "
            "Europe/Berlin, for example, or write them in UTC"
        )
    elif times.has_duplicates and (column := _telling_apart(frame, times)) is not None:
        hint = (
            f"column {column!r} tells many series apart. "
            f"{as_panel(frame, column, str(name))}, or keep the rows of one"
        )
    kind = "repeats" if steps[row - 1] == 0 else "is earlier than"
    raise UserError(f"{where}: row {row + 1} ({times[row]}) {kind} the time of row {row}; {hint}")


def require_one_series(frame: pd.DataFrame, time_column: str, where: str) -> None:
    """Raises UserError for a table that names series first and then times, where no other column
    was named for these."""
    names = [str(name) for name in frame.columns[:2]]
    if time_column or len(names) < 2:
        return
    first, second = frame.iloc[:, 0], frame.iloc[:, 1]
    if _times_of(first[:100]) is not None or not np.isnan(parse(second)[0]).all():
        return
    times = _times_of(second)
    if times is None or not times.has_duplicates:
        return
    raise UserError(
        f"{where}: column {names[0]!r} holds no times, and those of {names[1]!r} repeat: many "
        f"series in one table? {as_panel(frame, names[0], names[1])}; for one series name the "
        "column of times: --data.time-column"
    )


def _times_of(column: pd.Series) -> pd.DatetimeIndex | None:
    """The times of a column; None for one that has none."""
    try:
        return read_times(column, "")
    except UserError:
        return None


def as_panel(frame: pd.DataFrame, id_column: str, time_column: str) -> str:
    """How to train on a table of many series."""
    flags = f"--config panel_table --data.id-column {id_column}"
    if time_column != "ds":
        flags += f" --data.time-column {time_column}"
    rest = [name for name in frame.columns if name not in (id_column, time_column)]
    if "y" not in rest and len(rest) > 0:
        flags += f" --data.targets {rest[0] if len(rest) == 1 else 'COLUMN'}"
    return f"Train them together with {flags}"


def _clocks_went_back(times: pd.DatetimeIndex) -> bool:
    """Whether local times repeat or go back by up to an hour, no more than twice in 4,000 rows."""
    steps = np.diff(times.as_unit("ns").asi8) / 3.6e12  # hours
    back = steps[steps <= 0]
    return times.tz is None and len(back) <= 2 + len(times) // 4000 and bool((back > -1).all())


def _telling_apart(frame: pd.DataFrame, times: pd.DatetimeIndex) -> str | None:
    """A column of few values that, with the time, names every row once."""
    for name in frame.columns:
        values = frame[name].astype(str)
        keyed = pd.DataFrame({"value": values.to_numpy(), "time": times.asi8})
        if 1 < values.nunique() <= len(frame) // 2 and not keyed.duplicated().any():
            return str(name)
    return None


def read_times(column: pd.Series, where: str, zone: str = "") -> pd.DatetimeIndex:
    """The times of a column. Those that are written with different offsets from UTC become UTC;
    those without any are local times of `zone`, where one is given: the hour that repeats as clocks
    go back is told apart by the order of the rows."""
    if not pd.api.types.is_datetime64_any_dtype(column):
        text = pd.Series(words_of(column), dtype=object, name=column.name)
        bad = np.flatnonzero(
            pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).isna()
        )
        if len(bad):
            value = f"{shown(text.iloc[bad[0]])} in row {bad[0] + 1}"
            hint = (
                "write times as 2024-12-31 or 2024-12-31 23:00, or name the right column with "
                "--data.time-column"
            )
            if text.str.fullmatch(r"\d+").all():
                hint = (
                    "whole numbers are no times. Where they count steps (1, 2, 3 ...), say how "
                    "many make a season: --data.season 24, or 1 for none; where they are seconds "
                    "since 1970, make times of them before: pandas.to_datetime(t, unit='s')"
                )
            raise UserError(
                f"{where}: column {column.name!r} holds {value}, no time in ISO 8601; {hint}"
            )
        name = column.name
        try:
            column = pd.to_datetime(text, format="ISO8601")
        except ValueError:
            if (text.str.contains(r"(?:Z|[+-]\d\d:?\d\d)$")).all():
                log.info("%s: column %r is read in UTC, for its offsets differ", where, name)
                column = pd.to_datetime(text, format="ISO8601", utc=True)
            else:
                raise UserError(
                    f"{where}: column {name!r} mixes times with and without a zone; write all "
                    "times in UTC"
                ) from None
    absent = np.flatnonzero(column.isna()) + 1
    require(
        len(absent) == 0, f"{where}: column {column.name!r} has no time in row {listing(absent, 5)}"
    )
    times = pd.DatetimeIndex(column)
    local = times.tz_localize(None)
    outside = np.flatnonzero((local < EARLIEST) | (local > LATEST)) + 1
    require(
        len(outside) == 0,
        f"{where}: column {column.name!r} has a time before {EARLIEST.year} or after {LATEST.year} "
        f"in row {listing(outside, 5)}",
    )
    return times if times.tz is not None or not zone else _localised(times, zone, where)


def counts_steps(column: pd.Series) -> bool:
    """Whether these are whole numbers that grow by 1 (but for holes), and neither years nor dates
    such as 20240131."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return False
    text = pd.Series(words_of(column), dtype=object)
    if not len(text) or not text.str.fullmatch(r"-?\d{1,10}").all():
        return False
    steps = np.diff(np.unique(text.astype(np.int64)))
    dates = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True)
    return len(steps) > 0 and np.median(steps) == 1 and bool(dates.isna().any())


def counted_times(column: pd.Series, where: str) -> pd.DatetimeIndex:
    """Whole numbers that count steps as times, a second each from 1970 on. Raises UserError."""
    text = pd.Series(words_of(column), dtype=object)
    bad = np.flatnonzero(~text.str.fullmatch(r"-?\d{1,10}").to_numpy(bool))
    require(
        len(bad) == 0,
        f"{where}: column {column.name!r} counts steps, and holds "
        f"{shown(text.iloc[bad[0]]) if len(bad) else ''} in row {listing(bad[:1] + 1)}; whole "
        "numbers are needed, of at most ten digits",
    )
    return pd.DatetimeIndex(pd.to_datetime(text.astype(np.int64), unit="s"))


def time_like(written: str, times: pd.DatetimeIndex, where: str) -> pd.Timestamp:
    """A time as a user writes it, in the zone of these times. Raises UserError."""
    try:
        stamp = pd.Timestamp(written)
        if times.tz is not None:
            stamp = stamp.tz_convert(times.tz) if stamp.tz else stamp.tz_localize(times.tz)
        bool(times[-1] <= stamp)  # with a zone and without cannot be compared
        return stamp
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: write a time as the input does, such as {times[-1]} ({error})"
        ) from None


def _localised(times: pd.DatetimeIndex, zone: str, where: str) -> pd.DatetimeIndex:
    try:
        return times.tz_localize(zone, ambiguous="infer")
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{where}: the times are no local times of --data.time-zone {zone} ({error}); zones "
            "are named as Europe/Berlin"
        ) from None


def numeric_columns(
    frame: pd.DataFrame, time_column: str, others: tuple[str, ...]
) -> tuple[str, ...]:
    """Columns that hold numbers, apart from the times and those with other roles."""
    rest = [name for name in frame.columns if name not in (time_column, *others)]
    # One bad value does not make a column text: such a column stays in, and is reported when its
    # numbers are read.
    numeric = tuple(name for name in rest if not np.isnan(parse(frame[name])[0]).all())
    for name in (name for name in rest if name not in numeric):
        written = how_written(frame[name])
        require(
            not written,
            f"column {name!r} is text, numbers {written}; or name the others: --data.targets",
        )
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
