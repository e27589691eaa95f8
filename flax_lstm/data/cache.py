# SPDX-License-Identifier: Apache-2.0
"""Results that take long and depend on their inputs alone, kept in the user's cache folder.

Everything here can be deleted at any time. Spoilt files, and those of other users, are noticed
(`machine.cache.intact`) and made anew.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from flax_lstm.machine.cache import cache_folder, intact, keep, private_cache_folder
from flax_lstm.machine.files import draft

FILES_KEPT = 16  # the ones used last


def fingerprint(parts: Iterable[str]) -> str:
    """A name for the sequence of strings."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode("utf-8", "replace"))
        digest.update(b"\0")
    return digest.hexdigest()


def remember(key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` returns, or returned earlier for the same key."""
    path = cache_folder() / f"{key}.npz"
    if intact(path):
        with contextlib.suppress(OSError), np.load(path) as saved:
            arrays = dict(saved)
            path.touch()
            return arrays
    arrays = make()
    with contextlib.suppress(OSError):  # a full or read-only disk costs time only
        folder = private_cache_folder()
        with draft(path, shared=True) as new, new.open("wb") as file:
            new.chmod(0o600)
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy types the names it reserves
        keep(path)
        by_use = sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime)
        for old in by_use[:-FILES_KEPT]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)
    return arrays
