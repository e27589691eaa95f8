# SPDX-License-Identifier: Apache-2.0
"""The files of a work directory that are not checkpoints: the log of figures and the result."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_lstm.config import Config
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.sharding import on_host
from flax_lstm.runs.saved_config import flatten, read_config, resume_config, save_config
from flax_lstm.runs.workdir import ASSETS, CHECKPOINTS, CONFIG_FILE

Figures = Mapping[str, float]
PACKAGES = ("flax-lstm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_workdir(workdir: Path, config: Config, first: bool = True) -> Config:
    """Makes the folder and saves the config in it, or checks that the run there has the same
    settings; returns the config to train with, its schedule's length settled. A start that failed
    before its first checkpoint, say for a
    wrong column, leaves nothing to resume: the corrected command takes its folder over. Of several
    processes the first prepares the folder for the others."""
    if not first:
        path = workdir / CONFIG_FILE
        require(
            path.exists(),
            f"--workdir {workdir}: must lie on a file system that all processes share",
        )
        return resume_config(read_config(path), config, workdir)
    require(
        workdir.is_dir() or not os.path.lexists(workdir),
        f"--workdir {workdir}: a file of that name is in the way; name another folder",
    )
    path = workdir / CONFIG_FILE
    if not path.exists():
        require(
            not workdir.exists() or not any(workdir.iterdir()),
            f"--workdir {workdir}: the folder holds other things and no run; name a new or empty "
            "folder",
        )
        config = config.with_schedule_settled()
    elif is_failed_start(workdir) and flatten(read_config(path)) != flatten(
        config.with_schedule_settled()
    ):
        shutil.rmtree(workdir / ASSETS, ignore_errors=True)  # fitted under the other settings
        config = config.with_schedule_settled()
    else:
        config = resume_config(read_config(path), config, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        save_config(config, path)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot be written ({error.strerror}); name another folder"
        ) from error
    return config


def is_failed_start(workdir: Path) -> bool:
    """Whether the folder holds what a run writes before its first checkpoint, and nothing else."""
    early = {
        CONFIG_FILE,
        ASSETS,
        CHECKPOINTS,
        "metrics.jsonl",
        "metrics.discarded.jsonl",
        "tensorboard",
    }
    saved = any(path.name.isdigit() for path in (workdir / CHECKPOINTS).glob("*"))
    return not saved and {path.name for path in workdir.iterdir()} <= early


class MetricsLog:
    """`metrics.jsonl`: one row per (step, split), steps increasing within a split."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows; a torn last line is left out."""
        return [row for line in self._lines() if (row := _parse(line)) is not None]

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def append(self, step: int, split: str, figures: Figures, seconds: float) -> None:
        """Adds a row; the test row of a step that has one already is left as it is."""
        row = {"step": step, "split": split, **finite(figures), "seconds": round(seconds, 3)}
        if split == "test" and any((r["step"], r["split"]) == (step, split) for r in self.rows()):
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Moves rows beyond the step, and a torn last line, to `metrics.discarded.jsonl`."""
        kept: list[str] = []
        moved: list[str] = []
        for line in self._lines():
            row = _parse(line)
            (kept if row is not None and row["step"] <= step else moved).append(line + "\n")
        if moved:
            with self.path.with_name("metrics.discarded.jsonl").open("a") as file:
                file.writelines(moved)
        if moved or kept:  # also where nothing but the end of the last line was torn off
            write_atomically(self.path, "".join(kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def read_result(path: Path) -> dict[str, Any]:
    """The content of `result.json`. Raises UserError if it is spoilt."""
    try:
        result = json.loads(path.read_text())
        missing = {
            "name",
            "steps",
            "best_step",
            "stopped_early",
            "test",
            "baselines",
        } - result.keys()
        if missing:
            raise ValueError(f"without {listing(sorted(missing))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it, and the same "
            "command writes it again"
        ) from error
    return result


def finite(figures: Figures) -> dict[str, float | None]:
    """Figures as JSON numbers; what is not finite becomes null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def write_atomically(path: Path, text: str) -> None:
    """The file has its old content or the new one, whatever happens."""
    draft = path.with_name(path.name + ".part")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def params_sha256(params: Any) -> str:
    """SHA-256 over the parameters: leaves sorted by '/'-joined path, each as path, dtype, shape and
    little-endian bytes in C order."""
    digest = hashlib.sha256()
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): on_host(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name in sorted(leaves):
        array = leaves[name]
        digest.update(f"{name}{array.dtype.name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def device_name() -> str:
    """What trained, for example `cpu x 1 (2 cores)` or `NVIDIA H200 x 8`."""
    devices = jax.devices()
    cores = f" ({len(os.sched_getaffinity(0))} cores)" if devices[0].platform == "cpu" else ""
    return f"{devices[0].device_kind} x {len(devices)}{cores}"
