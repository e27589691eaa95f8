# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: the latest and the best, each with the progress of the run.

A checkpoint holds the items `params`, `rest` (optimiser, averaged weights, carried state, step) and
`progress` (JSON).
The position in the data is the step itself: batches are addressed by it.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flax_lstm.errors import UserError, listing, require
from flax_lstm.training.progress import Progress
from flax_lstm.training.steps import TrainState

# Orbax reports every save and restore as a warning or info of its own; its errors reach the user as
# ours.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints in a folder; a context manager, which waits for what is being saved.

    maximise: whether the best has the largest `progress.monitor`, or the smallest; the earliest of
    equal ones. Checkpoints saved between evaluations carry None there and can be the latest but
    never the best.
    """

    def __init__(self, folder: Path, maximise: bool = False):
        self.folder = folder
        sign = 1 if maximise else -1

        def rank(metrics: dict[str, float]) -> tuple[float, float]:
            return sign * metrics["monitor"], -metrics["step"]

        best = policies.BestN(n=1, get_metric_fn=rank, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            best_fn=rank,  # type: ignore[arg-type]  # anything that can be compared
            step_prefix=None,
            create=True,
        )
        handlers: dict[
            str, Any
        ] = {  # named, or the shapes of what an earlier process saved could not be told
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(
                folder.absolute(), options=options, item_handlers=handlers
            )
        except Exception as error:  # the figures of all checkpoints are read here
            there = listing(sorted(path.name for path in folder.glob("*")))
            raise UserError(
                f"{folder}: a checkpoint here cannot be read ({type(error).__name__}: {error}). "
                f"Move the damaged one away, to go on from another; there are: {there}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that a checkpoint is kept of."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Begins to save; training may go on meanwhile."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(state._replace(params=None)),
            progress=ocp.args.JsonSave(progress.as_json()),
        )
        monitor = progress.monitor
        metrics = None if monitor is None else {"monitor": monitor, "step": step}
        self._manager.save(step, args=items, metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """The state and progress at a step, on the devices that `abstract` says.

        Raises UserError for a checkpoint of another model, and for one that cannot be read.
        """
        require_same_model(self._shapes(step), abstract.params, f"{self.folder}/{step}")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(abstract._replace(params=None)),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._restore(step, items)
        state = restored["rest"]._replace(params=restored["params"])
        return state, Progress.of_json(restored["progress"])

    def restore_params(self, step: int, abstract: TrainState) -> Any:
        """The weights that are evaluated: the averaged ones if there are, else the parameters."""
        return self.restore(step, abstract)[0].evaluated

    def progress(self, step: int) -> Progress:
        items = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return Progress.of_json(self._restore(step, items)["progress"])

    def wait(self) -> None:
        """Until the saves under way are done."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _shapes(self, step: int) -> Any:
        try:
            found = self._manager.item_metadata(step)["params"]
        except Exception as error:
            raise self._unreadable(step, error) from error
        if not shapes(found):
            raise self._unreadable(step, FileNotFoundError())
        return found

    def _restore(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except (
            Exception
        ) as error:  # damaged files raise assorted exceptions, plain Exception among them
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        others = [other for other in self.steps() if other != step]
        remedy = (
            f"Move it away, to go on from: {listing(others)}"
            if others
            else "There is no other: begin a new run"
        )
        return UserError(
            f"{self.folder}/{step}: this checkpoint cannot be read ({type(error).__name__}). "
            f"{remedy}"
        )


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """`{"recurrent/layers_0/cell/bias": (4, 128), ...}` of arrays, or of what describes arrays."""
    leaves: Iterable[Any] = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def require_same_model(saved: Any, wanted: Any, where: str) -> None:
    there, here = shapes(saved), shapes(wanted)
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    lines = [
        f"  {name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in differ
    ]
    require(not differ, f"{where} is a checkpoint of another model:\n" + "\n".join(lines[:8]))


def initial_params(state: TrainState, params: Any) -> tuple[TrainState, str]:
    """The first state with those of the given arrays that fit its parameters by path and shape, and
    a text that says which were taken. Raises UserError where none fits."""

    def named(tree: Any) -> dict[str, Any]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    ours, given = named(state.params), named(params)
    taken = {name for name in ours if name in given and np.shape(given[name]) == ours[name].shape}
    lines = [f"  {name} {ours[name].shape}: begins as ever" for name in ours if name not in taken]
    lines += [f"  {name} {np.shape(given[name])}: not used" for name in given if name not in taken]
    told = f"params: {len(taken)} of the model's {len(ours)} arrays begin as given"
    told += "".join(f"\n{line}" for line in lines[:20])
    require(bool(taken), f"params: none fits the model by path and shape:\n{listing(lines)}")

    def begin(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in taken:
            return leaf
        return jax.device_put(np.asarray(given[name]).astype(leaf.dtype), leaf.sharding)

    first = jax.tree_util.tree_map_with_path(begin, state.params)
    # Averages begin as the parameters do; copied, for both are donated to the first step.
    averaged = None if state.ema is None else jax.tree.map(jnp.copy, first)
    return state._replace(params=first, ema=averaged), told
