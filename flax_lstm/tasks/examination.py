# SPDX-License-Identifier: Apache-2.0
"""What a classifier gets right and wrong: by class or tag, by length, how sure it is, and its worst
errors.

Axes: N examples, K classes or tags, M bins.
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


class TagAnswers(NamedTuple):
    """The same of tags, of which each example has any number."""

    logits_NK: np.ndarray
    has_NK: np.ndarray  # bool
    tokens_N: np.ndarray
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


def scores(label: str, hits: int, actual: int, predicted: int) -> dict[str, Any]:
    """Precision, recall and F1; None where nothing is of the label, or predicted to be."""
    return {
        "label": label,
        "examples": int(actual),
        "precision": float(hits / predicted) if predicted else None,
        "recall": float(hits / actual) if actual else None,
        "f1": float(2 * hits / (actual + predicted)) if actual + predicted else None,
    }


def by_class(table_KK: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The `scores` of each class, from the confusion [actual, predicted]."""
    return [
        scores(label, table_KK[k, k], table_KK[k].sum(), table_KK[:, k].sum())
        for k, label in enumerate(labels)
    ]


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


def calibration(
    logits_NK: np.ndarray, actual_N: np.ndarray, temperature: float | None
) -> dict[str, Any]:
    """How sure the answers are, and how often right; with a temperature also once the logits are
    divided by it."""
    right_N = logits_NK.argmax(axis=1) == actual_N
    bins = reliability(np.exp(log_softmax(logits_NK).max(axis=1)), right_N)
    found: dict[str, Any] = {"ece": calibration_error(bins)}
    if temperature is not None:
        cooled_NK = log_softmax(logits_NK / temperature)
        cooled = reliability(np.exp(cooled_NK.max(axis=1)), right_N)
        found |= {
            "temperature": temperature,
            "ece_calibrated": calibration_error(cooled),
            "loss_calibrated": float(-cooled_NK[np.arange(len(actual_N)), actual_N].mean()),
        }
    return {**found, "bins": bins}


def examine(answers: Answers, labels: Sequence[str], temperature: float | None) -> dict[str, Any]:
    """Everything that can be said of the answers, ready for JSON.

    temperature: from `fit_temperature` on other examples; None: nothing is said of calibrated
    probabilities.
    """
    predicted_N = answers.logits_NK.argmax(axis=1)
    right_N = predicted_N == answers.actual_N
    table_KK = np.zeros((len(labels),) * 2, int)
    np.add.at(table_KK, (answers.actual_N, predicted_N), 1)
    sure_N = np.exp(log_softmax(answers.logits_NK).max(axis=1))
    wrong = [int(n) for n in np.argsort(-sure_N, kind="stable") if not right_N[n]][:ERRORS]
    return {
        "confusion": {"labels": list(labels), "actual_by_predicted": table_KK.tolist()},
        "classes": by_class(table_KK, labels),
        "calibration": calibration(answers.logits_NK, answers.actual_N, temperature),
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


def yes_or_no(logits_NK: np.ndarray) -> np.ndarray:
    """[N K, 2]: each tag of each example as a choice of two classes, of which the second has its
    logit."""
    yes = logits_NK.astype(np.float64).ravel()
    return np.stack([np.zeros_like(yes), yes], axis=1)


def examine_tags(
    answers: TagAnswers, tags: Sequence[str], temperature: float | None
) -> dict[str, Any]:
    """The same of tags, without a confusion. An error is a row of which a tag is wrong, as sure as
    the surest of its wrong ones."""
    given_NK, has_NK = answers.logits_NK >= 0, answers.has_NK
    two = yes_or_no(answers.logits_NK)
    sure_NK = np.exp(log_softmax(two).max(axis=1)).reshape(given_NK.shape)
    wrong_N = np.where(given_NK == has_NK, 0, sure_NK).max(axis=1)
    worst = [int(n) for n in np.argsort(-wrong_N, kind="stable") if wrong_N[n] > 0][:ERRORS]

    def named(row_K: np.ndarray) -> str:
        return ", ".join(tag for tag, there in zip(tags, row_K, strict=True) if there) or "no tag"

    counts_K = (given_NK & has_NK).sum(axis=0), has_NK.sum(axis=0), given_NK.sum(axis=0)
    return {
        "classes": [scores(*row) for row in zip(tags, *counts_K, strict=True)],
        "calibration": calibration(two, has_NK.ravel().astype(int), temperature),
        "lengths": by_length(answers.tokens_N, (given_NK == has_NK).all(axis=1)),
        "errors": [
            {
                "label": named(has_NK[n]),
                "predicted": named(given_NK[n]),
                "probability": float(wrong_N[n]),
                "text": excerpt(answers.texts[n]),
            }
            for n in worst
        ],
    }


def excerpt(text: str) -> str:
    """The text, or its two ends where it is long."""
    half = EXCERPT // 2
    return text if len(text) <= EXCERPT else f"{text[:half]} [...] {text[-half:]}"
