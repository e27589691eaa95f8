# SPDX-License-Identifier: Apache-2.0
"""What is done with a model that was trained: figures of a split, predictions for new inputs."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from flax_lstm.assembly import assemble
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config
from flax_lstm.data.base import Batch
from flax_lstm.errors import UserError, listing, require
from flax_lstm.saved_config import CONFIG_FILE, read_config
from flax_lstm.sharding import put_batch, replicated
from flax_lstm.steps import Steps
from flax_lstm.tasks import Baseline, Task

ASSETS, CHECKPOINTS = "assets", "checkpoints"  # folders of a work directory
SPLITS = ("train", "validation", "test")


def add_up(sums: Iterable[Any]) -> Any:
    """The sum of trees, in float64 on the host, each read one turn late so that the device never waits."""
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
        carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), steps.abstract.carry)
        for batch in batches:
            carry, sums = steps.evaluate(params, carry, put_batch(batch, mesh))
            yield sums

    return task.figures(add_up(run()), info)


def evaluate_baselines(
    task: Task, info: Any, batches: Callable[[], Iterable[Batch]], mesh: Mesh
) -> dict[str, dict[str, float]]:
    """The figures of the task's baselines over the same batches."""

    def figures(rule: Baseline) -> dict[str, float]:
        measure = jax.jit(lambda batch: task.measure(rule(batch), batch, info), out_shardings=replicated(mesh))
        return task.figures(add_up(measure(put_batch(batch, mesh)) for batch in batches()), info)

    return {name: figures(rule) for name, rule in task.baselines(info).items()}


class Run:
    """A trained model: what `load` returns."""

    def __init__(self, workdir: Path, config: Config):
        self.workdir = workdir
        self.config = config
        self.info = config.data.restore(workdir / ASSETS)
        self._parts = assemble(config, self.info)
        self._checkpoints = Checkpoints(workdir / CHECKPOINTS, config.task.monitor.maximise)

    def step(self, checkpoint: str | int = "best") -> int:
        """The step of a checkpoint named "best", "latest", or by its step."""
        latest = self._checkpoints.latest()
        if latest is None:
            raise UserError(f"{self.workdir}: no checkpoint yet; train it first")
        if checkpoint == "latest":
            return latest
        if checkpoint == "best":
            best = self._checkpoints.progress(latest)["best_step"]
            return latest if best is None else best
        kept = self._checkpoints.steps()
        require(
            str(checkpoint).isdigit() and int(checkpoint) in kept,
            f"--checkpoint {checkpoint}: choose best, latest or one of {listing(kept)}",
        )
        return int(checkpoint)

    def params(self, checkpoint: str | int = "best") -> Any:
        """The weights that are evaluated: the averaged ones where the run has them."""
        return self._checkpoints.restore_params(self.step(checkpoint), self._parts.steps.abstract)

    def evaluate(self, split: str = "test", checkpoint: str | int = "best") -> dict[str, Any]:
        """The figures of a split, with `split`, `step` and `examples`."""
        require(split in SPLITS, f"--split {split}: choose one of {listing(SPLITS)}")
        dataset = self.config.data.load(self.workdir / ASSETS)
        step, parts = self.step(checkpoint), self._parts
        batches = dataset.evaluation(split, self.config.train.batch_size)
        params = self.params(step)
        figures = evaluate(parts.steps, params, self.config.task, dataset.info, batches, parts.mesh)
        return {**figures, "split": split, "step": step, "examples": dataset.size(split)}

    def forward(self, checkpoint: str | int = "best") -> Callable[[Batch], np.ndarray]:
        """A function from a batch to the module's outputs."""
        params, steps = self.params(checkpoint), self._parts.steps
        return lambda batch: np.asarray(steps.forward(params, None, jax.tree.map(np.asarray, batch))[1])

    def predict(self, table: pd.DataFrame, checkpoint: str | int = "best") -> pd.DataFrame:
        """Predictions for a table with the columns of the training data; see the task's `predict`."""
        batch_size = min(self.config.train.batch_size, 256)
        return self.config.task.predict(table, self.info, self.forward(checkpoint), batch_size)


def load(workdir: str | Path) -> Run:
    """The trained model in a work directory, ready to `evaluate` and `predict`. Its config is read as data, not run."""
    workdir = Path(workdir)
    path = workdir / CONFIG_FILE
    require(path.exists(), f"{workdir}: no run here ({CONFIG_FILE} is missing); name the folder that train.py wrote")
    config = read_config(path)
    if hasattr(config.model, "backend"):  # that of the training may not be there where the model is used
        config = replace(config, model=replace(config.model, backend="auto"))
    return Run(workdir, config)
