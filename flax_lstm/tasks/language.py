# SPDX-License-Identifier: Apache-2.0
"""Language modelling."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from flax_lstm.data.base import Batch, Documents
from flax_lstm.errors import MOST, require
from flax_lstm.nn.models import Factored
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    LanguageModelBuilder,
    Monitor,
    Sums,
    Task,
    weighted,
)
from flax_lstm.tasks.metrics import Mean
from flax_lstm.tasks.sampled_softmax import draw, sampled_cross_entropy


@dataclass(frozen=True)
class LanguageModeling(Task):
    """The next token at every step, by truncated back-propagation through time: the recurrent state
    is carried from batch to batch, its gradient is not (Mikolov et al. 2010)."""

    # words in the softmax of a training step, shared by its batch (sampled softmax); 0: all.
    # Evaluation always takes all of them
    candidates: int = 0

    monitor: ClassVar[Monitor] = Monitor("loss")
    needs: ClassVar[type | None] = Documents
    builds: ClassVar[type | None] = LanguageModelBuilder

    def __post_init__(self) -> None:
        require(
            0 <= self.candidates <= MOST,
            f"task.candidates {self.candidates}: must be 0 (all words) or a number of words",
        )

    def build(self, model: LanguageModelBuilder, info: Documents) -> nn.Module:
        return model.language_model(info.vocabulary_size, factored=self.candidates > 0)

    def loss(self, outputs: Any, batch: Batch) -> Mean:
        """outputs: scores [B, T, V], or `Factored` ones."""
        if not isinstance(outputs, Factored):
            losses_BT = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.targets)
            return weighted(losses_BT, batch.weights)
        features_BTE, weights_VE, bias_V, u = outputs
        losses_N = sampled_cross_entropy(
            features_BTE.reshape(-1, features_BTE.shape[-1]),
            weights_VE.astype(features_BTE.dtype),
            bias_V,
            batch.targets.reshape(-1),
            draw(len(bias_V), self.candidates, u),
        )
        return weighted(losses_N.reshape(batch.targets.shape), batch.weights)

    def whole(self, outputs: Any) -> Array:
        scores: Array = outputs.scores() if isinstance(outputs, Factored) else outputs
        return scores

    def measure(self, outputs: Any, batch: Batch, info: Documents) -> Sums:
        """A step at a time where the outputs are `Factored`: the scores of all words at all steps
        are larger than all else."""
        if isinstance(outputs, Factored):
            losses_TB, right_TB = jax.lax.map(
                lambda step: judge(outputs._replace(features_BTE=step[0]).scores(), step[1]),
                (outputs.features_BTE.swapaxes(0, 1), batch.targets.T),
            )
            losses_BT, right_BT = losses_TB.T, right_TB.T
        else:
            losses_BT, right_BT = judge(outputs, batch.targets)
        return {
            "loss": weighted(losses_BT, batch.weights),
            "accuracy": weighted(right_BT, batch.weights),
        }

    def figures(self, sums: Sums, info: Documents) -> dict[str, float]:
        loss = float(sums["loss"].value)
        return {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "accuracy": float(sums["accuracy"].value),
        }

    def baselines(self, info: Documents) -> dict[str, Baseline]:
        counts = np.asarray(info.token_counts, np.float32)
        log_share = np.log(np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum())

        def unigram(batch: Batch) -> Factored:
            # Behind the barrier, or XLA would work out the figures of a whole batch of constants
            # while it compiles: minutes for a large vocabulary.
            share_V = jax.lax.optimization_barrier(jnp.asarray(log_share))
            features_BTE = jnp.zeros((*batch.targets.shape, 1))
            return Factored(features_BTE, jnp.zeros((len(counts), 1)), share_V, jnp.zeros(()))

        return {"unigram": unigram}


def judge(scores: Array, targets: Array) -> tuple[Array, Array]:
    """The cross-entropy of scores [..., V], and 1 where the largest is that of the target."""
    right = (jnp.argmax(scores, axis=-1) == targets).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(scores, targets), right
