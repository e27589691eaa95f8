# SPDX-License-Identifier: Apache-2.0
"""Training, from top to bottom: read, assemble, restore, step, evaluate, save, report."""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from flax_lstm.config import Config
from flax_lstm.data.base import Batch, BatchSource
from flax_lstm.errors import UserError, require
from flax_lstm.machine.distributed import first_then_all, is_first
from flax_lstm.machine.malloc import trim_malloc
from flax_lstm.machine.sharding import put_batch
from flax_lstm.runs.records import (
    MetricsLog,
    device_name,
    finite,
    open_workdir,
    params_sha256,
    read_result,
    versions,
    write_atomically,
)
from flax_lstm.runs.workdir import ASSETS, CHECKPOINTS, CONFIG_FILE, METRICS_FILE, RESULT_FILE
from flax_lstm.tasks.plots import plot_curves
from flax_lstm.training.assembly import Assembly, assemble
from flax_lstm.training.checkpoint import Checkpoints
from flax_lstm.training.evaluation import evaluate, evaluate_baselines
from flax_lstm.training.profiling import STEPS, Profiler
from flax_lstm.training.signals import Signals, Stopped

console = Console(stderr=True)


class Best(NamedTuple):
    """The best validation figure so far; the earliest of equal ones."""

    value: float | None = None
    step: int | None = None
    stale: int = 0  # evaluations since

    def after(self, value: float, step: int, maximise: bool) -> "Best":
        better = self.value is None or (value > self.value if maximise else value < self.value)
        return Best(value, step) if better else self._replace(stale=self.stale + 1)


