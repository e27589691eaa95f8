# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash leaves the old content or the new."""

import os
from pathlib import Path


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
    except OSError:
        if draft.is_file():
            draft.unlink(missing_ok=True)
        raise
