# SPDX-License-Identifier: Apache-2.0
"""What every data set gives the training loop: batches of one form, addressed by the global step.

Axes: B rows of a batch, T time steps, D input features, N horizon (future steps), C target
channels, K covariates. Nothing in this folder imports JAX or Flax.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import pandas as pd

from flax_lstm.errors import UserError

Array = Any  # NumPy from a data set, JAX within the training step


class Batch(NamedTuple):
    """One batch. Sequences are padded on the right; a row or step that is only padding has weight
    0."""

    inputs: Array  # (B, T) int32 token ids, or (B, T, D) float32
    targets: (
        Array  # (B,) int32 class, (B, T) int32 next token, (B, N, C) float32, or (B, 1) float32
    )
    lengths: Array  # (B,) int32, valid steps of each row
    weights: Array  # (B,) or (B, T) float32: how much each row or step counts
    covariates: Array | None = None  # (B, T + N, K) float32, known in advance (calendar)
    reset: Array | None = None  # (B,) bool: forget the carried recurrent state before this batch


class BatchSource(Protocol):
    """Random access to the batches of training: item `step` is a whole batch, the same on every
    call.

    The order is a function of (seed, epoch), so the step alone says where training stands.
    """

    def __len__(self) -> int: ...  # steps in one epoch
    def __getitem__(
        self, step: int
    ) -> Batch: ...  # any step >= 0, epochs follow each other without end


class Info(Protocol):
    """What tasks and predictions need to know: label names, vocabulary, scaler (see each
    module)."""

    def sample(
        self, batch_size: int
    ) -> Batch: ...  # a batch of zeros with the form of the longest of training


class Dataset(Protocol):
    """Data in memory, split and encoded."""

    @property
    def info(self) -> Info: ...
    def size(self, split: str) -> int: ...  # examples in "train", "validation" or "test"
    def train(self, batch_size: int, seed: int) -> BatchSource: ...
    def evaluation(
        self, split: str, batch_size: int
    ) -> Iterator[Batch]: ...  # every example once, in a fixed order


class Data(Protocol):
    """The `data` section of a config: a frozen dataclass of settings. One of your own can inherit
    from this class and needs `load` and `restore`."""

    def load(self, assets: Path) -> Dataset:
        """Reads the data. What is fitted on the training split (vocabulary, scaler) is read from
        the folder `assets` where it is there already, else fitted and saved there."""
        ...

    def restore(self, assets: Path) -> Info:
        """The `info` of an earlier `load` into `assets`, without the data: all that a prediction
        needs."""
        ...

    def outline(self) -> Info | None:
        """`info` as far as the settings alone tell it, at the largest sizes that they allow: a plan
        then needs no data.
        None: they have to be read."""
        return None

    def absolute(self) -> Self:
        """The same settings with absolute paths, so that a run works from any directory."""
        return self

    def read(self, path: Path) -> pd.DataFrame:
        """A file of new inputs for `predict`, checked for the columns it needs."""
        raise UserError(f"{type(self).__name__} has no form of input file")
