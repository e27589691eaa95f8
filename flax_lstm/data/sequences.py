# SPDX-License-Identifier: Apache-2.0
"""Sequences of numbers with a label or numbers each: sensors, clicks, gestures.

Axes: N sequences, T time steps, D features, B rows of a batch.
"""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pandas as pd

from flax_lstm.data.base import Batch, BatchSource
from flax_lstm.data.buckets import BucketedBatches, Rows, choose_boundaries, pad, take
from flax_lstm.data.measures import FARTHEST, SMALLEST, is_several, scaled
from flax_lstm.data.memory import InMemory, absolute_path, in_memory, why_not, with_names
from flax_lstm.data.tables import label_name, read_bytes, read_table, sort_labels
from flax_lstm.errors import UserError, listing, require, within
from flax_lstm.machine.files import expanded, write_atomically
from flax_lstm.machine.memory import require_room

SPLITS = ("train", "validation", "test")


class Examples(NamedTuple):
    """What was read: sequences (T, D) float64, and a target each (none for a prediction)."""

    x: list[np.ndarray]
    y: list[Any] | None

    def chosen(self, rows: np.ndarray) -> "Examples":
        return Examples([self.x[i] for i in rows], self.y and [self.y[i] for i in rows])


@dataclass(frozen=True)
class SequencesInfo:
    """What a model and its predictions need to know. Statistics are of the training split."""

    features: int  # D
    mean: tuple[float, ...]  # of each feature
    std: tuple[float, ...]  # likewise; 1 for a constant one
    labels: tuple[str, ...] | None  # the classes, where the targets are labels
    class_counts: tuple[int, ...] | None  # training examples of each
    outputs: int | None  # numbers to predict, where the targets are numbers
    target_mean: float | None  # what to guess without looking
    per_step: bool  # whether every step has a target, or a sequence one
    max_length: int  # steps kept of a longer sequence
    keep: Literal["first", "last"]
    boundaries: tuple[int, ...]  # the padded lengths, ascending
    x_column: str
    y_column: str

    def sample(self, batch_size: int) -> Batch:
        """A batch of zeros, padded like the longest."""
        return pad(self._rows([np.zeros((0, self.features))]), self.boundaries[-1:], batch_size)

    def cut(self, x_TD: Any) -> Any:
        """The steps that are kept of a longer sequence."""
        return x_TD[-self.max_length :] if self.keep == "last" else x_TD[: self.max_length]

    def scale(self, x_TD: np.ndarray) -> np.ndarray:
        """A sequence as the model sees it: cut, mean 0, deviation 1, float32."""
        cut_TD, names = self.cut(x_TD), [str(n) for n in range(1, self.features + 1)]
        steps = np.arange(1, len(cut_TD) + 1)
        return scaled(cut_TD, np.array(self.mean), np.array(self.std), names, steps, "a sequence")

    def _rows(self, x: Sequence[np.ndarray]) -> Rows:
        """New sequences, whose targets are 0."""
        kind: Any = np.int32 if self.labels else np.float32
        one: tuple[Any, ...] = () if self.labels else (self.outputs,)
        scaled = [self.scale(x_TD) for x_TD in x]
        if self.per_step:
            return Rows(scaled, [np.zeros((len(x_TD), *one), kind) for x_TD in scaled])
        return Rows(scaled, np.zeros((len(x), *one), kind))

    def encode(self, examples: Examples, split: str) -> Rows:
        """Sequences and targets of a split."""
        assert examples.y is not None
        rows = self._rows(examples.x)
        if self.per_step:
            return rows._replace(labels=[self._targets(self.cut(y), split) for y in examples.y])
        return rows._replace(labels=self._targets(examples.y, split))

    def _targets(self, y: Sequence[Any], split: str) -> np.ndarray:
        """Places in the labels, or numbers (rows, outputs)."""
        if self.labels is None:
            return numbers(y, split).astype(np.float32)
        index = {label: n for n, label in enumerate(self.labels)}
        require(
            not any(is_several(one) for one in y),
            f"a target of the {split} split holds several values; a label is one",
        )
        names = [label_name(one) for one in y]
        if unknown := sorted({name for name in names if name not in index}):
            raise UserError(
                f"label {unknown[0]!r} of the {split} split is in no training sequence; trained "
                f"labels: {listing(self.labels)}"
            )
        return np.array([index[name] for name in names], np.int32)

    def inputs(self, table: pd.DataFrame) -> list[np.ndarray]:
        """The sequences in a table of new inputs, of as many features as those of training."""
        there = [str(name) for name in table.columns]
        require(
            self.x_column in there,
            f"the input has no column {self.x_column!r}; columns: {listing(there)}",
        )
        x = sequences(table[self.x_column].tolist(), "the input")
        require(
            x[0].shape[1] == self.features,
            f"the input has {x[0].shape[1]} features a step; the model was trained on "
            f"{self.features}",
        )
        return x

    def batches(self, x: Sequence[np.ndarray], batch_size: int) -> Iterator[Batch]:
        """New sequences in their order, for prediction; rows that fill the last batch have weight
        0."""
        for start in range(0, len(x), batch_size):
            yield pad(self._rows(x[start : start + batch_size]), self.boundaries, batch_size)

    def save(self, assets: Path) -> None:
        assets.mkdir(parents=True, exist_ok=True)
        write_atomically(assets / "info.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def restore(cls, assets: Path) -> Self:
        """What `save` wrote into the folder."""
        try:
            saved = json.loads((assets / "info.json").read_text(encoding="utf-8"))
            fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
            return cls(**fields)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {assets / 'info.json'}: {error}") from None


class SequencesDataset:
    """Encoded splits, and what was fitted on the first."""

    def __init__(self, info: SequencesInfo, splits: Mapping[str, Rows]):
        self.info, self._splits = info, splits

    def size(self, split: str) -> int:
        return len(self._splits[split].tokens)

    def train(self, batch_size: int, seed: int) -> BatchSource:
        return BucketedBatches(self._splits["train"], self.info.boundaries, batch_size, seed)

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every row once, shortest first; rows that fill the last batch have weight 0."""
        rows = self._splits[split]
        order = np.argsort([len(x) for x in rows.tokens], kind="stable")
        for start in range(0, len(order), batch_size):
            part = take(rows, order[start : start + batch_size])
            yield pad(part, self.info.boundaries, batch_size)


@dataclass(frozen=True)
class Sequences(InMemory):
    """Your own sequences of numbers, each with a label (classification) or numbers (regression).

    A `.npz` file with arrays `x` [N, T, D] or [N, T], `y` [N] or [N, outputs], and `lengths` [N]
    where sequences are padded; or Parquet or JSON lines with a column of lists (of numbers, or of
    lists of D numbers) and one of targets. In memory: `fit(config, data=(x, y))`, where x may also
    be a list of arrays [T_i, D]. Features are scaled to mean 0 and standard deviation 1 by the
    training sequences.
    """

    gives: ClassVar[type | None] = SequencesInfo

    path: str = ""  # file: .npz, .parquet or .jsonl
    x_column: str = "x"  # array or column with the sequences
    y_column: str = "y"  # array or column with the targets
    # what the targets are: labels, numbers, or auto (fractions are numbers, all else labels)
    target: Literal["auto", "labels", "numbers"] = "auto"
    per_step: bool = False  # every step has a target: y has a list for each sequence
    max_length: int = 1000  # steps kept of a longer sequence
    keep: Literal["first", "last"] = "last"  # which end of a longer sequence is kept
    validation_fraction: float = 0.1  # share of the sequences held out to choose the best step
    test_fraction: float = 0.1  # share of the sequences held out to report
    split_seed: int = 0  # another value draws another split

    def __post_init__(self) -> None:
        within("data.max-length", self.max_length, 1)
        within("data.split-seed", self.split_seed, 0, 2**63 - 1)
        shares = (self.validation_fraction, self.test_fraction)
        require(
            all(share > 0 for share in shares) and sum(shares) < 1,
            f"data.validation-fraction {shares[0]} and data.test-fraction {shares[1]}: must be "
            "positive and leave sequences for training",
        )

    def absolute(self) -> Self:
        return replace(self, path=absolute_path(self.path))

    def given(self, table: Any) -> Any:
        """What a program gave, as arrays that have a fingerprint: all steps [sum T, D], the
        lengths, and the targets."""
        if isinstance(table, pd.DataFrame):
            table = with_names(table, "data")
            table = {name: table[name].tolist() for name in table.columns}
        if isinstance(table, tuple | list) and len(table) == 2:
            table = {self.x_column: table[0], self.y_column: table[1]}
        if not isinstance(table, dict) or self.x_column not in table:
            raise UserError(
                f"data for Sequences are (x, y): arrays [N, T, D] and [N], or lists; not a "
                f"{type(table).__name__}{why_not(table)}"
            )
        x = sequences(table[self.x_column], "data")
        y = table.get(self.y_column)
        require(y is None or np.iterable(y), "data: the targets are a list or an array [N]")
        targets = [] if y is None else list(y)
        require(
            y is None or len(targets) == len(x),
            f"data: {len(x)} sequences and {len(targets)} targets; give one target a sequence",
        )
        if self.per_step:
            targets = list(np.concatenate([np.asarray(list(one)) for one in aligned(x, targets)]))
        steps = np.concatenate(x) if x else np.zeros((0, 1))
        try:
            return steps, np.array([len(one) for one in x]), np.asarray(targets)
        except ValueError:
            raise UserError("data: targets of several lengths; give as many numbers each") from None

    def examples(self) -> Examples:
        """The sequences and targets in the file, or in memory."""
        if not in_memory(self.path):
            require(bool(self.path), "data.path is not given: name a file, --data.path FILE")
            return self._checked(read_arrays(Path(self.path), self.x_column, self.y_column))
        steps, lengths, targets = self.held()
        ends = np.cumsum(lengths)[:-1]
        y = np.split(targets, ends) if self.per_step else targets
        return self._checked(Examples(np.split(steps, ends), list(y)))

    def _checked(self, examples: Examples) -> Examples:
        require(
            examples.y is not None and len(examples.y) == len(examples.x) > 0,
            f"{self.path}: no targets named {self.y_column!r} (--data.y-column)",
        )
        assert examples.y is not None
        return Examples(examples.x, aligned(examples.x, examples.y)) if self.per_step else examples

    def load(self, assets: Path) -> SequencesDataset:
        """Reads and splits; the scaler and labels come from `assets`, or are fitted on the training
        split and saved there."""
        examples = self.examples()
        order = np.random.default_rng([self.split_seed]).permutation(len(examples.x))
        ends = np.cumsum([self.test_fraction, self.validation_fraction]) * len(order)
        test, validation, train = np.split(order, np.maximum(ends.round().astype(int), (1, 2)))
        require(len(train) > 0, f"{self.path}: {len(order)} sequences are too few for three splits")
        splits = {"train": examples.chosen(train), "validation": examples.chosen(validation)}
        splits["test"] = examples.chosen(test)
        if (assets / "info.json").exists():
            info = SequencesInfo.restore(assets)
        else:
            info = self._fit(splits["train"])
            info.save(assets)
        return SequencesDataset(info, {name: info.encode(s, name) for name, s in splits.items()})

    def restore(self, assets: Path) -> SequencesInfo:
        """What an earlier `load` saved."""
        return SequencesInfo.restore(assets)

    def _fit(self, train: Examples) -> SequencesInfo:
        assert train.y is not None
        steps = np.concatenate([x[-self.max_length :] for x in train.x])
        std = steps.std(axis=0)
        constant = np.ptp(steps, axis=0) <= SMALLEST
        lengths = [min(len(x), self.max_length) for x in train.x]
        labels = counts = outputs = mean = None
        every = [y for one in train.y for y in one] if self.per_step else train.y
        if self._are_numbers(every):
            targets = numbers(every, "train")
            outputs, mean = targets.shape[1], float(targets.mean())
        else:
            found = Counter(label_name(y) for y in every)
            labels = tuple(sort_labels(found))
            require(
                len(labels) > 1,
                f"{self.path}: every training sequence has the label {labels[0]!r}: at least 2 "
                "different ones are needed, or --data.target numbers",
            )
            counts = tuple(found[label] for label in labels)
        return SequencesInfo(
            features=steps.shape[1],
            mean=tuple(steps.mean(axis=0).tolist()),
            std=tuple(np.where(constant, 1.0, std).tolist()),
            labels=labels,
            class_counts=counts,
            outputs=outputs,
            target_mean=mean,
            per_step=self.per_step,
            max_length=self.max_length,
            keep=self.keep,
            boundaries=choose_boundaries(lengths, max(lengths)),
            x_column=self.x_column,
            y_column=self.y_column,
        )

    def _are_numbers(self, y: Sequence[Any]) -> bool:
        if self.target != "auto":
            return self.target == "numbers"
        if any(is_several(one) for one in y):
            return True
        return np.asarray(y).dtype.kind == "f"

    def table(self, inputs: Any) -> pd.DataFrame:
        """New sequences: an array [N, T, D], a list of arrays, or a table with lists."""
        if isinstance(inputs, pd.DataFrame):
            return with_names(inputs, "the input")
        return pd.DataFrame({self.x_column: sequences(inputs, "the input")})

    def read(self, path: str | Path) -> pd.DataFrame:
        """New sequences for predictions."""
        examples = read_arrays(Path(path), self.x_column, self.y_column)
        return pd.DataFrame({self.x_column: examples.x})


def read_arrays(path: Path, x_column: str, y_column: str) -> Examples:
    """Sequences and targets in a file. Raises UserError."""
    path = expanded(path)
    if path.suffix.lower() != ".npz":
        frame = read_table(path)
        found: dict[str, Any] = {str(name): frame[name].tolist() for name in frame.columns}
    else:
        found = read_npz(path)
    require(
        x_column in found,
        f"{path} has no {x_column!r} (--data.x-column); there are: {listing(found)}",
    )
    x = sequences(found[x_column], str(path))
    if path.suffix.lower() == ".npz" and "lengths" in found:
        lengths = np.asarray(found["lengths"])
        good = lengths.shape == (len(x),) and lengths.dtype.kind in "iu" and len(x) > 0
        require(
            good and bool((lengths >= 0).all()) and bool((lengths <= len(x[0])).all()),
            f"{path}: lengths must be {len(x)} integers from 0 to {len(x[0]) if x else 0}",
        )
        x = [one[:n] for one, n in zip(x, lengths, strict=True)]
    y = found.get(y_column)
    return Examples(x, None if y is None else list(y))


def read_npz(path: Path) -> dict[str, Any]:
    """The arrays of a file. Raises UserError for what is none, and what is too large for the memory
    that is free."""
    data = read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        require_room(2 * size, f"{path} unpacks to arrays that are too large to be read")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except UserError:
        raise
    except Exception as error:  # zip, zlib and NumPy have errors of many types
        raise UserError(
            f"cannot read {path} as .npz of plain arrays: {error} (lists of arrays are saved "
            "padded, with an array `lengths`)"
        ) from None


def numbers(y: Sequence[Any], split: str) -> np.ndarray:
    """Targets as numbers (rows, outputs), float64. Raises UserError for what is none, not finite or
    so large that its square, added up, would not be, and for rows of several lengths."""
    try:
        found = np.array([np.ravel(one) for one in y], np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"the targets of the {split} split are not all numbers, of one length each; for labels "
            "there is --data.target labels"
        ) from None
    require(
        bool((np.abs(found) <= FARTHEST).all()),
        f"a target of the {split} split is not finite, or beyond {FARTHEST:g}: give it in a larger "
        "unit",
    )
    return found.reshape(len(found), -1)


def aligned(x: Sequence[np.ndarray], y: Sequence[Any]) -> list[Any]:
    """Targets of steps, cut to the lengths of their sequences where both were padded. Raises
    UserError for one that has fewer."""
    for n, (one, targets) in enumerate(zip(x, y, strict=True), start=1):
        require(
            np.ndim(targets) > 0 and len(targets) >= len(one),
            f"data.per-step: sequence {n} has {len(one)} steps and "
            f"{len(targets) if np.ndim(targets) else 'one'} target(s); every step needs one",
        )
    return [targets[: len(one)] for one, targets in zip(x, y, strict=True)]


def sequences(values: Any, where: str) -> list[np.ndarray]:
    """Sequences (T, D) float64, all of one D and finite. Raises UserError that names the one at
    fault, counted from 1."""
    require(np.iterable(values), f"{where}: sequences are a list or an array [N, T, D]")
    if hasattr(values, "__next__"):
        kind = type(values).__name__
        raise UserError(f"{where}: sequences are no {kind}{why_not(values)}")
    found: list[np.ndarray] = []
    for n, value in enumerate(values, start=1):
        try:
            # Parquet gives an array of arrays for a list of lists.
            one = np.asarray(value)
            if one.dtype.kind in "mMcSV":
                raise TypeError
            one = np.asarray(one.tolist(), np.float64)
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise UserError(f"{where}: sequence {n} is no array of numbers [T, D]") from None
        one = one[:, None] if one.ndim == 1 else one
        wanted = found[0].shape[1] if found else (one.shape[1] if one.ndim == 2 else 0)
        require(
            one.ndim == 2 and one.shape[1] == wanted > 0,
            f"{where}: sequence {n} has shape {one.shape}; [T, {wanted or 'D'}] is needed",
        )
        require(
            bool(np.isfinite(one).all()) and bool(np.abs(one).max(initial=0) < 1e30),
            f"{where}: sequence {n} holds values that are not finite, or beyond 1e30; clean them, "
            "or leave the sequence out",
        )
        found.append(one)
    require(any(len(one) for one in found), f"{where}: there is no sequence with a step")
    return found
