# SPDX-License-Identifier: Apache-2.0
"""Tables of texts and labels from files, read strictly: whatever is wrong with a file is said with
its row or line."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flax_lstm.errors import UserError, listing, nearest


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a CSV, TSV, JSON-lines or Parquet file, told apart by the extension.

    CSV and TSV values stay strings (an empty one is missing); JSON and Parquet values keep their
    types. Raises UserError for a file that is missing, empty, not UTF-8, malformed, or of another
    kind.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json, ".ndjson": _read_json}
    readers |= {".parquet": _read_parquet, ".pq": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if not path.exists():
        raise UserError(f"{path} does not exist (looked from {os.getcwd()})")
    if reader is None:
        raise UserError(
            f"{path}: unknown kind of file {path.suffix!r}; known extensions: {listing(readers)}"
        )
    frame = reader(path)
    if frame.empty:
        raise UserError(f"{path} has no rows")
    return frame


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises UserError that names the line of a spoilt byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
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


def _read_csv(path: Path) -> pd.DataFrame:
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty")
    csv.field_size_limit(
        max(csv.field_size_limit(), len(text))
    )  # the default refuses texts beyond 131,072 characters
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
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
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has more than one column named {listing(sorted(repeated))}")
    return pd.DataFrame(rows[1:], columns=names, dtype=object)


def _read_json(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} is not a JSON object such as "
                '{"text": "...", "label": "..."}'
            )
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow's errors have many types
        raise UserError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None


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
    if name not in frame:
        there = [str(c) for c in frame.columns]
        raise UserError(
            f"{path} has no column {name!r} (--{flag}).{nearest(name, there)} Columns: "
            f"{listing(there)}"
        )
    values = frame[name].tolist()
    missing = [row for row, absent in enumerate(frame[name].isna(), start=1) if absent]
    if missing:
        raise UserError(
            f"{path}: column {name!r} is empty in {len(missing)} row(s): {listing(missing)} "
            "(first row: 1)"
        )
    return values


def text_values(frame: pd.DataFrame, name: str, path: str | Path) -> list[str]:
    """The texts of a column, or of several, `title+body`, joined by line ends, of which one may be
    empty. Raises UserError if it is not there, has empty values, or holds anything but text."""
    parts = name.split("+")
    if name not in frame and all(part in frame for part in parts):
        filled = frame[parts].astype(object).where(frame[parts].notna(), "")
        rows = filled.itertuples(index=False)
        for part in parts:
            check_text(filled[part].tolist(), part, path)
        joined = ["\n".join(value for value in row if value) or None for row in rows]
        frame = pd.DataFrame({name: pd.Series(joined, dtype=object)})
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
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise UserError(
            f"{path}: column {name!r} holds {given[wrong[0]]!r} in row {wrong[0] + 1}, not a "
            "weight of 0 or more"
        )
    if not weights.sum() > 0:
        raise UserError(f"{path}: every weight in column {name!r} is 0")
    return weights.tolist()


def label_values(frame: pd.DataFrame, name: str, path: str | Path) -> list[str]:
    """The labels of a column by name: strings as they are, true and false, 3 for 3 and for 3.0."""
    return [label_name(value) for value in column(frame, name, path, "data.label-column")]


def tag_values(
    frame: pd.DataFrame, name: str, path: str | Path, separator: str
) -> list[tuple[str, ...]]:
    """The tags of each row: of a list, or of a text between separators; nothing: none. Raises
    UserError for another kind of value."""
    if name not in frame:
        column(frame, name, path, "data.label-column")

    def tags(row: int, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = value.split(separator)
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ()
        if not isinstance(value, list | tuple | np.ndarray):
            raise UserError(
                f"{path}: column {name!r} holds {value!r} in row {row}, neither a list of tags nor "
                f"text with {separator!r} between them (data.tag-separator)"
            )
        return tuple(dict.fromkeys(found for tag in value if (found := label_name(tag))))

    return [tags(row, value) for row, value in enumerate(frame[name].tolist(), start=1)]


def label_name(value: Any) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def sort_labels(names: Iterable[str]) -> list[str]:
    """By value if all are numbers, else by name."""
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)
