# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and how long the path through the code is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flax_lstm"

# Modules of the package that each may import (besides `errors`), by the name of a file or of a folder.
ALLOWED = {
    "cache": set(),
    "cells": {"sharding"},
    "recurrence": {"cache", "cells", "recurrence", "sharding"},
    "layers": {"cells", "recurrence", "sharding"},
    "models": {"cells", "layers", "recurrence", "sharding"},
    "segments": {"cells", "layers", "models", "recurrence"},
    "metrics": set(),
    "data": {"cache", "data"},
    "plots": set(),
    "profiling": set(),
    "tasks": {"data", "metrics", "models", "plots"},
    "optim": set(),
    "sharding": set(),
    "steps": {"data", "metrics", "optim", "sharding"},
    "config": set(),
    "saved_config": {"config"},
    "assembly": {"config", "optim", "recurrence", "sharding", "steps"},
    "plan": {"assembly", "config", "plan", "sharding"},
    "distributed": set(),
    "signals": {"distributed"},
    "checkpoint": {"steps"},
    "inference": {"assembly", "checkpoint", "config", "data", "saved_config", "sharding", "steps", "tasks"},
    "records": {"config", "inference", "saved_config", "sharding"},
    "convert": {"cells", "layers", "models"},
    "malloc": set(),
    "errors": set(),
}
FILES = ("config", "tasks", "models", "layers", "cells", "steps", "loop")
AFTERNOON = ("train.py", *(f"flax_lstm/{n}.py" for n in FILES))


def imports(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module)
            if node.module == "flax_lstm":  # from flax_lstm import recurrence
                found |= {f"flax_lstm.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Parts of the package among them: `flax_lstm.data.base` is `data`."""
    return {name.split(".")[1] for name in names if name.startswith("flax_lstm.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_only_what_it_may(part):
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for path in files:
        extra = own(imports(path)) - ALLOWED[part] - {"errors"}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_every_part_of_the_package_has_its_rule():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__", "loop"} == set(ALLOWED)  # those three sit on top of everything


def test_data_know_nothing_of_jax():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"jax", "jaxlib", "flax", "optax", "orbax"}, path


def test_cells_and_metrics_need_jax_alone():
    for name in ("cells", "metrics", "layers"):
        roots = {module.split(".")[0] for module in imports(PACKAGE / f"{name}.py")}
        assert roots <= {"jax", "flax", "numpy", "typing", "types", "collections", "flax_lstm"}, name


def test_nothing_needs_tensorflow_or_torch():
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py"), ROOT / "train.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"tensorflow", "torch", "keras"}, path


def test_the_path_through_the_code_is_an_afternoon():
    """Lines that are not blank: docstrings and comments want to be read, too."""
    lines = {name: sum(map(bool, map(str.strip, (ROOT / name).read_text().splitlines()))) for name in AFTERNOON}
    print(lines, "together", sum(lines.values()))
    assert sum(lines.values()) < 1420, lines
