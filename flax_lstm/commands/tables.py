# SPDX-License-Identifier: Apache-2.0
"""Tables that commands write: whole, or not at all."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.files import draft, found_at

WRITERS: dict[str, Callable[[Any, Path], None]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    # Fifteen digits are what pandas writes at most; numbers have up to seventeen.
    ".jsonl": lambda frame, path: frame.to_json(
        path, orient="records", lines=True, date_format="iso", double_precision=15
    ),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def write_table(table: Any, path: Path) -> None:
    """Writes the file whole, or leaves what was there."""
    try:
        with draft(path, shared=True) as new:
            WRITERS[path.suffix.lower()](table, new)
    except OSError as error:
        raise UserError(
            f"--output {path}: cannot be written ({error.strerror or error})"
        ) from error
    except Exception as error:  # what a column holds has no place in this format
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        others = listing(suffix for suffix in WRITERS if suffix != path.suffix.lower())
        raise UserError(
            f"--output {path}: the table cannot be written as {path.suffix} ({reason}); try one of "
            f"{others}"
        ) from error


def check_output(path: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuses, before any work, an output that could not be written or would replace something: the
    `source` it is made from in any case."""
    require(
        path.suffix.lower() in WRITERS,
        f"--output {path}: the extension must be one of {listing(WRITERS)}",
    )
    found = found_at(path)
    require(path.parent.is_dir(), f"--output {path}: the folder {path.parent} does not exist")
    if found is None:
        return
    require(not stat.S_ISDIR(found.st_mode), f"--output {path}: this is a folder")
    require(stat.S_ISREG(found.st_mode), f"--output {path}: this is no plain file")
    same = source is not None and source.exists() and source.samefile(path)
    require(not same, f"--output {path}: this is the input; name another file")
    require(overwrite, f"--output {path}: exists already; --overwrite replaces it")
