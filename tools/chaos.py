# SPDX-License-Identifier: Apache-2.0
"""Breaks runs on purpose, and counts how that ends.

    python tools/chaos.py --trials 20             all faults, so many times each
    python tools/chaos.py --trials 1000 --only bytes

Prints a row for each fault: trials, outcomes, and how many ended as none may (a value that is
silently wrong, a traceback, a run that cannot go on). Status 1 if any did. SIGINT and SIGTERM end
it with the rows so far. Every fault is followed
by the same command, which must end as a run that nothing befell: the same parameters, figures and
log. Runs are small, and forked from a process that has imported everything.

Disks that are full or read-only are made by mounting and by giving up rights, for which it takes
root; elsewhere files that cannot grow stand for them.
"""

import argparse
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
BAD = ("silently wrong", "traceback", "lost", "hung", "other end", "not refused", "leaks")
FORKS = multiprocessing.get_context("forkserver")
# What every session imports, lazily or not: a fork has it at once.
PRELOADED = [
    *(f"flax_lstm.{name}" for name in ("commands.train", "commands.prepare", "inference", "data")),
    *(f"flax_lstm.{name}" for name in ("nn.recurrence.cpu", "tasks.linear", "tasks.plots")),
    *("tensorboardX", "array_record.python.array_record_data_source", "grain"),
    *("sklearn.linear_model", "sklearn.feature_extraction.text"),
]
LONGEST = 900  # seconds, after which a run counts as hung
BOUND = 120  # seconds in which processes end of which one is gone

STEPS = "--train.steps 16 --train.eval-every 8 --train.checkpoint-every 5 --train.log-every 2"
SMALL = f"{STEPS} --train.batch-size 8 --model.hidden-size 4"
WORDS = "--data.vocabulary-size 30 --model.embed-size 4"
KINDS = {
    "series": "--config series_table --data.path table.csv --data.lookback 8 --data.horizon 2 "
    "--data.season 4",
    "texts": f"--config text_table --data.path texts.csv --data.max-length 8 {WORDS}",
    "language": f"--config text_lm --data.path texts.csv --data.sequence-length 5 {WORDS} "
    "--task.candidates 8",
    "tags": f"--config tag_table --data.path tags.jsonl --data.max-length 8 {WORDS}",
    "sequences": "--config sequence_table --data.path lists.jsonl",
    "adding": "--config adding_problem --data.length 8 --data.examples 80 "
    "--data.validation-examples 20 --data.test-examples 20",
}
BACKENDS = ("cpu", "fused", "scan")
PREPARE = (
    f"prepare --config text_lm --data.path texts.csv {WORDS.split(' --model')[0]} --out tokens"
)
# What a run does, by the file that it writes just then.
PHASES = {
    "assets": "data",
    "checkpoints": "saving",
    "metrics.jsonl": "log",
    "tensorboard": "log",
    "evaluation": "rivals",
    "plots": "report",
    "result.json": "result",
}


# --- a session of a run, in a process of its own


@dataclass(frozen=True)
class How:
    """What befalls a session from its beginning on."""

    largest: int = 0  # bytes that a file may have; 0: any
    die_at: int = 0  # kill -9 at this change of a file of the run; 0: never
    powerless: bool = False  # root obeys the modes of files
    cache: Path | None = None  # another cache folder
    compiler: Path | None = None  # another C++ compiler


def session(arguments: list[str], place: Path, said: Path, how: How) -> None:
    """`flax-lstm` with these arguments, in `place`, its words in a file."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.chdir(place)
    gc.freeze()  # what is inherited is not looked through again
    os.environ.update(plain())
    if how.cache:
        os.environ["XDG_CACHE_HOME"] = str(how.cache)
    if how.compiler:
        os.environ["CXX"] = str(how.compiler)
    if how.largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how.largest, resource.RLIM_INFINITY))
    count_changes(place, how.die_at, said.with_suffix(".changes"))
    if how.powerless:
        give_up_rights()
    from flax_lstm.__main__ import main

    sys.exit(main(arguments))


def plain() -> dict[str, str]:
    """The environment with one device and XLA's own ways to compile, whatever the caller asked
    for: of the same command come the same bits."""
    return {**os.environ, "XLA_FLAGS": ""}


def give_up_rights() -> None:
    """capset(2) to nothing: root is a user as any other."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


