# SPDX-License-Identifier: Apache-2.0
"""A first state whose n-grams know their naive Bayes log-count ratios.

Axes: R rows, T tokens, N n-grams of a row, M buckets, K classes.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.errors import UserError
from flax_lstm.nn.models import TextModel
from flax_lstm.nn.ngrams import BUCKETS, distinct_ngrams, places
from flax_lstm.training.steps import TrainState

COUNTED = 50_000  # rows from which n-grams are counted, at most: a gigabyte of long reviews
FEW = 5_000  # rows; where there are more, an n-gram has to be in five of them, else in two
AT_ONCE = 256  # rows


@runtime_checkable
class HasLabelledTokens(Protocol):
    """Data whose training rows are tokens with classes."""

    def labelled_tokens(self) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """The tokens (T,) of each training row, and (R, K) numbers, 1 for a class that it has."""
        ...


def row_ngrams(
    tokens: Sequence[np.ndarray], chosen: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places in `chosen` and the hashes of all distinct n-grams of these rows, as two arrays of one
    length."""
    rows, hashes = [], []
    hashed = jax.jit(distinct_ngrams, static_argnums=2)
    for start in range(0, len(chosen), AT_ONCE):
        part = [np.asarray(tokens[n]) for n in chosen[start : start + AT_ONCE]]
        lengths = np.zeros(AT_ONCE, np.int32)
        lengths[: len(part)] = [len(ids) for ids in part]
        # Lengths that are powers of 2: few shapes to compile.
        steps = 2 ** math.ceil(math.log2(max(lengths.max(), 1)))
        ids_RT = np.zeros((AT_ONCE, steps), np.int32)
        for row, ids in zip(ids_RT, part, strict=False):
            row[: len(ids)] = ids
        hash_RN = np.asarray(hashed(jnp.asarray(ids_RT), jnp.asarray(lengths), longest))
        row, place = np.nonzero(hash_RN)
        rows.append((row + start).astype(np.int32))
        hashes.append(hash_RN[row, place])
    return np.concatenate(rows), np.concatenate(hashes)


def log_count_ratios(
    tokens: Sequence[np.ndarray], targets_RK: np.ndarray, longest: int, most: int = COUNTED
) -> tuple[np.ndarray, np.ndarray]:
    """The `ratios` [M, K] and `checks` [M] of `NGrams`.

    A ratio is half of log (p / |p|) / (q / |q|), where p are the rows of a class that have an
    n-gram and q those of other classes, both plus 1 (Wang & Manning 2012, section 2.1): two classes
    differ by the whole. Of n-grams that share a bucket the one that most rows have is kept. Of more
    rows than `most` so many are counted, evenly spaced: rows may lie in the order of their classes.
    """
    least = 5 if len(tokens) > FEW else 2
    rows = min(len(tokens), most)
    chosen = np.arange(rows) * len(tokens) // rows
    row, hashes = row_ngrams(tokens, chosen, longest)
    known, which, count = np.unique(hashes, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(count >= least)
    kept = kept[np.argsort(count[kept], kind="stable")]
    bucket, check = places(known[kept])
    ratios_MK = np.zeros((BUCKETS, targets_RK.shape[1]), np.float32)
    checks_M = np.zeros(BUCKETS, np.float32)
    checks_M[bucket] = check
    for k, target_R in enumerate(targets_RK[chosen].T):
        having = np.bincount(which, weights=target_R[row], minlength=len(known))[kept]
        p, q = 1 + having, 1 + count[kept] - having
        ratios_MK[bucket, k] = np.log((p / p.sum()) / (q / q.sum())) / 2
    return ratios_MK, checks_M


def with_ngrams(state: TrainState, dataset: Any, model: Any) -> TrainState:
    """The first state with the ratios of the data's n-grams, for a model that has them. Raises
    UserError for data whose rows have no classes."""
    if not (isinstance(model, TextModel) and model.ngrams):
        return state
    if not isinstance(dataset, HasLabelledTokens):
        raise UserError("model.ngrams: these data have no classes to count n-grams by; give 0")
    params: Any = state.params
    begun = params["ngrams"]
    ratios_MK, checks_M = log_count_ratios(*dataset.labelled_tokens(), model.ngrams)
    counted = {
        "ratios": jax.device_put(ratios_MK, begun["ratios"].sharding),
        "checks": jax.device_put(checks_M, begun["checks"].sharding),
    }
    first = {**params, "ngrams": {**begun, **counted}}
    averaged = None if state.ema is None else jax.tree.map(jnp.copy, first)
    return state._replace(params=first, ema=averaged)
