# SPDX-License-Identifier: Apache-2.0
"""Classification of sequences.

Axes: B batch, T time, N horizon, C target channels, K classes or vocabulary, Q quantiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.special
from flax import linen as nn

from flax_lstm.data.base import Batch, Labelled
from flax_lstm.data.sources import Texts
from flax_lstm.errors import require
from flax_lstm.nn.models import Parts
from flax_lstm.tasks.adversary import PROBE, Adversary, divergence
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
    has_target_per_step,
    of_parts,
    vocabulary_size,
    warn_of_empty,
    weighted,
)
from flax_lstm.tasks.examination import Answers, examine, fit_temperature
from flax_lstm.tasks.linear import linear_log_probabilities, linear_rival
from flax_lstm.tasks.metrics import Mean, area_under_curve, confusion, macro_f1, score_histogram
from flax_lstm.tasks.plots import plot_examination


@dataclass(frozen=True)
class Classification(Task):
    """One label for a sequence, or one for each of its steps: softmax cross-entropy."""

    label_smoothing: float = 0.0  # share of the target spread over all classes
    # Norm of a move of each sequence to where the loss is larger, in standard deviations of its
    # inputs; trained on as well (Miyato et al. 2017, who take 5 for reviews); 0: none
    adversarial: float = 0.0
    # The same to where the answer changes most, whatever the label, so that rows without one
    # (data.unlabelled) are learnt from as well; three times the time of a step
    virtual: float = 0.0
    # fit a linear model of words and pairs beside it, for texts (needs scikit-learn)
    linear: bool = True

    monitor: ClassVar[Monitor] = Monitor("accuracy", maximise=True)
    needs: ClassVar[type | None] = Labelled
    builds: ClassVar[type | None] = SequenceBuilder

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"task.label-smoothing {self.label_smoothing}: must be in [0, 1)",
        )
        for name in ("adversarial", "virtual"):
            size = getattr(self, name)
            require(0 <= size < math.inf, f"task.{name} {size}: must be a finite norm, 0 for none")

    def build(self, model: SequenceBuilder, info: Labelled) -> nn.Module:
        per_step = has_target_per_step(info)
        return model.sequence(len(info.labels), vocabulary_size(info), per_step)

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        return of_parts(
            outputs, lambda logits_BK: self._cross_entropy(logits_BK, batch, self.label_smoothing)
        )

    def adversaries(self) -> tuple[Adversary, ...]:
        """Adversarial and virtual adversarial training (Miyato et al. 2017, sections 3 and 4)."""

        def loss(outputs: Array, moved: Array, batch: Batch) -> Mean:
            return self.loss(moved, batch)

        def change(outputs: Array, moved: Array, batch: Batch) -> Mean:
            # N-grams do not move.
            before, after = (
                y.recurrent_BO if isinstance(y, Parts) else y for y in (outputs, moved)
            )
            without_label_B = (batch.weights == 0) & (batch.lengths > 0)
            return weighted(
                divergence(before, after), jnp.where(without_label_B, 1.0, batch.weights)
            )

        both = Adversary(self.adversarial, loss), Adversary(self.virtual, change, PROBE)
        return tuple(adversary for adversary in both if adversary.size)

    def _cross_entropy(self, logits_BK: Array, batch: Batch, smoothing: float) -> Mean:
        targets_BK = optax.smooth_labels(
            jax.nn.one_hot(batch.targets, logits_BK.shape[-1]), smoothing
        )
        return weighted(optax.softmax_cross_entropy(logits_BK, targets_BK), batch.weights)

    def measure(self, outputs: Array, batch: Batch, info: Labelled) -> Sums:
        predicted_B = jnp.argmax(outputs, axis=-1)
        sums = {
            "loss": self._cross_entropy(outputs, batch, 0.0),
            "confusion": confusion(predicted_B, batch.targets, batch.weights, len(info.labels)),
        }
        if len(info.labels) == 2:
            sums["scores"] = score_histogram(
                outputs[..., 1] - outputs[..., 0], batch.targets, batch.weights
            )
        return sums

    def figures(self, sums: Sums, info: Labelled) -> dict[str, float]:
        table = np.asarray(sums["confusion"], np.float64)
        figures = {
            "loss": float(sums["loss"].value),
            "accuracy": float(np.trace(table) / table.sum()),
            "f1": macro_f1(table),
        }
        return {**figures, "auc": area_under_curve(sums["scores"])} if "scores" in sums else figures

    def baselines(self, info: Labelled) -> dict[str, Baseline]:
        counts = np.asarray(info.class_counts, np.float32)
        log_share = np.log(np.maximum(counts, 1e-9) / counts.sum())
        return {
            "majority": lambda batch: jnp.broadcast_to(
                log_share, (*batch.targets.shape, len(counts))
            )
        }

    def pooled(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Logarithms of the mean probabilities."""
        log_shares = scipy.special.log_softmax(np.asarray(outputs, np.float64), axis=-1)
        return scipy.special.logsumexp(log_shares, axis=0) - np.log(len(outputs))

    def rivals(self, dataset: Any, split: str, folder: Path) -> dict[str, dict[str, float]]:
        """`linear`, for texts: see `flax_lstm.tasks.linear`."""

        def fit(train: Texts, new: Texts) -> np.ndarray | None:
            names = dataset.info.labels
            return linear_log_probabilities(train.texts, train.labels, names, new.texts)

        return linear_rival(self, dataset, split, folder, fit)

    def examine(
        self, dataset: Any, split: str, outputs: np.ndarray, held_out: Outputs | None
    ) -> dict[str, Any]:
        """See `flax_lstm.tasks.examination`; of data that are texts."""
        order, read = dataset.order(split), dataset.read(split)
        labels = dataset.info.labels
        actual_N = np.array([labels.index(read.labels[n]) for n in order])
        temperature = None if held_out is None else fit_temperature(*held_out)
        answers = Answers(outputs, actual_N, dataset.lengths(split), [read.texts[n] for n in order])
        return examine(answers, labels, temperature)

    def plot(self, found: dict[str, Any], path: Path) -> None:
        plot_examination(found, path)

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """The table with columns `predicted`, `probability` and, for every label, its
        `probability_LABEL`; its own of these names become `predicted_input` and so on.
        A warning names the rows without any step or word, for which the answer is a guess."""
        batches = [*info.batches(info.inputs(table), batch_size)]
        parts = [forward(batch) for batch in batches]
        if has_target_per_step(info):
            return self._predict_steps(table, info, batches, parts)
        logits = np.concatenate(parts)[: len(table)].astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        best = shares.argmax(axis=1)
        new: dict[str, Any] = {
            "predicted": [info.labels[k] for k in best],
            "probability": shares[np.arange(len(best)), best],
            **{f"probability_{label}": shares[:, k] for k, label in enumerate(info.labels)},
        }
        warn_of_empty(batches, len(table))
        return beside(table, new)

    def answer(self, row: pd.Series, info: Labelled) -> dict[str, Any]:
        shares = {str(label): float(row[f"probability_{label}"]) for label in info.labels}
        return {
            "label": str(row["predicted"]),
            "probability": float(row["probability"]),
            "probabilities": shares,
        }

    def _predict_steps(
        self, table: pd.DataFrame, info: Any, batches: list[Batch], parts: list[np.ndarray]
    ) -> pd.DataFrame:
        """The table with columns `predicted` and `probability` that hold a list each: one entry for
        every step of the sequence."""
        rows = [
            jax.nn.softmax(logits_TK[:length].astype(np.float64))
            for batch, logits_BTK in zip(batches, parts, strict=True)
            for logits_TK, length in zip(logits_BTK, batch.lengths, strict=True)
        ][: len(table)]
        names = [[info.labels[k] for k in row.argmax(axis=-1)] for row in map(np.asarray, rows)]
        best = [np.asarray(row).max(axis=-1, initial=0).tolist() for row in rows]
        return beside(table, {"predicted": names, "probability": best})
