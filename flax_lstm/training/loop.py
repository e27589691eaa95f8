# SPDX-License-Identifier: Apache-2.0
"""Training, from top to bottom: read, assemble, restore, step, evaluate, save, report."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from flax_lstm.config import Config
from flax_lstm.data.base import Batch, BatchSource, Dataset
from flax_lstm.data.fingerprint import content_sha256
from flax_lstm.errors import UserError, require
from flax_lstm.machine.distributed import first_then_all, is_first, meet
from flax_lstm.machine.malloc import trim_malloc
from flax_lstm.machine.sharding import put_batch
from flax_lstm.runs.journal import Diverged, Journal, finite
from flax_lstm.runs.report import conditions, device_name, params_sha256, report, versions
from flax_lstm.runs.saved_config import require_savable
from flax_lstm.runs.workdir import Workdir
from flax_lstm.tasks.plots import plot_curves
from flax_lstm.training.assembly import Assembly, assemble
from flax_lstm.training.checkpoint import Checkpoints, initial_params
from flax_lstm.training.evaluation import evaluate, evaluate_baselines
from flax_lstm.training.ngrams import with_ngrams
from flax_lstm.training.pairing import check_parts
from flax_lstm.training.profiling import STEPS, Profiler
from flax_lstm.training.progress import Progress
from flax_lstm.training.room import check_room
from flax_lstm.training.signals import Signals, Stopped
from flax_lstm.training.steps import TrainState
from flax_lstm.training.vectors import with_vectors


@dataclass(frozen=True)
class Surroundings:
    """What `fit` finds around it. Tests give it other functions."""

    assemble: Callable[[Config, Any], Assembly] = assemble
    put_batch: Callable[[Batch, Mesh], Batch] = put_batch
    trim_malloc: Callable[[], None] = trim_malloc
    plot_curves: Callable[[Sequence[Mapping[str, Any]], Path], object] = plot_curves


class Origin(Protocol):
    """A run to begin another with; `load` gives one."""

    config: Config
    workdir: Path
    assets: Path

    def params(self) -> Any:
        """Its weights."""
        ...


def fit(
    config: Config,
    workdir: str | Path | None = None,
    profile: bool = False,
    test: bool = True,
    plots: bool = True,
    params: Any = None,
    words: Sequence[str] | None = None,
    data: Any = None,
    init_from: Origin | None = None,
    resume_with: Sequence[str] = (),
    around: Surroundings | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains, or resumes what `workdir` (default `runs/NAME`) holds, and returns the content of
    `result.json`.

    profile: trace a few steps into `workdir/profile` and print what takes longest.
    test: at the end, evaluate the best checkpoint and the baselines on the test split. Without it
    that split stays unread, baselines are those on validation, and `result["test"]` is None.
    plots: draw the curves, and what the task has to show.
    params: a tree of arrays to begin a new run with. Those that have the path and shape of one of
    the model's are taken, and it is said which; the model's others begin as ever.
    words: of the rows of the embedding in `params`, from 3 on (0 padding, 1 unknown, 2 the end).
    init_from: another run, `load("runs/imdb_lm")`, to take these from, and its vocabulary as well,
    so that embeddings stay with their words.
    data: in the place of the file `config.data.path`: a DataFrame, or arrays (x, y) for
    `Sequences`. The saved config names them by a hash of their content: resume with the same.
    resume_with: settings that may differ from the run's, of `learning-rate`, `clip`, `seed` (of the
    order of examples and of dropout from there on) and `schedule-steps`.
    quiet: print neither progress nor figures, which the folder and the result have.

    Raises UserError for what the user can mend, Stopped (all is saved) after SIGTERM or Ctrl-C.
    """
    folder = Workdir(workdir or Path("runs") / config.name)
    console = Console(stderr=True, quiet=quiet or not is_first())
    settings = config.data.absolute()
    wanted = replace(config, data=settings if data is None else settings.holding(data))
    check_parts(wanted)
    require_savable(wanted)
    with Signals() as signals, ExitStack() as held:
        own = first_then_all(lambda: held.enter_context(folder.own(is_first())))
        config = first_then_all(lambda: open_run(folder, wanted, resume_with))
        result = first_then_all(lambda: folder.finished(config.train.steps))
        if result:
            console.print(f"{folder}: this run is finished.", soft_wrap=True)
        else:
            # Ids before the data are encoded, weights once there are steps.
            first_then_all(partial(take_words, config, words, init_from, folder.assets))
            params = params if init_from is None else weights_of(init_from, config, console)
            session = Session(config, folder, own, console, around or Surroundings())
            with session.checkpoints, session.begin(params) as journal:
                session.train(journal, signals, Profiler(own.profile) if profile else None)
                result = session.conclude(journal, test)
            if plots:
                session.draw(journal, test)
            own.write_result(result)
            meet("finished")  # without the limit that JAX sets to waiting at its own end
    report(result, folder, console)
    return result


