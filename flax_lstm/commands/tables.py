# SPDX-License-Identifier: Apache-2.0
"""Tables that commands write: whole, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_lstm.errors import UserError, listing, require

WRITERS: dict[str, Callable[[Any, Path], None]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    ".jsonl": lambda frame, path: frame.to_json(
        path, orient="records", lines=True, date_format="iso"
    ),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def write_table(table: Any, path: Path) -> None:
    """Writes the file whole, or leaves what was there."""
    draft = path.with_name(f".{path.name}.part")
    try:
        WRITERS[path.suffix](table, draft)
        draft.replace(path)
    except OSError as error:
        raise UserError(
            f"--output {path}: cannot be written ({error.strerror or error})"
        ) from error
    except Exception as error:  # what a column holds has no place in this format
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        others = listing(suffix for suffix in WRITERS if suffix != path.suffix)
        raise UserError(
            f"--output {path}: the table cannot be written as {path.suffix} ({reason}); try one of "
            f"{others}"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses, before any work, an output that could not be written or would replace something."""
    require(
        path.suffix in WRITERS,
        f"--output {path}: the extension must be one of {listing(WRITERS)}",
    )
    require(path.parent.is_dir(), f"--output {path}: the folder {path.parent} does not exist")
    require(not path.is_dir(), f"--output {path}: this is a folder")
    require(
        overwrite or not path.exists(), f"--output {path}: exists already; --overwrite replaces it"
    )
