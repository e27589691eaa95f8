# SPDX-License-Identifier: Apache-2.0
"""Fetching one known file over HTTP: resumed where it was cut, checked before it is used."""

import hashlib
import http.client
import logging
import queue
import threading
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flax_lstm.errors import UserError

log = logging.getLogger(__name__)

TIMEOUT = 4.0  # seconds without an answer until the network counts as absent


class RemoteFile(NamedTuple):
    """A file that does not change."""

    url: str
    size: int  # bytes
    sha256: str


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: RemoteFile) -> None:
    """Raises UserError if the file is not the expected one. Leaves it as it is."""
    if path.stat().st_size != expected.size or (found := sha256(path)) != expected.sha256:
        detail = f"{path.stat().st_size:,} bytes instead of {expected.size:,}"
        if path.stat().st_size == expected.size:
            detail = f"SHA-256 {found[:12]}... instead of {expected.sha256[:12]}..."
        raise UserError(
            f"{path} is not the file of {expected.url}: {detail}. It was left as it is."
        )


def download(remote: RemoteFile, path: Path) -> None:
    """Fetches the file to `path`, which appears only when it is whole and its checksum is right.

    What came so far stays in `path`.part, where the same call, or the next program, goes on (HTTP
    Range); a server without ranges starts again. Tries again as long as every connection brings
    something. Raises OSError (or an HTTPException) without network, UserError for another content
    than expected.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    log.info("downloading %s to %s", remote.url, path)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(path.name, total=remote.size)
        while (before := part.stat().st_size) < remote.size:
            try:
                _fetch(remote.url, part, lambda done: progress.update(task, completed=done))
                failure: Exception = OSError("the connection closed too early")
            except (OSError, http.client.HTTPException) as error:
                failure = error
            if part.stat().st_size <= before:
                raise failure
    try:
        verify(part, remote)
    except UserError as error:
        spoilt = path.with_name(path.name + ".spoilt")
        part.replace(spoilt)
        raise UserError(f"{error} Kept as {spoilt}; the next start downloads it anew.") from None
    part.replace(path)


def _fetch(url: str, part: Path, advance: Any) -> None:
    """Appends what one connection brings."""
    start = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with _open(request) as response, part.open("ab") as file:
        if response.status != 206:  # the whole file, from its first byte
            file.truncate(0)
            start = 0
        while chunk := response.read1(1 << 16):
            file.write(chunk)
            start += len(chunk)
            advance(start)


def _open(request: urllib.request.Request) -> Any:
    """urlopen, but a name server that does not answer cannot hold it up: no socket timeout covers
    that."""
    answer: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            answer.put(urllib.request.urlopen(request, timeout=TIMEOUT))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        response = answer.get(timeout=TIMEOUT + 0.5)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TIMEOUT} seconds") from None
    if isinstance(response, Exception):
        raise response
    return response
