# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it, who may take it over, and what it says when it is done."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flax_lstm.config import Config
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.files import write_atomically
from flax_lstm.runs.saved_config import (
    flatten,
    read_config,
    require_savable,
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
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"

    def __str__(self) -> str:
        return str(self.path)

    def open(self, config: Config, first: bool = True) -> Config:
        """Makes the folder and saves the config in it, or checks that the run there has the same
        settings; returns the config to train with, its schedule's length settled.

        A start that failed before its first checkpoint, say for a wrong column, leaves nothing to
        resume: the corrected command takes its folder over. Of several processes the `first`
        prepares the folder for the others. Raises UserError.
        """
        if not first:
            require(
                self.config.exists(),
                f"--workdir {self}: must lie on a file system that all processes share",
            )
            return resume_config(read_config(self.config), config, self.path)
        require_savable(config)
        config = self._settled(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, self.config)
        except OSError as error:
            raise UserError(
                f"--workdir {self}: cannot be written ({error.strerror}); name another folder"
            ) from error
        return config

    def _settled(self, config: Config) -> Config:
        """The config to train with here."""
        require(
            self.path.is_dir() or not os.path.lexists(self.path),
            f"--workdir {self}: a file of that name is in the way; name another folder",
        )
        begun = config.with_schedule_settled()
        if not self.config.exists():
            require(
                not self.path.exists() or not any(self.path.iterdir()),
                f"--workdir {self}: the folder holds other things and no run; name a new or empty "
                "folder",
            )
            return begun
        saved = read_config(self.config)
        if self._failed_at_its_start() and flatten(saved) != flatten(begun):
            shutil.rmtree(self.assets, ignore_errors=True)  # fitted under the other settings
            return begun
        return resume_config(saved, config, self.path)

    def _failed_at_its_start(self) -> bool:
        """Whether it holds what a run writes before its first checkpoint, and nothing else."""
        early = {self.config, self.assets, self.checkpoints, self.metrics, self.discarded}
        kept = self.checkpoints.glob("*")
        saved = any(path.name.isdigit() or path.suffix == ".damaged" for path in kept)
        return not saved and {*self.path.iterdir()} <= early | {self.tensorboard}

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

    @contextmanager
    def own(self, first: bool) -> Iterator["Workdir"]:
        """Where this process writes what all write but only that of the first is kept: here, or
        into a folder that vanishes."""
        if first:
            yield self
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Workdir(scratch)
