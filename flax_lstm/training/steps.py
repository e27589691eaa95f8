# SPDX-License-Identifier: Apache-2.0
"""One training step for every task, jitted over a device mesh.

The step knows nothing of tasks: it is given a module, a loss and an optimiser as values. Randomness
is a function of (seed, step), and so is the order of examples, so that a state and its step number
say all there is about a run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flax_lstm.data.base import Batch
from flax_lstm.machine.sharding import (
    batch_sharding,
    batch_shards,
    on_mesh,
    parameter_shardings,
    replicated,
    shard_like_params,
)
from flax_lstm.tasks.metrics import Mean
from flax_lstm.training.optim import Schedule, plateau_scale

Array = jax.Array


class TrainState(NamedTuple):
    """Everything that changes during training."""

    step: Array  # updates made so far
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, None without
    carry: Any  # recurrent state carried from batch to batch, None for tasks that carry none


class Steps(NamedTuple):
    """The jitted functions of a run."""

    init: Callable[[], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]  # donates the state
    evaluate: Callable[
        [Any, Any, Batch], tuple[Any, Any]
    ]  # (params, carry, batch) -> (carry, sums)
    forward: Callable[
        [Any, Any, Batch], tuple[Any, Array]
    ]  # (params, carry, batch) -> (carry, outputs)
    abstract: TrainState  # shapes, dtypes and shardings


def apply(
    module: nn.Module, params: Any, carry: Any, batch: Batch, key: Array | None = None
) -> tuple[Any, Array]:
    """The module's carry and outputs for a batch; with a key, dropout is on."""
    if (reset := batch.reset) is not None:
        carry = jax.tree.map(
            lambda s: jnp.where(reset.reshape(-1, *(1,) * (s.ndim - 1)), 0, s), carry
        )
    result: Any = module.apply(
        {"params": params},
        batch.inputs,
        batch.lengths,
        carry,
        batch.covariates,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )
    carry, outputs = result
    return (None if reset is None else carry), outputs


def split(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]: each part takes every `parts`-th row, so that rows stay
    on their device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join(tree: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def fill(tree: Any, rows: int) -> Any:
    """[B, ...] -> [B + rows, ...], with zeros."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, rows), *[(0, 0)] * (x.ndim - 1))), tree)


def make_steps(
    module: nn.Module,
    loss: Callable[[Array, Batch], Mean],
    measure: Callable[[Array, Batch], Any],
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    mesh: Mesh,
    sample: Batch,
    *,
    seed: int = 0,
    accumulate: int = 1,
    ema: float = 0.0,
) -> Steps:
    """The jitted steps of a run.

    sample: a batch of the size and form of training; a `reset` in it means that the recurrent state
    is carried over.
    accumulate: parts a batch is computed in; gradients are added, so that the update equals that of
    the whole batch.
    ema: decay of the averaged parameters; they follow faster in the first steps, by (1 + step) /
    (10 + step).
    """
    root = jax.random.key(seed)

    def init() -> tuple[TrainState, Any]:
        """The first state, and its parameters with the names of their axes."""
        inputs = jax.tree.map(jnp.asarray, (sample.inputs, sample.lengths, None, sample.covariates))
        (carry, _), variables = module.init_with_output(jax.random.fold_in(root, 0), *inputs)
        params = nn.meta.unbox(variables["params"])
        carry = jax.tree.map(jnp.zeros_like, carry) if sample.reset is not None else None
        averaged = jax.tree.map(jnp.copy, params) if ema else None
        state = TrainState(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), averaged, carry
        )
        return state, variables["params"]

    place, everywhere = batch_sharding(mesh), replicated(mesh)
    shapes, named_params = jax.eval_shape(on_mesh(init, mesh))
    stored, used = parameter_shardings(named_params, mesh)
    shardings: Any = TrainState(
        step=everywhere,  # type: ignore[arg-type]
        params=stored,
        opt_state=shard_like_params(shapes.opt_state, shapes.params, stored, mesh),
        ema=stored if ema else None,
        carry=jax.tree.map(lambda _: place, shapes.carry),
    )

    def total_loss(
        params: Any, carry: Any, part: Batch, key: Array
    ) -> tuple[Array, tuple[Array, Any]]:
        carry, outputs = apply(module, params, carry, part, key)
        mean = loss(outputs, part)
        return mean.total, (mean.weight, carry)

    def gradient(*arguments: Any) -> tuple[Any, Any]:
        result, grads = jax.value_and_grad(total_loss, has_aux=True)(*arguments)
        return result, jax.lax.with_sharding_constraint(grads, stored)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(root, state.step + 1)
        params = jax.lax.with_sharding_constraint(state.params, used)
        if accumulate == 1:
            (total, (weight, carry)), grads = gradient(params, state.carry, batch, key)
        else:

            def add(sums: Any, part: Any) -> tuple[Any, Any]:
                carry, rows, n = part
                (total, (weight, carry)), grads = gradient(
                    params, carry, rows, jax.random.fold_in(key, n)
                )
                return jax.tree.map(jnp.add, sums, (total, weight, grads)), carry

            zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            parts = (
                split(state.carry, accumulate),
                split(batch, accumulate),
                jnp.arange(accumulate),
            )
            (total, weight, grads), carries = jax.lax.scan(add, zeros, parts)
            carry = join(carries)
        mean, grads = total / weight, jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=mean)
        params = optax.apply_updates(state.params, updates)
        averaged = state.ema
        if ema:
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            averaged = optax.incremental_update(params, state.ema, 1 - decay)
        metrics = {
            "loss": mean,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step) * plateau_scale(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state, averaged, carry), metrics

    def evaluate(params: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
        carry, outputs = apply(module, jax.lax.with_sharding_constraint(params, used), carry, batch)
        return carry, measure(outputs, batch)

    def forward(params: Any, carry: Any, batch: Batch) -> tuple[Any, Array]:
        params = jax.lax.with_sharding_constraint(params, used)
        rows = len(batch.lengths)
        carry, batch = fill((carry, batch), -rows % batch_shards(mesh))
        return jax.tree.map(lambda x: x[:rows], apply(module, params, carry, batch))

    def jit(
        function: Callable[..., Any], into: Any, out: Any, **settings: Any
    ) -> Callable[..., Any]:
        return jax.jit(on_mesh(function, mesh), in_shardings=into, out_shardings=out, **settings)

    return Steps(
        init=jit(lambda: init()[0], (), shardings),
        train=jit(train, (shardings, place), (shardings, everywhere), donate_argnums=0),
        evaluate=jit(evaluate, (stored, place, place), (place, everywhere)),
        # Predictions come in batches of any size, which need not divide over the devices: every
        # device gets all rows.
        forward=jit(forward, (stored, everywhere, everywhere), everywhere),
        abstract=jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings
        ),
    )
