# SPDX-License-Identifier: Apache-2.0
"""Texts with one label each: length-bucketed batches, and classification from any table of texts.

Axes: B rows of a batch, T tokens.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd

from flax_lstm.data.base import Batch, BatchSource
from flax_lstm.data.buckets import (
    BUCKETS,
    MOST_BUCKETS,
    BucketedBatches,
    HalfUnlabelled,
    Rows,
    choose_boundaries,
    lengths_of,
    pad,
    take,
)
from flax_lstm.data.corpus import LONGEST, Corpus, VocabularyInfo, check_sizes
from flax_lstm.data.documents import stream_documents
from flax_lstm.data.memory import InMemory, as_frame, with_names
from flax_lstm.data.prepared import SPLITS, Documents
from flax_lstm.data.sources import (
    TableSource,
    Texts,
    check_shares,
    read_texts,
    steady_number,
)
from flax_lstm.data.tables import (
    label_values,
    read_table,
    sort_labels,
    tag_values,
    text_values,
)
from flax_lstm.data.vectors import WordVectors, read_vectors
from flax_lstm.data.vocabulary import Vocabulary
from flax_lstm.errors import MOST, UserError, listing, nearest, require
from flax_lstm.machine.files import expanded


@dataclasses.dataclass(frozen=True)
class TextForm(VocabularyInfo):
    """How texts become batches."""

    max_length: int  # tokens kept of a longer text
    keep: Literal["first", "last"]
    boundaries: tuple[int, ...]  # the padded lengths T, ascending
    text_column: str
    label_column: str

    def sample(self, batch_size: int) -> Batch:
        """A batch of empty texts, padded like the longest."""
        return pad(Rows([], np.zeros(0, np.int32)), self.boundaries[-1:], batch_size)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, cut to `max_length`."""
        return self.cut(self.vocabulary.encode(texts))

    def inputs(self, table: pd.DataFrame) -> list[str]:
        """The texts in a table of new inputs."""
        return text_values(table, self.text_column, "the input", blank=True)

    @property
    def kept(self) -> slice:
        """Which tokens of a text are read."""
        return slice(-self.max_length, None) if self.keep == "last" else slice(self.max_length)

    def cut(self, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [ids[self.kept].copy() for ids in tokens]

    def written(self, text: str) -> list[str]:
        """The words that are read of a text, as it has them: also those that are unknown."""
        return self.vocabulary.written(text)[self.kept]

    def batches(self, texts: Sequence[str], batch_size: int) -> Iterator[Batch]:
        """New texts in their order, for prediction: targets are 0, and rows that fill the last
        batch have weight 0."""
        for start in range(0, len(texts), batch_size):
            yield from self.padded(self.encode(texts[start : start + batch_size]), batch_size)

    def padded(self, rows: Sequence[np.ndarray], batch_size: int) -> Iterator[Batch]:
        """The same for rows of token ids."""
        for start in range(0, len(rows), batch_size):
            tokens = list(rows[start : start + batch_size])
            yield pad(Rows(tokens, np.zeros(len(tokens), np.int32)), self.boundaries, batch_size)


@dataclasses.dataclass(frozen=True)
class TextInfo(TextForm):
    """What a text classifier and its predictions need to know about the data."""

    labels: tuple[str, ...]  # names of the classes, in the order of the model's outputs
    class_counts: tuple[int, ...]  # training examples of each

    @classmethod
    def fit(cls, labels: Sequence[str], **form: Any) -> Self:
        """The labels of the training rows. Raises UserError where there is one alone."""
        counts = Counter(labels)
        names = tuple(sort_labels(counts))
        if len(names) < 2:
            raise UserError(
                f"every training row has the label {names[0]!r}: at least 2 different ones are "
                "needed"
            )
        return cls(labels=names, class_counts=tuple(counts[name] for name in names), **form)

    def targets(self, split: str, labels: Sequence[str]) -> np.ndarray:
        """The place of each label, (rows,) int32. Raises UserError for one that training does not
        have."""
        check_names(split, labels, self.labels, "label")
        index = {label: i for i, label in enumerate(self.labels)}
        return np.array([index[label] for label in labels], np.int32)


@dataclasses.dataclass(frozen=True)
class TagInfo(TextForm):
    """The same where a row has any number of tags."""

    tags: tuple[str, ...]  # their names, in the order of the model's outputs
    tag_shares: tuple[float, ...]  # of the training rows that have each
    separator: str = "|"  # between the tags of an answer, as between those of a table

    def sample(self, batch_size: int) -> Batch:
        batch = super().sample(batch_size)
        return batch._replace(targets=np.zeros((batch_size, len(self.tags)), np.float32))

    @classmethod
    def fit(cls, labels: Sequence[tuple[str, ...]], **form: Any) -> Self:
        """The tags of the training rows. Raises UserError where there is none."""
        counts = Counter(tag for tags in labels for tag in {*tags})
        require(bool(counts), "no training row has a tag")
        names = tuple(sort_labels(counts))
        return cls(tags=names, tag_shares=tuple(counts[n] / len(labels) for n in names), **form)

    def targets(self, split: str, labels: Sequence[tuple[str, ...]]) -> np.ndarray:
        """(rows, tags) float32, 1 for a tag that a row has. Raises UserError for one that training
        does not have."""
        check_names(split, [tag for tags in labels for tag in tags], self.tags, "tag")
        return np.array([[tag in tags for tag in self.tags] for tags in labels], np.float32)


class TextDataset:
    """Encoded splits "train", "validation", "test", and what was fitted on the first."""

    def __init__(
        self,
        info: TextInfo | TagInfo,
        splits: Mapping[str, Rows],
        read: Mapping[str, Texts],
        vectors: Path | None = None,
        unlabelled: Callable[[], Rows] | None = None,  # read only where there is training
    ):
        self.info = info
        self._splits = splits
        self._read = read
        self._vectors = vectors
        self._unlabelled = unlabelled

    def word_vectors(self) -> WordVectors | None:
        """What the embedding of a new run begins with."""
        return None if self._vectors is None else read_vectors(self._vectors, self.info.vocabulary)

    def labelled_tokens(self) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """The tokens of each training row, and (rows, labels) numbers, 1 for what it has."""
        rows = self._splits["train"]
        if isinstance(self.info, TagInfo):
            return rows.tokens, np.asarray(rows.labels)
        return rows.tokens, np.eye(len(self.info.labels), dtype=np.float32)[rows.labels]

    def read(self, split: str) -> Texts:
        """The texts and labels of a split, as they were read."""
        return self._read[split]

    def size(self, split: str) -> int:
        return len(self._splits[split].tokens)

    def train(self, batch_size: int, seed: int) -> BatchSource:
        rows, boundaries = self._splits["train"], self.info.boundaries
        if self._unlabelled is None:
            return BucketedBatches(rows, boundaries, batch_size, seed)
        require(
            batch_size > 1,
            "data.unlabelled: half the rows of a batch have no label; give --train.batch-size 2 "
            "or more",
        )
        return HalfUnlabelled(rows, self._unlabelled(), boundaries, batch_size, seed)

    def order(self, split: str) -> np.ndarray:
        """The rows of a split, the shortest first: as evaluation gives them."""
        return np.argsort(lengths_of(self._splits[split].tokens), kind="stable")

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each row, in their `order`."""
        return np.sort(lengths_of(self._splits[split].tokens))

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every row once, in their `order`; rows that fill the last batch have weight 0."""
        rows, order = self._splits[split], self.order(split)
        for start in range(0, len(order), batch_size):
            yield pad(
                take(rows, order[start : start + batch_size]), self.info.boundaries, batch_size
            )


class PreparedTexts(TextDataset):
    """The same from files of tokens: a text is what its tokens say of it."""

    def read(self, split: str) -> Texts:
        rows = self._splits[split]
        texts = [self.info.vocabulary.decode(ids) for ids in rows.tokens]
        assert isinstance(self.info, TextInfo)
        return Texts(texts, [self.info.labels[place] for place in rows.labels])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(Corpus):
    """Classification of texts; subclasses say where the texts come from (`source`)."""

    gives: ClassVar[Any] = TextInfo  # or `TagInfo`

    max_length: int = 400  # tokens kept of a longer text
    keep: Literal["first", "last"] = "last"  # which end of a longer text is kept
    balanced: bool = False  # training rows weigh so that all classes weigh the same together
    # File of word vectors that the embedding begins with (.vec, .txt, or either as .gz)
    vectors: str = ""
    # training rows that are used, drawn steadily, fewer being a part of more; 0: all
    train_rows: int = 0
    # Table of rows to learn from beside them, such as what `predict` writes of texts without labels
    # (self-training); none judges
    more_path: str = ""
    # padded lengths, of which each has its own compiled step: fewer pad more and start sooner
    buckets: int = BUCKETS

    classes: ClassVar[
        tuple[str, ...]
    ] = ()  # the labels, where they are known before the data are read
    free: ClassVar[tuple[str, ...]] = (
        *("prepared", "max_length", "keep", "balanced", "train_rows", "buckets", "vectors"),
        "more_path",
    )
    paths: ClassVar[tuple[str, ...]] = ("prepared", "vectors", "more_path")
    # what a table of new texts calls them; a field where the user has a table of their own
    text_column = "text"
    label_column = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.max_length <= LONGEST,
            f"data.max-length is {self.max_length}: give at least 1 token, at most {LONGEST:,}",
        )
        require(
            0 <= self.train_rows <= MOST,
            f"data.train-rows is {self.train_rows}: give 0 (all) or a number of rows",
        )
        require(
            0 < self.buckets <= MOST_BUCKETS,
            f"data.buckets is {self.buckets}: give 1 to {MOST_BUCKETS} padded lengths",
        )
        require(
            not self.vectors or self.tokenizer == "word",
            "data.vectors are of words: they do not go with --data.tokenizer bpe",
        )

    def prepare(self, folder: Path) -> None:
        require(
            self.gives is TextInfo, "flax-lstm prepare takes texts with one label, not with tags"
        )
        super().prepare(folder)

    def load(self, assets: Path) -> TextDataset:
        if self.prepared:
            return self._load_prepared(assets)
        splits = self.source.splits()
        check_sizes({name: len(split.texts) for name, split in splits.items()})
        splits["train"] = self._drawn(splits["train"]).followed_by(self._more(splits))
        if saved := (assets / "info.json").exists():
            info = self.restore(assets)
        else:
            info = self._fit(assets, splits["train"])
        rows = {name: encode(info, name, split) for name, split in splits.items()}
        rows["train"] = self._weighed(info, rows["train"], splits["train"].weights)
        if not saved:
            lengths = [len(ids) for ids in rows["train"].tokens]
            boundaries = choose_boundaries(lengths, self.max_length, self.buckets)
            info = dataclasses.replace(info, boundaries=boundaries)
            info.save(assets)
        vectors = expanded(self.vectors) if self.vectors else None
        others = functools.partial(self._without_labels, info, splits)
        return TextDataset(info, rows, splits, vectors, others if self.has_unlabelled else None)

    @property
    def has_unlabelled(self) -> bool:
        """Whether there are texts without labels to learn from beside the training rows."""
        return False

    def texts_without_labels(self) -> list[str]:
        """These texts, of data that have some."""
        return []

    def _without_labels(self, info: TextForm, splits: Mapping[str, Texts]) -> Rows:
        """Those of them that are no copy of a row that judges."""
        judging = {*splits["validation"].texts, *splits["test"].texts}
        texts = [text for text in self.texts_without_labels() if text not in judging]
        require(bool(texts), "data.unlabelled: there is no text but copies of rows that judge")
        return Rows(info.encode(texts), np.zeros(len(texts), np.int32))

    def _more(self, splits: Mapping[str, Texts]) -> Texts:
        """The rows of `more_path` that are no copy of any others; their labels are in the column of
        the labels or, where there is none, in `predicted`."""
        if not self.more_path:
            return Texts([], [])
        path, known = expanded(self.more_path), {t for rows in splits.values() for t in rows.texts}
        frame = read_table(path)
        if self.label_column not in frame and "predicted" in frame:
            frame = frame.rename(columns={"predicted": self.label_column})
        texts = text_values(frame, self.text_column, path)
        rows, trained = Texts(texts, self.labels_of(frame, path)), names_in(splits["train"])
        unknown = sorted(names_in(rows) - trained)
        require(
            not unknown,
            f"data.more-path {path}: {listing(unknown, 5)} is a label of no training row. Trained "
            f"labels: {listing(sorted(trained))}",
        )
        return rows.take(n for n, text in enumerate(texts) if text not in known)

    def _load_prepared(self, assets: Path) -> TextDataset:
        require(
            not self.train_rows, "data.train-rows and data.prepared do not go together: leave one"
        )
        require(
            not self.has_unlabelled,
            "data.unlabelled and data.prepared do not go together: leave one",
        )
        require(
            not self.more_path, "data.more-path and data.prepared do not go together: leave one"
        )
        found = self.open_prepared(assets)
        end = slice(-self.max_length, None) if self.keep == "last" else slice(self.max_length)
        splits = {}
        for split in SPLITS:
            tokens_N, labels_N = found.rows(split).T
            documents = Documents(found.stream(split), tokens_N, end, self.max_length)
            splits[split] = Rows(documents, labels_N.astype(np.int32))
        lengths, counts = lengths_of(splits["train"].tokens), splits["train"].labels
        info = TextInfo(
            labels=found.labels,
            class_counts=tuple(np.bincount(counts, minlength=len(found.labels)).tolist()),
            vocabulary=found.vocabulary(),
            max_length=self.max_length,
            keep=self.keep,
            boundaries=choose_boundaries(lengths.tolist(), self.max_length, self.buckets),
            text_column=self.text_column,
            label_column=self.label_column,
        )
        info.save(assets)
        splits["train"] = self._weighed(info, splits["train"], None)
        return PreparedTexts(info, splits, {}, Path(self.vectors) if self.vectors else None)

    def _drawn(self, train: Texts) -> Texts:
        """As many of the training rows as are to be used, in the order in which they were read."""
        if not self.train_rows:
            return train
        found = len(train.texts)
        require(
            self.train_rows <= found,
            f"data.train-rows is {self.train_rows}: there are {found} training rows",
        )
        numbers = [steady_number(text, self.split_seed) for text in train.texts]
        places = np.argsort(numbers, kind="stable")
        return train.take(np.sort(places[: self.train_rows]))

    def _weighed(self, info: TextInfo, train: Rows, given: Sequence[float] | None) -> Rows:
        """The training rows with their weights, those given and those that balance the classes;
        rows for judgement count once each."""
        if given is None and not self.balanced:
            return train
        weights_N = np.ones(len(train.labels)) if given is None else np.asarray(given, np.float64)
        if self.balanced:
            total_K = np.bincount(train.labels, weights_N, minlength=len(info.labels))
            weights_N = weights_N / np.maximum(total_K, 1e-12)[train.labels]
        return train._replace(weights=(weights_N / weights_N.mean()).astype(np.float32))

    def _fit(self, assets: Path, train: Texts) -> Any:
        return self.gives.fit(
            train.labels,
            vocabulary=self.vocabulary(assets, train.texts),
            max_length=self.max_length,
            keep=self.keep,
            boundaries=(),  # chosen by the lengths of the encoded rows
            text_column=self.text_column,
            label_column=self.label_column,
        )

    def outline(self) -> Any:
        """The full vocabulary and texts of full length."""
        if not self.classes:
            return None
        return TextInfo(
            labels=self.classes,
            class_counts=(1,) * len(self.classes),
            vocabulary=Vocabulary.blank(self.vocabulary_size),
            max_length=self.max_length,
            keep=self.keep,
            boundaries=choose_boundaries((), self.max_length, buckets=1),
            text_column=self.text_column,
            label_column=self.label_column,
        )

    def restore(self, assets: Path) -> Any:
        """What an earlier `load` fitted: all that a prediction needs."""
        return self.gives.load(assets)

    def labels_of(self, frame: pd.DataFrame, path: Path) -> list[Any]:
        """The labels in the rows of a table."""
        return label_values(frame, self.label_column, path)

    def table(self, inputs: Any) -> pd.DataFrame:
        """New texts: one, several, or a table with the training table's text column."""
        if isinstance(inputs, str):
            inputs = [inputs]
        if hasattr(inputs, "to_pandas"):
            inputs = inputs.to_pandas()  # of Polars, or Arrow
        if isinstance(inputs, dict):
            inputs = as_frame(inputs)
        kind = type(inputs).__name__
        require(np.iterable(inputs), f"predict takes a text, several, or a table, not a {kind}")
        if isinstance(inputs, pd.DataFrame):
            frame = inputs
        else:
            frame = pd.DataFrame({self.text_column: pd.Series(list(inputs), dtype=object)})
        require(len(frame) > 0, "predict was given no text")
        frame = with_names(frame, "the input")
        text_values(frame, self.text_column, "the input", blank=True)
        return frame

    def labelled(self, path: Path, assets: Path) -> TextDataset:
        """New texts with labels: a table with the training table's columns, or a folder
        LABEL/*.txt."""
        path, info = expanded(path), self.restore(assets)
        new = read_texts(path, self.text_column, self.labels_of)
        return TextDataset(info, {"input": encode(info, "input", new)}, {"input": new})

    def read(self, path: str | Path) -> pd.DataFrame:
        """New texts for predictions: a table with the training table's text column, and any
        others."""
        frame = read_table(expanded(path))
        # says what is wrong with it, if anything
        text_values(frame, self.text_column, path, blank=True)
        return frame


