# SPDX-License-Identifier: Apache-2.0
"""Classification of sequences.

Axes: B batch, T time, N horizon, C target channels, K classes or vocabulary, Q quantiles.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import linen as nn

from flax_lstm.data.base import Batch, Labelled
from flax_lstm.errors import require
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    Forward,
    Monitor,
    SequenceBuilder,
    Sums,
    Task,
    vocabulary_size,
    weighted,
)
from flax_lstm.tasks.metrics import Mean, area_under_curve, confusion, macro_f1, score_histogram


@dataclass(frozen=True)
class Classification(Task):
    """One label for a sequence: softmax cross-entropy."""

    label_smoothing: float = 0.0  # share of the target spread over all classes

    monitor: ClassVar[Monitor] = Monitor("accuracy", maximise=True)
    needs: ClassVar[type | None] = Labelled
    builds: ClassVar[type | None] = SequenceBuilder

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"task.label-smoothing {self.label_smoothing}: must be in [0, 1)",
        )

    def build(self, model: SequenceBuilder, info: Labelled) -> nn.Module:
        return model.sequence(len(info.labels), vocabulary_size(info))

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        return self._cross_entropy(outputs, batch, self.label_smoothing)

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
                outputs[:, 1] - outputs[:, 0], batch.targets, batch.weights
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
            "majority": lambda batch: jnp.broadcast_to(log_share, (len(batch.targets), len(counts)))
        }

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """The table with columns `label` and `probability`; its own of these names become
        `label_input` and so on. `attrs["probabilities"]` has, for each row, the probability of
        every label."""
        parts = [forward(batch) for batch in info.batches(info.inputs(table), batch_size)]
        logits = np.concatenate(parts)[: len(table)].astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        given = {
            name: f"{name}_input" for name in ("label", "probability") if name in table.columns
        }
        result = table.rename(columns=given)
        best = shares.argmax(axis=1)
        result["label"] = [info.labels[k] for k in best]
        result["probability"] = shares[np.arange(len(best)), best]
        result.attrs["probabilities"] = [
            dict(zip(info.labels, row.tolist(), strict=True)) for row in shares
        ]
        return result
