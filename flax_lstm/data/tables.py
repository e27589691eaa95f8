# SPDX-License-Identifier: Apache-2.0
"""Tables of texts and labels from files, read strictly: whatever is wrong with a file is said with
its row or line."""

import ast
import codecs
import contextlib
import csv
import gzip
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flax_lstm.data.measures import is_several, shown
from flax_lstm.errors import UserError, listing, nearest, require
from flax_lstm.machine.files import expanded, found_at
from flax_lstm.machine.memory import in_words, require_room

Reader = Callable[[bytes, Path], pd.DataFrame]

LIGHTEST, HEAVIEST = 1e-9, 1e9  # weights of rows, that they can be balanced in float32
CELL = 120  # bytes that a value of a text file takes as a Python object in a table
PIECE = 1 << 24  # bytes inflated at a time
# What inflates to so many times its size, beyond so many bytes, is a trap and no table.
BOMB, BOMB_BYTES = 300, 1 << 26
# How files begin that are something else than their names say.
BEGINNINGS = {
    b"PAR1": "a Parquet file: its name should end in .parquet",
    b"\x1f\x8b": "compressed by gzip: its name should end in .gz",
    b"PK\x03\x04": "a zip archive (a spreadsheet, or .npz): save its table as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet: save its table as CSV",
    b"SQLite": "an SQLite database: export its table as CSV",
    codecs.BOM_UTF32_LE: "UTF-32, not UTF-8: save it as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16, not UTF-8: save it as UTF-8 (CSV UTF-8 in Excel)",
    codecs.BOM_UTF16_BE: "UTF-16, not UTF-8: save it as UTF-8 (CSV UTF-8 in Excel)",
}


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a CSV, TSV, JSON-lines or Parquet file, also with .gz, told apart by the
    extension.

    CSV and TSV values stay strings (an empty one is missing); JSON and Parquet values keep their
    types. Raises UserError for a file that is missing, empty, not UTF-8, malformed, of another
    kind, or too large for the memory that is free.
    """
    path = expanded(path)
    kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    reader = READERS.get(kind.lower())
    plain_file(path)
    if reader is None:
        raise UserError(
            f"{path}: unknown kind of file {kind!r}; known extensions: {listing(READERS)}, each "
            "also with .gz"
        )
    frame = reader(read_bytes(path), path)
    if frame.empty:
        raise UserError(f"{path} has no rows")
    names = [str(name) for name in frame.columns]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has more than one column named {listing(sorted(repeated))}")
    return frame


def plain_file(path: Path) -> os.stat_result:
    """What is said of a file. Raises UserError for what is not there, or no plain file: reading a
    pipe might never end."""
    found = found_at(path)
    if found is None:
        raise UserError(f"{path} does not exist (looked from {os.getcwd()})")
    require(not stat.S_ISDIR(found.st_mode), f"{path} is a folder; a file is needed")
    require(stat.S_ISREG(found.st_mode), f"{path} is no plain file; write its content to one")
    return found


def read_bytes(path: Path) -> bytes:
    """The content of a file, inflated where its name ends in .gz. Raises UserError for what cannot
    be read, is no plain file (a folder, a pipe), or inflates without end."""
    require_room(2 * plain_file(path).st_size, f"{path} is too large to be read")
    try:
        return _inflated(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _inflated(path: Path) -> bytes:
    pieces, size, packed = [], 0, path.stat().st_size
    try:
        with gzip.open(path) as file:
            while piece := file.read(PIECE):
                size += len(piece)
                pieces.append(piece)
                if size > BOMB_BYTES:
                    text = f"{path} inflates from {in_words(packed)} to {in_words(size)} and more"
                    require(size < BOMB * packed, f"{text}: no table does; unpack it yourself")
                    require_room(2 * size, f"{text}: too large to be read")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read {path} as gzip: {error}; it is damaged, or its copy was cut short"
        ) from None
    return b"".join(pieces)


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises UserError that names the line of a spoilt byte."""
    return _text(read_bytes(path), path)


def _text(data: bytes, path: Path) -> str:
    for beginning, kind in BEGINNINGS.items():
        require(not data.startswith(beginning), f"{path} is {kind}")
    if (offset := data.find(b"\0")) >= 0:
        raise UserError(
            f"{path} holds a NUL byte in {_line(data, offset)}: it is no text file, or not saved "
            "as UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = _line(data, error.start)
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in {where}; save it as UTF-8"
        ) from None


