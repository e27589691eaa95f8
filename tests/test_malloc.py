# SPDX-License-Identifier: Apache-2.0
"""glibc's malloc, told to keep what is freed and then to give it back, in a process of its own."""

import subprocess
import sys

import pytest

PROBE = """
import ctypes, os
from pathlib import Path
from flax_lstm.machine.malloc import trim_malloc, tune_malloc

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
assert tune_malloc()
before = resident()
block, above = (ctypes.c_void_p(libc.malloc(size)) for size in (100 << 20, 4096))
libc.memset(block, 1, 100 << 20)
libc.free(block)
kept = resident()
trim_malloc()
print(kept - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not Linux")
def test_what_is_freed_is_kept_until_it_is_given_back():
    output = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    ).stdout
    kept, left = map(int, output.split())
    assert kept >= 99
    assert left <= 2
