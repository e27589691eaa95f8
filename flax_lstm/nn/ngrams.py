# SPDX-License-Identifier: Apache-2.0
"""A linear classifier of n-grams, to stand beside a recurrence that reads the same tokens.

It is the one of Wang & Manning (2012, "Baselines and bigrams", section 2.3; NB-SVM): which n-grams
a text has, each worth its naive Bayes log-count ratio times a scale that is learnt. An n-gram is
known by 32 bits of a hash: `BUCKET_BITS` say where it is kept, the others whether it is what is
kept there.

Axes: B batch, T tokens, N n-grams of a text, M buckets of the hash, K classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.machine.sharding import named

Array = jax.Array
BUCKET_BITS = 22  # 290,000 n-grams are in five reviews of IMDB or more: few share a bucket
BUCKETS = 2**BUCKET_BITS
DROPOUT = 0.5  # share of a text's n-grams that a training step does not see


def mixed(hash_BT: Array) -> Array:
    """The bits of uint32 numbers, stirred: the last steps of MurmurHash3 (Appleby, fmix32)."""
    hash_BT = (hash_BT ^ (hash_BT >> 16)) * jnp.uint32(0x85EBCA6B)
    hash_BT = (hash_BT ^ (hash_BT >> 13)) * jnp.uint32(0xC2B2AE35)
    return hash_BT ^ (hash_BT >> 16)


def distinct_ngrams(tokens_BT: Array, lengths_B: Array, longest: int) -> Array:
    """[B, N] uint32: a hash of each n-gram of up to `longest` tokens that a row has, once however
    often it has it, in any order; 0 in the places that are left over."""
    steps = tokens_BT.shape[1]
    inside_BT = jnp.arange(steps)[None] < lengths_B[:, None]
    words_BT = jnp.where(inside_BT, tokens_BT + 1, 0).astype(jnp.uint32)
    hash_BT, found = jnp.zeros_like(words_BT), []
    for n in range(longest):
        first_BT = jnp.pad(words_BT, ((0, 0), (n, 0)))[:, :steps]  # of the n + 1 that end here
        hash_BT = mixed(hash_BT * 31 + first_BT)
        found.append(jnp.where((first_BT > 0) & inside_BT, jnp.maximum(hash_BT, 1), 0))
    hash_BN = jnp.sort(jnp.concatenate(found, axis=1), axis=1)
    again_BN = jnp.pad(hash_BN[:, 1:] == hash_BN[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(again_BN, 0, hash_BN)


def places(hash_BN: Any) -> tuple[Any, Any]:
    """The bucket of each n-gram, and what tells it from others there: the bits that are left, a
    small number, which float32 holds."""
    return (hash_BN % BUCKETS).astype("int32"), (hash_BN >> BUCKET_BITS).astype("float32")


class NGrams(nn.Module):
    """Scores of K classes from the n-grams of up to `longest` tokens.

    The parameters `ratios` [M, K] and `checks` [M] are not learnt: `training.ngrams` fills them
    from the training rows. N-grams that are rare there are not kept, and have no say.
    """

    outputs: int
    longest: int

    @nn.compact
    def __call__(self, tokens_BT: Array, lengths_B: Array, *, deterministic: bool = True) -> Array:
        """[B, K] float32."""
        zeros = nn.initializers.zeros
        by_bucket, shape = named(zeros, "vocabulary"), (BUCKETS,)
        ratios_MK = self.param(
            "ratios", named(zeros, "vocabulary", None), (*shape, self.outputs), jnp.float32
        )
        checks_M = self.param("checks", by_bucket, shape, jnp.float32)
        scales_M = self.param("scales", by_bucket, shape, jnp.float32)
        hash_BN = distinct_ngrams(tokens_BT, lengths_B, self.longest)
        bucket_BN, check_BN = places(hash_BN)
        # Whole numbers, but for the rounding of averaged weights.
        kept_BN = (hash_BN > 0) & (jnp.abs(check_BN - checks_M[bucket_BN]) < 0.5)
        worth_BN = nn.Dropout(DROPOUT)(
            jnp.where(kept_BN, scales_M[bucket_BN], 0.0), deterministic=deterministic
        )
        ratios_BNK = jax.lax.stop_gradient(ratios_MK)[bucket_BN]
        return jnp.einsum("BN,BNK->BK", worth_BN, ratios_BNK)
