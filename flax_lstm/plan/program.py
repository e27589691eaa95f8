# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does, read from its text (XLA's HLO): operations, how often each runs,
and what they move.

The compiler's own cost analysis counts the body of a loop once, whatever its steps, and says
nothing of collectives. Here every operation is met as often as it runs, loops within loops
included.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZES = {"pred": 1, "token": 0}  # bytes; the others have their bits in their name
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What launches nothing: names for parts of memory, and the ends of what was begun before.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "opt-barrier",
}
CONTROL = {"while", "call", "conditional", "async-start"}  # their computations are met on their own
SLICES = {"slice": 0, "dynamic-slice": 0, "gather": 0, "dynamic-update-slice": 1, "scatter": 2}


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    code: str
    operands: tuple[str, ...]
    line: str

    def called(self, key: str) -> list[str]:
        """The computations that it names under a key such as `calls`."""
        found = re.search(rf"\b{key}=(?:{{([^}}]*)}}|%?([\w.\-]+))", self.line)
        return (
            [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]
            if found
            else []
        )

    def is_kernel(self) -> bool:
        """Whether something is launched for it. The counter of a loop is not counted."""
        launched = self.code not in FREE | CONTROL and not self.code.endswith("-done")
        return launched and not self.shape.startswith("s32[]")


class Executed(NamedTuple):
    """An operation, how often a run of the program meets it, and whether it is within a loop."""

    operation: Operation
    times: int
    in_loop: bool
    computation: str


class Collective(NamedTuple):
    """One exchange between devices."""

    kind: str
    bytes: int  # of the whole array at a device: gathered, or before it is reduced
    groups: np.ndarray  # [groups, devices]: who exchanges with whom
    times: int
    in_loop: bool


