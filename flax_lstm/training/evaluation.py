# SPDX-License-Identifier: Apache-2.0
"""The figures of a split: sums over its batches, by the task and by the rules it is judged
against."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_lstm.data.base import Batch
from flax_lstm.machine.sharding import put_batch, replicated
from flax_lstm.tasks.base import Baseline, Task
from flax_lstm.training.steps import Steps


def add_up(sums: Iterable[Any]) -> Any:
    """The sum of trees, in float64 on the host, each read one turn late so that the device never
    waits."""
    total, last = None, None

    def add(total: Any, new: Any) -> Any:
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
        return new if total is None else jax.tree.map(np.add, total, new)

    for new in sums:
        total = total if last is None else add(total, last)
        last = new
    return total if last is None else add(total, last)


def evaluate(
    steps: Steps, params: Any, task: Task, info: Any, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
    """The task's figures over batches, every row of weight 1 counted once."""

    def run() -> Iterable[Any]:
        carry = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), steps.abstract.carry
        )
        for batch in batches:
            carry, sums = steps.evaluate(params, carry, put_batch(batch, mesh))
            yield sums

    return task.figures(add_up(run()), info)


def evaluate_baselines(
    task: Task, info: Any, batches: Callable[[], Iterable[Batch]], mesh: Mesh
) -> dict[str, dict[str, float]]:
    """The figures of the task's baselines over the same batches."""

    def figures(rule: Baseline) -> dict[str, float]:
        measure = jax.jit(
            lambda batch: task.measure(rule(batch), batch, info), out_shardings=replicated(mesh)
        )
        return task.figures(add_up(measure(put_batch(batch, mesh)) for batch in batches()), info)

    return {name: figures(rule) for name, rule in task.baselines(info).items()}
