# SPDX-License-Identifier: Apache-2.0
"""One owner of a folder at a time."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from flax_lstm.errors import UserError

logger = logging.getLogger(__name__)

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the file's lock (`flock`), which ends with the process however it ends; at a regular
    end the file goes, too. On NFS it holds among machines where the server does locks (version 4,
    or lockd).

    Raises UserError where another process has it, with that one's host, number and start.
    """
    with _open(path, what) as file:
        started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # a full disk: it is locked, and does not say by whom
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _open(path: Path, what: str) -> TextIO:
    """The file, locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read(200).strip() or "one that does not say which"
            raise UserError(
                f"{what}: another process has it: {owner}. Wait until it ends, or stop it, or name "
                "another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                file.close()
                raise
            logger.warning("%s: locks are not to be had here; take care to start it once", what)
            return file
        # Between the two calls its owner may have ended and removed it: then it locks nothing.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()