def size_of(shape: str, slow_memory_only: bool = False) -> int:
    """Bytes of an array, or of all of a tuple. On a TPU, S(n) marks what is kept in fast memory on
    the chip."""
    total = 0
    for kind, sizes, layout in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if not (slow_memory_only and "S(" in layout):
            width = SIZES[kind] if kind in SIZES else max(int(re.findall(r"\d+", kind)[0]) // 8, 1)
            total += width * math.prod(int(size) for size in sizes.split(",") if size)
    return total


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        for entry, name, body in re.findall(
            r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S
        ):
            operations = {}
            for line in body.splitlines():
                if found := re.match(
                    r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\(([^)]*)\)", line
                ):
                    own, shape, code, operands = found.groups()
                    operations[own] = Operation(
                        own, shape, code, tuple(re.findall(r"%([\w.\-]+)", operands)), line
                    )
            self.computations[name] = operations
            if entry:
                self.entry = name

    def executed(
        self, computation: str = "", times: int = 1, in_loop: bool = False
    ) -> Iterator[Executed]:
        """Every operation that a run meets. What a fusion consists of is the fusion's own
        business."""
        computation = computation or self.entry
        for operation in self.computations[computation].values():
            yield Executed(operation, times, in_loop, computation)
            if operation.code == "while":
                yield from self.executed(
                    operation.called("body")[0], times * self.trips(operation), True
                )
            elif operation.code in CONTROL:
                for key in (
                    "to_apply",
                    "calls",
                    "branch_computations",
                    "true_computation",
                    "false_computation",
                ):
                    for name in operation.called(key):
                        yield from self.executed(name, times, in_loop)

    def trips(self, loop: Operation) -> int:
        """Steps of a loop: as the compiler notes them, else the number that its condition compares
        the counter with."""
        if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.line):
            return int(known[1])
        lines = [
            operation.line for operation in self.computations[loop.called("condition")[0]].values()
        ]
        return max(
            (int(n) for line in lines for n in re.findall(r" constant\((\d+)\)", line)), default=1
        )

    def loops(self) -> list[list[Operation]]:
        """What is launched at each step of each loop, in the order in which the loops run."""
        bodies = [
            e.operation.called("body")[0] for e in self.executed() if e.operation.code == "while"
        ]
        return [
            [inner for inner in self.computations[body].values() if inner.is_kernel()]
            for body in bodies
        ]

    def collectives(self) -> Iterator[Collective]:
        """All exchanges. A TPU's program may spread one over several fusions, which carry the
        number of its chain."""
        chains = set()
        for operation, times, in_loop, computation in self.executed():
            places = operation.called("calls") if operation.code == "fusion" else []
            inside = [
                (place, inner) for place in places for inner in self.computations[place].values()
            ]
            for place, exchange in inside or [(computation, operation)]:
                kind = exchange.code.removesuffix("-start")
                chain = re.search(r'chain_id="(\d+)"', exchange.line)
                if kind not in COLLECTIVES or (chain and chain[1] in chains):
                    continue
                if chain:
                    chains.add(chain[1])
                groups = groups_of(exchange.line)
                own = sum(
                    size_of(self.computations[place][name].shape) for name in exchange.operands
                )
                whole = own * (groups.shape[1] if kind == "all-gather" else 1)
                yield Collective(kind, whole, groups, times, in_loop)

    def traffic(self, executed: Executed) -> int:
        """Bytes that an operation reads from a device's memory and writes to it; of an array that
        it takes slices of, or writes slices into, these alone."""
        operation, shapes = executed.operation, self.computations[executed.computation]
        if not operation.is_kernel():
            return 0

        def memory(name: str, within: dict[str, Operation] = shapes) -> int:
            return size_of(within[name].shape, slow_memory_only=True)

        if operation.code in SLICES:
            moved = (
                operation.operands[SLICES[operation.code]]
                if SLICES[operation.code]
                else operation.name
            )
            return 2 * memory(moved)
        if (
            operation.code.removesuffix("-start") in SLICES
        ):  # begun: its result is the array, and then the slice
            return size_of(operation.shape) - sum(
                size_of(shapes[name].shape) for name in operation.operands
            )
        written = 0 if operation.code.endswith("-start") else memory(operation.name)
        if operation.code == "custom-call":  # the others of its results are its workspace
            written = size_of(operation.shape.split("]")[0] + "]", slow_memory_only=True)
        if operation.code != "fusion":
            return written + sum(memory(name) for name in operation.operands)
        body = self.computations[operation.called("calls")[0]]
        updates = [op for op in body.values() if op.code == "dynamic-update-slice"]
        in_place = {origin(body, op.operands[0]) for op in updates}
        read = 0
        for inner in body.values():
            if inner.code != "parameter":
                continue
            outer = operation.operands[int(re.search(r"parameter\((\d+)\)", inner.line)[1])]  # type: ignore[index]
            if not memory(outer) or inner.name in in_place:
                continue
            users = [
                op
                for op in body.values()
                if inner.name in {origin(body, name) for name in op.operands}
            ]
            users = [op for op in users if op.code != "bitcast"]
            sliced = all(op.code in ("dynamic-slice", "gather", "slice") for op in users)
            read += (
                min(memory(outer), sum(size_of(op.shape) for op in users))
                if sliced
                else memory(outer)
            )
        written += sum(size_of(body[op.operands[1]].shape) - size_of(op.shape) for op in updates)
        return max(written, 0) + read


def origin(body: dict[str, Operation], name: str) -> str:
    """The array that a chain of bitcasts is a view of."""
    while name in body and body[name].code == "bitcast":
        name = body[name].operands[0]
    return name


def groups_of(line: str) -> np.ndarray:
    """[groups, devices] of a collective, in any of the forms in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return np.array(
            [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        )
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return np.array(
            [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        )
    if named := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line
    ):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        axes, chosen = list(sizes), re.findall(r"'(\w+)'", named[3])
        order = [axes.index(axis) for axis in axes if axis not in chosen] + [
            axes.index(axis) for axis in chosen
        ]
        group = math.prod(sizes[axis] for axis in chosen)
        return ids.reshape(list(sizes.values())).transpose(order).reshape(-1, group)
    if counted := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return iota(counted[1])
    raise ValueError(f"no groups of devices in: {line.strip()[:200]}")


def iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: the numbers from 0 as an array [2, 4], transposed, in the shape [4, 2].
    Without `<=` the shape is that before the transposition."""
    shape, source, order = re.fullmatch(
        r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text.strip()
    ).groups()  # type: ignore[union-attr]
    sizes = [int(n) for n in (source or shape).split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        ids = ids.transpose([int(n) for n in order.split(",")])
    return ids.reshape([int(n) for n in shape.split(",")]) if source else ids
