# SPDX-License-Identifier: Apache-2.0
"""How XLA compiles for the tests, on how many virtual devices.

Nearly all the time of the fast tests is that of compiling programs that run once on a few numbers,
so they are compiled without what makes programs fast. `XLA_FLAGS=--xla_backend_optimization_level=3
pytest` runs them as users compile; so do those marked `slow` or `faults`, which compute for long.
"""

import mmap
import os
import re
from pathlib import Path

import jaxlib

QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)
DEVICES = "--xla_force_host_platform_device_count"


def known(flags: tuple[str, ...]) -> list[str]:
    """Those that this jaxlib has: XLA ends a process for any other. A flag that is no more may live
    on as a name within a longer text; a flag's own text is that name alone."""
    for path in Path(jaxlib.__file__).parent.glob("libjax_common*"):
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
        ):
            names = [flag.removeprefix("--").split("=")[0].encode() for flag in flags]
            texts = [b"\0" + name + b"\0" for name in names]
            return [flag for flag, text in zip(flags, texts, strict=True) if library.find(text) > 0]
    return []


def quickly() -> None:
    """For this process and its children, unless the caller chose how to compile."""
    given = os.environ.get("XLA_FLAGS", "")
    if os.environ["JAX_PLATFORMS"] == "cpu" and "xla_backend_optimization_level" not in given:
        os.environ["XLA_FLAGS"] = " ".join([given, *known(QUICK)])


def flags(devices: int) -> str:
    """$XLA_FLAGS for a child with so many virtual devices, and else as here."""
    return re.sub(rf"{DEVICES}=\d+", "", os.environ["XLA_FLAGS"]) + f" {DEVICES}={devices}"