def take_words(
    config: Config, words: Sequence[str] | None, init_from: Origin | None, assets: Path
) -> None:
    """What a new run's vocabulary is, where it is not made of the data."""
    if words is not None:
        config.data.adopt(words, assets)
    if init_from is not None:
        check_direction(config, init_from)
        config.data.inherit(init_from.assets, assets)


def check_direction(config: Config, init_from: Origin) -> None:
    """Raises UserError where one run reads backwards and the other does not: a language model by
    its data, whose windows follow each other, a classifier by its model."""

    def backwards(read: Config) -> bool:
        return any(getattr(part, "backwards", False) for part in (read.data, read.model))

    theirs = backwards(init_from.config)
    part = "data" if hasattr(config.data, "backwards") else "model"
    require(
        theirs == backwards(config),
        f"{init_from.workdir} reads texts {'backwards' if theirs else 'forwards'}: begin with a "
        f"run that reads as this one, or give --{part}.backwards {theirs}",
    )


SHAPING = ("cell", "hidden_size", "embed_size", "num_layers", "bidirectional")


def weights_of(init_from: Origin, config: Config, console: Console) -> Any:
    """The weights of another run. Prints the settings that would let a model take all of the
    recurrent ones, where it has others."""
    theirs, ours = vars(init_from.config.model), vars(config.model)
    differ = [name for name in SHAPING if name in theirs and theirs[name] != ours.get(name)]
    if differ:
        there = [f"--model.{name.replace('_', '-')} {theirs[name]}" for name in differ]
        console.print(
            f"{init_from.workdir} has weights of other shapes: {' '.join(there)}",
            soft_wrap=True,
            highlight=False,
        )
    return init_from.params()


def open_run(folder: Workdir, wanted: Config, resume_with: Sequence[str]) -> Config:
    """The config to train with, see `Workdir.open`."""
    found = None
    if is_first():
        with suppress(OSError):  # what cannot be read is named when the data are
            found = content_sha256(wanted.data.files(), wanted.data.below)
    return folder.open(wanted, is_first(), resume_with, found)


