# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written by Orbax, hashed to the last byte, the best and the two latest kept.

A checkpoint is a folder named by its step, with the items `params`, `rest` (optimiser, averaged
weights, carried state, step) and `progress` (JSON), and a manifest of hashes. The position in the
data is the step itself: batches are addressed by it.

    N.unproven    written, but nobody knows yet whether the step after it is finite
    N             sealed with its manifest; only these are restored
    N.damaged     was sealed, and is not any more what was sealed: set aside, never restored
    N.deleted     on its way out
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.distributed import is_first, meet, process_count
from flax_lstm.runs.manifest import MANIFEST, Damaged, is_sealed, seal, verify
from flax_lstm.training.progress import Progress
from flax_lstm.training.steps import TrainState

# Orbax reports every save and restore as a warning or info of its own; its errors reach the user as
# ours.
logging.getLogger("absl").setLevel(logging.CRITICAL)

logger = logging.getLogger(__name__)

LATEST_KEPT = 2  # so that one damage costs steps and not the run
LEFTOVERS = ("*.orbax-checkpoint-tmp", "*.unproven", "*.deleted")


class Saving(NamedTuple):
    """A checkpoint that is not sealed yet."""

    step: int
    best: int | None  # the best step, as of this checkpoint
    sealed: Future[None] | None = None  # the work of sealing, once it has been asked for


