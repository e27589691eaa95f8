# SPDX-License-Identifier: Apache-2.0
"""What a run remembers between its sessions, beside its state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple


class Best(NamedTuple):
    """The best validation figure so far; the earliest of equal ones."""

    value: float | None = None
    step: int | None = None
    stale: int = 0  # evaluations since

    def after(self, value: float, step: int, maximise: bool) -> "Best":
        better = self.value is None or (value > self.value if maximise else value < self.value)
        return Best(value, step) if better else self._replace(stale=self.stale + 1)


@dataclass(frozen=True)
class Progress:
    """Saved in each checkpoint, as JSON."""

    seconds: float = 0.0  # of all sessions
    sessions: int = 0
    best: Best = Best()  # noqa: RUF009  # a tuple
    losses: tuple[float, ...] = ()  # since the last row of the log
    unwritten: tuple[str, ...] = ()  # rows of the log that a full disk has not taken yet
    backend: str | None = None  # of the recurrences, see `Assembly`
    monitor: float | None = None  # the validation figure of this very step, where there is one
    # Of the session that saved it: what a run depends on to the last bit.
    conditions: dict[str, Any] = field(default_factory=dict)
    form: int = 2  # of the checkpoint: 2 has a manifest, 1 is of version 0.1.0

    def as_json(self) -> dict[str, Any]:
        listed = {"best": [*self.best], "losses": [*self.losses], "unwritten": [*self.unwritten]}
        return {**asdict(self), **listed}

    @staticmethod
    def of_json(saved: Mapping[str, Any]) -> "Progress":
        """What `as_json` gave, now or in an earlier release; other entries are passed over."""
        known = {f.name: saved[f.name] for f in fields(Progress) if f.name in saved}
        best, losses = Best(*known.pop("best", ())), tuple(known.pop("losses", ()))
        unwritten = tuple(known.pop("unwritten", ()))
        more = {"best": best, "losses": losses, "unwritten": unwritten}
        return Progress(**{"form": 1, **known, **more})
