# SPDX-License-Identifier: Apache-2.0
"""How much memory is free, so that what cannot fit is refused before it is asked for: the kernel
would kill the process without a word."""

import contextlib
import os
from pathlib import Path

from flax_lstm.errors import require

UNLIMITED = 1 << 60  # bytes; a control group without a limit says one about as large
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# limit, usage and the name of the pages of files, which are given back on demand: version 2, 1
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Bytes that this process can still have: of the machine, and of the control groups (a
    container, a job of SLURM) that it is in; `UNLIMITED` where nothing tells."""
    return min([_of_machine(), *map(_of_group, _groups())])


def require_room(needed: float, what: str) -> None:
    """Raises UserError where so many bytes are not free. `what` says what takes them, and what to
    change."""
    free = free_memory()
    require(
        needed <= free,
        f"{what} (it takes about {in_words(needed)}, and {in_words(free)} of memory are free)",
    )


def in_words(size: float) -> str:
    """A number of bytes as people say it: `1.5 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}" if size < 1e15 else f"{size / factor:.1e} {unit}"
    return f"{size / 1e3:.3g} kB"


def _of_machine() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return UNLIMITED


def _groups() -> list[Path]:
    """The folders of the control groups with a say on memory, the process's own and those above."""
    with contextlib.suppress(OSError):
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().split("\n")]
        found = []
        for _, kinds, name in (entry for entry in entries if len(entry) == 3):
            if kinds not in ("", "memory"):
                continue
            root = CONTROL_GROUPS / kinds
            own = root / name.lstrip("/")
            found += [p for p in (own, *own.parents) if p == root or root in p.parents]
        return found
    return []


def _of_group(folder: Path) -> int:
    """What is left of the limit of one control group."""
    for limit, usage, reclaimable in FILES:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word max
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            pairs = dict(line.split(" ", 1) for line in lines)
            return max(most - used + int(pairs.get(reclaimable, 0)), 0)
    return UNLIMITED
