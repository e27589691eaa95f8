# SPDX-License-Identifier: Apache-2.0
"""glibc's malloc, told to keep what is freed, in huge pages, and then to give it back, in processes
of their own."""

import subprocess
import sys
from pathlib import Path

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


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HEAP = """
import ctypes
from pathlib import Path
from flax_lstm.machine.malloc import trim_malloc, tune_malloc

def heap():
    flags, at = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            at = line.endswith("[heap]") and [int(x, 16) for x in line.split()[0].split("-")]
        elif at and line.startswith("VmFlags:"):
            flags.append((at[1] - at[0] >> 20, "hg" in line.split()))
    return sum(size for size, _ in flags), all(huge for _, huge in flags)

print(*heap())
tune_malloc()
print(*heap())
trim_malloc()
print(*heap())
"""


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="no huge pages to ask for")
def test_the_heap_is_made_of_huge_pages_and_has_room_also_after_memory_was_given_back():
    output = subprocess.run(
        [sys.executable, "-c", HEAP], capture_output=True, text=True, check=True
    ).stdout
    before, tuned, trimmed = (line.split() for line in output.splitlines())
    assert int(before[0]) < 100 and before[1] == "False"
    assert int(tuned[0]) >= 1024 and tuned[1] == "True"
    assert int(trimmed[0]) >= 1024 and trimmed[1] == "True"
