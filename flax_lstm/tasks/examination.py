# SPDX-License-Identifier: Apache-2.0
"""What a classifier gets right and wrong: by class, by length, how sure it is, and its worst
errors.

Axes: N examples, K classes, M bins.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 15  # of probability, in the calibration error
ERRORS = 20  # the most confident ones are shown
LENGTHS = 5  # groups of equal size that are told apart
EXCERPT = 500  # characters of a text that are shown


class Answers(NamedTuple):
    """Examples with what a model says of them, on the host."""

    logits_NK: np.ndarray
    actual_N: np.ndarray  # places in the labels
    tokens_N: np.ndarray  # lengths
    texts: Sequence[str]


def log_softmax(logits_NK: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits_NK.astype(np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def fit_temperature(logits_NK: np.ndarray, actual_N: np.ndarray) -> float:
    """The number that logits are best divided by: the least cross-entropy on these examples (Guo et
    al. 2017, section 4.2), between 1/100 and 100.

    The slope of the cross-entropy in 1 / temperature, the mean of (the expected logit - that of the
    true class), only grows, so that halving an interval finds its root.
    """
    rows = np.arange(len(actual_N))

    def slope(inverse: float) -> float:
        share_NK = np.exp(log_softmax(inverse * logits_NK))
        return float(((share_NK * logits_NK).sum(axis=1) - logits_NK[rows, actual_N]).mean())

    low, high = 0.01, 100.0
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / low


def reliability(probability_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, float]]:
    """For each bin of probability that has examples: how sure the model was on average, how often
    it was right, and how many examples there are."""
    bin_N = np.minimum((probability_N * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(probability_N[bin_N == m].mean()),
            "accuracy": float(right_N[bin_N == m].mean()),
            "examples": int((bin_N == m).sum()),
        }
        for m in range(BINS)
        if (bin_N == m).any()
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """By how much confidence and accuracy differ, on average over the examples (ECE, Naeini et al.
    2015)."""
    total = sum(b["examples"] for b in bins)
    return sum(abs(b["confidence"] - b["accuracy"]) * b["examples"] for b in bins) / total


def by_class(table_KK: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class, from the confusion [actual, predicted]; None where
    nothing is of the class, or predicted to be."""
    rows: list[dict[str, Any]] = []
    for k, label in enumerate(labels):
        hits, actual, predicted = table_KK[k, k], table_KK[k].sum(), table_KK[:, k].sum()
        rows.append(
            {
                "label": label,
                "examples": int(actual),
                "precision": float(hits / predicted) if predicted else None,
                "recall": float(hits / actual) if actual else None,
                "f1": float(2 * hits / (actual + predicted)) if actual + predicted else None,
            }
        )
    return rows


def by_length(tokens_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, float]]:
    """Accuracy in groups of about equal size, from the shortest texts to the longest."""
    cuts = np.unique(np.quantile(tokens_N, np.linspace(0, 1, LENGTHS + 1)[1:], method="higher"))
    group_N = np.searchsorted(cuts, tokens_N)
    return [
        {
            "shortest": int(tokens_N[group_N == g].min()),
            "longest": int(tokens_N[group_N == g].max()),
            "examples": int((group_N == g).sum()),
            "accuracy": float(right_N[group_N == g].mean()),
        }
        for g in range(len(cuts))
    ]


def examine(answers: Answers, labels: Sequence[str], temperature: float | None) -> dict[str, Any]:
    """Everything that can be said of the answers, ready for JSON.

    temperature: from `fit_temperature` on other examples; None: nothing is said of calibrated
    probabilities.
    """
    log_NK = log_softmax(answers.logits_NK)
    rows, predicted_N = np.arange(len(log_NK)), log_NK.argmax(axis=1)
    right_N = predicted_N == answers.actual_N
    table_KK = np.zeros((len(labels),) * 2, int)
    np.add.at(table_KK, (answers.actual_N, predicted_N), 1)
    sure_N = np.exp(log_NK.max(axis=1))
    bins = reliability(sure_N, right_N)
    calibration: dict[str, Any] = {"ece": calibration_error(bins)}
    if temperature is not None:
        cooled_NK = log_softmax(answers.logits_NK / temperature)
        cooled = reliability(np.exp(cooled_NK.max(axis=1)), right_N)
        calibration |= {
            "temperature": temperature,
            "ece_calibrated": calibration_error(cooled),
            "loss_calibrated": float(-cooled_NK[rows, answers.actual_N].mean()),
        }
    wrong = [int(n) for n in np.argsort(-sure_N, kind="stable") if not right_N[n]][:ERRORS]
    return {
        "confusion": {"labels": list(labels), "actual_by_predicted": table_KK.tolist()},
        "classes": by_class(table_KK, labels),
        "calibration": {**calibration, "bins": bins},
        "lengths": by_length(answers.tokens_N, right_N),
        "errors": [
            {
                "label": labels[answers.actual_N[n]],
                "predicted": labels[predicted_N[n]],
                "probability": float(sure_N[n]),
                "text": excerpt(answers.texts[n]),
            }
            for n in wrong
        ],
    }


def excerpt(text: str) -> str:
    """The text, or its two ends where it is long."""
    half = EXCERPT // 2
    return text if len(text) <= EXCERPT else f"{text[:half]} [...] {text[-half:]}"
