# SPDX-License-Identifier: Apache-2.0
"""glibc's malloc: the large temporaries of a step are kept, in huge pages, and what compiling has
left behind is given back.

Only `train.py` sets malloc; importing the library changes nothing.
"""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# Parameters of mallopt(3) and their values: never map large blocks, keep what is freed, grow in
# large steps, one arena.
TUNED = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 256 << 20),
    "M_ARENA_MAX": (-8, 1),
}


ROOM = 1 << 30  # bytes by which the heap grows ahead of need: addresses, no memory
MADV_HUGEPAGE = 14  # of madvise(2)


def tune_malloc() -> bool:
    """Sets them for this process; call it before JAX runs anything. False where the C library is
    not glibc."""
    mallopt = glibc("mallopt")
    tuned = mallopt is not None and all(
        mallopt(parameter, value) == 1 for parameter, value in TUNED.values()
    )
    if tuned:
        make_room()
    return tuned


def trim_malloc() -> None:
    """Gives free memory back to the system: compiling a step takes more than running it, and malloc
    keeps that."""
    if malloc_trim := glibc("malloc_trim"):
        malloc_trim(0)
        make_room()


def make_room() -> None:
    """Makes the heap larger, where malloc takes large blocks from it, and asks the system for huge
    pages there: a page that is touched for the first time costs a microsecond, whatever its size,
    and a step reads and writes a hundred rows at once. Where that cannot be had, nothing changes.
    """
    malloc, free, madvise = glibc("malloc"), glibc("free"), glibc("madvise")
    malloc.restype = ctypes.c_void_p
    # What is taken and freed at once is not touched. A null pointer may be freed, too.
    free(ctypes.c_void_p(malloc(ctypes.c_size_t(ROOM))))
    with suppress(OSError):  # no /proc
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith("[heap]"):
                begin, end = (int(at, 16) for at in line.split()[0].split("-"))
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)


def glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
