# SPDX-License-Identifier: Apache-2.0
"""Batches of rows of similar length, so that little is padded and few shapes are compiled.

Axes: B rows of a batch, T tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flax_lstm.data.base import Batch

POOL = 50  # batches of the shuffled order that are sorted by length together
MOST_BUCKETS = 64
BUCKETS = 8  # distinct padded lengths T: each is one compilation of the training step


class Rows(NamedTuple):
    """The examples of a split, encoded."""

    tokens: Sequence[np.ndarray]  # (T,) int32 ids, or (T, D) float32 numbers; T up to max_length
    # (rows,) int32 places in the labels, or (rows, outputs) float32 numbers; in a list of (T,) or
    # (T, outputs) where every step has a target
    labels: np.ndarray | list[np.ndarray]
    weights: np.ndarray | None = None  # (rows,) float32, how much each counts; None: 1


def lengths_of(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Tokens of each row; rows in files say it without being read (`prepared.Documents`)."""
    known = getattr(tokens, "lengths", None)
    return np.array([len(ids) for ids in tokens]) if known is None else known


def take(rows: Rows, chosen: np.ndarray) -> Rows:
    stepwise = isinstance(rows.labels, list)
    labels = [rows.labels[i] for i in chosen] if stepwise else rows.labels[chosen]
    weights = None if rows.weights is None else rows.weights[chosen]
    return Rows([rows.tokens[i] for i in chosen], labels, weights)


def pad(rows: Rows, boundaries: Sequence[int], batch_size: int) -> Batch:
    """Up to `batch_size` rows as one batch of exactly that many; T is the smallest boundary that
    holds the longest."""
    lengths_B = np.zeros(batch_size, np.int32)
    lengths_B[: len(rows.tokens)] = [len(ids) for ids in rows.tokens]
    longest = int(lengths_B.max(initial=0))
    steps = next(b for b in boundaries if b >= longest)
    like = rows.tokens[0] if rows.tokens else np.zeros(0, np.int32)
    inputs_BT = np.zeros((batch_size, steps, *like.shape[1:]), like.dtype)
    for row, ids in zip(inputs_BT, rows.tokens, strict=False):
        row[: len(ids)] = ids
    if isinstance(rows.labels, list):
        first = rows.labels[0]
        targets_BT = np.zeros((batch_size, steps, *first.shape[1:]), first.dtype)
        for row, targets in zip(targets_BT, rows.labels, strict=False):
            row[: len(targets)] = targets
        weights_BT = (np.arange(steps) < lengths_B[:, None]).astype(np.float32)
        return Batch(inputs_BT, targets_BT, lengths_B, weights_BT)
    targets_B = np.zeros((batch_size, *rows.labels.shape[1:]), rows.labels.dtype)
    targets_B[: len(rows.labels)] = rows.labels
    weights_B = np.zeros(batch_size, np.float32)
    weights_B[: len(rows.tokens)] = 1 if rows.weights is None else rows.weights
    return Batch(inputs_BT, targets_B, lengths_B, weights_B)


def choose_boundaries(
    lengths: Sequence[int], max_length: int, buckets: int = BUCKETS
) -> tuple[int, ...]:
    """At most `buckets` padded lengths, multiples of 8 up to `max_length` rounded up, with the
    fewest padded cells.

    Exact, by dynamic programming over the rounded lengths (the k-segmentation of a histogram): with
    n(j) rows up to candidate c(j), cost_k(j) = min over i < j of cost_(k-1)(i) + (n(j) - n(i))
    c(j).
    """
    unit = 8 * max(1, math.ceil(max_length / 2048))  # at most 256 candidates
    candidates = np.arange(unit, max_length + unit, unit)
    rows = np.concatenate(
        [[0], np.searchsorted(np.sort(lengths), candidates, side="right")]
    )  # n(j), with n(0) = 0
    steps_ij = (rows[None, 1:] - rows[:-1, None]) * candidates.astype(
        np.float64
    )  # one bucket over candidates i+1..j+1
    steps_ij[np.tril_indices(len(candidates), -1)] = np.inf
    cost, choices = steps_ij[0], []
    for _ in range(min(buckets, len(candidates)) - 1):
        shifted = np.concatenate([[0.0], cost[:-1]])
        choices.append(np.argmin(shifted[:, None] + steps_ij, axis=0))
        cost = np.min(shifted[:, None] + steps_ij, axis=0)
    chosen, end = [], len(candidates) - 1
    for choice in [*reversed(choices), np.zeros(len(candidates), int)]:
        chosen.append(int(candidates[end]))
        end = int(choice[end]) - 1
        if end < 0:
            break
    return tuple(reversed(chosen))


class BucketedBatches:
    """Training batches of rows of similar length; item `step` is a function of (seed, step) alone.

    An epoch visits every row once: a permutation seeded by (seed, epoch), sorted by length within
    pools of 50 batches, cut into batches, and the batches shuffled. The one batch that the rows do
    not fill has rows of weight 0.
    """

    def __init__(self, rows: Rows, boundaries: Sequence[int], batch_size: int, seed: int):
        self._rows, self._boundaries, self._batch_size, self._seed = (
            rows,
            boundaries,
            batch_size,
            seed,
        )
        self._lengths = lengths_of(rows.tokens)
        self._plan = functools.lru_cache(maxsize=2)(
            self._make_plan
        )  # thread-safe, and cheap next to an epoch

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._lengths))
        batches = []
        for start in range(0, len(order), POOL * self._batch_size):
            pool = order[start : start + POOL * self._batch_size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [
                pool[i : i + self._batch_size] for i in range(0, len(pool), self._batch_size)
            ]
        return [batches[i] for i in generator.permutation(len(batches))]

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, len(self))
        chosen = self._plan(epoch)[position]
        return pad(take(self._rows, chosen), self._boundaries, self._batch_size)


class HalfUnlabelled:
    """The same where half the rows of a batch have no label and weight 0, drawn from rows of their
    own; an epoch is one of those with labels."""

    def __init__(
        self,
        labelled: Rows,
        unlabelled: Rows,
        boundaries: Sequence[int],
        batch_size: int,
        seed: int,
    ):
        self._has_label_B = balanced(batch_size)
        with_label = int(self._has_label_B.sum())
        self._labelled = BucketedBatches(labelled, boundaries, with_label, seed)
        self._unlabelled = BucketedBatches(unlabelled, boundaries, batch_size - with_label, seed)

    def __len__(self) -> int:
        return len(self._labelled)

    def __getitem__(self, step: int) -> Batch:
        one, other = self._labelled[step], self._unlabelled[step]
        steps = max(one.inputs.shape[1], other.inputs.shape[1])
        return Batch(
            self._mixed(longer(one.inputs, steps), longer(other.inputs, steps)),
            self._mixed(one.targets, other.targets),
            self._mixed(one.lengths, other.lengths),
            self._mixed(one.weights, np.zeros_like(other.weights)),
        )

    def _mixed(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        both = np.zeros((len(self._has_label_B), *one.shape[1:]), one.dtype)
        both[self._has_label_B], both[~self._has_label_B] = one, other
        return both


def longer(x_BT: np.ndarray, steps: int) -> np.ndarray:
    return np.pad(x_BT, ((0, 0), (0, steps - x_BT.shape[1])))


def balanced(rows: int) -> np.ndarray:
    """(rows,) bool, half of them true, by the sequence of Thue and Morse: so are every second row,
    every fourth, and every stretch of them, for a batch may be split into such parts."""
    return np.array([row.bit_count() % 2 == 0 for row in range(rows)])
