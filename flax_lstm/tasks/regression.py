# SPDX-License-Identifier: Apache-2.0
"""Regression of sequences."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import linen as nn

from flax_lstm.data.base import Batch, Measured
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    Forward,
    Monitor,
    SequenceBuilder,
    Sums,
    Task,
    beside,
    has_target_per_step,
    vocabulary_size,
    weighted,
)
from flax_lstm.tasks.metrics import Mean


@dataclass(frozen=True)
class SequenceRegression(Task):
    """One number (or several) for a sequence, or for each of its steps, by squared error: the
    synthetic tests of long-term memory."""

    monitor: ClassVar[Monitor] = Monitor("mse")
    needs: ClassVar[type | None] = Measured
    builds: ClassVar[type | None] = SequenceBuilder

    def build(self, model: SequenceBuilder, info: Measured) -> nn.Module:
        return model.sequence(info.outputs, vocabulary_size(info), has_target_per_step(info))

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        return weighted(jnp.square(outputs - batch.targets), batch.weights[..., None])

    def measure(self, outputs: Array, batch: Batch, info: Measured) -> Sums:
        error = outputs - batch.targets
        return {
            "mse": weighted(jnp.square(error), batch.weights[..., None]),
            "mae": weighted(jnp.abs(error), batch.weights[..., None]),
        }

    def figures(self, sums: Sums, info: Measured) -> dict[str, float]:
        mse, mae = float(sums["mse"].value), float(sums["mae"].value)
        return {"loss": mse, "mse": mse, "mae": mae}

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """The table with a column `predicted`, or `predicted_1` and so on for several numbers; its
        own of these names become `predicted_input` and so on."""
        batches = [*info.batches(info.inputs(table), batch_size)]
        parts = [forward(batch) for batch in batches]
        if has_target_per_step(info):
            rows = [
                outputs_TO[:length].astype(np.float64).squeeze().tolist()
                for batch, outputs_BTO in zip(batches, parts, strict=True)
                for outputs_TO, length in zip(outputs_BTO, batch.lengths, strict=True)
            ]
            return beside(table, {"predicted": rows[: len(table)]})
        outputs = np.concatenate(parts)[: len(table)].astype(np.float64)
        names = [f"predicted_{n}" for n in range(1, outputs.shape[1] + 1)]
        columns = dict(zip(names if len(names) > 1 else ["predicted"], outputs.T, strict=True))
        return beside(table, columns)

    def baselines(self, info: Measured) -> dict[str, Baseline]:
        mean = np.asarray(info.target_mean, np.float32)
        return {"mean": lambda batch: jnp.broadcast_to(mean, batch.targets.shape)}