def count_changes(place: Path, die_at: int, timeline: Path) -> None:
    """Notes the calls that make, change or remove a file below `place`, a line each; at the given
    one, kills this process before it is made. What Orbax writes by C++ is not seen."""
    changes = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
    file = open(timeline, "wb", buffering=0)  # noqa: SIM115  # as long as the process
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not (writes or event in changes) or isinstance(arguments[0], int):
            return
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if not path.is_relative_to(place):
            return
        seen += 1
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(file.fileno(), f"{path.relative_to(place)}\n".encode())

    sys.addaudithook(watch)


def phase(changed: str) -> str:
    """What a run does when it changes this file."""
    return next((PHASES[part] for part in Path(changed).parts if part in PHASES), "beginning")


class Session:
    """A command that has been started, in a process of its own."""

    number = 0

    def __init__(self, place: Path, arguments: str, how: How = How()):  # frozen
        Session.number += 1
        self.said = place / f"said{Session.number}"
        self.process = FORKS.Process(
            target=session, args=(arguments.split(), place, self.said, how), daemon=False
        )
        self.process.start()
        self.began = time.monotonic()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def ended(self, seconds: float = LONGEST) -> tuple[int, str]:
        """Its status and words, when it has ended; -99 where it does not in time."""
        self.process.join(seconds)
        if self.running:
            self.process.kill()
            self.process.join()
            return -99, self.words()
        return self.process.exitcode or 0, self.words()

    def words(self) -> str:
        return self.said.read_text() if self.said.exists() else ""

    def changes(self) -> list[str]:
        """The files that it has changed, in their order."""
        timeline = self.said.with_suffix(".changes")
        return timeline.read_text().splitlines() if timeline.exists() else []

    def signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)


def training(
    run: Path, arguments: str, how: How = How(), report: bool = False
) -> Session:  # frozen
    """`flax-lstm train` with these arguments into the folder `run`; report: pictures, too."""
    more = "" if report else " --no-report"
    return Session(run.parent, f"train {arguments} --workdir {run.name}{more}", how)


