# SPDX-License-Identifier: Apache-2.0
"""Documents from files of any size, one after the other: no more than one of them, or a few rows,
is in memory at a time."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from flax_lstm.data.tables import plain_file, read_table, read_text, text_values
from flax_lstm.errors import UserError, listing

LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
ROWS = 4_096  # of a table that are read at once


def stream_documents(path: Path, text_column: str) -> Iterator[str]:
    """The texts of a table, of the lines of a `.txt` file, or of all files below a folder in the
    order of their paths: `.txt` (one text there), `.jsonl` and `.ndjson` (one a line), each also as
    `.gz`, and Parquet. CSV and TSV are read whole.

    Raises UserError for what cannot be read, with the file and its line or row.
    """
    if is_plain_text(path):
        plain_file(path)
        return (line.strip() for _, line in _lines(path))
    if not path.is_dir():
        return _texts(path, text_column)
    kinds = (".txt", *LINES, *PARQUET)
    files = sorted(p for p in path.rglob("*") if kind(p) in kinds and p.is_file())
    if not files:
        raise UserError(
            f"{path} holds no file of texts: {listing(('.txt', *LINES, *PARQUET))}, also as .gz"
        )
    return (text for file in files for text in _texts(file, text_column))


def is_plain_text(path: Path) -> bool:
    """Whether a path is of one file that has a text in each line."""
    return kind(path) == ".txt" and not path.is_dir()


def kind(path: Path) -> str:
    """The extension that says what a file is, without `.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file."""
    plain_file(path)
    if kind(path) == ".txt":
        yield read_text(path)
    elif kind(path) in LINES:
        for first, rows in _json_rows(path):
            yield from _checked(pd.DataFrame(rows, dtype=object), column, path, first)
    elif kind(path) in PARQUET:
        for first, frame in _parquet_rows(path):
            yield from _checked(frame, column, path, first)
    else:
        yield from text_values(read_table(path), column, path)


def _checked(frame: pd.DataFrame, column: str, path: Path, first: int) -> list[str]:
    return text_values(frame, column, f"{path}, rows from {first:,} on")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Some objects at a time, with the number of the first of them."""
    rows: list[dict[str, Any]] = []
    first = 1
    for number, line in _lines(path):
        rows.append(_object(line, path, number))
        if len(rows) == ROWS:
            yield first, rows
            first, rows = first + ROWS, []
    if rows:
        yield first, rows


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        assert isinstance(row, dict)
    except (ValueError, RecursionError, AssertionError):
        raise UserError(
            f'{path}, line {number} is not a JSON object such as {{"text": "..."}}'
        ) from None
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, pd.DataFrame]]:
    import pyarrow.parquet

    first = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                batch.validate(full=True)
                yield first, batch.to_pandas()
                first += len(batch)
    except Exception as error:  # pyarrow's errors have many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {path} as Parquet: {reason}") from None