def batches(source: BatchSource, begin: int, end: int) -> Iterator[Batch]:
    """The batches of the steps from `begin` to `end`, prepared ahead by Grain in a thread of its
    own."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(
        grain.MapDataset.range(begin, end)
        .map(lambda step: source[int(step)])
        .to_iter_dataset(options)
    )


class Session:
    """One session of a run: from its beginning, or a checkpoint, to its end, or a signal.

    Its parts are made once: data, steps, checkpoints. What changes as it trains are `state`,
    `step` (of the state, known without waiting for the device) and `best`.

    folder, own: the run's folder, and where this process writes (see `Workdir.own`).
    """

    state: TrainState
    step: int

    def __init__(
        self, config: Config, folder: Workdir, own: Workdir, console: Console, around: Surroundings
    ):
        self.config, self.folder, self.own = config, folder, own
        self.console, self.around = console, around
        self.began = time.monotonic()
        console.print(f"{config.name}: reading the data")
        self.dataset: Dataset = first_then_all(self._load)
        config.task.check(self.dataset)
        parts = around.assemble(config, self.dataset.info)
        check_room(config, self.dataset.info, parts.steps)
        self.tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        self.checkpoints = Checkpoints(folder.checkpoints, self.tell)
        self.latest = first_then_all(self.checkpoints.newest_intact)
        self.progress = Progress()
        if self.latest is not None:
            self.progress = self.checkpoints.progress(self.latest)
        self.mesh, self.steps, self.backend = self._as_before(parts)
        self.conditions = conditions()
        self._tell_what_differs()

    def _tell_what_differs(self) -> None:
        """Warns of what keeps a resumed run from ending bit for bit as an uninterrupted one."""
        before = self.progress.conditions
        differ = [
            f"{name} {before[name]} then, {now} now"
            for name, now in self.conditions.items()
            if name in before and before[name] != now
        ]
        if differ:
            self.console.print(
                "warning: figures will not be bit for bit those of an uninterrupted run: "
                f"{'; '.join(differ)}"
            )
        train, at = self.config.train, self.latest or 0
        if train.schedule in ("cooldown", "cosine") and train.schedule_steps <= at < train.steps:
            self.console.print(
                f"warning: the schedule of this run ended at step {train.schedule_steps}: all "
                f"{train.steps - at} steps to come are made at a learning rate of 0. "
                "--resume-with schedule-steps goes on with a longer one: --train.schedule-steps "
                f"{train.steps}"
            )

    def _load(self) -> Dataset:
        self.folder.check_assets()
        dataset = self.config.data.load(self.folder.assets)
        self.folder.seal_assets()
        return dataset

    def _as_before(self, parts: Assembly) -> Assembly:
        """The run's parts. A resumed run takes the backend it had, so that its numbers stay the
        same to the last bit; where that is not to be had, another with a warning."""
        config, before = self.config, self.progress.backend
        if before in (None, "auto", parts.backend) or config.backend != "auto":
            return parts
        try:
            return self.around.assemble(config.with_backend(before), self.dataset.info)
        except UserError as error:
            self.console.print(
                f"warning: this run used another backend until now. {error} Going on with what "
                "there is."
            )
            return parts

    def begin(self, params: Any) -> Journal:
        """Takes the state of the latest checkpoint, or a first one; returns the journal of what
        follows."""
        train = self.config.train
        if self.latest is None:
            self.state = self.steps.init()
            if params is not None:
                self.state, told = initial_params(self.state, params)
                self.console.print(told)
            self.state = with_vectors(self.state, self.dataset)
            self.state = with_ngrams(self.state, self.dataset, self.config.model)
        else:
            self.state, self.progress = self.checkpoints.restore(self.latest, self.steps.abstract)
            self.console.print(f"resuming from step {self.latest} of {self.folder}")
        self.step, self.best = int(self.state.step), self.progress.best
        # Where an evaluation was due, it was made before the save.
        self.first = self.evaluated = self.step
        self.source = self.dataset.train(train.batch_size, self.config.seed)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.console.print(
            f"{self.parameters:,} parameters on {device_name()}; {self.dataset.size('train'):,} "
            f"examples, {len(self.source)} steps an epoch"
        )
        began = self.began - self.progress.seconds
        losses, unwritten = self.progress.losses, self.progress.unwritten
        return Journal(self.own, self.console, train, self.step, losses, unwritten, began)

    @property
    def stopped_early(self) -> bool:
        patience = self.config.train.patience
        return bool(patience) and self.best.stale >= patience

    def train(self, journal: Journal, signals: Signals, profiler: Profiler | None) -> None:
        """The steps that are left, with evaluations and checkpoints where they are due."""
        train = self.config.train
        left = train.steps - self.step
        require(
            profiler is None or left > STEPS.stop,
            f"--profile traces {len(STEPS)} steps, after {STEPS.start} others; {left} are left to "
            "train: raise --train.steps",
        )
        stream = batches(self.source, self.step, train.steps)
        shapes: set[Batch] = set()
        while True:
            due = self.step % train.eval_every == 0 or self.step == train.steps
            if due and self.step > self.evaluated:
                self.validate(journal)
            elif self.step % train.checkpoint_every == 0 and self.step > 0:
                self.save(journal)
            if self.stopped_early or self.step >= train.steps:
                break
            if number := signals.stop(self.step):
                self.save(journal)
                self.checkpoints.wait()
                raise Stopped(number, self.step, self.folder.path)
            if profiler and (told := profiler.at(self.step - self.first, self.state)):
                self.console.print(told, highlight=False, markup=False)
            batch = self.around.put_batch(next(stream), self.mesh)
            self.state, metrics = self.steps.train(self.state, batch)
            self.step += 1
            journal.step(self.step, metrics)
            self.checkpoints.prove(journal.sound)
            # A new shape was compiled, which leaves memory behind that no step needs.
            if (shape := jax.tree.map(jnp.shape, batch)) not in shapes:
                shapes.add(shape)
                self.around.trim_malloc()
        if self.stopped_early:
            self.console.print(
                f"no better validation {self.config.task.monitor.figure} in {train.patience} "
                "evaluations: training ends"
            )

    def validate(self, journal: Journal) -> None:
        """Figures of the validation split, and a checkpoint that has them."""
        monitor = self.config.task.monitor
        journal.flush()
        with journal.paused():
            figures = self.figures("validation", self.state.evaluated)
            value = figures[monitor.figure]
            if not math.isfinite(value):
                raise Diverged(f"the validation {monitor.figure} is {value} at step {self.step}")
            self.evaluated = self.step
            self.best = self.best.after(value, self.step, monitor.maximise)
            journal.evaluated(self.step, "validation", figures, best=self.best.step == self.step)
            self.save(journal, value)
            self.around.trim_malloc()  # evaluation has shapes of its own

    def figures(self, split: str, params: Any) -> dict[str, float]:
        rows = self.dataset.evaluation(split, self.config.train.batch_size)
        task, info = self.config.task, self.dataset.info
        return evaluate(self.steps, params, task, info, rows, self.mesh)

    def save(self, journal: Journal, monitor: float | None = None) -> None:
        """Begins to save a checkpoint; `monitor` is its validation figure."""
        require(
            self.folder.config.exists(),
            f"{self.folder}: the folder of this run, or its config.py, was removed while it "
            "trained; the run is gone with it",
        )
        # So that what is not finite is never saved, and the log is whole up to here.
        journal.flush()
        self.checkpoints.prove(journal.sound)
        progress = Progress(
            seconds=journal.seconds(),
            sessions=self.progress.sessions + 1,
            best=self.best,
            losses=tuple(journal.losses),
            unwritten=tuple(journal.log.unwritten),
            backend=self.backend,
            conditions=self.conditions,
            monitor=monitor,
        )
        self.checkpoints.save(self.state, progress)

    def conclude(self, journal: Journal, test: bool) -> dict[str, Any]:
        """The content of `result.json`: figures of the best checkpoint and of the baselines."""
        config = self.config
        final_hash = params_sha256(self.state.params)
        self.checkpoints.wait()
        assert self.best.step is not None
        best = self.checkpoints.best_intact(self.best.step, config.task.monitor.maximise)
        self.best_params = self.checkpoints.restore_params(best, self.steps.abstract)
        self._settle()
        last = "test" if test else "validation"
        figures = {
            split: self.figures(split, self.best_params)
            for split in dict.fromkeys(("validation", last))
        }
        rows = partial(self.dataset.evaluation, last, config.train.batch_size)
        baselines = evaluate_baselines(self.config.task, self.dataset.info, rows, self.mesh)
        if is_first():
            baselines |= config.task.rivals(self.dataset, last, self.folder.evaluation)
        if test:
            journal.record(best, "test", figures["test"])
        journal.log.write()  # a run is finished when its log is whole
        return {
            "task": type(config.task).__name__,
            "name": config.name,
            "steps": self.step,
            "best_step": best,
            "parameters": self.parameters,
            "params_sha256": final_hash,
            "wall_seconds": round(journal.seconds(), 3),
            "sessions": self.progress.sessions + 1,
            "seed": config.seed,
            "stopped_early": self.stopped_early,
            "validation": finite(figures["validation"]),
            "test": finite(figures["test"]) if test else None,
            "baselines": {name: finite(baseline) for name, baseline in baselines.items()},
            "versions": versions(),
            "device": device_name(),
            "backend": self.backend,
            "cores": self.conditions["cores"],
            "processes": self.conditions["processes"],
            "data_sha256": self.folder.data_sha256(),
        }

    def _settle(self) -> None:
        """From here on the task is as it will be when the run is used."""
        task = self.config.task
        settled = task.settle(self.dataset, self._forward, self.own.path)
        if settled != task:
            self.config = replace(self.config, task=settled)
            self.steps = self.around.assemble(self.config, self.dataset.info).steps

    def _forward(self, batch: Batch) -> Any:
        """The outputs of the best checkpoint."""
        return jax.device_get(self.steps.forward(self.best_params, None, batch)[1])

    def draw(self, journal: Journal, test: bool) -> None:
        """The curves, and what the task has to show of the test split; a full disk costs these."""
        try:
            self.around.plot_curves(journal.log.rows(), self.own.plots / "curves.png")
            if test:
                self.config.task.illustrate(self.dataset, self._forward, self.own.plots)
        except OSError as error:
            self.tell(f"warning: {self.own.plots}: no plots are drawn ({error.strerror})")
