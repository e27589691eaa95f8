# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C while training: noted, so that a step is finished and everything saved
first."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from flax_lstm.machine.distributed import process_count, stop_agreed


class Stopped(Exception):
    """Training ended early at a signal, with everything saved. `code` is the exit status: 75 after
    SIGTERM, 130 after Ctrl-C."""

    def __init__(self, number: int, step: int, workdir: Path):
        self.code = 75 if number == signal.SIGTERM else 130
        super().__init__(
            f"Stopped at step {step}; everything is saved. The same command goes on from there "
            f"({workdir})."
        )


class Signals:
    """Notes SIGTERM and Ctrl-C, and says so. A second acts at once.

    Among several processes SIGTERM is JAX's to notice, which tells the others; Ctrl-C is turned
    into it."""

    def __init__(self) -> None:
        self.received = 0
        self._alone = process_count() == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
        os.write(
            2, b"stopping as soon as everything is saved; once more: at once\n"
        )  # print is not safe in a handler
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self, step: int) -> int:
        """The signal to stop at before this step, in all processes; 0: go on."""
        if self._alone:
            return self.received
        return (self.received or signal.SIGTERM) if stop_agreed(step) else 0
