# SPDX-License-Identifier: Apache-2.0
"""Breaks runs on purpose, and counts how that ends.

    python tools/chaos.py --trials 20             all faults, so many times each
    python tools/chaos.py --trials 200 --only bytes

Prints a row for each fault: trials, outcomes, and how many ended as none may (a value that is
silently wrong, a traceback, a run that cannot go on). Status 1 if any did. Files of checkpoints and
assets are damaged fifty times as often as the rest, for that is cheap.
"""

import argparse
import json
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
BAD = ("silently wrong", "traceback", "lost", "hung", "other end", "not refused")


def train(folder: Path, *more: object, **process: Any) -> subprocess.Popen[str]:
    """A small forecaster that saves often, in a process of its own."""
    table = folder.parent / "table.csv"
    flags = (
        f"--config series_table --workdir {folder} --data.path {table} --data.lookback 8 "
        "--data.horizon 2 --data.season 4 --model.hidden-size 4 --train.steps 400 "
        "--train.batch-size 8 --train.eval-every 50 --train.checkpoint-every 7 "
        "--train.log-every 5 --mesh.data 1 --no-report"
    )
    command = [sys.executable, ROOT / "train.py", *flags.split(), *map(str, more)]
    settings = {"stderr": subprocess.PIPE, "text": True, "cwd": folder.parent, **process}
    return subprocess.Popen(command, **settings)


def finish(folder: Path, *more: object, **process: Any) -> tuple[int, str]:
    """The status and the words of a run to its end."""
    running = train(folder, *more, **process)
    try:
        _, said = running.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        running.kill()
        return -99, running.communicate()[1]
    return running.returncode, said


def the_end(folder: Path) -> Any:
    """What a run ends with, without what depends on the clock."""
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "examples_per_second")
    rows = [{name: v for name, v in row.items() if name not in clocks} for row in rows]
    return result["params_sha256"], result["best_step"], result["test"], rows


def compared(folder: Path, whole: Any, code: int, said: str) -> str:
    if "Traceback" in said:
        return "traceback"
    if code == -99:
        return "hung"
    if code:
        return "lost"
    return "the same end to the last bit" if the_end(folder) == whole else "other end"


