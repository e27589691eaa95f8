# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and how long the path through the code is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flax_lstm"

# Rooms of the package, and single modules at its top, that each may import besides itself and
# `errors`.
ALLOWED = {
    "machine": set(),
    "nn": {"data", "machine"},
    "nn/layers": {"machine"},
    "nn/recurrence": {"machine"},
    "nn/cells": {"machine"},
    "data": {"machine"},
    "tasks": {"data", "machine", "nn"},
    "tasks/metrics": set(),
    "tasks/plots": set(),
    "config": {"machine"},
    "runs": {"config", "data", "machine"},
    "training/steps": {"data", "machine", "tasks"},
    "training/optim": set(),
    "training": {"config", "data", "machine", "nn", "runs", "tasks"},
    "inference": {"config", "data", "machine", "nn", "runs", "tasks", "training"},
    "backtest": {"inference", "tasks", "training"},
    "plan": {"config", "machine", "training"},
    "convert": {"nn"},
    "nnx": {"nn"},
}


def imports(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, also within functions; not those that a
    type checker alone reads."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
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
        extra = own(imports(path)) - ALLOWED[part] - {part.split("/")[0], "errors", "lazy"}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_every_part_of_the_package_has_its_rule():
    paths = [p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    parts = {path.stem for path in paths}
    assert parts - {"__init__", "__main__", "commands", "errors", "lazy"} == {
        part for part in ALLOWED if "/" not in part
    }


def test_data_know_nothing_of_jax():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {
            "jax",
            "jaxlib",
            "flax",
            "optax",
            "orbax",
        }, path


def test_cells_and_metrics_need_jax_alone():
    for name in ("nn/cells", "tasks/metrics", "nn/layers"):
        roots = {module.split(".")[0] for module in imports(PACKAGE / f"{name}.py")}
        assert roots <= {
            "jax",
            "flax",
            "functools",
            "numpy",
            "math",
            "typing",
            "types",
            "collections",
            "flax_lstm",
        }, name


def test_nothing_needs_tensorflow_or_torch():
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py"), ROOT / "train.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {
            "tensorflow",
            "torch",
            "keras",
        }, path


# Functions longer than a screen, each with the reason.
LONG: dict[str, str] = {}


def test_functions_fit_on_a_screen():
    long = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 60:
                    long.add(f"{path.relative_to(PACKAGE)}::{node.name}")
    assert long == LONG.keys()
