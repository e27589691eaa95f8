# SPDX-License-Identifier: Apache-2.0
"""glibc's malloc: the large temporaries of a step are kept, what compiling has left behind is given
back.

Only `train.py` sets malloc; importing the library changes nothing.
"""

import ctypes
import sys
from typing import Any

# Parameters of mallopt(3) and their values: never map large blocks, keep what is freed, grow in
# large steps, one arena.
TUNED = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 256 << 20),
    "M_ARENA_MAX": (-8, 1),
}


def tune_malloc() -> bool:
    """Sets them for this process; call it before JAX runs anything. False where the C library is
    not glibc."""
    mallopt = glibc("mallopt")
    return mallopt is not None and all(
        mallopt(parameter, value) == 1 for parameter, value in TUNED.values()
    )


def trim_malloc() -> None:
    """Gives free memory back to the system: compiling a step takes more than running it, and malloc
    keeps that."""
    if malloc_trim := glibc("malloc_trim"):
        malloc_trim(0)


def glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
