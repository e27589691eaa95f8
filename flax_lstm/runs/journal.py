# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it trains: rows of `metrics.jsonl`, TensorBoard, the bar, the console."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from flax_lstm.config import TrainConfig
from flax_lstm.errors import UserError
from flax_lstm.machine.files import write_atomically
from flax_lstm.runs.workdir import Workdir

Figures = Mapping[str, float]

FLUSH_SECONDS = 10  # between writes of curves to the disk


class Diverged(UserError):
    """A loss, gradient or figure that is not finite."""

    def __init__(self, how: str):
        super().__init__(
            f"{how}: try a lower --train.learning-rate or --train.clip 1. The checkpoints are "
            "untouched: with --resume-with learning-rate and a lower one, the same command goes on "
            "from the latest."
        )


class Journal:
    """The log of one session of a run; a context manager.

    folder: where it writes.
    step: the first of the session comes after it. Rows beyond it, of a session whose end was lost,
    are set aside.
    losses: of the steps since the last row of training, from the session before.
    unwritten: rows that had found no room by then.
    began: when the run began, by `time.monotonic`, had it run without a break.
    """

    def __init__(
        self,
        folder: Workdir,
        console: Console,
        train: TrainConfig,
        step: int = 0,
        losses: Sequence[float] = (),
        unwritten: Sequence[str] = (),
        began: float | None = None,
    ):
        self.log = MetricsLog(folder.metrics, unwritten)
        self.losses = [*losses]
        self.console = console
        self.sound = step  # the last whose loss and gradient are known to be finite
        self._folder, self._train, self._step = folder, train, step
        self._began = time.monotonic() if began is None else began
        self._window = time.monotonic()  # since when the losses of the next row come in
        self._told = False  # whether the latest row found no room, and it was said
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} examples/s  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal or console.is_jupyter),
        )
        self._line = self._bar.add_task(
            "step", total=train.steps, completed=step, loss="-", rate="-"
        )

    def __enter__(self) -> "Journal":
        self.log.rewind(self._step)
        self._board = Board(self._folder.tensorboard, self._step)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._board.close()

    def seconds(self) -> float:
        """The time of all sessions."""
        return time.monotonic() - self._began

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of the step before, for this one's may still be computed: the device
        works on while the host reads. Raises Diverged."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Takes in what is pending, and writes a row each `log_every` steps. Raises Diverged."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(f"the loss is {loss} and the norm of its gradient {norm} at step {step}")
        self.sound = step
        self.losses.append(loss)
        elapsed = max(time.monotonic() - self._window, 1e-9)
        rate = len(self.losses) * self._train.batch_size / elapsed
        self._bar.update(self._line, completed=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
        if step % self._train.log_every == 0:
            extra = {"learning_rate": float(metrics["learning_rate"]), "grad_norm": norm}
            self._trained(step, rate, extra)

    def _trained(self, step: int, rate: float, extra: Figures) -> None:
        """The row of the steps since the last."""
        mean = sum(self.losses) / len(self.losses)
        self.record(step, "train", {"loss": mean, **extra, "examples_per_second": rate})
        if self._bar.disable:
            left = (self._train.steps - step) * self._train.batch_size / rate
            self.console.print(
                f"step {step}/{self._train.steps}  loss {mean:.4f}  {rate:,.0f} examples/s  "
                f"{left:.0f} s left"
            )
        self.losses, self._window = [], time.monotonic()

    def evaluated(self, step: int, split: str, figures: Figures, best: bool) -> None:
        """A row of an evaluation, shown too."""
        self.record(step, split, figures)
        line, end = f"step {step}  {split}", "  (best)" if best else ""
        for name in distinct(figures):
            more = f"  {name} {figures[name]:.4g}"
            if len(line + more + end) <= 80:  # the others are in the log
                line += more
        self.console.print(line + end, highlight=False)

    def record(self, step: int, split: str, figures: Figures) -> None:
        """A row of the log, and points of TensorBoard's curves. What a full disk does not take
        comes with a later row; training goes on."""
        try:
            self.log.append(step, split, figures, self.seconds())
            self._board.add_scalars(split, step, finite(figures))
            self._told = False
        except OSError as error:
            if not self._told:
                self.console.print(
                    f"warning: {error.filename or self.log.path} cannot be written "
                    f"({error.strerror}); training goes on, and rows are kept until it can",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            self._told = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training's."""
        began = time.monotonic()
        yield
        self._window += time.monotonic() - began


class Board:
    """Curves for TensorBoard, written as they come: a thread of its own, as `SummaryWriter` has,
    ends at a full disk, and whoever hands it the next point then waits for ever."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        if step:  # points beyond it, of a session whose end was lost, are not shown
            session = SessionLog(status=SessionLog.START)
            event = Event(wall_time=time.time(), step=step, session_log=session)
            self._events.write_event(event)

    def add_scalars(self, split: str, step: int, figures: Mapping[str, float | None]) -> None:
        for name, value in figures.items():
            if value is not None:
                summary = Summary(value=[Summary.Value(tag=f"{split}/{name}", simple_value=value)])
                event = Event(wall_time=time.time(), step=step, summary=summary)
                self._events.write_event(event)
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._events.close()


class MetricsLog:
    """`metrics.jsonl`: one row per (step, split), steps increasing within a split.

    unwritten: lines that found no room in the file, in a session before this one.
    """

    def __init__(self, path: Path, unwritten: Sequence[str] = ()):
        self.path = path
        self.unwritten = [*unwritten]

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows; a torn last line is left out."""
        lines = [*self._lines(), *self.unwritten]
        return [row for line in lines if (row := _parse(line)) is not None]

    def _lines(self) -> list[str]:
        # Bytes that are no UTF-8 are of a damaged line, which is not parsed but kept as it is.
        text = self.path.read_bytes().decode(errors="surrogateescape") if self.path.exists() else ""
        return text.split("\n")[: -1 if text.endswith("\n") else None] if text else []

    def append(self, step: int, split: str, figures: Figures, seconds: float) -> None:
        """Adds a row; the test row of a step that has one already is left as it is."""
        row = {"step": step, "split": split, **finite(figures), "seconds": round(seconds, 3)}
        if split == "test" and any((r["step"], r["split"]) == (step, split) for r in self.rows()):
            return
        self.unwritten.append(json.dumps(row) + "\n")
        self.write()

    def write(self) -> None:
        """Writes what found no room yet."""
        if not self.unwritten:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.writelines(self.unwritten)
        except OSError:
            with contextlib.suppress(OSError):  # half a line would be taken for damage
                os.truncate(self.path, before)
            raise
        self.unwritten.clear()

    def rewind(self, step: int) -> None:
        """Moves rows beyond the step, and a torn last line, to `metrics.discarded.jsonl`; adds
        those that had found no room."""
        kept: list[str] = []
        moved: list[str] = []
        there = set()
        for line in self._lines():
            row = _parse(line)
            if row is not None and row["step"] <= step:
                kept.append(line + "\n")
                there.add((row["step"], row.get("split")))
            else:
                moved.append(line + "\n")
        # Some may have been written later in the session that is gone.
        for line in self.unwritten:
            row = json.loads(line)
            if (row["step"], row["split"]) not in there:
                kept.append(line)
        if moved:
            with self.path.with_name("metrics.discarded.jsonl").open("ab") as file:
                file.write("".join(moved).encode(errors="surrogateescape"))
        if moved or kept:  # also where nothing but the end of the last line was torn off
            write_atomically(self.path, "".join(kept))
        self.unwritten.clear()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line.encode())  # a ValueError, too, where it is no UTF-8
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def distinct(figures: Mapping[str, Any]) -> list[str]:
    """The names of the figures, without a loss that is one of the others under another name."""
    loss = figures.get("loss")
    others = [value for name, value in figures.items() if name != "loss" and value is not None]
    again = loss is not None and any(math.isclose(loss, value, rel_tol=1e-5) for value in others)
    return [name for name in figures if name != "loss" or not again]


def finite(figures: Figures) -> dict[str, float | None]:
    """Figures as JSON numbers; what is not finite becomes null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
