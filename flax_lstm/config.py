# SPDX-License-Identifier: Apache-2.0
"""A config: frozen dataclasses, loaded from a Python file, overridden by flags, saved and reloaded as data.

`--config` executes the user's own file. The `config.py` in a work directory is read as data: a tree of calls of known
classes with literal arguments, never executed.
"""

import ast
import importlib
import importlib.util
import math
import pprint
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from flax_lstm.errors import UserError, listing, nearest, require

Schedule = Literal["constant", "cosine", "plateau"]
Optimizer = Literal["adamw", "sgd", "adafactor"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step is one update of the optimiser."""

    steps: int = 1000  # optimiser updates
    batch_size: int = 32  # examples an update, over all devices and accumulated parts
    accumulate: int = 1  # parts a batch is computed in, one after the other, to save memory
    optimizer: Optimizer = "adamw"  # adamw, sgd (momentum 0.9) or adafactor
    learning_rate: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # decoupled weight decay, on matrices only
    clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    warmup_steps: int = 0  # steps of linear warm-up
    schedule: Schedule = (
        "constant"  # after the warm-up: constant, cosine (to 0), plateau (halved as training loss stalls)
    )
    schedule_steps: int = 0  # length of the schedule; 0: the steps of the first run
    ema: float = 0.0  # decay of the averaged weights that are evaluated; 0: none
    patience: int = 0  # evaluations without a new best before training stops; 0: never
    log_every: int = 50  # steps between rows of the log
    eval_every: int = 500  # steps between evaluations on the validation split
    checkpoint_every: int = 500  # steps between checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("weight_decay", "clip", "warmup_steps", "schedule_steps", "patience"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name.replace('_', '-')} {value}: must be finite and not negative")
        require(0 < self.learning_rate < math.inf, f"train.learning-rate {self.learning_rate}: must be positive")
        require(0 <= self.ema < 1, f"train.ema {self.ema}: must be at least 0 and below 1")
        divisors = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
        require(
            self.batch_size % self.accumulate == 0,
            f"train.accumulate {self.accumulate} does not divide train.batch-size {self.batch_size}; "
            f"these do: {listing(divisors)}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes all that are left. A batch is split over data and fsdp."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # devices that share the parameters' storage
    model: int = 1  # devices that share the hidden units


@dataclass(frozen=True)
class Config:
    """Everything about a run. The types of `model`, `data` and `task` are chosen by the config file."""

    name: str
    data: Any  # see flax_lstm/data/base.py
    task: Any  # see flax_lstm/tasks.py
    model: Any  # see flax_lstm/models.py
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0  # of the initial weights, dropout and the order of examples

    def with_schedule_settled(self) -> "Config":
        """The config whose schedule has a length of its own, so that a longer run does not change it."""
        if self.train.schedule_steps:
            return self
        return replace(self, train=replace(self.train, schedule_steps=self.train.steps))


CONFIG_FILE = "config.py"  # in a work directory
MAY_DIFFER = ("mesh.", "train.log_every", "train.eval_every", "train.checkpoint_every", "model.backend")


def config_folder() -> Path:
    """Where the shipped configs are: in the installed package, or at the top of the checkout."""
    package = Path(__file__).parent
    return next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())


def shipped_configs() -> list[str]:
    return sorted(path.stem for path in config_folder().glob("*.py") if not path.stem.startswith("_"))


def load_config(name: str | Path) -> Config:
    """The config of a file, or a shipped one by its bare name. Executes the file's `get_config()`."""
    path = Path(name)
    if path.suffix != ".py" and not path.is_file():
        require(
            path.name in shipped_configs() and len(path.parts) == 1,
            f"--config {name}: no such file or shipped config.{nearest(str(name), shipped_configs())} "
            f"Shipped: {listing(shipped_configs())}",
        )
        path = config_folder() / f"{name}.py"
    require(path.is_file(), f"--config {name}: no such file. Shipped configs: {listing(shipped_configs())}")
    module_name = f"flax_lstm_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    require(spec is not None, f"--config {name}: not a Python file")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module_name] = module  # so that classes defined there are known by name when a run is reloaded
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        line = next((f.lineno for f in reversed(_frames(error)) if f.filename == str(path.absolute())), None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        where = f"{path}, line {line}" if line else str(path)
        raise UserError(f"--config {where}: {type(error).__name__}: {error}") from error
    require(isinstance(config, Config), f"--config {path}: get_config() must return a flax_lstm.Config")
    return config


def _frames(error: BaseException) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


def override(config: Config, arguments: Sequence[str], prog: str, description: str) -> Config:
    """The config with flags such as `--model.hidden-size 256` applied. Prints help or the mistake, and exits, like any
    command-line parser (0 and 2)."""
    # Each section has the type of the value in the config file, so that the flags are exactly that type's fields.
    types = [(f.name, type(getattr(config, f.name))) for f in fields(Config)]
    chosen = make_dataclass("Config", [(n, t, field(default=getattr(config, n))) for n, t in types], frozen=True)
    parsed = tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)(chosen),
        args=list(arguments),
        default=chosen(),
        prog=prog,
        description=description,
    )
    return Config(**{f.name: getattr(parsed, f.name) for f in fields(Config)})


def save_config(config: Config, path: Path) -> None:
    """Writes a Python file whose `get_config()` returns an equal config."""
    classes = sorted({(type(v).__module__, type(v).__name__) for v in _tree(config)})
    imports = "\n".join(f"from {module} import {name}" for module, name in classes)
    body = pprint.pformat(config, width=100, sort_dicts=False).replace("\n", "\n    ")
    draft = path.with_name(f"{path.name}.part")  # a run cannot be resumed with half a config
    draft.write_text(f"{imports}\n\n\ndef get_config():\n    return {body}\n")
    draft.replace(path)


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


def _known_class(module: str, name: str) -> type:
    # Only flax_lstm's own modules are imported here; others must be there already, so that reading runs no code.
    if module.split(".")[0] == "flax_lstm":
        importlib.import_module(module)
    require(
        module in sys.modules and is_dataclass(getattr(sys.modules[module], name, None)),
        f"the run uses the class {name} of the module {module}, which is not loaded; "
        f"import it first, or train with the config file that defines it",
    )
    return getattr(sys.modules[module], name)


def _build(node: ast.expr, known: dict[str, type]) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
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


def resume_config(saved: Config, wanted: Config, workdir: Path) -> Config:
    """The wanted config where it may resume the saved run; the schedule keeps its first length."""
    if not wanted.train.schedule_steps:  # not asked for: the first run's
        wanted = replace(wanted, train=replace(wanted.train, schedule_steps=saved.train.schedule_steps))
    before, now = flatten(saved), flatten(wanted)
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    refused = [name for name in differ if not name.startswith(MAY_DIFFER) and name != "train.steps"]
    lines = "\n".join(f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in refused)
    require(
        not refused,
        f"{workdir} holds a run with other settings:\n{lines}\n"
        "Give the same settings to resume it, or another --workdir to begin a new run.",
    )
    require(
        wanted.train.steps >= saved.train.steps,
        f"train.steps {wanted.train.steps}: the run in {workdir} was begun for {saved.train.steps}; "
        "it can be made longer, not shorter.",
    )
    return wanted
