# SPDX-License-Identifier: Apache-2.0
"""Whether files are as they were saved: a manifest of the sizes and SHA-256 of all in a folder.

The manifest lies in the folder and has a hash of its own, so that a change of any byte in the
folder, the manifest's included, is noticed: in 1 of 2^256 it is not. What is written to a disk is
hashed as it is read back, so that errors in writing count, too, as far as the machine's cache of
files shows them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from flax_lstm.errors import UserError
from flax_lstm.machine.files import write_atomically

MANIFEST = "manifest.json"


class Damaged(UserError):
    """A file is not as it was saved. `path` is the file."""

    def __init__(self, path: Path, how: str):
        self.path = path
        super().__init__(f"{path}: {how}")


def seal(folder: Path) -> None:
    """Writes the manifest of all that the folder holds."""
    files = {name: [path.stat().st_size, _sha256(path)] for name, path in _files(folder).items()}
    content = {"files": files, "sha256": _of_entries(files)}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=0) + "\n")


def is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def verify(folder: Path, content: bool = True) -> None:
    """Raises Damaged for the first file that is not as it was sealed. Names and sizes are compared
    first, which is cheap; without `content` nothing else is."""
    saved, found = _read(folder / MANIFEST), _files(folder)
    for name in sorted({*saved, *found}):
        path = folder / name
        if name not in found:
            raise Damaged(path, "is missing")
        if name not in saved:
            raise Damaged(path, "was not there when the checkpoint was saved")
        if path.stat().st_size != saved[name][0]:
            raise Damaged(path, f"has {path.stat().st_size} bytes; {saved[name][0]} were saved")
    for name, (_, digest) in sorted(saved.items()):
        if content and _sha256(folder / name) != digest:
            raise Damaged(folder / name, "its content is not what was saved")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        files = content["files"]
        whole = content.keys() == {"files", "sha256"} and content["sha256"] == _of_entries(files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(path, f"cannot be read ({type(error).__name__})") from error
    if not whole:
        raise Damaged(path, "its content is not what was saved")
    return files


def _files(folder: Path) -> dict[str, Path]:
    """All files below but the manifest, by their names in it."""
    found = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    names = ((path.relative_to(folder).as_posix(), path) for path in found)
    return {name: path for name, path in names if name not in (MANIFEST, f"{MANIFEST}.part")}


def _of_entries(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from error
