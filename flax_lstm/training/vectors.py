# SPDX-License-Identifier: Apache-2.0
"""A first state whose embedding begins with word vectors.

Axes: N words found, V vocabulary, E features of a token's embedding.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.data.vectors import WordVectors
from flax_lstm.errors import UserError, require
from flax_lstm.training.steps import TrainState


@runtime_checkable
class HasVectors(Protocol):
    """Data that may have word vectors."""

    def word_vectors(self) -> WordVectors | None:
        """What the embedding of a new run begins with."""
        ...


def with_vectors(state: TrainState, dataset: Any) -> TrainState:
    """The first state with the data's word vectors, if there are any, in their rows of the
    embedding; other words begin as ever. Raises UserError for a model without an embedding, or of
    another width."""
    words = dataset.word_vectors() if isinstance(dataset, HasVectors) else None
    if words is None:
        return state
    params: Any = state.params
    try:
        table_VE = params["embed"]["embedding"]
    except (KeyError, TypeError, IndexError):
        raise UserError(f"data.vectors {words.path}: the model has no embedding of words") from None
    found, width = words.vectors_NE.shape[1], table_VE.shape[1]
    require(
        found == width,
        f"data.vectors {words.path} has {found} numbers a word, the model's embedding {width}: "
        f"--model.embed-size {found}",
    )
    begun_VE = np.array(table_VE)
    begun_VE[words.ids_N] = words.vectors_NE
    embedding = jax.device_put(begun_VE, table_VE.sharding)
    first = {**params, "embed": {**params["embed"], "embedding": embedding}}
    averaged = None if state.ema is None else jax.tree.map(jnp.copy, first)
    return state._replace(params=first, ema=averaged)
