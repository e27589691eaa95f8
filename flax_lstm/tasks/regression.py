# SPDX-License-Identifier: Apache-2.0
"""Regression of sequences."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_lstm.data.base import Batch
from flax_lstm.tasks.base import Array, Baseline, Monitor, Sums, Task, weighted
from flax_lstm.tasks.metrics import Mean


@dataclass(frozen=True)
class SequenceRegression(Task):
    """One number (or several) for a sequence, by squared error: the synthetic tests of long-term
    memory."""

    monitor: ClassVar[Monitor] = Monitor("mse")

    def build(self, model: Any, info: Any) -> nn.Module:
        return model.sequence(info.outputs)

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        return weighted(jnp.square(outputs - batch.targets), batch.weights[:, None])

    def measure(self, outputs: Array, batch: Batch, info: Any) -> Sums:
        error = outputs - batch.targets
        return {
            "mse": weighted(jnp.square(error), batch.weights[:, None]),
            "mae": weighted(jnp.abs(error), batch.weights[:, None]),
        }

    def figures(self, sums: Sums, info: Any) -> dict[str, float]:
        mse, mae = float(sums["mse"].value), float(sums["mae"].value)
        return {"loss": mse, "mse": mse, "mae": mae}

    def baselines(self, info: Any) -> dict[str, Baseline]:
        mean = np.asarray(info.target_mean, np.float32)
        return {"mean": lambda batch: jnp.broadcast_to(mean, batch.targets.shape)}
