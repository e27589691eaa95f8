# SPDX-License-Identifier: Apache-2.0
"""Language modelling."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from flax_lstm.data.base import Batch
from flax_lstm.tasks.base import Array, Baseline, Monitor, Sums, Task, weighted
from flax_lstm.tasks.metrics import Mean


@dataclass(frozen=True)
class LanguageModeling(Task):
    """The next token at every step, by truncated back-propagation through time: the recurrent state
    is carried from batch to batch, its gradient is not (Mikolov et al. 2010)."""

    monitor: ClassVar[Monitor] = Monitor("loss")

    def build(self, model: Any, info: Any) -> nn.Module:
        return model.sequence(info.vocabulary_size, info.vocabulary_size, pooled=False)

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.targets)
        return weighted(losses_BT, batch.weights)

    def measure(self, outputs: Array, batch: Batch, info: Any) -> Sums:
        right_BT = (jnp.argmax(outputs, axis=-1) == batch.targets).astype(jnp.float32)
        return {"loss": self.loss(outputs, batch), "accuracy": weighted(right_BT, batch.weights)}

    def figures(self, sums: Sums, info: Any) -> dict[str, float]:
        loss = float(sums["loss"].value)
        return {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "accuracy": float(sums["accuracy"].value),
        }

    def baselines(self, info: Any) -> dict[str, Baseline]:
        counts = np.asarray(info.token_counts, np.float32)
        log_share = np.log(np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum())
        return {
            "unigram": lambda batch: jnp.broadcast_to(
                log_share, (*batch.targets.shape, len(counts))
            )
        }
