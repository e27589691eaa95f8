# SPDX-License-Identifier: Apache-2.0
"""Paths as users give them; writing files so that a crash leaves the old content or the new, and a
full disk a line."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flax_lstm.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # whatever file it is about


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~name` resolved. Raises UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: ~ stands for the home of a user who is not known here") from None


def found_at(path: Path) -> os.stat_result | None:
    """What is at a path; None where nothing is. Raises UserError for what cannot be a path (a name
    that is too long), and where it may not be looked at."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot look at {path}: {reason}") from None


@contextmanager
def draft(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Where to write the new content of a file. It takes the place of the old one when the block
    ends well, and is removed when it does not.

    shared: others may write the same file at the same time, and each has a draft of its own. Where
    a folder has one owner, the draft of one that was killed is written over by the next.
    """
    # Without the file's name, which may be as long as names can be.
    name = f".{secrets.token_hex(8)}.part" if shared else f"{path.name}.part"
    new = path.with_name(name)
    try:
        yield new
        new.replace(path)
    finally:
        if new.is_file():
            new.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """The file has its old content or the new one, whatever happens; text is UTF-8. shared: as of
    `draft`.

    Raises OSError where it cannot be written, and then leaves no draft behind.
    """
    try:
        with draft(path, shared=shared) as new, new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def written_or_told(folder: Path) -> Iterator[None]:
    """Raises UserError where a file in the folder, or any file for want of room, cannot be
    written."""
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename or folder))
        if error.errno not in FULL and not path.absolute().is_relative_to(folder.absolute()):
            raise
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). With this mended the same command goes "
            "on from the last checkpoint"
        ) from error