class Chaos:
    """The faults. `whole` is a run that nothing befell, in `folder/whole`."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.generator = np.random.default_rng(seed)
        hours = np.arange(120)
        times = pd.date_range("2024-01-01", periods=len(hours), freq="h").astype(str)
        frame = pd.DataFrame({"time": times, "load": np.sin(hours / 4), "price": np.cos(hours / 4)})
        frame.to_csv(folder / "table.csv", index=False)
        code, said = finish(folder / "whole")
        assert code == 0, said
        self.whole = the_end(folder / "whole")

    def new(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copy(self.folder / "table.csv", folder)
        return folder / "run"

    def bytes(self, number: int) -> str:
        """A bit flipped, a file cut, emptied or deleted, in the latest checkpoint or the assets."""
        from flax_lstm import UserError, load

        run = self.new().with_name(f"bytes{number}")
        shutil.copytree(self.folder / "whole", run)
        latest = max(int(p.name) for p in (run / "checkpoints").iterdir())
        places = (run / "checkpoints" / str(latest), run / "assets")
        files = [p for place in places for p in place.rglob("*") if p.is_file()]
        path = files[int(self.generator.integers(len(files)))]
        content, kind = path.read_bytes(), int(self.generator.integers(8))
        at = int(self.generator.integers(len(content) or 1))
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(b"")
        elif kind == 2:
            path.write_bytes(content[:at])
        else:
            bit = 1 << int(self.generator.integers(8))
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        try:
            if path == run / "assets" / "manifest.json" and kind == 0:
                return "nothing but the manifest gone"
            loaded = load(run)
            found = loaded.params("latest")
        except UserError:
            outcome = "refused, naming the file"
        else:
            true = load(self.folder / "whole").params("latest")
            import jax

            same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, true))
            outcome = "harmless" if same and path.read_bytes() == content else "silently wrong"
        shutil.rmtree(run)
        return outcome

    def damaged_and_resumed(self, number: int) -> str:
        """A bit of the latest checkpoint flipped between two sessions."""
        run = self.new()
        finish(run, "--train.steps", 200, "--train.schedule-steps", 400)
        latest = max(int(p.name) for p in (run / "checkpoints").iterdir())
        files = [p for p in (run / "checkpoints" / str(latest)).rglob("*") if p.stat().st_size]
        files = [path for path in files if path.is_file()]
        path = files[int(self.generator.integers(len(files)))]
        content = path.read_bytes()
        at = int(self.generator.integers(len(content)))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        code, said = finish(run, "--train.schedule-steps", 400)
        if "set aside as" not in said:
            return "silently wrong"
        (run / "metrics.jsonl").write_text(
            "".join(
                line + "\n"
                for line in (run / "metrics.jsonl").read_text().splitlines()
                if not ('"test"' in line and '"step": 400' not in line and "200" in line)
            )
        )
        if code or "Traceback" in said:
            return compared(run, self.whole, code, said)
        same = the_end(run)[0] == self.whole[0]
        return "the same parameters to the last bit" if same else "other end"

    def kill(self, number: int) -> str:
        """kill -9 at any moment of a session, until one comes to its end."""
        run, kills = self.new(), 0
        while True:
            running = train(run)
            try:
                limit = self.generator.uniform(1, 25) if kills < 3 else 900
                _, said = running.communicate(timeout=limit)
                break
            except subprocess.TimeoutExpired:
                running.kill()
                running.communicate()
                kills += 1
        return compared(run, self.whole, running.returncode, said)

    def two_owners(self, number: int) -> str:
        """A second run on the folder of one that trains."""
        run = self.new()
        first = train(run)
        while not (run / "config.py").exists() and first.poll() is None:
            time.sleep(0.05)
        code, said = finish(run)
        outcome = compared(run, self.whole, first.wait(), first.communicate()[1])
        if code != 2 or "another process has it" not in said or "Traceback" in said:
            return "not refused"
        return f"refused; the first: {outcome}" if outcome not in BAD else outcome

    def full_disk(self, number: int) -> str:
        """No room for a checkpoint from some size of its files on, then room again."""
        run, size = self.new(), int(self.generator.integers(200, 30_000))

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        _, said = finish(run, preexec_fn=limited)
        if "Traceback" in said:
            return "traceback"
        code, said = finish(run)
        return compared(run, self.whole, code, said)

    def folder_removed(self, number: int) -> str:
        """The folder of checkpoints removed while it trains."""
        run = self.new()
        running = train(run)
        while not list((run / "checkpoints").glob("[1-9]*")) and running.poll() is None:
            time.sleep(0.05)
        time.sleep(self.generator.uniform(0, 0.5))
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        _, said = running.communicate(timeout=900)
        if "Traceback" in said:
            return "traceback"
        code, said = finish(run)
        return compared(run, self.whole, code, said)

    def stranger(self, number: int) -> str:
        """Somebody who is none of two processes talks to the one that coordinates them."""
        run = self.new()
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        more = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id")
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        processes = [train(run, *more, index, env=environment) for index in range(2)]
        came = 0
        while any(process.poll() is None for process in processes) and came < 200:
            try:
                address = (socket.gethostbyname(socket.gethostname()), port)
                with socket.create_connection(address, timeout=1) as talk:
                    talk.sendall(self.generator.bytes(64))
                    came += 1
            except OSError:
                pass
            time.sleep(0.1)
        ended = [process.wait(timeout=900) for process in processes]
        said = "".join(process.communicate()[1] for process in processes)
        if ended != [0, 0] or "Traceback" in said:
            return "traceback" if "Traceback" in said else "lost"
        return f"trained on; {'nobody got through' if not came else 'some got through'}"


FAULTS: dict[str, tuple[str, Callable[[Chaos, int], str]]] = {
    "bytes": ("a file of checkpoint or assets damaged", Chaos.bytes),
    "damaged-and-resumed": ("a bit flipped, then resumed", Chaos.damaged_and_resumed),
    "kill": ("kill -9 at any moment, up to three times", Chaos.kill),
    "two-owners": ("a second run on the folder", Chaos.two_owners),
    "full-disk": ("files cannot grow beyond a size", Chaos.full_disk),
    "folder-removed": ("checkpoints removed while it trains", Chaos.folder_removed),
    "stranger": ("a stranger talks to the coordinator", Chaos.stranger),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--only", choices=FAULTS, action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options.seed)
        print("| fault | trials | outcomes |\n| --- | --- | --- |", flush=True)
        for name in options.only or FAULTS:
            title, fault = FAULTS[name]
            trials = options.trials * (50 if name == "bytes" else 1)
            outcomes = Counter(fault(chaos, number) for number in range(trials))
            bad += sum(count for outcome, count in outcomes.items() if outcome in BAD)
            told = "; ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
            print(f"| {title} | {trials} | {told} |", flush=True)
    print(f"{bad} ended as none may")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
