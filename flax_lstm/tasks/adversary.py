# SPDX-License-Identifier: Apache-2.0
"""Training at inputs that were moved the worst way: Miyato, Dai & Goodfellow 2017, "Adversarial
Training Methods for Semi-Supervised Text Classification".

Moves are in units of the inputs' standard deviation, as `SequenceModel` adds them: to embeddings
that are normalised by the frequencies of the batch (their equation 3), so that nothing is gained by
larger embeddings.

Axes: B batch, T time, D input features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flax_lstm.data.base import Batch
from flax_lstm.tasks.metrics import Mean

Array = jax.Array
MOVES = "moves"  # the collection in which a module finds a move of its inputs
# How far from the inputs the direction is sought in which the answer changes most. At the inputs
# themselves the divergence is least, and its gradient 0
PROBE = 0.1


@dataclass(frozen=True)
class Adversary:
    """Moves each sequence to where a cost is larger, and has the cost there added to the loss.

    size: the Euclidean norm of a sequence's move, over all its steps.
    cost: (outputs, outputs at moved inputs, batch) -> the cost of the move.
    probe: distance from the inputs, in a random direction, at which the cost's gradient is taken.
    """

    size: float
    cost: Callable[[Array, Array, Batch], Mean]
    probe: float = 0.0

    def move(
        self, outputs_at: Callable[[Array], Array], zeros_BTD: Array, batch: Batch, key: Array
    ) -> Array:
        """The worst move by the cost's gradient (their equations 5 and 7, one step of the power
        method). outputs_at: the outputs where the inputs are moved so far."""
        valid_BT1 = (jnp.arange(zeros_BTD.shape[1])[None] < batch.lengths[:, None])[..., None]
        random_BTD = jax.random.normal(key, zeros_BTD.shape, zeros_BTD.dtype)
        start_BTD = self.probe * unit(random_BTD * valid_BT1)
        outputs = outputs_at(zeros_BTD)

        def total(moved_BTD: Array) -> Array:
            return self.cost(outputs, outputs_at(moved_BTD), batch).total

        return self.size * unit(jax.grad(total)(start_BTD))


def unit(x_BTD: Array) -> Array:
    """Each row divided by its Euclidean norm over T and D; zeros stay zeros. Divided by the largest
    entry first, whose square may be too small for float32."""
    largest_B11 = jnp.max(jnp.abs(x_BTD), axis=(1, 2), keepdims=True)
    x_BTD = x_BTD / jnp.where(largest_B11 > 0, largest_B11, 1)
    return x_BTD / jnp.maximum(jnp.sqrt(jnp.sum(x_BTD**2, axis=(1, 2), keepdims=True)), 1)


def divergence(logits_BK: Array, moved_BK: Array) -> Array:
    """KL(p || q) [B] of the answers p before and q after a move; p is taken as given."""
    before_BK = jax.nn.log_softmax(jax.lax.stop_gradient(logits_BK))
    after_BK = jax.nn.log_softmax(moved_BK)
    return jnp.sum(jnp.exp(before_BK) * (before_BK - after_BK), axis=-1)
