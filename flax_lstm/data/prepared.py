# SPDX-License-Identifier: Apache-2.0
"""Token streams in files: what `flax-lstm prepare` writes, and training from it.

A folder with

    vocabulary.json
    index.json              the settings, and of every part its tokens and their SHA-256
    00017.train.tokens      ids in the order of the documents, each document closed by <eos>;
                            little-endian, 2 bytes an id where the vocabulary allows, else 4
    00017.train.rows        of texts with labels, for each its tokens, <eos> included, and the place
                            of its label in those of the index; little-endian, 4 bytes each

Axes: B lanes (rows of a batch), T tokens of a window, N tokens.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_lstm.data.base import Batch
from flax_lstm.data.vocabulary import END, Vocabulary
from flax_lstm.errors import UserError, require

INDEX, VOCABULARY = "index.json", "vocabulary.json"
SPLITS = ("train", "validation", "test")
CHUNK = 1 << 20  # tokens that are looked at together
WINDOWS = 64  # in a piece: so many steps a lane reads on before it goes to another place


class Part(NamedTuple):
    """A file of tokens, how many documents are in it, and the hash of their rows."""

    name: str
    tokens: int
    sha256: str
    documents: int = 0
    rows_sha256: str = ""


class Prepared(NamedTuple):
    """What the index of a folder says."""

    folder: Path
    settings: Mapping[str, Any]  # of the data, that the tokens depend on
    bytes_a_token: int
    token_counts: tuple[int, ...]  # how often each id is in the training split
    parts: Mapping[str, list[Part]]  # by split
    labels: tuple[str, ...] = ()  # of texts with labels

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        """Reads the index, and looks whether its files are there in full length. Raises UserError
        where they are not."""
        path = folder / INDEX
        require(
            path.exists(),
            f"{folder} is no folder that flax-lstm prepare has finished: it has no {INDEX}. The "
            "same prepare command again goes on where it was",
        )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            parts = {name: [Part(*row) for row in found["parts"][name]] for name in SPLITS}
            self = cls(
                folder,
                found["settings"],
                found["bytes_a_token"],
                tuple(found["token_counts"]),
                parts,
                tuple(found.get("labels", ())),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read {path}: {error!r}") from None
        for part in (part for split in SPLITS for part in parts[split]):
            file = folder / part.name
            size = file.stat().st_size if file.exists() else -1
            require(
                size == part.tokens * self.bytes_a_token,
                f"{file} is not as it was prepared: it has "
                f"{'no file' if size < 0 else f'{size:,} bytes'}, not "
                f"{part.tokens * self.bytes_a_token:,}. Delete {folder} and prepare again",
            )
        return self

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.folder / VOCABULARY)

    def stream(self, split: str) -> "TokenStream":
        return TokenStream(self.folder, self.parts[split], self.bytes_a_token)

    def rows(self, split: str) -> np.ndarray:
        """Tokens, <eos> included, and place of the label of each document, [N, 2]. Raises
        UserError where the documents have no labels."""
        require(bool(self.labels), f"{self.folder} was prepared of documents without labels")
        files = [rows_file(self.folder / part.name) for part in self.parts[split]]
        try:
            return np.concatenate([np.fromfile(file, "<i4") for file in files]).reshape(-1, 2)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is not as it was prepared: {error}") from None

    def verify(self, digest: Callable[[Path], str] | None = None) -> None:
        """Compares every byte with the hash that was saved. Raises UserError for the first that
        differs. digest: what gives the SHA-256 of a file; None: it is read."""
        digest = digest or sha256
        for part in (part for split in SPLITS for part in self.parts[split]):
            tokens = self.folder / part.name
            for path, expected in ((tokens, part.sha256), (rows_file(tokens), part.rows_sha256)):
                require(
                    path.exists() and digest(path) == expected,
                    f"{path} is not as it was prepared (SHA-256). Delete {self.folder} and prepare "
                    "again",
                )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_file(tokens: Path) -> Path:
    """Where the rows of a file of tokens are."""
    return tokens.with_suffix(".rows")


class Documents(Sequence[np.ndarray]):
    """The documents of a stream, without their separators, each read when it is asked for.

    lengths: tokens that each has. cut: what of a long document is kept.
    """

    def __init__(self, stream: "TokenStream", tokens_N: np.ndarray, cut: slice, most: int):
        self._stream, self._cut, self._most = stream, cut, most
        self._ends_N = 1 + np.cumsum(tokens_N, dtype=np.int64)
        self._tokens_N = tokens_N
        self.lengths = np.minimum(tokens_N - 1, most)

    def __len__(self) -> int:
        return len(self._tokens_N)

    def __getitem__(self, number: Any) -> Any:
        stop = int(self._ends_N[number]) - 1
        start = stop - int(self._tokens_N[number]) + 1
        return self._stream.read(start, stop)[self._cut]


class TokenStream:
    """A separator, then the tokens of all parts, read as they are asked for.

    By `pread`, not by a memory map: pages of a map count as the process's own memory once they were
    touched, and in the course of an epoch all of them are.
    """

    def __init__(self, folder: Path, parts: list[Part], bytes_a_token: int):
        self._dtype = np.dtype(f"<u{bytes_a_token}")
        self._files = [os.open(folder / part.name, os.O_RDONLY) for part in parts]
        self._ends = np.cumsum([part.tokens for part in parts])

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)

    def __len__(self) -> int:
        return 1 + (int(self._ends[-1]) if len(self._ends) else 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from place `start` to before `stop`, int32."""
        found = [np.array([END], np.int32)] if start == 0 < stop else []
        start, stop = max(start, 1) - 1, max(stop, 1) - 1  # places in the parts
        number = int(np.searchsorted(self._ends, start, "right"))
        while start < stop:
            begin = int(self._ends[number - 1]) if number else 0
            end = min(stop, int(self._ends[number]))
            found.append(self._read(number, start - begin, end - start).astype(np.int32))
            start, number = end, number + 1
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def ends(self) -> list[int]:
        """Where each document ends in the stream, its separator included."""
        found: list[int] = []
        for start in range(1, len(self), CHUNK):
            tokens = self.read(start, min(start + CHUNK, len(self)))
            found += (start + 1 + np.flatnonzero(tokens == END)).tolist()
        return found

    def _read(self, number: int, place: int, count: int) -> np.ndarray:
        width = self._dtype.itemsize
        data = os.pread(self._files[number], count * width, place * width)
        if len(data) != count * width:
            raise UserError(
                f"a file of tokens has become shorter while it was read (part {number})"
            )
        return np.frombuffer(data, self._dtype)