@dataclasses.dataclass(frozen=True)
class TextTable(TextData, InMemory):
    """Your own texts: a CSV, TSV, JSON-lines or Parquet file, or a folder with one folder of .txt
    files per label.

    Without a test file, or folders train/ and test/, the rows are split at random but steadily: the
    split of a row is a function of its text (its group, where a column names one) and `split_seed`,
    so that more rows move none, and copies of a text stay together.
    """

    below: ClassVar[tuple[str, ...]] = ("*/*.txt", "t*/*/*.txt")  # LABEL, train/LABEL, test/LABEL

    free: ClassVar[tuple[str, ...]] = (*TextData.free, "unlabelled_path")
    paths: ClassVar[tuple[str, ...]] = (*TextData.paths, "path", "test_path", "unlabelled_path")

    # table (.csv .tsv .jsonl .ndjson .parquet), folder LABEL/*.txt, or folder of train/ and test/
    # such
    path: str = ""
    # Column of the table with the texts; a name such as title+body joins two columns
    text_column: str = "text"
    test_path: str = ""  # table or folder with the test rows; without it they are split off
    # Share of the rows split off for the test where no test rows are given
    test_fraction: float = 0.1
    # Column of the table with the labels: names or numbers, two or more different ones
    label_column: str = "label"
    weight_column: str = ""  # column with how much a row counts in training; empty: all alike
    # Column that says which rows belong together (a customer's, a film's): all of them go to one
    # split; empty: copies of a text do
    group_column: str = ""
    # Table or folder of texts without labels, for task.virtual: half the rows of a batch
    unlabelled_path: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation_fraction, self.test_fraction, "row")

    @property
    def source(self) -> TableSource:
        shares = {"test": self.test_fraction, "validation": self.validation_fraction}
        return TableSource(self.path, self.test_path, shares, self.split_seed, self._texts)

    def _texts(self, path: Path) -> Texts:
        columns = (self.weight_column, self.group_column)
        return read_texts(path, self.text_column, self.labels_of, *columns, self.held)

    def prepare(self, folder: Path) -> None:
        require(
            not self.weight_column,
            f"data.weight-column {self.weight_column}: files of tokens hold no weights of rows; "
            "leave it out, or train without --data.prepared",
        )
        super().prepare(folder)

    @property
    def has_unlabelled(self) -> bool:
        return bool(self.unlabelled_path)

    def texts_without_labels(self) -> list[str]:
        return [*stream_documents(expanded(self.unlabelled_path), self.text_column)]


