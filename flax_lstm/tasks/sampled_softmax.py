# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy over a large vocabulary, estimated from a few of its words.

The denominator of the softmax, a sum over all words, is estimated from S candidates that all rows
of a batch share. A word k is one of them with the probability pi(k) = min(1, c log((k + 2) / (k +
1))), log-uniform over ids that go by falling frequency as far as a probability can be, c such that
exactly S are drawn; what a candidate adds is divided by pi(k). So the estimate is unbiased whatever
the order of the ids (Horvitz & Thompson 1952), and exact where S is the whole vocabulary. The
target itself is always counted, with weight 1. For sampled softmax in language models see Bengio &
Senecal 2008, Jean et al. 2015.

Axes: N rows (the steps of all sequences), E features, V words, S candidates.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Candidates(NamedTuple):
    """Words that stand for the vocabulary in one training step."""

    ids_S: Array
    log_chance_S: Array  # log pi(k) of each


@lru_cache(maxsize=8)
def chances(vocabulary: int, candidates: int) -> tuple[np.ndarray, int]:
    """pi [V] in float64, which adds up to the number of candidates, and how many ids (the first)
    are always drawn."""
    if candidates >= vocabulary:
        return np.ones(vocabulary), vocabulary
    share_V = np.log1p(1 / np.arange(1, vocabulary + 1))
    left_V = np.cumsum(share_V[::-1])[::-1]  # of the ids from k on
    scale_V = (candidates - np.arange(vocabulary)) / left_V  # c, were the ids before k certain
    certain = int(np.argmax(scale_V * share_V < 1))
    chance_V = np.concatenate([np.ones(certain), scale_V[certain] * share_V[certain:]])
    return chance_V, certain


def draw(vocabulary: int, candidates: int, u: Array) -> Candidates:
    """Systematic sampling (Madow 1949): with the chances laid end to end on a line, the words under
    the points u, u + 1, u + 2, ... are drawn, all of them different. u: uniform in [0, 1)."""
    chance_V, certain = chances(vocabulary, candidates)
    size = min(candidates, vocabulary)
    ends = np.cumsum(chance_V[certain:])
    # Only the fraction of a place matters, so that float32 is fine enough for the rarest word.
    end = np.append(ends[:-1] % 1, 0.0).astype(np.float32)
    begin = np.append(0.0, end[:-1]).astype(np.float32)
    across = begin > end  # a whole number lies in between, or at the very end
    inside = jnp.where(across, (u >= begin) | (u < end), (u >= begin) & (u < end))
    rest = certain + jnp.flatnonzero(inside, size=size - certain)
    ids_S = jnp.concatenate([jnp.arange(certain), rest.astype(jnp.int32)])
    return Candidates(ids_S, jnp.log(jnp.asarray(chance_V, jnp.float32))[ids_S])


def sampled_cross_entropy(
    features_NE: Array, weights_VE: Array, bias_V: Array, targets_N: Array, among: Candidates
) -> Array:
    """[N]: -log softmax(features weights' + bias)[target], the softmax estimated over `among`."""
    own_N = jnp.einsum("ne,ne->n", features_NE, weights_VE[targets_N]) + bias_V[targets_N]
    score_NS = features_NE @ weights_VE[among.ids_S].T
    score_NS += (bias_V[among.ids_S] - among.log_chance_S)[None]
    is_target_NS = targets_N[:, None] == among.ids_S[None]
    others_N = jax.nn.logsumexp(jnp.where(is_target_NS, -1e30, score_NS), axis=1)
    return jnp.logaddexp(own_N, others_N) - own_N
