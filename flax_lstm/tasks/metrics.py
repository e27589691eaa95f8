# SPDX-License-Identifier: Apache-2.0
"""Figures from sums that can be added over batches, devices and processes: never a mean of means.

Axes: B batch, K classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
BINS = 4096  # of the histogram behind the area under the curve


class Mean(NamedTuple):
    """A weighted mean in the making."""

    total: Array
    weight: Array

    @property
    def value(self) -> Any:
        """The mean, a NumPy number or array; NaN where nothing was counted."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.total, np.float64) / np.asarray(self.weight, np.float64)


def confusion(predicted_B: Array, actual_B: Array, weights_B: Array, classes: int) -> Array:
    """[K actual, K predicted]: how much weight fell in each cell."""
    cells = actual_B * classes + predicted_B
    return jnp.zeros(classes * classes).at[cells].add(weights_B).reshape(classes, classes)


def macro_f1(confusion_KK: np.ndarray) -> float:
    """The F1 score of each class that occurs or was predicted, averaged over these classes."""
    hits = np.diag(confusion_KK)
    sizes = confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1)
    return float(np.mean(2 * hits[sizes > 0] / sizes[sizes > 0]))


def score_histogram(margin_B: Array, actual_B: Array, weights_B: Array) -> Array:
    """[2, BINS]: scores of the negatives and of the positives, by x / (1 + |x|) of the margin
    between the logits."""
    place = 0.5 + 0.5 * margin_B / (1 + jnp.abs(margin_B))
    bins = jnp.clip((place * BINS).astype(jnp.int32), 0, BINS - 1)
    return jnp.zeros((2, BINS)).at[actual_B, bins].add(weights_B)


def area_under_curve(histogram_2: np.ndarray) -> float:
    """The area under the ROC curve: how often a positive scores above a negative, ties (one bin)
    counted half."""
    negatives, positives = np.asarray(histogram_2, np.float64)
    below = np.cumsum(negatives) - negatives
    pairs = negatives.sum() * positives.sum()
    return float(np.sum(positives * (below + negatives / 2)) / pairs) if pairs else float("nan")
