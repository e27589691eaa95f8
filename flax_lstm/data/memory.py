# SPDX-License-Identifier: Apache-2.0
"""Data that a program has in memory, in the place of a file.

The settings then name their content, `path="memory:4f1d..."`, so that a run is resumed and judged
on these data and no others; the data themselves are given again each time.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from flax_lstm.data.base import Data
from flax_lstm.errors import UserError, require
from flax_lstm.machine.files import expanded

MEMORY = "memory:"


class InMemory(Data):
    """Settings of data that are read from the file `path`, or given in memory (`holding`)."""

    path: str

    below: ClassVar[tuple[str, ...]] = ()  # `path` names a file

    def holding(self, table: Any) -> Self:
        """The same settings for data in memory. Raises UserError for other data than the settings
        name already, and for what is no table."""
        table = self.given(table)
        name = MEMORY + fingerprint(table)
        require(
            not in_memory(self.path) or self.path == name,
            f"these are other data than the run was begun with: {name} now, {self.path} there. "
            "Give the same, or begin a new run in another folder",
        )
        held = replace(self, path=name)
        object.__setattr__(held, "_held", table)  # no field: neither saved nor compared
        return held

    def given(self, table: Any) -> Any:
        """What the program gave, in the form in which a file would be read: a DataFrame."""
        return as_frame(table)

    def table(self, inputs: Any) -> pd.DataFrame:
        """New inputs for predictions, as a program has them, in the form of `read`."""
        return as_frame(inputs)

    def whole(self) -> Any:
        """All of the data: those in memory, or the file's."""
        return self.held() if in_memory(self.path) else self.read(Path(self.path))

    def held(self) -> Any:
        """The data in memory."""
        held = vars(self).get("_held")
        if held is None:
            raise UserError(
                f"the data of this run were given in memory ({self.path}): give them again, "
                "fit(config, data=...) or run.evaluate(data=...)"
            )
        return held


def in_memory(path: object) -> bool:
    """Whether a path stands for data in memory."""
    return str(path).startswith(MEMORY)


def absolute_path(path: str) -> str:
    """The path from the root; what stands for nothing or for data in memory stays."""
    return path if not path or in_memory(path) else str(expanded(path).absolute())


def as_frame(table: Any) -> pd.DataFrame:
    """A DataFrame whose columns have strings as names; an index with a name, or of times, is a
    column like others. Raises UserError for anything else."""
    if not isinstance(table, pd.DataFrame) and hasattr(table, "to_pandas"):
        table = table.to_pandas()  # of Polars, or Arrow
    if isinstance(table, dict):
        try:
            table = pd.DataFrame(table)
        except ValueError as error:
            raise UserError(f"data: no table can be made of these columns: {error}") from None
    if not isinstance(table, pd.DataFrame):
        kind = type(table).__name__
        raise UserError(f"data must be a pandas DataFrame, not a {kind}{why_not(table)}")
    require(len(table) > 0, "data: the DataFrame has no rows")
    if not isinstance(table.index, pd.RangeIndex) and (
        table.index.names != [None] or isinstance(table.index, pd.DatetimeIndex)
    ):
        table = table.rename_axis(index=[str(name or "time") for name in table.index.names])
        table = with_index(table, "data")
    return with_names(table.reset_index(drop=True), "data")


def why_not(rows: object) -> str:
    """What is said of data that give one row after the other (generators, pipelines of Grain)."""
    if not hasattr(rows, "__iter__") or isinstance(rows, str | list | tuple | np.ndarray):
        return ""
    return (
        ": a run that resumes, bit for bit, reads its data again, and at any place. Collect the "
        "rows first, list(rows), and give a table or arrays of them"
    )


def with_index(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with its index as columns. Raises UserError where there are such columns."""
    try:
        return table.reset_index()
    except ValueError as error:
        raise UserError(f"{where}: the index of the table cannot be a column: {error}") from None


def with_names(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with strings as names of its columns. Raises UserError for names that repeat, or
    that no file can hold."""
    table = table.set_axis([str(name) for name in table.columns], axis=1)
    repeated = table.columns[table.columns.duplicated()]
    require(not len(repeated), f"{where}: more than one column is named {', '.join(repeated)}")
    broken = [name for name in table.columns if name != name.encode(errors="replace").decode()]
    require(not broken, f"{where}: the names of columns hold half a character: {broken!r}")
    for name in table.columns:
        given = table[name].tolist() if table[name].dtype.kind == "O" else []
        if any(isinstance(value, str) and _whole(value) != value for value in given):
            whole = [_whole(value) if isinstance(value, str) else value for value in given]
            table[name] = pd.Series(whole, table.index, dtype=object)
    return table


def _whole(text: str) -> str:
    """The text with a question mark for half a character, which nothing in UTF-8 can hold."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def fingerprint(data: Any) -> str:
    """SHA-256, first 16 hex digits, of a DataFrame's columns, types and values, or of arrays."""
    digest = hashlib.sha256()
    if isinstance(data, pd.DataFrame):
        for name in data.columns:
            values = data[name]
            digest.update(f"{name}\0{values.dtype}\0{len(values)}\0".encode())
            values = values.map(repr) if values.dtype == object else values
            digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy().tobytes())
    else:
        for array in data:
            digest.update(f"{array.dtype}{array.shape}".encode())
            # An array of objects holds their addresses, which differ from one process to another.
            plain = np.array([repr(x) for x in array]) if array.dtype == object else array
            digest.update(np.ascontiguousarray(plain).tobytes())
    return digest.hexdigest()[:16]