def batches(source: BatchSource, begin: int, end: int) -> Iterator[Batch]:
    """The batches of the steps from `begin` to `end`, prepared ahead by Grain in a thread of its
    own."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(
        grain.MapDataset.range(begin, end)
        .map(lambda step: source[int(step)])
        .to_iter_dataset(options)
    )


def assemble_again(config: Config, info: Any, backend: str | None) -> Assembly:
    """A run's parts. A resumed run takes the backend it had, so that its numbers stay the same to
    the last bit; where that is not to be had, another with a warning."""
    model = config.model
    if backend not in (None, "auto") and getattr(model, "backend", None) == "auto":
        try:
            return assemble(replace(config, model=replace(model, backend=backend)), info)
        except UserError as error:
            console.print(
                f"warning: this run used another backend until now. {error} Going on with what "
                "there is."
            )
    return assemble(config, info)


def fit(
    config: Config,
    workdir: str | Path | None = None,
    profile: bool = False,
    test: bool = True,
    plots: bool = True,
) -> dict[str, Any]:
    """Trains, or resumes what `workdir` (default `runs/NAME`) holds, and returns the content of
    `result.json`.

    profile: trace a few steps into `workdir/profile` and print what takes longest.
    test: at the end, evaluate the best checkpoint and the baselines on the test split. Without it
    that split is not
        read, the baselines are those on validation, and `result["test"]` is None: for choosing
        settings.
    plots: draw the curves, and what the task has to show.

    Raises UserError for what the user can mend, Stopped after SIGTERM or Ctrl-C with everything
    saved.
    """
    with Signals() as signals:
        return run(config, workdir, profile, test, plots, signals)


def run(
    config: Config,
    workdir: str | Path | None,
    profile: bool,
    test: bool,
    plots: bool,
    signals: Signals,
) -> dict[str, Any]:
    """See `fit`."""
    workdir, console.quiet = Path(workdir or Path("runs") / config.name), not is_first()
    wanted = replace(config, data=config.data.absolute())
    config = first_then_all(lambda: open_workdir(workdir, wanted, is_first()))
    train, task = config.train, config.task
    finished = first_then_all(lambda: finished_result(workdir / RESULT_FILE, train.steps))
    if finished:
        console.print(f"{workdir}: this run is finished.")
        report(finished, workdir)
        return finished

    began = time.monotonic()
    console.print(f"{config.name}: reading the data")
    dataset = first_then_all(lambda: config.data.load(workdir / ASSETS))
    info = dataset.info
    mesh, steps, backend = assemble(config, info)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, task.monitor.maximise)
    latest = checkpoints.latest()
    if latest is not None and backend != (before := checkpoints.progress(latest).get("backend")):
        mesh, steps, backend = assemble_again(config, info, before)
    scratch = tempfile.TemporaryDirectory()  # for what all processes write but one of them keeps
    folder = workdir if is_first() else Path(scratch.name)
    log = MetricsLog(folder / METRICS_FILE)
    source = dataset.train(train.batch_size, config.seed)

    progress: dict[str, Any] = {"seconds": 0.0, "sessions": 0, "best": list(Best()), "losses": []}
    if latest is None:
        state = steps.init()
    else:
        state, progress = checkpoints.restore(latest, steps.abstract)
        console.print(f"resuming from step {latest} of {workdir}")
    step = int(state.step)
    enough = not profile or step + STEPS.stop < train.steps
    left = f"{train.steps - step} are left to train: raise --train.steps"
    require(enough, f"--profile traces {len(STEPS)} steps, after {STEPS.start} others; {left}")
    log.rewind(step)
    best, evaluated = (
        Best(*progress["best"]),
        step,
    )  # where an evaluation was due, it was made before the save
    sessions, earlier = progress["sessions"] + 1, progress["seconds"]
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(
        f"{parameters:,} parameters on {device_name()}; {dataset.size('train'):,} examples, "
        f"{len(source)} steps an epoch"
    )

    pending: tuple[int, dict[str, Any]] | None = None
    losses: list[float] = progress["losses"]  # since the last row of the log
    window = time.monotonic()

    def seconds() -> float:
        return earlier + time.monotonic() - began

    def save(monitor: float | None = None) -> None:
        nonlocal pending
        read(pending)  # so that what is not finite is never saved, and the log is whole up to here
        pending = None
        record = {
            "monitor": monitor,
            "best": list(best),
            "best_step": best.step,
            "losses": [*losses],
        }
        checkpoints.save(
            state, {**record, "seconds": seconds(), "sessions": sessions, "backend": backend}
        )

    def evaluated_params() -> Any:
        return state.params if state.ema is None else state.ema

    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def record(at: int, split: str, figures: dict[str, float]) -> None:
        log.append(at, split, figures, seconds())
        for name, value in finite(figures).items():
            if value is not None:
                board.add_scalar(f"{split}/{name}", value, at)

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} examples/s  left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    line = bar.add_task("step", total=train.steps, completed=step, loss="-", rate="-")

    def diverged(how: str) -> UserError:
        checkpoints.close()  # what is being saved was finite
        board.close()
        return UserError(
            f"{how}: try a lower --train.learning-rate or --train.clip 1. The checkpoints in "
            f"{workdir} are untouched."
        )

    def read(pending: tuple[int, dict[str, Any]] | None) -> None:
        """Takes in the metrics of a step that is done by now, and logs each `log_every` steps."""
        nonlocal losses, window
        if pending is None:
            return
        at, metrics = pending
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise diverged(f"the loss is {loss} and the norm of its gradient {norm} at step {at}")
        losses.append(loss)
        rate = len(losses) * train.batch_size / max(time.monotonic() - window, 1e-9)
        bar.update(line, completed=at, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
        if at % train.log_every == 0:
            mean = sum(losses) / len(losses)
            extra = {"learning_rate": float(metrics["learning_rate"]), "grad_norm": norm}
            record(at, "train", {"loss": mean, **extra, "examples_per_second": rate})
            if bar.disable:
                left = (train.steps - at) * train.batch_size / rate
                console.print(
                    f"step {at}/{train.steps}  loss {mean:.4f}  {rate:,.0f} examples/s  "
                    f"{left:.0f} s left"
                )
            losses, window = [], time.monotonic()

    profiler, first = Profiler(folder / "profile"), step
    stopped_early = False
    stream = batches(source, step, train.steps)
    with bar:
        while True:
            due = step % train.eval_every == 0 or step == train.steps
            if due and step > evaluated:
                read(pending)
                pending, pause = None, time.monotonic()
                rows = dataset.evaluation("validation", train.batch_size)
                figures = evaluate(steps, evaluated_params(), task, info, rows, mesh)
                evaluated, value = step, figures[task.monitor.figure]
                if not math.isfinite(value):
                    raise diverged(
                        f"the validation {task.monitor.figure} is {value} at step {step}"
                    )
                best = best.after(value, step, task.monitor.maximise)
                record(step, "validation", figures)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                console.print(
                    f"step {step}  validation  {shown}{'  (best)' if best.step == step else ''}"
                )
                save(value)
                window += time.monotonic() - pause
            elif step % train.checkpoint_every == 0 and step > 0:
                save()
            stopped_early = bool(train.patience) and best.stale >= train.patience
            if stopped_early or step >= train.steps:
                break
            if number := signals.stop(step):
                save()
                checkpoints.close()
                board.close()
                raise Stopped(number, step, workdir)
            if profile and (told := profiler.at(step - first, state)):
                console.print(told, highlight=False, markup=False)
            state, metrics = steps.train(state, put_batch(next(stream), mesh))
            read(pending)  # of the step before: the device works on while the host reads
            step += 1
            pending = (step, metrics)
            if (
                step - first
            ).bit_count() == 1:  # after 1, 2, 4, ... steps: shapes are compiled as they come
                trim_malloc()

    if stopped_early:
        console.print(
            f"no better validation {task.monitor.figure} in {train.patience} evaluations: "
            "training ends"
        )
    final_hash = params_sha256(state.params)
    checkpoints.wait()
    assert best.step is not None
    params = checkpoints.restore_params(best.step, steps.abstract)
    last = "test" if test else "validation"
    rows_of = partial(dataset.evaluation, batch_size=train.batch_size)
    figures_of = {
        split: evaluate(steps, params, task, info, rows_of(split), mesh)
        for split in dict.fromkeys(("validation", last))
    }
    baselines = evaluate_baselines(task, info, lambda: rows_of(last), mesh)
    if test:
        record(best.step, "test", figures_of["test"])
    checkpoints.close()
    board.close()
    result = {
        "task": type(task).__name__,
        "name": config.name,
        "steps": step,
        "best_step": best.step,
        "parameters": parameters,
        "params_sha256": final_hash,
        "wall_seconds": round(seconds(), 3),
        "sessions": sessions,
        "seed": config.seed,
        "stopped_early": stopped_early,
        "validation": finite(figures_of["validation"]),
        "test": finite(figures_of["test"]) if test else None,
        "baselines": {name: finite(figures) for name, figures in baselines.items()},
        "versions": versions(),
        "device": device_name(),
        "backend": backend,
    }
    if plots:
        plot_curves(log.rows(), folder / "plots" / "curves.png")
    if plots and test:
        task.illustrate(
            dataset, lambda batch: steps.forward(params, None, batch)[1], folder / "plots"
        )
    write_atomically(folder / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    scratch.cleanup()
    report(result, workdir)
    return result


def finished_result(path: Path, steps: int) -> dict[str, Any] | None:
    """The content of `result.json` where no more steps are wanted. One of a shorter run is put
    aside."""
    if not path.exists():
        return None
    result = read_result(path)
    if result["steps"] >= steps or result["stopped_early"]:
        return result
    path.replace(path.with_name(f"result.{result['steps']}.json"))
    return None


def report(result: dict[str, Any], workdir: Path) -> None:
    """Prints the test figures beside those of the baselines, or the validation figures where the
    test split was not read, and where everything is."""
    split = "test" if result["test"] else "validation"
    columns = {"model": result[split], **result["baselines"]}
    table = Table(
        title=f"{result['name']}: {split}, best step {result['best_step']} of {result['steps']}"
    )
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name in result[split]:
        values = [figures.get(name) for figures in columns.values()]
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values))
    console.print(table)
    shown = [RESULT_FILE, METRICS_FILE, CONFIG_FILE, CHECKPOINTS, "tensorboard"]
    plots = sorted(f"plots/{path.name}" for path in (workdir / "plots").glob("*.png"))
    console.print(
        f"In {workdir.absolute()}: {', '.join(shown + plots)}", soft_wrap=True, highlight=False
    )
