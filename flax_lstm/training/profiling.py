# SPDX-License-Identifier: Apache-2.0
"""A trace of a few training steps, for TensorBoard or Perfetto, and what it says in a few lines."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

STEPS = range(60, 70)  # of a session: all shapes are compiled by then; few enough for a small file


class Operation:
    """One execution of a compiled operation. Operations within it (of a loop's body) are not in its
    own time."""

    def __init__(self, name: str, begin: float, end: float):
        self.name, self.begin, self.end = name, begin, end
        self.own = end - begin


def operations(trace: Path) -> Iterator[Operation]:
    """All operations in a folder that `jax.profiler` wrote, thread by thread in the order of their
    beginning."""
    newest = max(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    for plane in ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            timed = [e for e in line.events if e.duration_ns > 0 and "hlo_op" in dict(e.stats)]
            around: list[Operation] = []
            for event in sorted(timed, key=lambda e: (e.start_ns, -e.duration_ns)):
                name = str(dict(event.stats)["hlo_op"])
                found = Operation(name, event.start_ns, event.start_ns + event.duration_ns)
                while around and around[-1].end < found.end:
                    around.pop()
                if around:
                    around[-1].own -= found.own
                around.append(found)
                yield found


def summary(trace: Path, steps: int, top: int = 10) -> str:
    """How long the device idled, and the operations that took the most time of a step."""
    with warnings.catch_warnings(
        action="ignore", category=DeprecationWarning
    ):  # of Python 3.12, about jaxlib's types
        found = sorted(operations(trace), key=lambda operation: operation.begin)
    if not found:
        return f"The trace in {trace} holds no operation."
    busy, reached = 0.0, found[0].begin
    times: dict[str, float] = defaultdict(float)
    for operation in found:
        busy += max(0.0, operation.end - max(operation.begin, reached))
        reached = max(reached, operation.end)
        times[operation.name] += operation.own
    span, total = reached - found[0].begin, sum(times.values())
    ranked = sorted(times.items(), key=lambda item: -item[1])[:top]
    rows = [f"{time / steps / 1e6:9.3f} ms {time / total:6.1%}  {name}" for name, time in ranked]
    heading = (
        f"{span / steps / 1e6:.2f} ms a step, device idle {1 - busy / span:.1%}; the "
        "operations that take longest:"
    )
    return "\n".join([heading, *rows, f"Trace: {trace} (tensorboard --logdir, or Perfetto)"])


class Profiler:
    """Traces `STEPS` of a session into a folder; `at` is called before each of its steps, counted
    from 0."""

    def __init__(self, folder: Path):
        self._folder = folder

    def at(self, step: int, state: object) -> str | None:
        """Begins or ends the trace where it is time to, and then says what is in it. `state` is
        waited for, so that just the steps of the trace are in it."""
        if step in (STEPS.start, STEPS.stop):
            jax.block_until_ready(state)
        if step == STEPS.start:
            jax.profiler.start_trace(str(self._folder))
        if step == STEPS.stop:
            jax.profiler.stop_trace()
            return summary(self._folder, len(STEPS))
        return None
