# SPDX-License-Identifier: Apache-2.0
"""Generated sequences that test how far a model remembers.

Axes: B rows of a batch, T time steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from flax_lstm.data.base import Batch, Data
from flax_lstm.data.order import in_order
from flax_lstm.errors import MOST, require, within
from flax_lstm.machine.memory import require_room

Array = np.ndarray


@dataclass(frozen=True)
class RegressionInfo:
    """What a model for sequence regression needs to know about the data."""

    features: int  # numbers at each step
    outputs: int  # numbers to predict
    target_mean: float  # what to guess without looking
    length: int  # steps of a sequence

    def sample(self, batch_size: int) -> Batch:
        """A batch of zeros."""
        return Batch(
            inputs=np.zeros((batch_size, self.length, self.features), np.float32),
            targets=np.zeros((batch_size, self.outputs), np.float32),
            lengths=np.full(batch_size, self.length, np.int32),
            weights=np.zeros(batch_size, np.float32),
        )


@dataclass(frozen=True)
class AddingProblem(Data):
    """Add two numbers that lie far apart (Hochreiter & Schmidhuber 1997, section 5.4).

    Each step has a uniform number of [0, 1) and a marker, which is 1 at two steps, one in either
    half, and 0 elsewhere. The target is the sum of the two marked numbers. Always guessing its
    mean, 1, has a mean squared error of 1/6.
    """

    gives: ClassVar[type | None] = RegressionInfo

    length: int = 400  # steps of a sequence
    # Training examples that count as an epoch; they are drawn anew and never repeat
    examples: int = 10_000
    validation_examples: int = 1_000  # fixed examples to choose the checkpoint by
    test_examples: int = 2_000  # fixed examples to report

    def __post_init__(self) -> None:
        require(
            2 <= self.length <= MOST,
            f"data.length {self.length}: must be at least 2, for one marker in each half, and at "
            f"most {MOST:,}",
        )
        for name in ("examples", "validation_examples", "test_examples"):
            within(f"data.{name.replace('_', '-')}", getattr(self, name), 1)

    def load(self, assets: Path) -> "AddingDataset":
        """The data set; nothing is read, fitted or saved. Raises UserError where its fixed examples
        do not fit into memory."""
        fixed = max(self.validation_examples, self.test_examples)
        require_room(
            12.0 * fixed * self.length,
            f"data.length {self.length:,}: {fixed:,} sequences of so many steps",
        )
        return AddingDataset(self)

    def restore(self, assets: Path) -> RegressionInfo:
        """What a model needs to know."""
        return RegressionInfo(features=2, outputs=1, target_mean=1.0, length=self.length)

    def outline(self) -> RegressionInfo:
        """The settings say it all."""
        return self.restore(Path())

    def draw(self, rows: int, seed: tuple[int, ...]) -> tuple[Array, Array]:
        """Inputs (B, T, 2) and targets (B, 1), a function of the seed alone."""
        generator = np.random.default_rng(seed)
        values_BT = generator.random((rows, self.length), np.float32)
        half = self.length // 2
        marked_B2 = np.stack(
            [generator.integers(0, half, rows), generator.integers(half, self.length, rows)], axis=1
        )
        markers_BT = np.zeros_like(values_BT)
        np.put_along_axis(markers_BT, marked_B2, 1.0, axis=1)
        targets_B1 = np.take_along_axis(values_BT, marked_B2, axis=1).sum(axis=1, keepdims=True)
        return np.stack([values_BT, markers_BT], axis=-1), targets_B1


class AddingDataset:
    """Examples of the adding problem; training draws new ones for every step."""

    def __init__(self, data: AddingProblem):
        self._data, self.info = data, data.restore(Path())
        self._sizes = {
            "train": data.examples,
            "validation": data.validation_examples,
            "test": data.test_examples,
        }

    def size(self, split: str) -> int:
        """Examples of a split."""
        return self._sizes[split]

    def train(self, batch_size: int, seed: int) -> "AddingBatches":
        """Batches without end."""
        return AddingBatches(self._data, batch_size, seed)

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """The fixed examples of a split, each once, the same whatever the run's seed and batch
        size."""
        inputs, targets = self._data.draw(self.size(split), (1, list(self._sizes).index(split)))
        for rows_B in in_order(self.size(split), batch_size):
            yield _batch(inputs[rows_B], targets[rows_B], rows_B >= 0)


@dataclass(frozen=True)
class AddingBatches:
    """Training batches by global step (`BatchSource`)."""

    data: AddingProblem
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-self.data.examples // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        # The leading 0 keeps training apart from the fixed splits, whose seeds lead with 1.
        return _batch(
            *self.data.draw(self.batch_size, (0, self.seed, step)), np.ones(self.batch_size, bool)
        )


def _batch(inputs_BTD: Array, targets_B1: Array, counts_B: Array) -> Batch:
    lengths_B = np.full(len(inputs_BTD), inputs_BTD.shape[1], np.int32)
    return Batch(inputs_BTD, targets_B1, lengths_B, counts_B.astype(np.float32))
