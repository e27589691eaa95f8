# SPDX-License-Identifier: Apache-2.0
"""Training from files of tokens: memory, time of a batch, and of the first batch after a resume,
beside the same form of batch from memory.

    python benchmarks/prepared.py FOLDER --tokens 500_000_000

The tokens are generated (uniform ids below 20,000, documents of 250), in the form that `flax-lstm
prepare` writes; that command's own speed is not measured here. Linux, for memory is read from
/proc.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_lstm.data.language import LanguageBatches
from flax_lstm.data.prepared import INDEX, SPLITS, VOCABULARY, PieceBatches, Prepared
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
            (folder / name).write_bytes(data := ids.astype("<u2").tobytes())
            parts[split].append([name, len(ids), hashlib.sha256(data).hexdigest()])
    index = {"settings": SETTINGS, "bytes_a_token": 2, "token_counts": [1] * SIZE, "parts": parts}
    (folder / INDEX).write_text(json.dumps(index))


def memory() -> float:
    """Resident memory of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def milliseconds(get: Callable[[int], Any], steps: range) -> float:
    """The median over steps."""
    times = []
    for step in steps:
        began = time.perf_counter()
        get(step)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the tokens are, or are put")
    parser.add_argument("--tokens", type=int, default=500_000_000)
    options = parser.parse_args()
    if not options.folder.exists():
        generate(options.folder, options.tokens)
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
