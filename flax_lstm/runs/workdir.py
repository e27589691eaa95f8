# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it, who may take it over, and what it says when it is done."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flax_lstm.config import Config
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.files import write_atomically, written_or_told
from flax_lstm.machine.lock import locked
from flax_lstm.runs.manifest import Damaged, is_sealed, seal, verify
from flax_lstm.runs.saved_config import (
    read_config,
    resume_config,
    save_config,
)

RESULT_KEYS = {"name", "steps", "best_step", "stopped_early", "test", "baselines"}


class Workdir:
    """A run's folder. Its attributes are the paths of what it holds, there or not yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.py"
        self.metrics = self.path / "metrics.jsonl"
        self.discarded = self.path / "metrics.discarded.jsonl"
        self.result = self.path / "result.json"
        self.assets = self.path / "assets"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.evaluation = self.path / "evaluation"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.data = self.path / "data.json"
        self.lock = self.path / "lock"
        self._draft = self.path / "config.py.part"  # that a kill left

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def own(self, first: bool) -> Iterator["Workdir"]:
        """Where this process writes what all write but only that of the first is kept: here, or
        into a folder that vanishes.

        The first makes the folder and holds its lock, for a run has one owner. Raises UserError
        where another has it, where the folder cannot be had, and later where a file in it cannot be
        written.
        """
        if not first:
            with tempfile.TemporaryDirectory() as scratch:
                yield Workdir(scratch)
            return
        self._require_ours()
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.lock, f"--workdir {self}"))
            except OSError as error:
                raise self._not_writable(error) from error
            with written_or_told(self.path):
                yield self

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(
            f"--workdir {self}: cannot be written ({error.strerror}); name another folder"
        )

    def _require_ours(self) -> None:
        """Refuses what is no folder, and one that holds other things."""
        require(
            self.path.is_dir() or not os.path.lexists(self.path),
            f"--workdir {self}: a file of that name is in the way; name another folder",
        )
        if not self.config.exists() and self.path.exists():
            # A run whose folder is removed while it trains writes on until it notices.
            late = set() if self._kept() else {self.metrics, self.discarded, self.checkpoints}
            require(
                {*self.path.iterdir()} <= {self.lock, self._draft, *late},
                f"--workdir {self}: the folder holds other things and no run; name a new or empty "
                "folder",
            )

    def open(
        self,
        config: Config,
        first: bool = True,
        resume_with: Sequence[str] = (),
        data_sha256: str | None = None,
    ) -> Config:
        """Makes the folder and saves the config in it, or checks that the run there has the same
        settings and data; returns the config to train with, its schedule's length settled.

        A start that failed before its first checkpoint, say for a wrong column, leaves nothing to
        resume: the corrected command takes its folder over. Of several processes the `first`
        prepares the folder for the others. `resume_with` says what else may differ, see
        `saved_config`; `data_sha256` is the fingerprint of the data, None where there are no files
        to read. Raises UserError.
        """
        if not first:
            require(
                self.config.exists(),
                f"--workdir {self}: must lie on a file system that all processes share",
            )
            return resume_config(read_config(self.config), config, self.path, resume_with)
        config = self._settled(config, resume_with, data_sha256)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, self.config)
            if data_sha256 and not self.data.exists():
                write_atomically(self.data, json.dumps({"data_sha256": data_sha256}) + "\n")
        except OSError as error:
            raise self._not_writable(error) from error
        return config

    def _settled(
        self, config: Config, resume_with: Sequence[str], data_sha256: str | None
    ) -> Config:
        """The config to train with here."""
        self._require_ours()
        begun = config.with_schedule_settled()
        if not self.config.exists():
            return begun
        if self._failed_at_its_start():
            # Fitted, perhaps, on other data, under other settings or for another run's weights.
            shutil.rmtree(self.assets, ignore_errors=True)
            self.data.unlink(missing_ok=True)
            return begun
        saved, before = read_config(self.config), self.data_sha256()
        require(
            None in (before, data_sha256) or before == data_sha256,
            f"{self}: the data are not those that this run began with (SHA-256 of their content "
            f"{before}, now {data_sha256}). Bring the old ones back to resume it, or name another "
            "--workdir to begin a new run",
        )
        return resume_config(saved, config, self.path, resume_with)

    def _failed_at_its_start(self) -> bool:
        """Whether it holds what a run writes before its first checkpoint, and nothing else."""
        early = {self.config, self.assets, self.checkpoints, self.metrics, self.discarded}
        early |= {self.tensorboard, self.data, self.lock, self._draft}
        return not self._kept() and {*self.path.iterdir()} <= early

    def _kept(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        found = self.checkpoints.glob("*")
        return any(path.name.isdigit() or path.suffix == ".damaged" for path in found)

    def data_sha256(self) -> str | None:
        """The fingerprint of the data that the run began with; None where there is none."""
        if not self.data.exists():
            return None
        try:
            return str(json.loads(self.data.read_bytes())["data_sha256"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.data} cannot be read ({type(error).__name__}). Delete it if the data are "
                "those that the run began with"
            ) from error

    def check_assets(self) -> None:
        """Raises UserError where what was fitted on the training data is not as it was saved.
        Without a manifest nobody can tell: of a run whose checkpoints have theirs it is lost."""
        sealed = (is_sealed(path) for path in self.checkpoints.glob("*") if path.name.isdigit())
        if is_sealed(self.assets) or (self.assets.is_dir() and any(sealed)):
            try:
                verify(self.assets)
            except Damaged as error:
                raise UserError(
                    f"{error}. Bring a copy back, or delete the folder {self.assets}: the next "
                    "training makes it anew from the data"
                ) from error

    def seal_assets(self) -> None:
        """Hashes what was fitted, so that `check_assets` notices a change."""
        if self.assets.is_dir() and not is_sealed(self.assets):
            seal(self.assets)

    def finished(self, steps: int) -> dict[str, Any] | None:
        """The content of `result.json` where no more steps are wanted. One of a shorter run is put
        aside."""
        if not self.result.exists():
            return None
        result = self.read_result()
        if result["steps"] >= steps or result["stopped_early"]:
            return result
        self.result.replace(self.path / f"result.{result['steps']}.json")
        return None

    def read_result(self) -> dict[str, Any]:
        """The content of `result.json`. Raises UserError if it is spoilt."""
        try:
            result = json.loads(self.result.read_text())
            if missing := RESULT_KEYS - result.keys():
                raise ValueError(f"without {listing(sorted(missing))}")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.result} cannot be read ({type(error).__name__}: {error}); delete it, and "
                "the same command writes it again"
            ) from error
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.result, json.dumps(result, indent=1) + "\n")
