# SPDX-License-Identifier: Apache-2.0
"""What is learnt: a task builds the module, says the loss, and turns outputs into figures and
predictions.

A task is a frozen dataclass; its fields are the `task` section of a config. `info` is what the data
say of themselves (label names, scaler, vocabulary), `forward` maps a batch to the module's outputs
as a NumPy array.

Axes: B batch, T time, N horizon, C target channels, K classes or vocabulary, Q quantiles.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import linen as nn

from flax_lstm.data.base import Batch, SeriesForm, Stepwise, Tokens
from flax_lstm.errors import UserError, listing
from flax_lstm.nn.models import Parts
from flax_lstm.tasks.adversary import Adversary
from flax_lstm.tasks.metrics import Mean

logger = logging.getLogger(__name__)

Array = jax.Array
Sums = Any  # a tree of arrays that add over batches
Forward = Callable[[Batch], np.ndarray]
# Outputs of a form the module gives, by a rule that learns nothing; traced by JAX
Baseline = Callable[[Batch], Any]


class Monitor(NamedTuple):
    """The validation figure that says which checkpoint is best."""

    figure: str
    maximise: bool = False


class SequenceBuilder(Protocol):
    """Models of whole sequences."""

    def sequence(self, outputs: int, vocabulary_size: int = 0, per_step: bool = False) -> nn.Module:
        """A module with `outputs` outputs a sequence, or a step; `vocabulary_size` 0: numbers."""
        ...


class ForecasterBuilder(Protocol):
    """Forecasters."""

    def forecaster(self, form: SeriesForm) -> nn.Module:
        """A module that forecasts series of this form."""
        ...


class LanguageModelBuilder(Protocol):
    """Language models."""

    def language_model(self, vocabulary_size: int, factored: bool = False) -> nn.Module:
        """A module with logits of the next token at every step; `Factored` ones where that is
        asked for."""
        ...


class Task(Protocol):
    """The `task` section of a config.

    needs: the trait of `info` (see `flax_lstm.data.base`) that `info` has below; builds: what
    `model` has to build. Where they are said, what does not go together is refused before the data
    are read.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # for type checkers: `replace` takes them

    monitor: ClassVar[Monitor]
    needs: ClassVar[type | None] = None
    builds: ClassVar[type | None] = None

    def build(self, model: Any, info: Any) -> nn.Module:
        """The module for these settings and data."""
        ...

    def check(self, dataset: Any) -> None:
        """Raises UserError for data that the task has no use for."""

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        """What is minimised, as a total and the weight to divide it by."""
        ...

    def adversaries(self) -> tuple[Adversary, ...]:
        """What moves the inputs of a training step the worst way, and adds its cost to the loss."""
        return ()

    def whole(self, outputs: Any) -> Array:
        """The module's outputs as one array, where they are parts of it; traced by JAX."""
        return outputs  # type: ignore[no-any-return]

    def measure(self, outputs: Array, batch: Batch, info: Any) -> Sums:
        """Sums over the batch from which `figures` come; traced by JAX."""
        ...

    def figures(self, sums: Sums, info: Any) -> dict[str, float]:
        """Named figures from the sums over a split."""
        ...

    def baselines(self, info: Any) -> dict[str, Baseline]:
        """Rules that learn nothing, to be judged by the same figures."""
        ...

    def settle(self, dataset: Any, forward: Forward, folder: Path) -> Self:
        """The task as its figures and predictions are to be from the end of training on, with what
        it found on the validation split; kept in the run's folder."""
        return self

    def settled(self, folder: Path) -> Self:
        """The task as `settle` left it there."""
        return self

    def rivals(self, dataset: Any, split: str, folder: Path) -> dict[str, dict[str, float]]:
        """Figures on a split of simpler models that are fitted on the training split, to be shown
        beside the baselines; kept in the folder, so that they are fitted once."""
        return {}

    def final(self, outputs: np.ndarray, batch: Batch) -> np.ndarray:
        """The module's outputs as figures and predictions take them, calibrated: what a task that
        is not calibrated itself has nothing to add to."""
        return outputs

    def pooled(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The `final` outputs of several models for one batch as those of one."""
        return np.mean(outputs, axis=0)

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """Predictions for a table of new inputs."""
        raise UserError(f"{type(self).__name__} has no predictions for a table of inputs")

    def answer(self, row: pd.Series, info: Any) -> dict[str, Any]:
        """A row of `predict`, for one text, as it is printed in JSON."""
        raise UserError(f"{type(self).__name__} has no answer for one text; give it a table")

    def illustrate(self, dataset: Any, forward: Forward, folder: Path) -> None:
        """Draws into the folder what helps to judge the model."""


@runtime_checkable
class Forecaster(Protocol):
    """A task whose predictions are of times to come."""

    def forecast(
        self,
        table: pd.DataFrame,
        info: Any,
        forward: Forward,
        batch_size: int,
        cutoffs: Sequence[str] = (),
        paths: bool = False,
    ) -> pd.DataFrame:
        """Predictions for a table of new inputs. cutoffs: from what was known at each of these
        times, instead of the end of the table. paths: with the sample paths of a model that draws
        them."""
        ...


class Outputs(NamedTuple):
    """What a module gives for examples, and what they are in truth."""

    outputs: np.ndarray
    targets: np.ndarray


@runtime_checkable
class Examiner(Protocol):
    """A task that can say more of a split than its figures."""

    def examine(
        self, dataset: Any, split: str, outputs: np.ndarray, held_out: Outputs | None
    ) -> dict[str, Any]:
        """Ready for JSON. outputs: [N, ...] for the rows of the split, as evaluation gives them.
        held_out: those of other rows, with their targets, to calibrate with."""
        ...

    def plot(self, found: dict[str, Any], path: Path) -> None:
        """Draws what `examine` found."""
        ...


def beside(table: pd.DataFrame, new: Mapping[str, Any]) -> pd.DataFrame:
    """The table with new columns. Its own of these names are kept as `NAME_input`, or with more of
    `_input` where the table has that, too."""
    taken = {*table.columns, *new}
    names = {}
    for name in table.columns:
        own = name
        while own in (taken if own != name else new):
            own = f"{own}_input"
        names[name] = own
        taken.add(own)
    return pd.concat([table.rename(columns=names), pd.DataFrame(new, index=table.index)], axis=1)


def warn_of_empty(batches: Sequence[Batch], rows: int) -> None:
    """Names the rows, of so many, without any step or word: what is answered to them is a guess."""
    lengths = np.concatenate([batch.lengths for batch in batches])[:rows]
    if len(empty := np.flatnonzero(lengths == 0)):
        logger.warning(
            "warning: nothing to read in %d row(s), %s: the answer is a guess",
            len(empty),
            listing((empty + 1).tolist()),
        )


def vocabulary_size(info: object) -> int:
    """How many different tokens there are; 0 where the inputs are numbers."""
    return info.vocabulary_size if isinstance(info, Tokens) else 0


def has_target_per_step(info: object) -> bool:
    """Whether every step has a target; else a sequence has one."""
    return isinstance(info, Stepwise) and info.per_step


def of_parts(outputs: Any, loss: Callable[[Array], Mean]) -> Mean:
    """The loss of a model's outputs; of parts that learn each by itself, the mean of their
    losses."""
    if not isinstance(outputs, Parts):
        return loss(outputs)
    return jax.tree.map(lambda *values: sum(values) / len(values), *map(loss, outputs))


def weighted(values_B: Array, weights_B: Array) -> Mean:
    """The mean of values, broadcast against weights."""
    weights = jnp.broadcast_to(weights_B, values_B.shape)
    return Mean(jnp.sum(values_B * weights), jnp.sum(weights))
