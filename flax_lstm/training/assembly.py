# SPDX-License-Identifier: Apache-2.0
"""From a config and what the data say of themselves to the jitted steps: the one place where the
parts meet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flax_lstm.config import Config
from flax_lstm.machine.sharding import check_batch_size, make_mesh
from flax_lstm.nn.recurrence import noting
from flax_lstm.training.optim import learning_rate, make_optimizer
from flax_lstm.training.pairing import check_parts
from flax_lstm.training.room import sample_of
from flax_lstm.training.steps import Steps, make_steps
from flax_lstm.training.tables import Table, by_rows


class Assembly(NamedTuple):
    """A run's mesh and steps, and the backend of its recurrences: "auto" where layers differ, or
    there are none."""

    mesh: Mesh
    steps: Steps
    backend: str


def assemble(config: Config, info: Any, devices: Sequence[Any] | None = None) -> Assembly:
    """Builds module, optimiser and steps, for this machine's devices or for those given, which may
    exist in description
    only: `steps.train.lower(steps.abstract, abstract_batch(...))` then compiles for them. Raises
    UserError for a batch that does not divide over the devices."""
    check_parts(config, info)
    train, task = config.train, config.task
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices)
    check_batch_size(train.batch_size, train.accumulate, mesh)
    length = train.schedule_steps or train.steps
    schedule = learning_rate(train.schedule, train.learning_rate, train.warmup_steps, length)
    plateau_steps = max(length // 50, 1) if train.schedule == "plateau" else 0
    optimizer = make_optimizer(
        train.optimizer,
        schedule,
        train.weight_decay,
        train.clip,
        plateau_steps,
        train.epsilon,
        train.layer_decay,
        train.unfreeze_every,
        train.frozen,
    )
    module = task.build(config.model, info)
    with noting() as layers:
        steps = make_steps(
            module,
            task.loss,
            lambda outputs, batch: task.measure(outputs, batch, info),
            optimizer,
            schedule,
            mesh,
            sample_of(info, train.batch_size),
            seed=config.seed,
            accumulate=train.accumulate,
            ema=train.ema,
            adversaries=task.adversaries(),
            table=table_of(config, module, mesh),
            whole=task.whole,
        )
    names = {*layers.values()}
    return Assembly(mesh, steps, names.pop() if len(names) == 1 else "auto")


def table_of(config: Config, module: Any, mesh: Mesh) -> Table | None:
    """The table of embeddings that is updated by rows, where that is AdamW alone. A run that was
    given, or began with, a backend that needs no compiler is the same on a machine that has one."""
    train = config.train
    alone = (
        train.optimizer == "adamw"
        and train.schedule != "plateau"
        and train.layer_decay == 1
        and not (train.unfreeze_every or train.frozen)
        and train.accumulate == 1
    )
    if not alone or config.backend not in ("auto", "cpu") or not by_rows(module, mesh):
        return None
    return Table(train.weight_decay, train.epsilon, train.clip)