def the_end(folder: Path) -> Any:
    """What a run ends with, without what depends on the clock."""
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "examples_per_second")
    rows = [{name: v for name, v in row.items() if name not in clocks} for row in rows]
    return result["params_sha256"], result["best_step"], result["test"], rows


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, without the place where it is."""
    place = str(folder.parent).encode()
    return {path.name: path.read_bytes().replace(place, b"") for path in folder.iterdir()}


def pictures(folder: Path) -> list[str]:
    """Names of the pictures that are whole."""
    found = sorted((folder / "plots").glob("*"))
    return [path.name for path in found if path.read_bytes().endswith(b"IEND\xaeB`\x82")]


def compared(folder: Path, whole: Any, code: int, said: str) -> str:
    if code == 0 and "Traceback" not in said and the_end(folder) == whole:
        return "the same end to the last bit"
    print(f"--- {folder}: status {code}\n{said[-3000:]}", file=sys.stderr, flush=True)
    if "Traceback" in said:
        return "traceback"
    return "hung" if code == -99 else "lost" if code else "other end"


# --- damage to files, many times in one process


@functools.cache
def copied(whole: Path, place: Path) -> tuple[Path, Any]:
    """A copy of a run, and the form of its state."""
    from flax_lstm import load

    run = place / f"copy-{whole.parent.name}"
    shutil.copytree(whole, run)
    return run, load(run)._parts.steps.abstract  # type: ignore[union-attr]


def damaged(whole: Path, place: Path, seed: int) -> str:
    """A bit flipped, a file cut, emptied or deleted, in the latest checkpoint or the assets of a
    copy of a run: whether it is refused at use, and passed over at resume. The doors are those that
    `load` and `fit` go through; every hundredth time it is `load` itself."""
    from flax_lstm import UserError, load
    from flax_lstm.runs.workdir import Workdir
    from flax_lstm.training.checkpoint import Checkpoints

    generator = np.random.default_rng(seed)
    run, abstract = copied(whole, place)
    *_, before, latest = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    checkpoint, assets = run / "checkpoints" / str(latest), run / "assets"
    files = [p for part in (checkpoint, assets) for p in sorted(part.rglob("*")) if p.is_file()]
    path = files[int(generator.integers(len(files)))]
    content, manifest = path.read_bytes(), assets / "manifest.json"
    sealed = manifest.read_bytes()
    hurt(path, generator)
    if path.is_relative_to(assets) and generator.integers(2):
        manifest.unlink(missing_ok=True)  # a second damage
    try:
        if generator.integers(100) == 0:
            load(run).params("latest")
        else:
            Workdir(run).check_assets()
            Checkpoints(run / "checkpoints").restore_params(latest, abstract)
        outcome = "silently wrong"
    except UserError as error:
        named = any(file.name in str(error) for file in (path, manifest))
        outcome = "refused, naming the file" if named else "not refused"
    if outcome not in BAD and path.is_relative_to(checkpoint):
        with Checkpoints(run / "checkpoints", lambda told: None) as checkpoints:
            used = checkpoints.newest_intact()
        aside = checkpoint.with_suffix(".damaged")
        if used != before or not aside.is_dir():
            outcome = "lost"
        else:
            aside.rename(checkpoint)
            path = checkpoint / path.relative_to(checkpoint)
            outcome = "refused, naming the file; passed over at resume"
    path.write_bytes(content)
    if path != manifest:
        manifest.write_bytes(sealed)
    return outcome


def hurt(path: Path, generator: np.random.Generator) -> None:
    """Deletes, empties or cuts a file, or flips a bit of it."""
    content, kind = path.read_bytes(), int(generator.integers(8))
    at = int(generator.integers(len(content) or 1))
    if kind == 0:
        path.unlink()
    elif kind <= 2:
        path.write_bytes(content[: at if kind == 2 else 0])
    else:
        bit = 1 << int(generator.integers(8))
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])


# --- the faults


class Chaos:
    """The faults. A run of each kind that nothing befell is made when it is first asked for.

    steps: of a soak.
    """

    def __init__(self, folder: Path, seed: int, steps: int = 200_000):
        self.steps = steps
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        FORKS.set_forkserver_preload(PRELOADED)
        self.folder = folder
        self.generator = np.random.default_rng(seed)
        self.ends: dict[str, tuple[Path, Any, float, list[str]]] = {}
        self.kills: Counter[str] = Counter()  # by what a run did when it was killed
        self.pool = ProcessPoolExecutor(1, FORKS)
        hours = np.arange(120)
        times = pd.date_range("2024-01-01", periods=len(hours), freq="h").astype(str)
        frame = pd.DataFrame({"time": times, "load": np.sin(hours / 4), "price": np.cos(hours / 4)})
        frame.to_csv(folder / "table.csv", index=False)
        words = [["fine", "dull"][n % 2] + f" {'abcdefg'[n % 7]} {'hij'[n % 3]}" for n in range(80)]
        texts = pd.DataFrame({"text": [f"{w} {n}" for n, w in enumerate(words)]})
        texts.assign(label=["good", "bad"] * 40).to_csv(folder / "texts.csv", index=False)
        tags = texts.assign(tags=[["a", "b"], ["a"], [], ["b"]] * 20)
        tags.to_json(folder / "tags.jsonl", orient="records", lines=True)
        waves = [[[float(n % 5), 1.0], [n / 7, 0.5], [2.0, n % 2]] for n in range(80)]
        lists = pd.DataFrame({"x": waves, "y": ["up", "down"] * 40})
        lists.to_json(folder / "lists.jsonl", orient="records", lines=True)

    def new(self) -> Path:
        """A place for a run, with its data."""
        return self.with_data(Path(tempfile.mkdtemp(dir=self.folder)))

    def with_data(self, place: Path) -> Path:
        for table in (*self.folder.glob("*.csv"), *self.folder.glob("*.jsonl")):
            shutil.copy(table, place)
        return place / "run"

    def whole(self, arguments: str, report: bool = False) -> tuple[Any, float, list[str]]:
        """How a run of these arguments ends, in how many seconds, and the files that it changes in
        their order."""
        if arguments not in self.ends:
            run = self.new()
            alone = training(run, arguments, report=report)
            code, said = alone.ended()
            assert code == 0, said
            seconds = time.monotonic() - alone.began
            self.ends[arguments] = run, the_end(run), seconds, alone.changes()
        return self.ends[arguments][1:]

    def again(self, run: Path, arguments: str) -> str:
        """The same command, to its end."""
        return compared(run, self.whole(arguments)[0], *training(run, arguments).ended())

    def moment(self, low: float, high: float) -> float:
        return float(self.generator.uniform(low, high))

    def bytes(self, number: int) -> str:
        """A file of the latest checkpoint or the assets damaged; used, and resumed."""
        arguments = one_process(("series", "texts", "language")[number % 3])
        self.whole(arguments)
        seed = int(self.generator.integers(1 << 31))
        run, place = self.ends[arguments][0], self.folder
        return self.pool.submit(damaged, run, place, seed).result(LONGEST)

    def damaged_and_resumed(self, number: int) -> str:
        """A file of the latest checkpoint damaged between two sessions."""
        run, arguments = self.new(), one_process(KINDS_IN_TURN[number % len(KINDS)])
        whole, _, _ = self.whole(arguments)
        first = training(run, arguments)
        while len(list((run / "checkpoints").glob("*[05]"))) < 2 and first.running:
            time.sleep(0.01)
        first.process.kill()
        first.ended()
        kept = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
        if len(kept) < 2:
            return "over before"
        latest = max(kept, key=lambda path: int(path.name))
        files = [path for path in sorted(latest.rglob("*")) if path.is_file()]
        hurt(files[int(self.generator.integers(len(files)))], self.generator)
        code, said = training(run, arguments).ended()
        if "set aside as" not in said:
            return "silently wrong"
        return compared(run, whole, code, said)

    def at(self, timeline: list[str]) -> int:
        """One of the changes of a timeline, every phase as likely as the others."""
        phases = [phase(changed) for changed in timeline]
        names = sorted(set(phases))
        drawn = names[int(self.generator.integers(len(names)))]
        places = [n for n, name in enumerate(phases, 1) if name == drawn]
        return places[int(self.generator.integers(len(places)))]

    def struck(self, running: Session, seconds: float) -> bool:
        """Whether a session was killed: by itself, at a change, or now after so many seconds (0:
        when it ends); notes in which phase it was."""
        running.process.join(seconds or LONGEST)
        hit = running.running or running.process.exitcode == -signal.SIGKILL
        running.process.kill()
        running.process.join()
        if hit:
            done = running.changes()
            self.kills[phase(done[-1]) if done else "start"] += 1
        return hit

    def kill(self, number: int) -> str:
        """kill -9, up to six times a run: at any moment, or at any change of a file."""
        kind, rounds = KINDS_IN_TURN[number % len(KINDS)], number // len(KINDS)
        backend = BACKENDS[(number + rounds) % len(BACKENDS)]
        arguments, report = one_process(kind, backend), number % 2 == 0
        whole, seconds, timeline = self.whole(arguments, report)
        run, kills = self.new(), 0
        for _ in range(6):
            at = self.at(timeline) if self.generator.integers(2) else 0
            wait = 0 if at else self.moment(0, seconds)
            running = training(run, arguments, How(die_at=at), report)
            kills += self.struck(running, wait)
            if "Traceback" in running.words():
                return compared(run, whole, 1, running.words())
        code, said = training(run, arguments, report=report).ended()
        outcome = compared(run, whole, code, said)
        if outcome not in BAD and pictures(run) != pictures(self.ends[arguments][0]):
            return "lost"
        return outcome if outcome in BAD else f"{outcome}, {kills} kills"

    def kill_while_preparing(self, number: int) -> str:
        """kill -9 of `flax-lstm prepare`, three times, at any moment or change of a file."""
        if "prepare" not in self.ends:
            folder = self.new().parent
            alone = Session(folder, PREPARE)
            code, said = alone.ended()
            assert code == 0, said
            seconds = time.monotonic() - alone.began
            self.ends["prepare"] = folder, contents(folder / "tokens"), seconds, alone.changes()
        _, whole, seconds, timeline = self.ends["prepare"]
        place, kills = self.new().parent, 0
        for _ in range(3):
            at = int(self.generator.integers(1, len(timeline))) if self.generator.integers(2) else 0
            running = Session(place, PREPARE, How(die_at=at))
            kills += self.struck(running, 0 if at else self.moment(0, 1.2 * seconds))
        code, said = Session(place, PREPARE).ended()
        if code or "Traceback" in said:
            return compared(place / "tokens", None, code or 1, said)
        found = contents(place / "tokens")
        differ = [name for name in {*found, *whole} if found.get(name) != whole.get(name)]
        if differ:
            print(f"--- {place}: other content in {differ}", file=sys.stderr, flush=True)
        return "silently wrong" if differ else f"the same bytes, {kills} kills"

    def kill_at_start(self, number: int) -> str:
        """kill -9 of a command as it is typed, while it imports and reads."""
        run, arguments = self.new(), one_process("series")
        command = [sys.executable, str(ROOT / "train.py"), *arguments.split(), "--workdir", "run"]
        running = subprocess.Popen(command, cwd=run.parent, stderr=subprocess.DEVNULL, env=plain())
        time.sleep(self.moment(0.2, 12))
        running.kill()
        running.wait()
        return self.again(run, arguments)

    def kill_while_compiling(self, number: int) -> str:
        """kill -9 while the C++ kernel is compiled, in an empty cache folder, by a compiler that
        does not optimise (it takes a sixth of the time); every tenth time by the user's."""
        arguments, fast = one_process("series", "cpu"), self.folder / "fast"
        compiler = fast if number % 10 else None
        key = f"compiled by {compiler}"
        if key not in self.ends:
            fast.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
            fast.chmod(0o755)
            run = self.new()
            how = How(cache=run.parent / "cache", compiler=compiler)
            alone = training(run, arguments, how)
            began = self.compiling(alone, run.parent / "cache")
            while alone.running and not [*run.parent.glob("cache/flax_lstm/recurrence-*.so")]:
                time.sleep(0.01)
            seconds = time.monotonic() - began
            code, said = alone.ended()
            assert code == 0, said
            self.ends[key] = run, the_end(run), seconds, []
        whole, seconds = self.ends[key][1:3]
        run = self.new()
        how = How(cache=run.parent / "cache", compiler=compiler)
        running = training(run, arguments, how)
        self.compiling(running, run.parent / "cache")
        time.sleep(self.moment(0, 1.1 * seconds))
        running.process.kill()
        running.ended()
        there = [*run.parent.glob("cache/flax_lstm/recurrence-*.so")]
        outcome = compared(run, whole, *training(run, arguments, how).ended())
        return outcome if outcome in BAD or not there else f"{outcome}, killed when it was compiled"

    def compiling(self, running: Session, cache: Path) -> float:
        """Waits until it compiles; the time when it begins."""
        while running.running and not list(cache.glob("flax_lstm/*/")):
            time.sleep(0.01)
        return time.monotonic()

    def two_owners(self, number: int) -> str:
        """A second run on the folder of one that trains."""
        run, arguments = self.new(), one_process("series")
        whole, seconds, _ = self.whole(arguments)
        first = training(run, arguments)
        while not (run / "config.py").exists() and first.running:
            time.sleep(0.001)
        time.sleep(self.moment(0, 0.5 * seconds))
        second = training(run, arguments)
        code, said = second.ended()
        late = not first.running and code == 0
        outcome = compared(run, whole, *first.ended())
        if late and "is finished" in said:
            return "over before"
        if code != 2 or "another process has it" not in said or "Traceback" in said:
            return "not refused"
        return outcome if outcome in BAD else f"refused; the first: {outcome}"

    def full_disk(self, number: int) -> str:
        """No room from some moment on, then room again: files that cannot grow; or a disk, or its
        inodes, used up."""
        arguments = one_process(KINDS_IN_TURN[number // 3 % len(KINDS)])
        whole, seconds, _ = self.whole(arguments)
        if number % 3 == 0 or os.geteuid():
            run = self.new()
            how = How(largest=int(self.generator.integers(200, 20_000)))
            _, said = training(run, arguments, how).ended()
            if "Traceback" in said:
                return compared(run, whole, 1, said)
            return self.again(run, arguments)
        with self.disk("size=4m", "nr_inodes=2000") as place:
            run = self.with_data(place)
            running = training(run, arguments)
            running.process.join(self.moment(0, seconds))
            filler = place / "filler"
            filler.mkdir()
            (use_up_inodes if number % 3 == 1 else use_up_room)(filler, self.generator)
            code, said = running.ended()
            if "Traceback" in said or code == -99:
                return compared(run, whole, code, said)
            shutil.rmtree(filler)
            return self.again(run, arguments)

    @contextmanager
    def disk(self, *options: str) -> Iterator[Path]:
        """A small file system of its own."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", place], check=True
        )
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)

    def read_only(self, number: int) -> str:
        """All folders of the run read-only from some moment on, then writable again."""
        run, arguments = self.new(), one_process(KINDS_IN_TURN[number % len(KINDS)])
        whole, seconds, _ = self.whole(arguments)
        running = training(run, arguments, How(powerless=True))
        running.process.join(self.moment(0, seconds))
        folders = [run.parent, *(path for path in run.rglob("*") if path.is_dir()), run]
        for path in folders:
            if path.exists():
                path.chmod(0o555)
        code, said = running.ended()
        for path in folders:
            if path.exists():
                path.chmod(0o755)
        if "Traceback" in said or code == -99:
            return compared(run, whole, code, said)
        return self.again(run, arguments)

    def folder_removed(self, number: int) -> str:
        """The folder of checkpoints, or all of the run, removed while it trains."""
        run, arguments = self.new(), one_process(KINDS_IN_TURN[number // 2 % len(KINDS)])
        whole, seconds, _ = self.whole(arguments)
        running = training(run, arguments)
        while not list((run / "checkpoints").glob("[1-9]*")) and running.running:
            time.sleep(0.01)
        running.process.join(self.moment(0, 0.6 * seconds))
        shutil.rmtree(run / "checkpoints" if number % 2 else run, ignore_errors=True)
        code, said = running.ended()
        if "Traceback" in said or code == -99:
            return compared(run, whole, code, said)
        if number % 2 == 0 and code == 0 and not (run / "config.py").exists():
            shutil.rmtree(run, ignore_errors=True)  # removed at its very end
        if code == 0 and "figures are those of step" in said:
            return "the best checkpoint was gone, and the best of those left said so"
        return self.again(run, arguments)

    # --- several processes

    def pair(self, run: Path, address: str, process: int) -> Session:
        more = f"--coordinator {address} --num-processes 2 --process-id {process}"
        return training(run, f"{two_processes()} {more}")

    def both(self, run: Path) -> tuple[Any, int, str]:
        """Two processes to their end: how they should end, the worse status, what they say."""
        address = f"unix:{run.parent}/meet"
        Path(run.parent / "meet").unlink(missing_ok=True)
        ended = [session.ended() for session in [self.pair(run, address, n) for n in range(2)]]
        return None, max((abs(code) for code, _ in ended)), "".join(said for _, said in ended)

    def whole_of_two(self) -> Any:
        if "two" not in self.ends:
            run = self.new()
            _, code, said = self.both(run)
            assert code == 0, said
            self.ends["two"] = run, the_end(run), 0.0, 0
        return self.ends["two"][1]

    def after(self, run: Path, pair: list[Session], began: float) -> str:
        """Both end in time, and the same command goes on to the same end."""
        whole = self.whole_of_two()
        for process in pair:
            code, said = process.ended(max(1, BOUND - (time.monotonic() - began)))
            if code == -99 or "Traceback" in said:
                return compared(run, whole, code, said)
        _, code, said = self.both(run)
        return compared(run, whole, code, said)

    def begun(self, run: Path, address: str) -> list[Session]:
        """Two processes that have met, at any moment of their training."""
        pair = [self.pair(run, address, number) for number in range(2)]
        while not (run / "checkpoints").exists() and pair[0].running:
            time.sleep(0.05)
        pair[0].process.join(self.moment(0, 8))
        return pair

    def process_killed(self, number: int) -> str:
        """One of two processes killed."""
        self.whole_of_two()
        run = self.new()
        pair = self.begun(run, f"unix:{run.parent}/meet")
        pair[number % 2].process.kill()
        return self.after(run, pair, time.monotonic())

    def process_stopped(self, number: int) -> str:
        """One of two processes stopped, and woken when the other has given up."""
        self.whole_of_two()
        run, began = self.new(), time.monotonic()
        pair = self.begun(run, f"unix:{run.parent}/meet")
        if not all(process.running for process in pair):
            return "over before"
        began = time.monotonic()
        pair[number % 2].signal(signal.SIGSTOP)
        pair[1 - number % 2].process.join(BOUND)
        if pair[1 - number % 2].running:
            return "hung"
        pair[number % 2].signal(signal.SIGCONT)
        return self.after(run, pair, began)

    def parent_killed(self, number: int) -> str:
        """The process killed that has started two others."""
        whole = self.whole_of_two()
        run = self.new()
        command = [sys.executable, ROOT / "train.py", *two_processes().split(), "--workdir", "run"]
        with open(run.parent / "said", "w") as said:
            parent = subprocess.Popen(
                [*command, "--no-report", "--local-processes", "2"],
                cwd=run.parent,
                stderr=said,
                env=plain(),
            )
        while not (run / "checkpoints").exists() and parent.poll() is None:
            time.sleep(0.05)
        children = children_of(parent.pid)
        time.sleep(self.moment(0, 5))
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + BOUND
        while any(Path(f"/proc/{child}").exists() for child in children):
            if time.monotonic() > deadline:
                return "hung"
            time.sleep(0.1)
        words = (run.parent / "said").read_text()
        if "Traceback" in words:
            return compared(run, whole, 1, words)
        return compared(run, *((whole, *self.both(run)[1:])))

    def stopped_at_start(self, number: int) -> str:
        """SIGTERM in the first seconds of a command that starts two processes."""
        whole, run = self.whole_of_two(), self.new()
        command = [sys.executable, ROOT / "train.py", *two_processes().split(), "--workdir", "run"]
        with open(run.parent / "said", "w") as said:
            parent = subprocess.Popen(
                [*command, "--no-report", "--local-processes", "2"],
                cwd=run.parent,
                stderr=said,
                env=plain(),
            )
            time.sleep(self.moment(0.5, 20))
            children = children_of(parent.pid)
            parent.terminate()
            try:
                code = parent.wait(BOUND)
            except subprocess.TimeoutExpired:
                parent.kill()
                return "hung"
        words = (run.parent / "said").read_text()
        if "Traceback" in words or any(Path(f"/proc/{child}").exists() for child in children):
            return compared(run, whole, 1, f"{words}\nleft behind: {children}")
        outcome = compared(run, *((whole, *self.both(run)[1:])))
        told = {75: "75", 0: "0, over before", -15: "-15, before Python was ready"}.get(code)
        return outcome if outcome in BAD else f"status {told}; {outcome}" if told else "not refused"

    def stranger(self, number: int) -> str:
        """Somebody on this machine sends bytes to all ports that two processes listen at."""
        whole, run = self.whole_of_two(), self.new()
        address = f"127.0.0.1:{free_port()}"
        pair, came = [self.pair(run, address, number) for number in range(2)], 0
        while any(process.running for process in pair):
            for port in [int(address.split(":")[1]), *ports_of(pair)]:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as talk:
                        talk.sendall(self.generator.bytes(64))
                        came += 1
                except OSError:
                    pass
            time.sleep(0.2)
        ended = [process.ended() for process in pair]
        words = "".join(said for _, said in ended)
        outcome = compared(run, whole, max(abs(code) for code, _ in ended), words)
        return outcome if outcome in BAD else f"trained on; {outcome}"

    def twin(self, number: int) -> str:
        """Somebody who can reach the coordinator's port joins as a process that is there already:
        the run ends, in time, and goes on."""
        self.whole_of_two()
        run = self.new()
        address = f"127.0.0.1:{free_port()}"
        pair = self.begun(run, address)
        began = time.monotonic()
        program = (
            f"import jax; jax.distributed.initialize({address!r}, 2, {number % 2}, "
            "initialization_timeout=5)"
        )
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        outcome = self.after(run, pair, began)
        return outcome if outcome in BAD else f"ended in time; then {outcome}"

    def soak(self, number: int) -> str:
        """A run of many steps with many saves: memory, open files and disk stay as they are."""
        run = self.new()
        every = self.steps // 400
        flags = (
            f"--train.steps {self.steps} --train.checkpoint-every {every} "
            f"--train.eval-every {10 * every} --train.log-every {2 * every}"
        )
        running = training(run, f"{one_process('adding')} {flags}")
        process, points = Path(f"/proc/{running.process.pid}"), []
        while running.running:
            try:
                resident = int((process / "statm").read_text().split()[1]) * 4096 / 2**20
                handles = len(list((process / "fd").iterdir()))
                threads = len(list((process / "task").iterdir()))
                kept = sum(1 for path in (run / "checkpoints").rglob("*"))
                points.append((resident, handles, threads, kept))
            except OSError:
                pass
            time.sleep(1)
        code, said = running.ended()
        if code or len(points) < 20:
            return compared(run, None, code or 1, said)
        early = np.array(points[len(points) // 4 : len(points) // 2]).mean(0)
        late = np.array(points[-len(points) // 4 : -2]).mean(0)
        told = ", ".join(
            f"{name} {a:.0f} -> {b:.0f}"
            for name, a, b in zip(
                ("MiB", "handles", "threads", "files of checkpoints"), early, late, strict=True
            )
        )
        grown = late > early * 1.05 + 2
        if grown.any():
            print(f"--- {run}: {told}", file=sys.stderr, flush=True)
            return "leaks"
        return f"flat: {told}"


KINDS_IN_TURN = tuple(KINDS)


def one_process(kind: str, backend: str = "auto") -> str:
    return f"{KINDS[kind]} {SMALL} --mesh.data 1 --model.backend {backend}"


def two_processes() -> str:
    return f"{KINDS['series']} {SMALL} --mesh.data 2"


def use_up_room(folder: Path, generator: np.random.Generator) -> None:
    """All but some pages of a file system."""
    left = int(generator.integers(0, 40))
    try:
        with open(folder / "room", "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    except OSError:
        os.truncate(folder / "room", max(0, (folder / "room").stat().st_size - 4096 * left))


def use_up_inodes(folder: Path, generator: np.random.Generator) -> None:
    """All but some inodes of a file system."""
    made = []
    try:
        while True:
            made.append(folder / str(len(made)))
            made[-1].touch()
    except OSError:
        made.pop()
    for path in made[len(made) - int(generator.integers(0, 30)) :]:
        path.unlink()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def ports_of(pair: list[Session]) -> list[int]:
    """All TCP ports that the processes listen at."""
    inodes = set()
    for process in pair:
        for handle in Path(f"/proc/{process.process.pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(handle).removeprefix("socket:[").rstrip("]"))
            except OSError:
                continue
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


FAULTS: dict[str, tuple[str, Callable[[Chaos, int], str]]] = {
    "bytes": ("a file of checkpoint or assets damaged", Chaos.bytes),
    "damaged-and-resumed": ("a file of the latest checkpoint damaged", Chaos.damaged_and_resumed),
    "kill": ("kill -9 at any moment or change of a file, six times", Chaos.kill),
    "kill-at-start": ("kill -9 while it starts", Chaos.kill_at_start),
    "kill-while-preparing": ("kill -9 of `prepare`, three times", Chaos.kill_while_preparing),
    "kill-while-compiling": ("kill -9 while the kernel is compiled", Chaos.kill_while_compiling),
    "two-owners": ("a second run on the folder", Chaos.two_owners),
    "full-disk": ("a full disk, no inodes, files that cannot grow", Chaos.full_disk),
    "read-only": ("folders read-only", Chaos.read_only),
    "folder-removed": ("checkpoints, or the folder, removed", Chaos.folder_removed),
    "process-killed": ("one of two processes killed", Chaos.process_killed),
    "process-stopped": ("one of two processes stopped", Chaos.process_stopped),
    "parent-killed": ("who started two processes, killed", Chaos.parent_killed),
    "stopped-at-start": ("SIGTERM while two processes are started", Chaos.stopped_at_start),
    "stranger": ("a stranger sends bytes to every port", Chaos.stranger),
    "twin": ("a stranger joins as one of two processes", Chaos.twin),
    "soak": ("many steps, 400 saves", Chaos.soak),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--only", choices=FAULTS, action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200_000, help="of a soak, with 400 saves")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options.seed, options.steps)
        print("| fault | trials | outcomes |\n| --- | --- | --- |", flush=True)
        for name in options.only or FAULTS:
            title, fault = FAULTS[name]
            outcomes: Counter[str] = Counter()
            with suppress(KeyboardInterrupt):
                for number in range(options.trials):
                    outcomes[fault(chaos, number)] += 1
            bad += sum(count for outcome, count in outcomes.items() if outcome in BAD)
            told = "; ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
            print(f"| {title} | {outcomes.total()} | {told} |", flush=True)
            if chaos.kills:
                kills = ", ".join(f"{n} {name}" for name, n in chaos.kills.most_common())
                print(f"killed in: {kills}", flush=True)
                chaos.kills.clear()
            if outcomes.total() < options.trials:
                for left in multiprocessing.active_children():
                    left.kill()
                break
    print(f"{bad} ended as none may")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
