# SPDX-License-Identifier: Apache-2.0
"""What every data set gives the training loop: batches of one form, addressed by the global step.

Axes: B rows of a batch, T time steps, D input features, N horizon (future steps), C target
channels, K covariates. Nothing in this folder imports JAX or Flax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import pandas as pd

from flax_lstm.errors import UserError
from flax_lstm.machine.files import expanded, found_at

Array = Any  # NumPy from a data set, JAX within the training step


class Known(NamedTuple):
    """What is known of a window of a series besides the past values of its channels."""

    phase: Array  # (B,) int32, the place of the first step of the look-back within its season
    future: Array | None = None  # (B, T + N, K) float32, known in advance (calendar, plans)
    observed: Array | None = None  # (B, T, C) float32, 1 where a target was measured, 0 elsewhere
    static: Array | None = None  # (B, F) float32, the same all along the series
    codes: Array | None = None  # (B, G) int32, categories of the series


class Batch(NamedTuple):
    """One batch. Sequences are padded on the right; a row or step that is only padding has weight
    0."""

    inputs: Array  # (B, T) int32 token ids, or (B, T, D) float32
    targets: (
        Array  # (B,) int32 class, (B, T) int32 next token, (B, N, C) float32, or (B, 1) float32
    )
    lengths: Array  # (B,) int32, valid steps of each row
    weights: Array  # (B,), (B, T) or (B, N, C) float32: how much each row, step or value counts
    covariates: Known | None = None  # of series
    reset: Array | None = None  # (B,) bool: forget the carried recurrent state before this batch
    units: Array | None = None  # (B, 4, C) float32, of series: see `flax_lstm.data.windows`


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
    """What tasks and predictions need to know of the data. The traits below say what there can be
    in it; a task and a model each name one of them, and so are paired with data that have it."""

    def sample(self, batch_size: int) -> Batch:
        """A batch of zeros with the form of the longest of training."""
        ...


@runtime_checkable
class Tokens(Protocol):
    """Tokens: inputs (B, T) are ids below `vocabulary_size`."""

    vocabulary_size: int


class Features(Protocol):
    """Sequences of numbers: inputs are (B, T, features)."""

    features: int


@runtime_checkable
class Stepwise(Protocol):
    """A target for every step, or one for each sequence."""

    per_step: bool


class Labelled(Protocol):
    """Labels: targets (B,) are places in `labels`; `class_counts` of them are in training."""

    labels: tuple[str, ...]
    class_counts: tuple[int, ...]


class Tagged(Protocol):
    """Tags: targets (B, tags) are 1 for those that a row has, and 0; `tag_shares` of the training
    rows have each."""

    tags: tuple[str, ...]
    tag_shares: tuple[float, ...]


class Measured(Protocol):
    """Numbers to predict: targets are (B, outputs), with this mean in training."""

    outputs: int
    target_mean: float


class Documents(Tokens, Protocol):
    """Running text: targets (B, T) are the tokens that follow, found so often in training."""

    token_counts: tuple[int, ...]


class Windows(Protocol):
    """Time series: inputs (B, lookback, D) hold the targets first, targets are (B, horizon, C)."""

    targets: tuple[str, ...]
    lookback: int
    horizon: int
    season: int
    id_column: str  # of a table of many series; empty: one
    categories: tuple[int, ...]  # how many there are of each that a series has

    @property
    def reference_C(self) -> Array:
        """The unit of each target in which sums over batches are taken, float64."""
        ...


@dataclass(frozen=True)
class SeriesForm:
    """What a forecaster is built for."""

    lookback: int  # T
    horizon: int  # N
    channels: int = 1  # C
    per_value: int = 1  # numbers forecast for each value, such as quantiles
    season: int = 1  # steps
    categories: tuple[int, ...] = ()  # how many there are of each that a series has
    # What the outputs are parameters of (see `flax_lstm.nn.likelihoods`); None: values themselves
    likelihood: Any = None

    @property
    def outputs(self) -> int:
        """Numbers that a module gives for each value."""
        return self.per_value if self.likelihood is None else sum(self.likelihood.sizes)


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
    from this class and needs `load` and `restore`.

    gives: the class of the `info`. Where it is said, a task or a model that does not go with it is
    refused before the data are read.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # for type checkers: `replace` takes them

    gives: ClassVar[type | None] = None
    # Which files are read below a folder that a setting names, as `Path.glob` takes it
    below: ClassVar[tuple[str, ...]] = ("**/*",)

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

    def inherit(self, theirs: Path, ours: Path) -> None:
        """Takes over into the folder `ours`, before a new run's `load`, what the run that it begins
        with keeps in the folder `theirs` and its weights depend on: a vocabulary."""
        return None

    def adopt(self, words: Sequence[str], ours: Path) -> None:
        """Takes over the words of an embedding that was trained elsewhere. Raises UserError where
        the data have none."""
        raise UserError(f"words: {type(self).__name__} has no vocabulary")

    def files(self) -> list[Path]:
        """Files and folders that the data are read from, as far as they are there: a run is not
        resumed on other content. Here: those that settings with `path` in their name say."""
        names = (f.name for f in fields(self) if "path" in f.name)  # type: ignore[arg-type]
        paths = [expanded(str(getattr(self, name))) for name in names]
        return [path for path in paths if path.name and found_at(path) is not None]

    def absolute(self) -> Self:
        """The same settings with absolute paths, so that a run works from any directory."""
        return self

    def holding(self, table: Any) -> Self:
        """The same settings for data that a program has in memory."""
        raise UserError(
            f"{type(self).__name__} reads data of its own; data in memory go with SeriesTable, "
            "PanelTable, TextTable, LanguageTable or Sequences"
        )

    def table(self, inputs: Any) -> pd.DataFrame:
        """New inputs for predictions, as a program has them, in the form of `read`."""
        if isinstance(inputs, pd.DataFrame):
            return inputs
        raise UserError(f"predict takes a DataFrame here, not a {type(inputs).__name__}")

    def labelled(self, path: Path, assets: Path) -> Dataset:
        """A file of new inputs with what they are in truth, as the split "input"; nothing is fitted
        to it."""
        raise UserError(
            f"--input: new labelled data are judged of texts with labels or tags, and this run has "
            f"{type(self).__name__}; without --input a split of its own data is (--split)"
        )

    def read(self, path: Path) -> pd.DataFrame:
        """A file of new inputs for `predict`, checked for the columns it needs."""
        raise UserError(f"{type(self).__name__} has no form of input file")
