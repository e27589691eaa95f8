# SPDX-License-Identifier: Apache-2.0
"""Regression of sequences."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_lstm.data.base import Batch, Measured
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    Monitor,
    SequenceBuilder,
    Sums,
    Task,
    vocabulary_size,
    weighted,
)
from flax_lstm.tasks.metrics import Mean


@dataclass(frozen=True)
class SequenceRegression(Task):
    """One number (or several) for a sequence, by squared error: the synthetic tests of long-term
    memory."""

    monitor: ClassVar[Monitor] = Monitor("mse")
    needs: ClassVar[type | None] = Measured
    builds: ClassVar[type | None] = SequenceBuilder

    def build(self, model: SequenceBuilder, info: Measured) -> nn.Module:
        return model.sequence(info.outputs, vocabulary_size(info))

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        return weighted(jnp.square(outputs - batch.targets), batch.weights[:, None])

    def measure(self, outputs: Array, batch: Batch, info: Measured) -> Sums:
        error = outputs - batch.targets
        return {
            "mse": weighted(jnp.square(error), batch.weights[:, None]),
            "mae": weighted(jnp.abs(error), batch.weights[:, None]),
        }

    def figures(self, sums: Sums, info: Measured) -> dict[str, float]:
        mse, mae = float(sums["mse"].value), float(sums["mae"].value)
        return {"loss": mse, "mse": mse, "mae": mae}

    def baselines(self, info: Measured) -> dict[str, Baseline]:
        mean = np.asarray(info.target_mean, np.float32)
        return {"mean": lambda batch: jnp.broadcast_to(mean, batch.targets.shape)}
