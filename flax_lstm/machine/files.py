# SPDX-License-Identifier: Apache-2.0
"""Paths as users give them; writing files so that a crash leaves the old content or the new, and a
full disk a line."""

import errno
import os
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file has its old content or the new one, whatever happens; text is UTF-8.

    Raises OSError where it cannot be written, and then leaves no draft behind.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if draft.is_file():
            draft.unlink(missing_ok=True)
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
