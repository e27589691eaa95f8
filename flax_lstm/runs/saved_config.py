# SPDX-License-Identifier: Apache-2.0
"""The config of a run, in its work directory: written, read as data, and compared with the one that
resumes it.

The file is a tree of calls of known classes with literal arguments, and is never executed.
"""

import ast
import importlib
import pprint
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import flax_lstm
import flax_lstm.data
from flax_lstm.config import Config
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.files import write_atomically

MAY_DIFFER = (
    "mesh.",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "model.backend",
)

# What else may differ where the user says so: the way on of a run that has diverged.
RESUME_WITH = {
    "learning-rate": "train.learning_rate",
    "clip": "train.clip",
    "seed": "seed",
    "schedule-steps": "train.schedule_steps",
}

# Where earlier releases kept the classes that their saved configs name.
MOVED = {
    "flax_lstm.models": "flax_lstm.nn.models",
    "flax_lstm.segments": "flax_lstm.nn.segments",
    "flax_lstm.tasks": "flax_lstm",
}


def save_config(config: Config, path: Path) -> None:
    """Writes a Python file whose `get_config()` returns an equal config. Classes of the package are
    imported by their public names, so that its modules may move."""
    classes = sorted({(_public_module(type(v)), type(v).__name__) for v in _tree(config)})
    imports = "\n".join(f"from {module} import {name}" for module, name in classes)
    body = pprint.pformat(config, width=100, sort_dicts=False).replace("\n", "\n    ")
    # Atomically, for a run cannot be resumed with half a config.
    write_atomically(path, f"{imports}\n\n\ndef get_config():\n    return {body}\n")


def require_savable(config: Config) -> None:
    """Raises UserError for a config that could not be read again once it is saved, so that its run
    could be neither resumed nor used."""
    classes = {type(value) for value in _tree(config)}
    local = [kind.__qualname__ for kind in classes if "<locals>" in kind.__qualname__]
    require(
        not local,
        f"the class {listing(local)} is defined within a function: a run of it could not be loaded "
        "again. Define it at the top level of a module",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.py"
        save_config(config, path)
        again = read_config(path)
    before, after = flatten(config), flatten(again)
    lost = [name for name in before if before[name] != after.get(name)]
    require(
        not lost,
        f"config field {listing(lost)}: the value cannot be saved and read again; fields are "
        "numbers, strings, None, tuples of these, or dataclasses",
    )


def _tree(value: Any) -> Iterator[Any]:
    yield value
    for f in fields(value):
        if is_dataclass(getattr(value, f.name)):
            yield from _tree(getattr(value, f.name))


def read_config(path: Path) -> Config:
    """The config that `save_config` wrote, read as data: nothing in the file is executed."""
    try:
        module = ast.parse(path.read_text())
        known = {}
        for node in module.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    known[alias.name] = _known_class(node.module or "", alias.name)
        (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef))
        (statement,) = function.body
        if not (isinstance(statement, ast.Return) and statement.value is not None):
            raise ValueError("get_config() must be a single return")
        config = _build(statement.value, known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ImportError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a config that flax_lstm saved ({error})") from error
    require(isinstance(config, Config), f"{path}: does not return a Config")
    return config


def _public_module(kind: type) -> str:
    """Where a class is to be imported from: the package, its data, or else the module that defines
    it."""
    for package in (flax_lstm, flax_lstm.data):
        if getattr(package, kind.__name__, None) is kind:
            return package.__name__
    return kind.__module__


def _known_class(module: str, name: str) -> type:
    module = MOVED.get(module, module)
    # Only flax_lstm's own modules are imported here; others must be there already, so that reading
    # runs no code.
    if module.split(".")[0] == "flax_lstm":
        importlib.import_module(module)
    require(
        module in sys.modules and is_dataclass(getattr(sys.modules[module], name, None)),
        f"the run uses the class {name} of the module {module}, which is not loaded; "
        f"import it first, or train with the config file that defines it",
    )
    return getattr(sys.modules[module], name)


# Until 0.1.0 one class had the settings of every model of recurrent layers; the task says which of
# its heirs is meant, for which the others' fields had no meaning.
HEIRS = {
    "Classification": "TextModel",
    "Forecasting": "RecurrentForecaster",
    "LanguageModeling": "LanguageModel",
}


def _with_heir(call: ast.Call, known: dict[str, type]) -> None:
    """Puts the model that an old config means in the place of the one that it names."""
    sections = {k.arg: k.value for k in call.keywords}
    model, task = sections.get("model"), sections.get("task")
    names = {k.arg for k in model.keywords} if isinstance(model, ast.Call) else set()
    if not isinstance(model, ast.Call) or not {"tied", "subtract_last"} <= names:
        return
    heir = HEIRS.get(_called(task), "RecurrentModel")
    if _called(model) == "RecurrentModel":
        known[heir] = getattr(flax_lstm, heir)
        model.func = ast.Name(heir, ast.Load())
        kept = {f.name for f in fields(known[heir])}
        model.keywords = [k for k in model.keywords if k.arg in kept]


def _called(node: ast.expr | None) -> str:
    """The name of what is called, or nothing."""
    called = node.func if isinstance(node, ast.Call) else None
    return called.id if isinstance(called, ast.Name) else ""


def _build(node: ast.expr, known: dict[str, type]) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        if known[node.func.id] is Config:
            _with_heir(node, known)
        return known[node.func.id](**{str(k.arg): _build(k.value, known) for k in node.keywords})
    return ast.literal_eval(node)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.hidden_size": 128, ...}`, with the type of each section under its own name."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat[prefix + f.name] = type(value).__name__
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def resume_config(
    saved: Config, wanted: Config, workdir: Path, resume_with: Sequence[str] = ()
) -> Config:
    """The wanted config where it may resume the saved run; the schedule keeps its first length.

    resume_with: what else may differ, of `RESUME_WITH`. Raises UserError.
    """
    names = [name.replace("_", "-").removeprefix("train.") for name in resume_with]
    for name in names:
        require(
            name in RESUME_WITH,
            f"--resume-with {name}: a run can be resumed with another {listing(RESUME_WITH)}",
        )
    if not wanted.train.schedule_steps:  # not asked for: the first run's
        wanted = replace(
            wanted, train=replace(wanted.train, schedule_steps=saved.train.schedule_steps)
        )
    before, now = flatten(saved), flatten(wanted)
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    allowed = (*MAY_DIFFER, "train.steps", *(RESUME_WITH[name] for name in names))
    refused = [
        name
        for name in differ
        if not any(name == may or (may[-1] == "." and name.startswith(may)) for may in allowed)
    ]
    lines = "\n".join(
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in refused
    )
    require(
        not refused,
        f"{workdir} holds a run with other settings:\n{lines}\n"
        "Give the same settings to resume it, or another --workdir to begin a new run. Only "
        f"--resume-with allows another {listing(RESUME_WITH)}.",
    )
    require(
        (saved.train.clip == 0) == (wanted.train.clip == 0),
        "--resume-with clip: a run that clips gradients goes on clipping, and one that does not "
        "cannot begin to, for its optimiser's state has no place for it",
    )
    require(
        wanted.train.steps >= saved.train.steps,
        f"train.steps {wanted.train.steps}: the run in {workdir} was begun for "
        f"{saved.train.steps}; "
        "it can be made longer, not shorter.",
    )
    return wanted