class PieceBatches:
    """Training batches of a stream of any length, as a function of (seed, step).

    The stream is cut into pieces of some windows; each epoch reads them in an order of its own, B
    at a time, each in a lane that begins anew with it and goes on to its end. Every token but the
    first of the stream is a target once an epoch. The order is a shuffle of numbers that is
    computed one by one (Grain's `index_shuffle`): nothing of the size of the data is in memory.
    """

    def __init__(self, stream: TokenStream, batch_size: int, sequence_length: int, seed: int):
        self._stream, self._seed = stream, seed
        self._batch_size, self._length = batch_size, sequence_length
        self._targets = len(stream) - 1
        # Few tokens: pieces so short that each lane still reads some of them.
        short = self._targets // (4 * batch_size * sequence_length)
        self._windows = min(WINDOWS, max(short, 1))
        self._piece = self._windows * sequence_length
        self._pieces = -(-self._targets // self._piece)

    def __len__(self) -> int:
        return self._windows * -(-self._pieces // self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, len(self))
        round, window = divmod(position, self._windows)
        inputs_BT = np.zeros((self._batch_size, self._length), np.int32)
        targets_BT = np.zeros_like(inputs_BT)
        lengths_B = np.zeros(self._batch_size, np.int32)
        for lane in range(self._batch_size):
            number = round * self._batch_size + lane
            if number >= self._pieces:
                break
            begin = self._place(epoch, number) * self._piece
            start = begin + window * self._length
            stop = min(start + self._length, begin + self._piece, self._targets)
            if start < stop:
                tokens = self._stream.read(start, stop + 1)
                lengths_B[lane] = count = stop - start
                inputs_BT[lane, :count], targets_BT[lane, :count] = tokens[:-1], tokens[1:]
        weights_BT = (np.arange(self._length) < lengths_B[:, None]).astype(np.float32)
        reset_B = np.full(self._batch_size, window == 0)
        return Batch(inputs_BT, targets_BT, lengths_B, weights_BT, reset=reset_B)

    def _place(self, epoch: int, number: int) -> int:
        """Which piece is the `number`-th of an epoch."""
        return _shuffled(number, self._pieces, self._seed, epoch)


@functools.lru_cache(maxsize=1024)  # a lane asks for its piece again in every step
def _shuffled(number: int, size: int, seed: int, epoch: int) -> int:
    from grain.experimental import index_shuffle

    key = int(np.random.default_rng([seed, epoch]).integers(2**32))
    return index_shuffle(number, max_index=size - 1, seed=key, rounds=4)
