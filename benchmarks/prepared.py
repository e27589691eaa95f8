# SPDX-License-Identifier: Apache-2.0
"""Training from files of tokens: memory, time of a batch, and of the first batch after a resume,
beside the same form of batch from memory.

    python benchmarks/prepared.py FOLDER --tokens 500_000_000
    python benchmarks/prepared.py FOLDER --processes 2

The second trains the config `text_lm` from them in so many processes, stops, goes on, and says what
memory each process had at most, and how long after its start the first step is done.
The tokens are generated (uniform ids below 20,000, documents of 250), in the form that `flax-lstm
prepare` writes; that command's own speed is not measured here. Linux, for memory is read from
/proc.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flax_lstm.data.language import LanguageBatches
from flax_lstm.data.prepared import INDEX, SPLITS, VOCABULARY, PieceBatches, Prepared, rows_file
from flax_lstm.data.vocabulary import END, Vocabulary

SIZE, DOCUMENT, PART = 20_000, 250, 1 << 24  # vocabulary; tokens of a document and of a file
BATCH, LENGTH, BATCHES = 64, 70, 2_000
SETTINGS = {"vocabulary_size": SIZE, "tokenizer": "word"}


def generate(folder: Path, tokens: int) -> None:
    """Writes a folder as `flax-lstm prepare` would."""
    folder.mkdir(parents=True)
    Vocabulary.blank(SIZE).save(folder / VOCABULARY)
    generator = np.random.default_rng(0)
    sizes = {"train": tokens, "validation": DOCUMENT * 400, "test": DOCUMENT * 400}
    parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for split, size in sizes.items():
        for start in range(0, size, PART):
            ids = generator.integers(3, SIZE, min(PART, size - start), dtype=np.uint16)
            ids[DOCUMENT - 1 :: DOCUMENT] = END
            ids[-1] = END
            name = f"{start // PART:05}.{split}.tokens"
            lengths = np.diff(np.flatnonzero(ids == END), prepend=-1).astype("<i4").tobytes()
            (folder / name).write_bytes(data := ids.astype("<u2").tobytes())
            rows_file(folder / name).write_bytes(lengths)
            hashes = [hashlib.sha256(each).hexdigest() for each in (data, lengths)]
            parts[split].append([name, len(ids), hashes[0], len(lengths) // 4, hashes[1]])
    index = {"settings": SETTINGS, "bytes_a_token": 2, "token_counts": [1] * SIZE, "parts": parts}
    (folder / INDEX).write_text(json.dumps(index))


def memory(process: int | str = "self") -> float:
    """Resident memory of a process, MB; 0 where it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
    return 0.0


def milliseconds(get: Callable[[int], Any], steps: range) -> float:
    """The median over steps."""
    times = []
    for step in steps:
        began = time.perf_counter()
        get(step)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def train(folder: Path, workdir: Path, processes: int, steps: int) -> dict[str, Any]:
    """One session of a run to so many steps."""
    command = [sys.executable, "-m", "flax_lstm", "train", "--config", "text_lm", "--no-test"]
    command += ["--no-report", "--data.prepared", str(folder), "--workdir", str(workdir)]
    command += ["--local-processes", str(processes), "--train.schedule", "constant"]
    command += ["--train.steps", str(steps), "--train.log-every", "1"]
    log, began, first = workdir / "metrics.jsonl", time.time(), None
    before = log.stat().st_size if log.exists() else 0
    most: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            time.sleep(0.1)
            for process in (pid for pid in below(run.pid) if processes == 1 or pid != run.pid):
                most[process] = max(memory(process), most.get(process, 0.0))
            if first is None and log.exists() and log.stat().st_size > before:
                first = time.time() - began
    large = sorted(mb for mb in most.values() if mb > 100)
    return {"memory of each process at most, MB": large, "seconds to the first step": first}


def below(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += below(int(child))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the tokens are, or are put")
    parser.add_argument("--tokens", type=int, default=500_000_000)
    parser.add_argument("--processes", type=int, help="train in so many, in place of reading alone")
    options = parser.parse_args()
    if not options.folder.exists():
        generate(options.folder, options.tokens)
    if options.processes:
        with tempfile.TemporaryDirectory() as workdir:
            for name, steps in (("begun", 30), ("resumed", 40)):
                told = train(options.folder, Path(workdir) / "run", options.processes, steps)
                print(json.dumps({name: told}, indent=1))
        return
    found: dict[str, Any] = {"memory before, MB": memory()}
    began = time.perf_counter()
    stream = Prepared.open(options.folder).stream("train")
    source = PieceBatches(stream, BATCH, LENGTH, seed=0)
    found |= {"tokens": len(stream) - 1, "steps of an epoch": len(source)}
    source[len(source) // 2 + 17]
    found["seconds to a batch in the middle of an epoch"] = time.perf_counter() - began
    found["milliseconds a batch"] = milliseconds(source.__getitem__, range(BATCHES))
    found["memory after, MB"] = memory()
    few = np.random.default_rng(0).integers(3, SIZE, (20_000, DOCUMENT), dtype=np.int32)
    few[:, -1] = END
    within = LanguageBatches([*few], BATCH, LENGTH, seed=0)
    within[0]
    found["milliseconds a batch from memory"] = milliseconds(within.__getitem__, range(1, 1_000))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
