# SPDX-License-Identifier: Apache-2.0
"""Where texts come from. A data set of texts builds one such source from its settings and asks
nothing else for texts, whatever it then does with them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from flax_lstm.data.documents import stream_documents
from flax_lstm.data.memory import in_memory
from flax_lstm.data.preparing import Document
from flax_lstm.data.tables import (
    group_values,
    read_folder,
    read_table,
    text_values,
    weight_values,
)
from flax_lstm.errors import require
from flax_lstm.machine.files import expanded, found_at


class Texts(NamedTuple):
    """The examples of a split, as read."""

    texts: list[str]
    labels: list[Any]  # a name each, or a tuple of tags; None for a text without
    weights: list[float] | None = None  # how much each counts in training; None: alike
    # which of them belong together, a name each: a split takes them all or none; None: copies alone
    groups: list[str] | None = None

    @classmethod
    def unlabelled(cls, texts: list[str]) -> "Texts":
        return cls(texts, [None] * len(texts))

    def followed_by(self, others: "Texts") -> "Texts":
        """These rows and the others, which weigh 1 where these have weights."""
        weights = self.weights
        if weights is not None:
            weights = [*weights, *(others.weights or [1.0] * len(others.texts))]
        return Texts([*self.texts, *others.texts], [*self.labels, *others.labels], weights)

    def take(self, chosen: Iterable[int]) -> "Texts":
        """These rows."""
        rows = list(chosen)
        return Texts(
            [self.texts[n] for n in rows],
            [self.labels[n] for n in rows],
            None if self.weights is None else [self.weights[n] for n in rows],
            None if self.groups is None else [self.groups[n] for n in rows],
        )


class TextSource(Protocol):
    """A place that gives texts, already split. One of your own can inherit from this class and
    needs `splits`."""

    def splits(self) -> dict[str, Texts]:
        """The texts of "train", "validation" and "test", the same on every call."""
        ...

    def stream(self) -> Iterator[Document]:
        """The same, one by one."""
        for split, rows in self.splits().items():
            pairs = zip(rows.texts, rows.labels, strict=True)
            yield from (Document(split, text, label) for text, label in pairs)

    def files(self) -> list[Path]:
        """What is read besides the files that settings name."""
        return []


@dataclass(frozen=True)
class TableSource(TextSource):
    """Rows of the user's own files, in splits that they give or that are drawn."""

    path: str  # a table or folder, or a folder of train/ and test/
    test_path: str  # one with the test rows; empty: they are in `path`
    # Of the rows of `path` that are split off by the hash of their texts; no test where there is
    # one already
    shares: Mapping[str, float]
    seed: int
    read: Callable[[Path], Texts]  # the rows of a table or folder

    def places(self) -> tuple[Path, Path | None, dict[str, float]]:
        """Where rows are to be read, where those of the test, and the shares of the first that are
        split off."""
        require(
            bool(self.path),
            "data.path is not given: name a table or folder of texts, --data.path FILE",
        )
        train = expanded(self.path)
        test = expanded(self.test_path) if self.test_path else None
        found_at(train)  # what can be no path is refused
        if test is None and (train / "train").is_dir() and (train / "test").is_dir():
            train, test = train / "train", train / "test"
        given = set() if test is None else {"test"}
        return train, test, {n: share for n, share in self.shares.items() if n not in given}

    def splits(self) -> dict[str, Texts]:
        train, test, shares = self.places()
        rows = self.read(train)
        splits = split_by_hash(rows, shares, self.seed, rows.groups or ())
        return splits if test is None else {**splits, "test": self.read(test)}


@dataclass(frozen=True)
class DocumentSource(TableSource):
    """The same for documents, which may be more than memory holds."""

    text_column: str

    def stream(self) -> Iterator[Document]:
        train, test, shares = self.places()
        if in_memory(train):
            yield from super().stream()
            return
        for text in stream_documents(train, self.text_column):
            yield Document(split_of(text, shares, self.seed), text)
        if test is not None:
            texts = stream_documents(test, self.text_column)
            yield from (Document("test", text) for text in texts)


def read_texts(
    path: Path,
    text_column: str,
    labels_of: Callable[[pd.DataFrame, Path], list[Any]],
    weight_column: str = "",
    group_column: str = "",
    held: Callable[[], pd.DataFrame] | None = None,
) -> Texts:
    """The texts and labels of a table, or of a folder LABEL/*.txt, and weights and groups where a
    column has them; `held` gives a table that is in memory."""
    if path.is_dir():
        for flag, name in (("weight", weight_column), ("group", group_column)):
            require(
                not name,
                f"data.{flag}-column {name}: {path} is a folder, which has no columns; leave it "
                "out, or give a table",
            )
        return Texts(*read_folder(path))
    frame = held() if held is not None and in_memory(path) else read_table(path)
    texts = text_values(frame, text_column, path)
    weights = weight_values(frame, weight_column, path) if weight_column else None
    groups = group_values(frame, group_column, path) if group_column else None
    return Texts(texts, labels_of(frame, path), weights, groups)


def split_by_hash(
    rows: Texts, shares: Mapping[str, float], seed: int, keys: Sequence[str] = ()
) -> dict[str, Texts]:
    """About these shares of the rows, and the others as "train".

    Where a row goes is a function of the seed and its key (its text by default) alone: rows with
    one key stay together.
    """
    names = [*shares, "train"]
    numbers = [steady_number(key, seed) for key in keys or rows.texts]
    chosen = np.searchsorted(np.cumsum([*shares.values()]), numbers, "right")
    return {name: rows.take(np.flatnonzero(chosen == n)) for n, name in enumerate(names)}


def split_of(key: str, shares: Mapping[str, float], seed: int) -> str:
    """In which of these shares, or "train", `split_by_hash` puts a row of this key."""
    ends = np.cumsum([*shares.values()])
    return [*shares, "train"][int(np.searchsorted(ends, steady_number(key, seed), "right"))]


def steady_number(key: str, seed: int) -> float:
    """A number in [0, 1) that only the key and the seed decide."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def check_fraction(field: str, value: float) -> None:
    require(0 < value < 1, f"data.{field} is {value}: give a share between 0 and 1, such as 0.1")


def check_shares(validation: float, test: float, rows: str) -> None:
    """Raises UserError where the two leave nothing to train on. rows: what is shared out."""
    check_fraction("test-fraction", test)
    require(
        validation + test < 1,
        f"data.validation-fraction and data.test-fraction leave no {rows} for training",
    )
