# SPDX-License-Identifier: Apache-2.0
"""AdamW for a table of embeddings whose gradient is kept as the rows that were looked up, on a CPU.

Written out, such a gradient is zeros but for a few rows, and the table, its gradient and both
moments are read and written several times a step. The native kernel adds the rows up, and then goes
over the table and its moments once (`native/table.h`). The numbers are those of `optax.adamw`, but
for the last bits.

Axes: N words of a batch, V words of the vocabulary, F features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flax_lstm.nn.models import Embed, SequenceModel
from flax_lstm.nn.recurrence import native

Array = jax.Array
FIRST, SECOND = 0.9, 0.999  # what `optax.adamw` keeps of the moments


class Looked(NamedTuple):
    """The gradient of a table: values_NF[n] belong to its row ids_N[n]."""

    ids_N: Array
    values_NF: Array


class Table(NamedTuple):
    """The table `embed` of a `SequenceModel`, and how AdamW updates it (see `optim.py`)."""

    weight_decay: float
    epsilon: float
    clip: float

    def gradient(self, total: Callable[..., Any]) -> Callable[..., Any]:
        """`jax.grad(total, has_aux=True)` of a function of (params, carry, batch, ..., inputs to
        take in the place of the batch's), where the gradient of the table is `Looked`."""

        def grad(params: Any, carry: Any, batch: Any, *rest: Any) -> tuple[Any, Any]:
            table_VF = get(params)

            def of_looked_up(others: Any, x_BTF: Array) -> Any:
                whole = put(others, table_VF)
                return total(whole, carry, batch, *rest, x_BTF)

            x_BTF = take(table_VF, batch.inputs)
            both = jax.grad(of_looked_up, argnums=(0, 1), has_aux=True)
            (others, values_BTF), found = both(put(params, None), x_BTF)
            values_NF = values_BTF.reshape(-1, table_VF.shape[1])
            return put(others, Looked(batch.inputs.reshape(-1), values_NF)), found

        return grad

    def update(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        grads: Any,
        opt_state: Any,
        params: Any,
        step: Array,
        rate: Array,
        loss: Array,
    ) -> tuple[Any, Any, Array]:
        """Parameters, optimiser's state and the gradient's norm after a step: number `step`, from
        0, at this learning rate.

        The optimizer updates all others. To it the table is a single number, whose gradient is the
        norm of the table's, so that the global norm is the right one.
        """
        table_VF, looked = get(params), get(grads)
        found_N, sums_NF = add_up(looked, len(table_VF))
        stand_in_1 = jnp.sqrt(jnp.sum(jnp.square(sums_NF)))[None]
        grads, others = put(grads, stand_in_1), put(params, jnp.zeros(1))
        moments, others_state = take_out(opt_state)
        updates, others_state = optimizer.update(grads, others_state, others, value=loss)
        others = optax.apply_updates(others, updates)
        norm = optax.tree.norm(grads)
        scale = jnp.where(norm < self.clip, 1.0, self.clip / norm) if self.clip else 1.0
        made = (step + 1).astype(jnp.float32)
        settings: list[Any] = [scale, rate, self.weight_decay, FIRST, SECOND]
        settings += [1 / (1 - FIRST**made), 1 / (1 - SECOND**made), self.epsilon]
        numbers = jnp.stack([jnp.asarray(s, jnp.float32) for s in settings])
        shapes = [jax.ShapeDtypeStruct(table_VF.shape, jnp.float32)] * 3
        in_place = {0: 0, 1: 1, 2: 2}
        call = jax.ffi.ffi_call("flax_lstm_update_table", shapes, input_output_aliases=in_place)
        table_VF, *moments = call(table_VF, *moments, found_N, sums_NF, numbers)
        return put(others, table_VF), put_back(others_state, moments), norm


def take(table_VF: Array, words_BT: Array) -> Array:
    """`jnp.take(table_VF, words_BT, axis=0)`, by all threads."""
    shape = jax.ShapeDtypeStruct((*words_BT.shape, table_VF.shape[1]), jnp.float32)
    x_BTF: Array = jax.ffi.ffi_call("flax_lstm_take", shape)(table_VF, words_BT.astype(jnp.int32))
    return x_BTF


def add_up(looked: Looked, rows: int) -> tuple[Array, Array]:
    """The rows that were looked up, in increasing order, and their gradients; `rows` and zeros
    where there are fewer than N."""
    ids_N, values_NF = looked
    shapes = [
        jax.ShapeDtypeStruct(ids_N.shape, jnp.int32),
        jax.ShapeDtypeStruct(values_NF.shape, jnp.float32),
    ]
    found_N, sums_NF = jax.ffi.ffi_call("flax_lstm_add_up", shapes)(
        ids_N.astype(jnp.int32), values_NF, rows=rows
    )
    return found_N, sums_NF


def get(params: Any) -> Any:
    return params["embed"]["embedding"]


def put(params: Any, table: Any) -> Any:
    return {**params, "embed": {**params["embed"], "embedding": table}}


def of_table(path: Any) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator="/").endswith("/embed/embedding")


def take_out(opt_state: Any) -> tuple[list[Array], Any]:
    """The moments of the table, and the state with a number in place of each."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    moments = [leaf for path, leaf in leaves if of_table(path)]
    rest = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros(1) if of_table(path) else leaf, opt_state
    )
    return moments, rest


def put_back(opt_state: Any, moments: list[Array]) -> Any:
    """The inverse of `take_out`."""
    left = iter(moments)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: next(left) if of_table(path) else leaf, opt_state
    )


def by_rows(module: nn.Module, mesh: Mesh) -> bool:
    """Whether the gradient of a module's table is no more than what was looked up, and can be had
    as that: on one CPU, by the native kernel. N-grams need the words, not what was looked up."""
    return (
        isinstance(module, SequenceModel)
        and isinstance(module.embed, Embed)
        and not (module.tied or module.ngrams)
        and mesh.size == 1
        and mesh.devices.flat[0].platform == "cpu"
        and native.unavailable() is None
    )