def _line(data: bytes, offset: int) -> str:
    return f"line {data.count(10, 0, offset) + 1}"


def _read_csv(data: bytes, path: Path) -> pd.DataFrame:
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
    text, delimiter = _text(data, path), "\t" if tabs else ","
    if not text.strip():
        raise UserError(f"{path} is empty")
    cells = data.count(delimiter.encode()) + data.count(b"\n")
    require_room(CELL * cells + len(text), f"{path} has about {cells:,} values, too many to read")
    csv.field_size_limit(
        max(csv.field_size_limit(), len(text))
    )  # the default refuses texts beyond 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str | None]] = []
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} values under {len(rows[0])} "
                    "column names"
                )
            if row:
                rows.append([value or None for value in row])
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error} (a quote inside a quoted value is doubled)"
        ) from None
    names = [name or "" for name in rows[0]]
    marks = [mark for mark in ";\t|," if len(names) == 1 and mark in names[0]]
    require(
        not marks,
        f"{path} has one column, {names[0]!r}: values are to be separated by {delimiter!r}, not by "
        f"{listing(map(repr, marks))}",
    )
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has more than one column named {listing(sorted(repeated))}")
    return pd.DataFrame(rows[1:], columns=names, dtype=object)


def _read_json(data: bytes, path: Path) -> pd.DataFrame:
    rows = []
    require_room(10 * len(data), f"{path} is too large to be read")
    for number, line in enumerate(_text(data, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_json_object)
            if "\\u" in line:
                row = _whole_characters(row)
        except (ValueError, RecursionError) as error:
            hint = "" if number > 1 else ": JSON lines have an object in each line"
            raise UserError(f"{path}, line {number} is not JSON: {error}{hint}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} is not a JSON object such as "
                '{"text": "...", "label": "..."}'
            )
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, whose names are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _whole_characters(row: Any) -> Any:
    """JSON's escapes can write half a character, which no file in UTF-8 can hold: it becomes a
    question mark."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode(errors="replace"))
    return row


def _read_parquet(data: bytes, path: Path) -> pd.DataFrame:
    import pyarrow.parquet as parquet  # here: other files do without

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        cells = file.metadata.num_rows * max(file.metadata.num_columns, 1)
    except Exception as error:  # pyarrow's errors have many types
        raise UserError(f"cannot read {path} as Parquet: {_first_line(error)}") from None
    require_room(8 * cells, f"{path} has {cells:,} values, too many to read")
    try:
        file.read().validate(full=True)  # texts that are no UTF-8 are found late without
        return pd.read_parquet(io.BytesIO(data))
    except Exception as error:
        raise UserError(f"cannot read {path} as Parquet: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


READERS: dict[str, Reader] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
}


def read_folder(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a folder with one folder per label that holds one .txt file per text."""
    files = sorted(path.glob("*/*.txt"))
    if not files:
        raise UserError(
            f"{path} holds no LABEL/*.txt files, one folder per label with one file per text"
        )
    return [read_text(file) for file in files], [file.parent.name for file in files]


def column(frame: pd.DataFrame, name: str, path: str | Path, flag: str) -> list[Any]:
    """The values of a column, none missing. `flag` is the flag that names another column."""
    there = [str(c) for c in frame.columns]
    if name not in frame:
        raise UserError(
            f"{path} has no column {name!r} (--{flag}).{nearest(name, there)} Columns: "
            f"{listing(there)}"
        )
    require(there.count(name) == 1, f"{path} has more than one column named {name}")
    values = frame[name].tolist()
    missing = [row for row, absent in enumerate(frame[name].isna(), start=1) if absent]
    if missing:
        raise UserError(
            f"{path}: column {name!r} is empty in {len(missing)} row(s): {listing(missing)} "
            "(first row: 1)"
        )
    return values


def text_values(frame: pd.DataFrame, name: str, path: str | Path, blank: bool = False) -> list[str]:
    """The texts of a column, or of several, `title+body`, joined by line ends, of which one may be
    empty. Raises UserError if it is not there, has empty values, or holds anything but text.

    blank: an empty value is an empty text, as in rows that only ask for an answer.
    """
    parts = name.split("+")
    if name not in frame and all(part in frame for part in parts):
        filled = frame[parts].astype(object).where(frame[parts].notna(), "")
        rows = filled.itertuples(index=False)
        for part in parts:
            check_text(filled[part].tolist(), part, path)
        joined = ["\n".join(value for value in row if value) or None for row in rows]
        frame = pd.DataFrame({name: pd.Series(joined, dtype=object)})
    if blank and [*frame.columns].count(name) == 1:
        frame = frame.assign(**{name: frame[name].astype(object).where(frame[name].notna(), "")})
    values = column(frame, name, path, "data.text-column")
    check_text(values, name, path)
    return values


def check_text(values: Sequence[Any], name: str, path: str | Path) -> None:
    """Raises UserError for a value that is no text."""
    if wrong := [i for i, value in enumerate(values) if not isinstance(value, str)]:
        kind = type(values[wrong[0]]).__name__
        raise UserError(
            f"{path}: column {name!r} holds a value of type {kind} in row {wrong[0] + 1}, not text"
        )


def weight_values(frame: pd.DataFrame, name: str, path: str | Path) -> list[float]:
    """The weights of a column. Raises UserError for one that is no number of 0 or more."""
    given = column(frame, name, path, "data.weight-column")
    weights = pd.to_numeric(pd.Series(given, dtype=object), errors="coerce").to_numpy(float)
    good = (weights == 0) | ((weights >= LIGHTEST) & (weights <= HEAVIEST))
    wrong = np.flatnonzero(~good)
    if len(wrong):
        raise UserError(
            f"{path}: column {name!r} holds {shown(given[wrong[0]])} in row {wrong[0] + 1}, not a "
            f"weight of 0, or of {LIGHTEST:g} to {HEAVIEST:g}"
        )
    if not weights.sum() > 0:
        raise UserError(f"{path}: every weight in column {name!r} is 0")
    return weights.tolist()


def group_values(frame: pd.DataFrame, name: str, path: str | Path) -> list[str]:
    """What the rows of a column belong to, by name. Raises UserError for a row without, and where
    all belong to one."""
    groups = [label_name(value) for value in column(frame, name, path, "data.group-column")]
    require(
        len({*groups}) > 1,
        f"{path}: every row has {shown(groups[0])} in column {name!r}: no split can take a part "
        "of them; leave data.group-column out, or name another",
    )
    return groups


def label_values(frame: pd.DataFrame, name: str, path: str | Path) -> list[str]:
    """The labels of a column by name: strings as they are, true and false, 3 for 3 and for 3.0."""
    values = column(frame, name, path, "data.label-column")
    several = [row for row, value in enumerate(values, start=1) if is_several(value)]
    require(
        not several,
        f"{path}: column {name!r} holds several values in row {listing(several, 5)}, not a label",
    )
    return [label_name(value) for value in values]


def tag_values(
    frame: pd.DataFrame, name: str, path: str | Path, separator: str
) -> list[tuple[str, ...]]:
    """The tags of each row: of a list, also one that is written out (`["a", "b"]`, as pandas writes
    lists to CSV), or of a text between separators; nothing: none. Raises UserError for another
    kind of value."""
    if name not in frame:
        column(frame, name, path, "data.label-column")

    def tags(row: int, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            written = _written_list(value)
            value = value.split(separator) if written is None else written
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ()
        if not isinstance(value, list | tuple | np.ndarray):
            raise UserError(
                f"{path}: column {name!r} holds {value!r} in row {row}, neither a list of tags nor "
                f"text with {separator!r} between them (data.tag-separator)"
            )
        return tuple(dict.fromkeys(found for tag in value if (found := label_name(tag))))

    return [tags(row, value) for row, value in enumerate(frame[name].tolist(), start=1)]


def _written_list(text: str) -> list[Any] | None:
    """The list that a text is in JSON, in Python or as NumPy prints it; None where it is none."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    # NumPy has no commas: Python would read 'a' 'b' as 'ab'.
    parted = re.sub(r"""(['"])\s+(['"])""", r"\1, \2", text)
    for read, form in ((json.loads, text), (ast.literal_eval, parted)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return list(read(form))
    return None


def label_name(value: Any) -> str:
    """The name of a label, whole characters alone (see `_whole_characters`)."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip().encode(errors="replace").decode()


def sort_labels(names: Iterable[str]) -> list[str]:
    """By value if all are numbers, else by name."""
    with contextlib.suppress(ValueError):
        values = {name: float(name) for name in names}
        if all(map(math.isfinite, values.values())):
            return sorted(values, key=values.__getitem__)
    return sorted(names)
