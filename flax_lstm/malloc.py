# SPDX-License-Identifier: Apache-2.0
"""glibc's malloc set so that the large temporaries of a training step are kept, not given back to the kernel each step.

Only `train.py` asks for it; importing the library changes nothing.
"""

import ctypes
import sys

# Parameters of mallopt(3) and their values: never map large blocks, keep what is freed, grow in large steps, one arena.
TUNED = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 256 << 20),
    "M_ARENA_MAX": (-8, 1),
}


def tune_malloc() -> bool:
    """Sets them for this process; call it before JAX runs anything. False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in TUNED.values())
