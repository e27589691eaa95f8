# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of the backend `cpu`: compiled for this machine at first use, kept in the user's
cache folder.

Compiling at first use, not at installation, keeps the wheel one for all platforms and asks nobody
for a compiler who does not have one; it matches the XLA headers of the jaxlib that is there. The
library is named by a hash of sources, flags, compiler and jaxlib, written under a temporary name
and then renamed, so that processes that begin together each find it whole. $FLAX_LSTM_CPU names the
instruction set (avx512bf16, avx512, avx2, neon or portable) instead of the best one that the
processor has.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from flax_lstm.machine.cache import intact, keep, private_cache_folder

log = logging.getLogger(__name__)

SOURCES = [
    Path(__file__).with_name(name)
    for name in ("binding.cc", "alone.h", "int8.h", "kernel.h", "table.h")
]
# For each instruction set: what /proc/cpuinfo calls what it needs, and how to compile. LANES are
# the floats of a vector, TILE the rows of a tile: TILE * 2 sums, 2 weights and an input or two must
# fit the registers.
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma", "-DLANES=16", "-DTILE=12"]
VARIANTS = {
    "avx512bf16": (
        ("avx512f", "avx512dq", "avx512vl", "fma", "avx512_bf16", "avx512_vnni"),
        [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    ),
    "avx512": (("avx512f", "avx512dq", "avx512vl", "fma"), AVX512),
    "avx2": (("avx2", "fma"), ["-mavx2", "-mfma", "-DLANES=8", "-DTILE=6"]),
    "neon": (("asimd",), ["-DLANES=4", "-DTILE=12"]),
    "portable": ((), ["-DLANES=4", "-DTILE=6"]),
}
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared"]


class Unavailable(Exception):
    """Why there is no library; ends up in the log and in `flax_lstm.backends()`."""


def processor_flags() -> set[str]:
    """What this processor can do, in the words of Linux; empty where that cannot be told."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"asimd"} if platform.machine() in ("arm64", "aarch64") else set()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def possible() -> list[str]:
    """The instruction sets that this processor has, the best one first."""
    has = processor_flags()
    return [name for name, (needs, _) in VARIANTS.items() if has.issuperset(needs)]


def variant() -> str:
    """The instruction set to compile for. Raises Unavailable for one that this processor lacks."""
    names = possible()
    wanted = os.environ.get("FLAX_LSTM_CPU", names[0])
    if wanted not in names:
        raise Unavailable(f"FLAX_LSTM_CPU={wanted}: this processor has {', '.join(names)}")
    return wanted


def compiler() -> str:
    """The C++ compiler's path: $CXX, else g++, clang++ or c++."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("no C++ compiler (g++ or clang++) was found")


def build(
    sources: Sequence[Path] = SOURCES, instructions: str | None = None, name: str = "recurrence"
) -> Path:
    """The compiled library, from the cache where it is there already. Raises Unavailable.

    sources: what is compiled, and what that includes. instructions: None: those of `variant()`.
    """
    command = [
        compiler(),
        *FLAGS,
        *VARIANTS[instructions or variant()][1],
        "-I",
        jax.ffi.include_dir(),
        str(sources[0]),
    ]
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=False
    ).stdout
    parts = [
        *(source.read_bytes() for source in sources),
        " ".join([*command, version, jaxlib.version.__version__]).encode(),
    ]
    try:
        folder = private_cache_folder()
    except OSError as error:
        raise Unavailable(
            f"the kernel could not be compiled into {error.filename} ({error.strerror})"
        ) from error
    library = folder / f"{name}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if intact(library):
        return library
    log.info("compiling the %s kernel for this processor (once, some seconds)", name)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            made = Path(draft, library.name)
            result = subprocess.run(
                [*command, "-o", str(made)],
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            if result.returncode:
                raise Unavailable(
                    f"{command[0]} failed: "
                    f"{(result.stderr.strip().splitlines() or ['no message'])[0]}"
                )
            made.chmod(0o700)
            made.replace(library)
            keep(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the kernel could not be compiled into {folder} ({error})") from error
    return library


@functools.cache
def note_bfloat16() -> None:
    """Says once where bfloat16 brings no speed."""
    if variant() != "avx512bf16":
        log.info(
            "bfloat16 is multiplied by way of float32 on this processor, which is slower: "
            "--model.dtype float32 gives better figures in less time"
        )


@functools.cache
def unavailable() -> str | None:
    """None once the kernel is registered with JAX; else the reason why it cannot be, logged
    once."""
    try:
        library = ctypes.CDLL(str(build()))
    except (Unavailable, OSError) as error:
        log.info("The fused recurrence is used in place of the native one: %s", error)
        return str(error)
    for kind in ("forward", "backward", "words", "bytes", "add_up", "take", "update_table"):
        name = f"flax_lstm_{kind}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None
