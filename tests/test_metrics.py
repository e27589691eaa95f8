# SPDX-License-Identifier: Apache-2.0
"""Figures from sums, against what NumPy computes from all rows at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm.tasks.metrics import (
    BINS,
    Mean,
    area_under_curve,
    confusion,
    macro_f1,
    score_histogram,
)


def pairs_auc(scores: np.ndarray, actual: np.ndarray) -> float:
    """How often a positive scores above a negative, ties counted half: every pair looked at."""
    difference = scores[actual == 1][:, None] - scores[actual == 0]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def test_mean_of_batches_of_different_weight():
    first, second = (
        Mean(jnp.asarray(6.0), jnp.asarray(3.0)),
        Mean(jnp.asarray(10.0), jnp.asarray(1.0)),
    )
    together = Mean(first.total + second.total, first.weight + second.weight)
    assert together.value == 4.0 != (first.value + second.value) / 2
    assert np.isnan(Mean(np.zeros(()), np.zeros(())).value)
    np.testing.assert_array_equal(Mean(np.array([2.0, 3.0]), np.array(2.0)).value, [1.0, 1.5])


def test_confusion_counts_weights_with_actual_in_rows():
    table = confusion(
        jnp.array([0, 1, 1, 2]), jnp.array([0, 2, 1, 2]), jnp.array([1.0, 0.5, 1.0, 0.0]), 3
    )
    np.testing.assert_array_equal(table, [[1, 0, 0], [0, 1, 0], [0, 0.5, 0]])


def test_macro_f1_by_its_definition():
    generator = np.random.default_rng(0)
    actual, predicted = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    scores = []
    for k in range(4):
        hits = np.sum((actual == k) & (predicted == k))
        precision, recall = hits / np.sum(predicted == k), hits / np.sum(actual == k)
        scores.append(2 * precision * recall / (precision + recall))
    table = np.asarray(confusion(jnp.asarray(predicted), jnp.asarray(actual), jnp.ones(200), 4))
    assert macro_f1(table) == pytest.approx(np.mean(scores))


def test_macro_f1_leaves_out_a_class_that_is_nowhere():
    assert macro_f1(np.array([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])) == pytest.approx(
        (6 / 7 + 8 / 9) / 2
    )
    # Predicted though it does not occur: an F1 of 0, which counts.
    assert macro_f1(np.array([[3.0, 1.0], [0.0, 0.0]])) == pytest.approx((6 / 7 + 0) / 2)


def test_area_under_curve_with_ties_against_all_pairs():
    generator = np.random.default_rng(1)
    actual = generator.integers(0, 2, 300)
    margin = np.round(generator.normal(actual - 0.5, 1.5), 1).astype(
        np.float32
    )  # tenths: many ties, bins apart
    histogram = np.asarray(score_histogram(jnp.asarray(margin), jnp.asarray(actual), jnp.ones(300)))
    assert area_under_curve(histogram) == pytest.approx(pairs_auc(margin, actual), abs=1e-6)


def test_area_under_curve_leaves_out_rows_of_weight_zero():
    generator = np.random.default_rng(2)
    actual, keep = generator.integers(0, 2, 100), generator.integers(0, 2, 100)
    margin = np.round(generator.normal(0, 1, 100), 1).astype(np.float32)
    histogram = score_histogram(
        jnp.asarray(margin), jnp.asarray(actual), jnp.asarray(keep, jnp.float32)
    )
    expected = pairs_auc(margin[keep == 1], actual[keep == 1])
    assert area_under_curve(np.asarray(histogram)) == pytest.approx(expected, abs=1e-6)


def test_area_under_curve_at_its_ends():
    def area(margin, actual):
        margin, actual = np.asarray(margin, np.float32), np.asarray(actual)
        return area_under_curve(
            np.asarray(score_histogram(jnp.asarray(margin), jnp.asarray(actual), jnp.ones(4)))
        )

    assert area([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1]) == 1.0
    assert area([2.0, 1.0, -1.0, -2.0], [0, 0, 1, 1]) == 0.0
    assert area([0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1]) == 0.5
    assert area([-1e30, -1e30, 1e30, 1e30], [0, 0, 1, 1]) == 1.0
    assert np.isnan(area([0.0, 1.0, 2.0, 3.0], [1, 1, 1, 1]))  # no negative to compare with
    assert BINS >= 1000
