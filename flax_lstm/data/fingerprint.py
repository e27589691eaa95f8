# SPDX-License-Identifier: Apache-2.0
"""What data are made of: a hash of the content of the files that they are read from."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flax_lstm.machine.cache import cache_folder
from flax_lstm.machine.files import write_atomically

LARGE = 1 << 24  # bytes in all from which on the hash is remembered


def content_sha256(paths: Iterable[Path], below: Sequence[str] = ("**/*",)) -> str | None:
    """SHA-256 over the content of files, and of those files below folders that one of the patterns
    `below` finds, with their names below them; None where there is none. Names of the paths
    themselves and times do not count.

    For much content it is remembered in the user's cache folder, by path, size and time of change.

    Raises OSError for a file that cannot be read.
    """
    files = sorted((name, path) for given in paths for name, path in _below(given, below))
    if not files:
        return None
    return remembered([path for _, path in files], lambda: _hash(files))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, remembered like the above."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered([path], read)


def remembered(paths: Sequence[Path], digest: Callable[[], str]) -> str:
    """The digest of these files, from the user's cache folder where they are large and were neither
    written nor moved since."""
    stats = [(path, path.stat()) for path in paths]
    if sum(stat.st_size for _, stat in stats) < LARGE:
        return digest()
    seen = "".join(f"{p.absolute()}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ino}\0" for p, s in stats)
    key = hashlib.sha256(seen.encode(errors="surrogateescape")).hexdigest()
    kept = cache_folder() / "fingerprints" / key
    with contextlib.suppress(OSError):
        if len(found := kept.read_text()) == 64:
            return found
    found = digest()
    with contextlib.suppress(OSError):  # a full or read-only disk costs time only
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(kept, found, shared=True)
    return found


def _below(given: Path, patterns: Sequence[str]) -> Iterable[tuple[str, Path]]:
    """Files with the names that count."""
    if given.is_file():
        return [("", given)]
    every = {path for pattern in patterns for path in given.glob(pattern)}
    found = (path for path in every if path.is_file())
    return [(path.relative_to(given).as_posix(), path) for path in found]


def _hash(files: Iterable[tuple[str, Path]]) -> str:
    whole = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
    return whole.hexdigest()
