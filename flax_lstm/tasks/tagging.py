# SPDX-License-Identifier: Apache-2.0
"""Any number of tags for a sequence.

Axes: B batch, K tags.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import linen as nn

from flax_lstm.data.base import Batch, Tagged
from flax_lstm.data.sources import Texts
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    Forward,
    Monitor,
    Outputs,
    SequenceBuilder,
    Sums,
    Task,
    beside,
    of_parts,
    vocabulary_size,
    warn_of_empty,
    weighted,
)
from flax_lstm.tasks.examination import TagAnswers, examine_tags, fit_temperature, yes_or_no
from flax_lstm.tasks.linear import linear_logits, linear_rival
from flax_lstm.tasks.metrics import Mean
from flax_lstm.tasks.plots import plot_examination


@dataclass(frozen=True)
class Tagging(Task):
    """Whether a sequence has each of some tags: a logistic regression each, on what they share; a
    tag is given from a probability of one half on.

    Figures: `loss`, the mean cross-entropy of a tag; `accuracy`, the share of rows of which all
    tags are right; `f1`, the mean of the F1 scores of the tags that occur or were given, and that
    of all of them together, `f1_micro`.
    """

    # fit a linear model of words and pairs for each tag beside it, for texts (needs scikit-learn)
    linear: bool = True

    monitor: ClassVar[Monitor] = Monitor("f1", maximise=True)
    needs: ClassVar[type | None] = Tagged
    builds: ClassVar[type | None] = SequenceBuilder

    def build(self, model: SequenceBuilder, info: Tagged) -> nn.Module:
        return model.sequence(len(info.tags), vocabulary_size(info))

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        def cross_entropy(scores_BK: Array) -> Mean:
            losses_BK = optax.sigmoid_binary_cross_entropy(scores_BK, batch.targets)
            return weighted(losses_BK, batch.weights[:, None])

        return of_parts(outputs, cross_entropy)

    def measure(self, outputs: Array, batch: Batch, info: Tagged) -> Sums:
        given_BK, has_BK = outputs >= 0, batch.targets > 0.5
        weights_B1 = batch.weights[:, None]
        return {
            "loss": self.loss(outputs, batch),
            "right": weighted(jnp.all(given_BK == has_BK, axis=1), batch.weights),
            "both": jnp.sum(weights_B1 * (given_BK & has_BK), axis=0),
            "given": jnp.sum(weights_B1 * given_BK, axis=0),
            "has": jnp.sum(weights_B1 * has_BK, axis=0),
        }

    def figures(self, sums: Sums, info: Tagged) -> dict[str, float]:
        both_K, given_K, has_K = (np.asarray(sums[n], np.float64) for n in ("both", "given", "has"))
        either_K = given_K + has_K
        seen_K = either_K > 0
        return {
            "loss": float(sums["loss"].value),
            "accuracy": float(sums["right"].value),
            "f1": float(np.mean(2 * both_K[seen_K] / either_K[seen_K])) if seen_K.any() else 0.0,
            "f1_micro": float(2 * both_K.sum() / max(either_K.sum(), 1e-12)),
        }

    def pooled(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Logits of the mean probabilities, from their logarithms so that none is lost."""
        logits = np.asarray(outputs, np.float64)
        yes, no = (np.logaddexp.reduce(-np.logaddexp(0, -x)) for x in (logits, -logits))
        return np.asarray(yes - no)

    def baselines(self, info: Tagged) -> dict[str, Baseline]:
        """`shares`: each tag as likely as it is among the training rows."""
        share_K = np.clip(np.asarray(info.tag_shares, np.float32), 1e-6, 1 - 1e-6)
        logits_K = np.log(share_K / (1 - share_K))
        return {"shares": lambda batch: jnp.broadcast_to(logits_K, batch.targets.shape)}

    def rivals(self, dataset: Any, split: str, folder: Path) -> dict[str, dict[str, float]]:
        """`linear`, for texts: see `flax_lstm.tasks.linear`."""

        def fit(train: Texts, new: Texts) -> np.ndarray | None:
            has_NK = dataset.info.targets("train", train.labels)
            return linear_logits(train.texts, has_NK, new.texts)

        return linear_rival(self, dataset, split, folder, fit)

    def examine(
        self, dataset: Any, split: str, outputs: np.ndarray, held_out: Outputs | None
    ) -> dict[str, Any]:
        """See `flax_lstm.tasks.examination`; of data that are texts."""
        order, read = dataset.order(split), dataset.read(split)
        has_NK = dataset.info.targets(split, [read.labels[n] for n in order]) > 0.5
        texts = [read.texts[n] for n in order]
        temperature = None
        if held_out is not None:
            had = (held_out.targets > 0.5).ravel().astype(int)
            temperature = fit_temperature(yes_or_no(held_out.outputs), had)
        answers = TagAnswers(outputs, has_NK, dataset.lengths(split), texts)
        return examine_tags(answers, dataset.info.tags, temperature)

    def plot(self, found: dict[str, Any], path: Path) -> None:
        plot_examination(found, path)

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """The table with the column `predicted`, the tags of each row with the separator of
        training between them, and `probability_TAG` for every tag; its own of these names become
        `predicted_input` and so on. A warning names the rows without any word."""
        batches = [*info.batches(info.inputs(table), batch_size)]
        warn_of_empty(batches, len(table))
        parts = [forward(batch) for batch in batches]
        logits_NK = np.concatenate(parts)[: len(table)].astype(np.float64)
        shares_NK = 0.5 + 0.5 * np.tanh(logits_NK / 2)
        new: dict[str, Any] = {
            "predicted": [
                info.separator.join(np.array(info.tags)[row >= 0.5]) for row in shares_NK
            ],
            **{f"probability_{tag}": shares_NK[:, k] for k, tag in enumerate(info.tags)},
        }
        return beside(table, new)

    def answer(self, row: pd.Series, info: Tagged) -> dict[str, Any]:
        shares = {tag: float(row[f"probability_{tag}"]) for tag in info.tags}
        return {"tags": [tag for tag, p in shares.items() if p >= 0.5], "probabilities": shares}
