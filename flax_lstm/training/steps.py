# SPDX-License-Identifier: Apache-2.0
"""One training step for every task, jitted over a device mesh.

The step knows nothing of tasks: it is given a module, a loss and an optimiser as values. Randomness
is a function of (seed, step), and so is the order of examples, so that a state and its step number
say all there is about a run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flax_lstm.data.base import Batch
from flax_lstm.errors import require
from flax_lstm.machine.sharding import (
    batch_sharding,
    batch_shards,
    on_mesh,
    parameter_shardings,
    replicated,
    shard_like_params,
)
from flax_lstm.tasks.adversary import MOVES, Adversary
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

    @property
    def evaluated(self) -> Any:
        """The weights that are evaluated: the averaged ones if there are, else the parameters."""
        return self.params if self.ema is None else self.ema


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
    module: nn.Module,
    params: Any,
    carry: Any,
    batch: Batch,
    key: Array | None = None,
    move: Any = None,
) -> tuple[Any, Array]:
    """The module's carry and outputs for a batch; with a key, dropout is on, and a module that is
    `forced` sees the targets; `move` is added to the inputs, see `flax_lstm.tasks.adversary`."""
    if (reset := batch.reset) is not None:
        carry = jax.tree.map(
            lambda s: jnp.where(reset.reshape(-1, *(1,) * (s.ndim - 1)), 0, s), carry
        )
    forced = key is not None and getattr(module, "forced", False)
    result: Any = module.apply(
        {"params": params} if move is None else {"params": params, MOVES: {"inputs": move}},
        batch.inputs,
        batch.lengths,
        carry,
        batch.covariates,
        deterministic=key is None,
        **({"targets": batch.targets} if forced else {}),
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


class Recipe(NamedTuple):
    """What a training step does, as values."""

    module: nn.Module
    loss: Callable[[Array, Batch], Mean]
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Schedule
    # parts a batch is computed in; their gradients are added: the update is that of the whole batch
    accumulate: int = 1
    # decay of the averaged parameters, which follow faster in the first steps, by (1 + step) /
    # (10 + step); 0: there are none
    ema: float = 0.0
    adversaries: tuple[Adversary, ...] = ()  # each adds its cost to the loss
    table: Any = (
        None  # the `Table` of tables.py whose gradient is kept as rows; None: there is none
    )


def gradients(
    recipe: Recipe, params: Any, carry: Any, batch: Batch, key: Array, stored: Any
) -> tuple[Array, Any, Any]:
    """The mean loss of a batch, its gradient, and the carried state after it.

    Computed in `recipe.accumulate` parts, whose sums are divided at last, so that the update equals
    that of the whole batch. Each part's gradient lies as the parameters are `stored`.
    """

    def total(
        params: Any, carry: Any, part: Batch, key: Array, moves: list[Array], looked_up: Any = None
    ) -> tuple[Array, tuple[Array, Array, Any]]:
        seen = part if looked_up is None else part._replace(inputs=looked_up)
        after, outputs = apply(recipe.module, params, carry, seen, key)
        mean = recipe.loss(outputs, part)
        loss = mean.total
        for adversary, move in zip(recipe.adversaries, moves, strict=True):
            _, moved = apply(recipe.module, params, carry, seen, key, move)
            cost = adversary.cost(outputs, moved, part)  # of more rows than have labels, perhaps
            loss += cost.total * (mean.weight / jnp.maximum(cost.weight, 1e-9))
        # One division here saves one of every gradient, a pass over all of them.
        divisor = mean.weight if recipe.accumulate == 1 else 1
        return loss / divisor, (loss, mean.weight, after)

    def sums(carry: Any, part: Batch, key: Array) -> tuple[tuple[Array, Array, Any], Any]:
        moves = worst_moves(recipe, params, carry, part, key)
        by_rows = recipe.table.gradient(total) if recipe.table else None
        gradient = by_rows or jax.grad(total, has_aux=True)
        grads, (loss, weight, carry) = gradient(params, carry, part, key, moves)
        if by_rows:  # there is one device
            return (loss, weight, grads), carry
        return (loss, weight, jax.lax.with_sharding_constraint(grads, stored)), carry

    if recipe.accumulate == 1:
        (loss, weight, grads), carry = sums(carry, batch, key)
        return loss / weight, grads, carry

    def add(before: Any, part: Any) -> tuple[Any, Any]:
        carry, rows, n = part
        new, carry = sums(carry, rows, jax.random.fold_in(key, n))
        return jax.tree.map(jnp.add, before, new), carry

    zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    carried, rows = split((carry, batch), recipe.accumulate)
    parts = carried, rows, jnp.arange(recipe.accumulate)
    (loss, weight, grads), carries = jax.lax.scan(add, zeros, parts)
    carry = join(carries)
    return loss / weight, jax.tree.map(lambda g: g / weight, grads), carry


def worst_moves(recipe: Recipe, params: Any, carry: Any, batch: Batch, key: Array) -> list[Array]:
    """Where each adversary moves the inputs to. The same dropout acts there as on the inputs."""
    if not recipe.adversaries:
        return []

    def made() -> Any:
        """The variables that the module makes where its inputs can be moved."""
        inputs = batch.inputs, batch.lengths, carry, batch.covariates
        return recipe.module.apply({"params": params}, *inputs, mutable=[MOVES])[1]

    shape = jax.eval_shape(made).get(MOVES)
    require(
        shape is not None,
        "task.adversarial and task.virtual need a SequenceModel, whose inputs can be moved",
    )

    def outputs_at(move: Array) -> Array:
        return apply(recipe.module, params, carry, batch, key, move)[1]

    zeros_BTD = jnp.zeros(shape["inputs"].shape, shape["inputs"].dtype)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(recipe.adversaries))
    return [
        adversary.move(outputs_at, zeros_BTD, batch, k)
        for adversary, k in zip(recipe.adversaries, keys, strict=True)
    ]


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, root: Array, stored: Any, used: Any
) -> tuple[TrainState, dict[str, Array]]:
    """One update: all there is to training. The rest of this file says how it lies on devices.

    root: the run's key; dropout is a function of it and of the step.
    stored, used: shardings of the parameters between steps, and within one.
    """
    key = jax.random.fold_in(root, state.step + 1)
    params = jax.lax.with_sharding_constraint(state.params, used)
    loss, grads, carry = gradients(recipe, params, state.carry, batch, key, stored)
    if recipe.table:
        rate = recipe.schedule(state.step)
        params, opt_state, norm = recipe.table.update(
            recipe.optimizer, grads, state.opt_state, state.params, state.step, rate, loss
        )
    else:
        updates, opt_state = recipe.optimizer.update(
            grads, state.opt_state, state.params, value=loss
        )
        params, norm = optax.apply_updates(state.params, updates), optax.tree.norm(grads)
    averaged = state.ema
    if recipe.ema:  # averages follow faster in the first steps
        decay = jnp.minimum(recipe.ema, (1.0 + state.step) / (10.0 + state.step))
        averaged = optax.incremental_update(params, state.ema, 1 - decay)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": recipe.schedule(state.step) * plateau_scale(opt_state),
    }
    return TrainState(state.step + 1, params, opt_state, averaged, carry), metrics


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
    adversaries: tuple[Adversary, ...] = (),
    table: Any = None,
    whole: Callable[[Any], Array] = lambda outputs: outputs,
) -> Steps:
    """The jitted steps of a run, placed on the devices of a mesh: for readers who split a model.

    sample: a batch of the size and form of training; a `reset` in it means that the recurrent state
    is carried over.
    accumulate, ema, adversaries, table: see `Recipe`.
    whole: the module's outputs as `forward` gives them.
    """
    recipe = Recipe(module, loss, optimizer, schedule, accumulate, ema, adversaries, table)
    root = jax.random.key(seed)
    init = partial(first_state, recipe, sample, root)
    place, everywhere = batch_sharding(mesh), replicated(mesh)
    shapes, named_params = jax.eval_shape(on_mesh(init, mesh))
    stored, used = parameter_shardings(named_params, mesh)
    shardings = state_shardings(shapes, stored, mesh)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return train_step(recipe, state, batch, root, stored, used)

    def evaluate(params: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
        carry, outputs = apply(module, jax.lax.with_sharding_constraint(params, used), carry, batch)
        return carry, measure(outputs, batch)

    def forward(params: Any, carry: Any, batch: Batch) -> tuple[Any, Array]:
        rows = len(batch.lengths)
        carry, batch = fill((carry, batch), -rows % batch_shards(mesh))
        carry, outputs = apply(module, jax.lax.with_sharding_constraint(params, used), carry, batch)
        return jax.tree.map(lambda x: x[:rows], (carry, whole(outputs)))

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


def first_state(recipe: Recipe, sample: Batch, root: Array) -> tuple[TrainState, Any]:
    """The state before the first step, and its parameters with the names of their axes."""
    inputs = jax.tree.map(jnp.asarray, (sample.inputs, sample.lengths, None, sample.covariates))
    key = jax.random.fold_in(root, 0)
    (carry, _), variables = recipe.module.init_with_output(key, *inputs)
    params = nn.meta.unbox(variables["params"])
    carry = jax.tree.map(jnp.zeros_like, carry) if sample.reset is not None else None
    averaged = jax.tree.map(jnp.copy, params) if recipe.ema else None
    opt_state = recipe.optimizer.init(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, averaged, carry)
    return state, variables["params"]


def state_shardings(shapes: TrainState, stored: Any, mesh: Mesh) -> Any:
    """Where each part of a state lies, given where its parameters are stored."""
    return TrainState(
        step=replicated(mesh),  # type: ignore[arg-type]
        params=stored,
        opt_state=shard_like_params(shapes.opt_state, shapes.params, stored, mesh),
        ema=None if shapes.ema is None else stored,
        carry=jax.tree.map(lambda _: batch_sharding(mesh), shapes.carry),
    )