@dataclasses.dataclass(frozen=True)
class TagTable(TextTable):
    """Your own texts with any number of tags each: the label column of a JSON-lines or Parquet file
    holds lists, that of a CSV or TSV file the tags with a separator between them, or nothing."""

    gives: ClassVar[Any] = TagInfo

    label_column: str = "tags"  # Column of the table with the tags
    tag_separator: str = "|"  # between tags where they are text

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.tag_separator), "data.tag-separator is empty: give a character such as |")
        require(
            not self.balanced,
            "data.balanced: rows with several tags have no class that could weigh as others do",
        )

    def _fit(self, assets: Path, train: Texts) -> Any:
        return dataclasses.replace(super()._fit(assets, train), separator=self.tag_separator)

    def labels_of(self, frame: pd.DataFrame, path: Path) -> list[Any]:
        return tag_values(frame, self.label_column, path, self.tag_separator)


def names_in(rows: Texts) -> set[str]:
    """The labels, or tags, that the rows have."""
    return {
        name for label in rows.labels for name in (label if isinstance(label, tuple) else (label,))
    }


def check_names(split: str, found: Iterable[str], known: Sequence[str], kind: str) -> None:
    """Raises UserError for a label, or tag, that no training row has."""
    if unknown := Counter(name for name in found if name not in known):
        name, count = unknown.most_common(1)[0]
        raise UserError(
            f"{kind} {name!r} of {count} row(s) of the {split} split is in no training row."
            f"{nearest(name, known)} Trained {kind}s: {listing(known)}"
        )


def encode(info: TextInfo | TagInfo, name: str, split: Texts) -> Rows:
    """The rows of a split."""
    targets = info.targets(name, split.labels)
    return Rows(info.cut(info.vocabulary.encode_cached(split.texts)), targets)
