# SPDX-License-Identifier: Apache-2.0
"""The training step that a user of JAX writes around `apply`: value_and_grad, optax.adam, jit,
donated arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from workloads import Work


def make_step(work: Work, params: Any, apply: Callable[..., jax.Array]) -> Callable[[int], Any]:
    """apply: (params, inputs, lengths) -> outputs; lengths None where every row is full. With
    resets: (params, inputs, lengths, resets)."""
    workload = work.workload
    params = jax.tree.map(jnp.asarray, params)
    placed = [
        jax.tree.map(jnp.asarray, b if workload.ragged else b._replace(lengths=None))
        for b in work.batches
    ]
    optimizer = optax.adam(1e-3)

    def loss(params: Any, batch: Any) -> jax.Array:
        resets = [] if batch.resets is None else [batch.resets]
        outputs = apply(params, batch.inputs, batch.lengths, *resets)
        if workload.vocabulary:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, batch.targets).mean()
        return jnp.mean(jnp.square(outputs - batch.targets))

    def train(params: Any, moments: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    if not workload.train:
        forward = jax.jit(apply)
        return lambda n: np.asarray(forward(params, placed[n].inputs, placed[n].lengths))
    train = jax.jit(train, donate_argnums=(0, 1))
    moments = optimizer.init(params)

    def step(n: int) -> float:
        nonlocal params, moments
        params, moments, value = jax.block_until_ready(train(params, moments, placed[n]))
        return float(value)

    return step
