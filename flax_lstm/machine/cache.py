# SPDX-License-Identifier: Apache-2.0
"""Where what was made once is kept for the next run: where the platform keeps such things, on Linux
$XDG_CACHE_HOME/flax_lstm, or ~/.cache/flax_lstm; without a home (a container's nameless user), a
folder of the user's own among the temporary ones.

Programs are kept here, too, and are run: only what belongs to this user, in a folder that nobody
else can write, is taken.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import platformdirs

from flax_lstm.machine.files import write_atomically


def cache_folder() -> Path:
    """The folder, there or not yet."""
    with contextlib.suppress(RuntimeError):  # no HOME, and no entry for this user
        folder = platformdirs.user_cache_path("flax_lstm", appauthor=False)
        if folder.is_absolute():  # older versions then give a path below `~`
            return folder
    return Path(tempfile.gettempdir()) / f"flax_lstm-{os.geteuid()}"


def private_cache_folder() -> Path:
    """The folder, made where it is not there, open to this user alone.

    Raises OSError where it cannot be made so, or belongs to somebody else.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_own(folder):
        raise PermissionError(errno.EPERM, "belongs to another user", str(folder))
    folder.chmod(0o700)
    _remove_drafts(folder)
    return folder


def _remove_drafts(folder: Path) -> None:
    """Of processes that were killed: folders to compile in, files half written. None is used for an
    hour."""
    for draft in (*folder.glob("tmp*/"), *folder.glob(".*.part")):
        with contextlib.suppress(OSError):
            if draft.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def is_own(path: Path) -> bool:
    """Whether a file or folder, and not a link to one, belongs to this user."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)


def keep(path: Path) -> None:
    """Notes the content of a file in the folder, for `intact`."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    write_atomically(path.with_suffix(".sha256"), digest, shared=True)


def intact(path: Path) -> bool:
    """Whether the file belongs to this user, can be written by nobody else, and is as it was kept:
    half a library would end the process with a bus error."""
    with contextlib.suppress(OSError):
        noted = path.with_suffix(".sha256")
        own = is_own(path) and is_own(noted)
        closed = not (path.stat().st_mode | noted.stat().st_mode) & 0o022
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        return own and closed and noted.read_text() == found
    return False


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs there, unless its own settings name a place. Importing the
    library does not. Goes on without where the folder is not to be had."""
    import jax  # here: reading data does without

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            jax.config.update("jax_compilation_cache_dir", str(private_cache_folder() / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