class Checkpoints:
    """The checkpoints in a folder; a context manager, which waits for what is being saved.

    warn: told in a line of a checkpoint that cannot be saved, or is damaged. Training goes on.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object] = logger.warning):
        self.folder = folder.absolute()
        self._warn = warn
        self._saving: Saving | None = None
        self._writer: Any = None
        self._sealer = ThreadPoolExecutor(1, "seal")
        self._failed: str | None = None  # why the latest save failed
        self._verified: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._saving and not self._saving.sealed:
            self._discard()
        self.close()

    # --- what there is

    def steps(self) -> list[int]:
        """Steps that a checkpoint is kept of."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def verify(self, step: int, content: bool = True) -> bool:
        """Raises UserError for the first file that is not as it was saved; without `content` names
        and sizes alone are compared. False: a checkpoint of version 0.1.0 has no hashes."""
        folder = self.folder / str(step)
        sealed = is_sealed(folder)
        if not sealed and not self._is_old(folder):
            raise Damaged(folder / MANIFEST, "is missing")
        if sealed:
            verify(folder, content)
        if content:
            self._verified.add(step)
        return sealed

    def listing(self, content: bool) -> list[dict[str, Any]]:
        """See `inference.checkpoints`."""
        best, latest = self.best(), self.latest()
        aside = sorted(self.folder.glob("*.damaged"))
        rows = [
            {"step": int(path.stem), "bytes": _bytes(path), "monitor": None, "intact": False}
            | {"best": False, "latest": False, "damage": f"set aside as {path.name}"}
            for path in aside
            if path.stem.isdigit()
        ]
        for step in self.steps():
            row: dict[str, Any] = {"step": step, "bytes": _bytes(self.folder / str(step))}
            row |= {"monitor": None, "intact": None, "damage": None}
            row |= {"best": step == best, "latest": step == latest}
            try:
                sealed = self.verify(step, content)
                row["intact"] = sealed if content or not sealed else None
                row["monitor"] = self._progress(self.folder / str(step)).monitor
            except UserError as error:
                row |= {"intact": False, "damage": str(error)}
            rows.append(row)
        return sorted(rows, key=lambda row: row["step"])

    def _is_old(self, folder: Path) -> bool:
        """Whether an earlier release saved it: these had an item `metrics`, or no best figure yet,
        and said nothing of their form."""
        return self._progress(folder).form == 1

    def newest_intact(self) -> int | None:
        """The latest step whose checkpoint is as it was saved. Damaged ones are set aside, with a
        warning that says what that costs; where all are, a UserError says so."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                self.verify(step)
                return step
            except UserError as error:
                earlier = [other for other in steps if other < step]
                self._set_aside(step)
                cost = (
                    f"going on from step {earlier[-1]}, {step - earlier[-1]} earlier"
                    if earlier
                    else "there is no other"
                )
                self._warn(
                    f"warning: the checkpoint of step {step} is damaged and set aside as "
                    f"{step}.damaged; {cost}. {error}"
                )
        aside = sorted(path.name for path in self.folder.glob("*.damaged"))
        require(
            not aside,
            f"{self.folder}: no checkpoint is left that is as it was saved; set aside: "
            f"{listing(aside)}. Begin a new run in another --workdir, or bring back a copy",
        )
        return None

    def _set_aside(self, step: int) -> None:
        if is_first():
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier damage
            (self.folder / str(step)).rename(aside)

    def best(self) -> int | None:
        """The step with the best validation figure, as the latest intact checkpoint has it; the
        latest where none was evaluated."""
        intact = self._intact()
        if not intact:
            return self.latest()
        best = self.progress(intact[-1]).best.step
        return intact[-1] if best is None else best

    def _intact(self) -> list[int]:
        found = []
        for step in self.steps():
            try:
                self.verify(step)
                found.append(step)
            except UserError:
                pass
        return found

    def best_intact(self, best: int, maximise: bool) -> int:
        """The best step, or the best of those left where its checkpoint is damaged or could not be
        saved; a warning says so."""
        intact = self._intact()
        if best in intact:
            return best
        figures = {step: self.progress(step).monitor for step in intact}
        ranked = sorted(
            (value if maximise else -value, step)
            for step, value in figures.items()
            if value is not None
        )
        require(
            bool(ranked), f"{self.folder}: the checkpoint of the best step, {best}, cannot be read"
        )
        step = ranked[-1][1]
        self._warn(
            f"warning: the checkpoint of the best step, {best}, is damaged or could not be saved; "
            f"figures are those of step {step}, the best of those left"
        )
        return step

    # --- saving

    def save(self, state: TrainState, progress: Progress) -> None:
        """Begins to save; training may go on meanwhile. The checkpoint before it, if it was not
        found good, is given up."""
        step = int(state.step)
        if (self._saving and self._saving.step == step) or (self.folder / str(step)).exists():
            return
        self.settle()
        self._discard()
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(state._replace(params=None)),
            progress=ocp.args.JsonSave(progress.as_json()),
        )
        self._saving = Saving(step, progress.best.step)
        try:
            self._write(step, items)
        except Exception as error:  # a full or read-only disk raises assorted exceptions
            self._not_saved(error)

    def _write(self, step: int, items: Any) -> None:
        if self._writer is None:
            if is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
            meet("checkpoints")
            self._writer = ocp.AsyncCheckpointer(_handler())
        self._writer.save(self.folder / f"{step}.unproven", args=items)

    def prove(self, step: int) -> None:
        """Says that the loss and gradient of this step are finite, and so the states before it are
        worth keeping: what is being saved of them is sealed, in a thread of its own."""
        if self._saving and self._saving.step < step and not self._saving.sealed:
            self.accept()
        if self._saving and self._saving.sealed and self._saving.sealed.done():
            self.settle()

    def accept(self) -> None:
        """What is being saved is good."""
        if self._saving and not self._saving.sealed:
            work = self._sealer.submit(self._seal, self._saving)
            self._saving = self._saving._replace(sealed=work)

    def _seal(self, saving: Saving) -> None:
        self._writer.wait_until_finished()
        if not is_first():
            return
        unproven, final = self.folder / f"{saving.step}.unproven", self.folder / str(saving.step)
        seal(unproven)
        unproven.rename(final)
        kept = {*self.steps()[-LATEST_KEPT:], saving.best}
        for step in self.steps():
            if step not in kept:
                _delete(self.folder / str(step))

    def settle(self) -> None:
        """Until what was found good is sealed."""
        if self._saving and self._saving.sealed:
            try:
                self._saving.sealed.result()
                self._saving = self._failed = None
            except Exception as error:
                self._not_saved(error)

    def _not_saved(self, error: Exception) -> None:
        """Goes on without this checkpoint. Among several processes the others wait for it, so that
        there all end."""
        assert self._saving
        step, self._saving = self._saving.step, None
        if process_count() > 1:
            raise error
        self._failed = _reason(error)
        self._remove_leftovers()
        last = self.latest()
        kept = "there is none yet" if last is None else f"the last good one is of step {last}"
        self._warn(
            f"warning: {self.folder}: the checkpoint of step {step} cannot be saved "
            f"({self._failed}); {kept}. Training goes on and tries again at the next"
        )

    def _discard(self) -> None:
        """Gives up what is being saved."""
        if self._saving:
            try:
                self._writer.wait_until_finished()
            except Exception as error:
                self._not_saved(error)
            self._saving = None
            if is_first():
                self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Of a kill, or of a save that failed: they hold space that the next one may need."""
        for pattern in LEFTOVERS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Until the last save is sealed, in all processes. Raises UserError where it failed."""
        self.accept()
        self.settle()
        meet("sealed")
        require(
            self._failed is None,
            f"{self.folder}: the last checkpoint could not be saved ({self._failed}). Make room, "
            "and the same command goes on from "
            f"{'the beginning' if self.latest() is None else f'step {self.latest()}'}",
        )

    def close(self) -> None:
        self.settle()
        self._sealer.shutdown()
        if self._writer is not None:
            self._writer.close()

    # --- restoring

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """The state and progress at a step, on the devices that `abstract` says.

        Raises UserError for a checkpoint of another model, and for one that is not as it was saved.
        """
        self._check(step)
        require_same_model(self._shapes(step), abstract.params, f"{self.folder}/{step}")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(abstract._replace(params=None)),
        )
        restored = self._read(step, lambda reader, folder: reader.restore(folder, args=items))
        state = restored["rest"]._replace(params=restored["params"])
        return state, self._progress(self.folder / str(step))

    def restore_params(self, step: int, abstract: TrainState) -> Any:
        """The weights that are evaluated: the averaged ones if there are, else the parameters."""
        return self.restore(step, abstract)[0].evaluated

    def progress(self, step: int) -> Progress:
        self._check(step)
        return self._progress(self.folder / str(step))

    def _progress(self, folder: Path) -> Progress:
        try:
            return Progress.of_json(json.loads((folder / "progress" / "metadata").read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise self._unreadable(int(folder.name), error) from error

    def _check(self, step: int) -> None:
        """Verifies a checkpoint, once."""
        if step not in self._verified:
            try:
                self.verify(step)
            except Damaged as error:
                raise self._unreadable(step, error) from error

    def _shapes(self, step: int) -> Any:
        found = self._read(step, lambda reader, folder: reader.metadata(folder))
        found = found.item_metadata["params"]
        if not shapes(found):
            raise self._unreadable(step, FileNotFoundError())
        return found

    def _read(self, step: int, action: Callable[[Any, Path], Any]) -> Any:
        try:
            with ocp.Checkpointer(_handler()) as reader:
                return action(reader, self.folder / str(step))
        # Damaged files raise assorted exceptions, plain Exception among them.
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        others = [other for other in self.steps() if other != step]
        remedy = f"There are others: {listing(others)}" if others else "There is no other"
        why = str(error) if isinstance(error, Damaged) else type(error).__name__
        return UserError(f"{self.folder}/{step}: this checkpoint cannot be read ({why}). {remedy}")


def _handler() -> Any:
    """Items by name, or the shapes of what an earlier process saved could not be told."""
    return ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(),
        rest=ocp.StandardCheckpointHandler(),
        progress=ocp.JsonCheckpointHandler(),
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _delete(folder: Path) -> None:
    """Renamed first, so that half of a checkpoint is never taken for one."""
    gone = folder.with_name(f"{folder.name}.deleted")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """An error in a few words: `No space left on device`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for known in ("No space left on device", "Read-only file system", "Permission denied"):
        if known in str(error):
            return known
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


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
    require(bool(taken), "params: none fits the model by path and shape:\n" + "\n".join(lines[:8]))

    def begin(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in taken:
            return leaf
        return jax.device_put(np.asarray(given[name]).astype(leaf.dtype), leaf.sharding)

    first = jax.tree_util.tree_map_with_path(begin, state.params)
    # Averages begin as the parameters do; copied, for both are donated to the first step.
    averaged = None if state.ema is None else jax.tree.map(jnp.copy, first)
    return state._replace(params=first, ema=averaged), told
