# SPDX-License-Identifier: Apache-2.0
"""The chips that a run can be planned for, how they are put together, and how fast they are said to
be.

Speeds are peaks by the makers' public pages, and so are the predictions from them: a run does not
get faster than that. What no page gives is an assumption, and called one.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from flax_lstm.errors import UserError, listing, nearest, require

# How To Scale Your Model, the pages on TPUs, sharding and GPUs
BOOK = "jax-ml.github.io/scaling-book"


class Chip(NamedTuple):
    """One kind of chip, as one device of JAX. Seconds, bytes, and floating-point operations."""

    compiler: str  # tpu, cuda or cpu
    sides: int  # of the grids that it comes in: 2 or 3 of a torus; 1: a number of them
    memory: float = math.inf
    bfloat16: float = math.nan  # operations a second of matrix products
    float32: float = math.nan  # the same of float32 arrays, at JAX's default precision
    bandwidth: float = math.nan  # of the memory, bytes a second
    link: float = (
        math.nan
    )  # bytes a second to the neighbours in a ring: both directions of one axis of a torus
    latency: float = math.nan  # of an exchange, at least; on a torus for each chip on its way
    kernel: float = 0.0  # that an operation takes, at least; 0: the compiler estimates it
    clock: float = math.nan  # of the cycles in which the compiler estimates, 1 / s
    host: int = 0  # chips that `link` reaches; 0: all
    network: float = math.nan  # bytes a second of a chip beyond its host
    network_latency: float = math.nan
    sources: str = ""


GIB = 2.0**30

# TPUs: a ring along one axis uses two of a chip's ports, and a port has half its bidirectional
# bandwidth each way.
CHIPS = {
    "v5e": Chip(
        "tpu",
        2,
        16 * GIB,
        197e12,
        197e12,
        819e9,
        400e9 / 4,
        1e-6,
        0.0,
        1.5e9,
        sources=f"cloud.google.com/tpu/docs/v5e; {BOOK} (1 us a hop, 1.5 GHz)",
    ),
    "v5p": Chip(
        "tpu",
        3,
        95 * GIB,
        459e12,
        459e12,
        2765e9,
        1200e9 / 6,
        1e-6,
        0.0,
        1.75e9,
        sources=(
            f"cloud.google.com/tpu/docs/v5p; {BOOK} (1 us a hop); 1.75 GHz from the peak of its 8 "
            "matrix units"
        ),
    ),
    "v6e": Chip(
        "tpu",
        2,
        32 * GIB,
        918e12,
        918e12,
        1638e9,
        800e9 / 4,
        1e-6,
        0.0,
        1.75e9,
        sources=f"cloud.google.com/tpu/docs/v6e; {BOOK} (1 us a hop); 1.75 GHz is an assumption",
    ),
    "h200": Chip(
        "cuda",
        1,
        141e9,
        989e12,
        494e12,
        4.8e12,
        450e9,
        10e-6,
        1.5e-6,
        host=8,
        network=50e9,
        network_latency=20e-6,
        sources=(
            "nvidia.com/en-us/data-center/h200 (without sparsity; float32 as TF32); "
            "docs.nvidia.com/dgx-basepod (8 x 400 Gb/s a host); "
            f"{BOOK} (450 GB/s each way, 1.5 us for a small kernel); "
            "10 and 20 us an exchange are assumptions"
        ),
    ),
    "cpu": Chip("cpu", 1, sources="virtual devices: what a program holds and exchanges, no speed"),
}


class Topology(NamedTuple):
    """Chips of a kind in a grid: v5e:16x16, v5p:4x4x4, h200:64."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.sizes)

    def smaller(self) -> Iterator["Topology"]:
        """This one, and what is left as its longest side is halved, down to a single chip."""
        sizes = list(self.sizes)
        yield self
        while max(sizes) > 1 and all(size & (size - 1) == 0 for size in sizes):
            longest = len(sizes) - 1 - sizes[::-1].index(max(sizes))
            sizes[longest] //= 2
            yield Topology(self.kind, tuple(sizes))


def parse_topology(text: str) -> Topology:
    """Raises UserError for what is none."""
    kind, _, rest = text.partition(":")
    examples = "v5e:16x16, v5p:4x4x4, v6e:8x8, h200:8, cpu:8"
    known = f"{nearest(kind, CHIPS)} Known: {listing(CHIPS)} ({examples})"
    require(kind in CHIPS, f"--topology {text}: unknown kind.{known}")
    sizes = rest.split("x")
    if len(sizes) != CHIPS[kind].sides or not all(
        size.isdecimal() and int(size) > 0 for size in sizes
    ):
        form = "x".join(["N"] * CHIPS[kind].sides)
        raise UserError(f"--topology {text}: {kind} comes as {kind}:{form} (as in {examples})")
    return Topology(kind, tuple(int(size) for size in sizes))
