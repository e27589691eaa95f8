# SPDX-License-Identifier: Apache-2.0
"""A config: frozen dataclasses, loaded from a Python file, which is executed, and overridden by
flags.

How a run keeps its config, and what may differ when it is resumed: `saved_config.py`.
"""

import importlib
import importlib.util
import math
import pprint
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flax_lstm.errors import MOST, UserError, listing, nearest, require, within
from flax_lstm.machine.files import found_at

if TYPE_CHECKING:
    from flax_lstm.data.base import Data
    from flax_lstm.tasks.base import Task

Schedule = Literal["constant", "cooldown", "cosine", "plateau"]
Optimizer = Literal["adamw", "sgd", "adafactor"]
LARGE = 1e37  # about where float32 ends
COUNTS = ("steps", "batch_size", "accumulate", "log_every", "eval_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step is one update of the optimiser."""

    steps: int = 1000  # optimiser updates
    batch_size: int = 32  # examples an update, over all devices and accumulated parts
    accumulate: int = 1  # parts a batch is computed in, one after the other, to save memory
    optimizer: Optimizer = "adamw"  # adamw, sgd (momentum 0.9) or adafactor
    learning_rate: float = 1e-3  # peak learning rate
    epsilon: float = 1e-8  # of AdamW: added to the root of the mean squared gradient
    weight_decay: float = 0.0  # decoupled weight decay, on matrices only
    clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    warmup_steps: int = 0  # steps of linear warm-up
    # after the warm-up: constant, cosine (to 0), cooldown (constant, then to 0 in the last fifth),
    # plateau (halved as training loss stalls)
    schedule: Schedule = "constant"
    schedule_steps: int = 0  # length of the schedule; 0: the steps of the first run
    # share of the learning rate that each layer has of the one above it, the head at the top
    layer_decay: float = 1.0
    # steps after which one more layer below the head learns, the embedding last; 0: all at once
    unfreeze_every: int = 0
    # parts of the model that keep the weights they begin with, such as embed with word vectors
    frozen: tuple[str, ...] = ()
    ema: float = 0.0  # decay of the averaged weights that are evaluated; 0: none
    patience: int = 0  # evaluations without a new best before training stops; 0: never
    log_every: int = 50  # steps between rows of the log
    eval_every: int = 500  # steps between evaluations on the validation split
    checkpoint_every: int = 500  # steps between checkpoints

    def __post_init__(self) -> None:
        for name in COUNTS:
            within(f"train.{name.replace('_', '-')}", getattr(self, name), 1)
        for name in ("warmup_steps", "schedule_steps", "patience"):
            within(f"train.{name.replace('_', '-')}", getattr(self, name), 0)
        within("train.unfreeze-every", self.unfreeze_every, 0, 10**6)
        for name in ("weight_decay", "clip"):
            value, flag = getattr(self, name), f"train.{name.replace('_', '-')}"
            require(0 <= value <= LARGE, f"{flag} {value}: must be finite and not negative")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            require(
                1 / LARGE <= value <= LARGE,
                f"train.{name.replace('_', '-')} {value}: must be positive, and finite in float32",
            )
        require(
            self.epsilon == 1e-8 or self.optimizer == "adamw",
            f"train.epsilon {self.epsilon} acts with train.optimizer adamw only, not with "
            f"{self.optimizer}",
        )
        require(
            0 < self.layer_decay <= 1,
            f"train.layer-decay {self.layer_decay}: must be above 0 and at most 1",
        )
        require(0 <= self.ema < 1, f"train.ema {self.ema}: must be at least 0 and below 1")
        low = [n for n in range(1, math.isqrt(self.batch_size) + 1) if self.batch_size % n == 0]
        divisors = sorted({*low, *(self.batch_size // n for n in low)})
        require(
            self.batch_size % self.accumulate == 0,
            f"train.accumulate {self.accumulate} does not divide train.batch-size "
            f"{self.batch_size}; "
            f"these do: {listing(divisors)}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes all that are left. A batch is split over data
    and fsdp."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # devices that share the parameters' storage
    model: int = 1  # devices that share the hidden units

    def __post_init__(self) -> None:
        for f in fields(self):
            size = getattr(self, f.name)
            require(
                size == -1 or 1 <= size <= MOST,
                f"mesh.{f.name} {size}: must be a number of devices, or -1 for all that are left",
            )


@dataclass(frozen=True)
class Config:
    """Everything about a run. The types of `model`, `data` and `task` are chosen by the config
    file."""

    name: str
    data: "Data"  # see flax_lstm/data/base.py
    task: "Task"  # see flax_lstm/tasks/base.py
    # Settings that the task can build from: see flax_lstm/nn/models.py. Of no type in common, for
    # their fields are those of the class that a config chose; `check_parts` holds them to the task
    model: Any
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0  # of the initial weights, dropout and the order of examples

    def __post_init__(self) -> None:
        name = str(self.name)
        require(
            name not in ("", ".", "..") and not {"/", "\0"} & {*name},
            f"name {name!r}: the folder runs/NAME cannot be called so",
        )
        within("seed", self.seed, 0, 2**32 - 1)

    @property
    def backend(self) -> str | None:
        """How recurrences are to be run; None where the model does not say."""
        return getattr(self.model, "backend", None)

    def with_backend(self, name: str) -> "Config":
        """The config with this backend, where the model has one."""
        if self.backend is None:
            return self
        return replace(self, model=replace(self.model, backend=name))

    def __str__(self) -> str:
        """The settings as Python writes them, a section after the other."""
        return pprint.pformat(self, width=100, sort_dicts=False)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What a notebook shows."""
        printer.text(str(self))

    def with_schedule_settled(self) -> "Config":
        """The config whose schedule has a length of its own, so that a longer run does not change
        it."""
        if self.train.schedule_steps:
            return self
        return replace(self, train=replace(self.train, schedule_steps=self.train.steps))


def config_folder() -> Path:
    """Where the shipped configs are: in the installed package, or at the top of the checkout."""
    package = Path(__file__).parent
    return next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())


def shipped_configs() -> list[str]:
    return sorted(
        path.stem for path in config_folder().glob("*.py") if not path.stem.startswith("_")
    )


def load_config(name: str | Path) -> Config:
    """The config of a file, or a shipped one by its bare name. Executes the file's
    `get_config()`."""
    path = Path(name)
    found_at(path)  # what can be no path is refused
    if path.suffix != ".py" and not path.is_file():
        require(
            path.name in shipped_configs() and len(path.parts) == 1,
            f"--config {name}: no such file or shipped "
            f"config.{nearest(str(name), shipped_configs())} "
            f"Shipped: {listing(shipped_configs())}",
        )
        path = config_folder() / f"{name}.py"
    require(
        path.is_file(),
        f"--config {name}: no such file. Shipped configs: {listing(shipped_configs())}",
    )
    module_name = f"flax_lstm_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    require(spec is not None, f"--config {name}: not a Python file")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module_name] = (
        module  # so that classes defined there are known by name when a run is reloaded
    )
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        line = next(
            (f.lineno for f in reversed(_frames(error)) if f.filename == str(path.absolute())), None
        )
        line = error.lineno if isinstance(error, SyntaxError) else line
        where = f"{path}, line {line}" if line else str(path)
        raise UserError(f"--config {where}: {type(error).__name__}: {error}") from error
    require(
        isinstance(config, Config), f"--config {path}: get_config() must return a flax_lstm.Config"
    )
    return config


def _frames(error: BaseException) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


def sections(config: Config) -> type:
    """A dataclass with the fields of `Config`, each of the type that its value has in this config
    and with that value as default: so flags are exactly the fields of those types."""
    told = {
        "name": "what the run is called; its folder is runs/NAME",
        "seed": "of the initial weights, dropout and the order of examples",
    }
    chosen = []
    for name in (f.name for f in fields(Config)):
        kind: Any = type(getattr(config, name))
        if name in told:
            kind = Annotated[kind, tyro.conf.arg(help=told[name])]
        # A factory, for a value that cannot be hashed is refused as a default.
        chosen.append((name, kind, field(default_factory=partial(getattr, config, name))))
    return make_dataclass("Settings", chosen, frozen=True)


def read_sections(settings: Any) -> Config:
    """The config with the values of an instance of such a dataclass."""
    return Config(**{f.name: getattr(settings, f.name) for f in fields(Config)})


def override(config: Config, arguments: Sequence[str], prog: str = "", about: str = "") -> Config:
    """The config with flags such as `--model.hidden-size 256` applied. Prints help or the mistake,
    and exits, like any command-line parser (0 and 2)."""
    chosen = sections(config)
    return read_sections(
        tyro.cli(
            tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)(chosen),
            args=list(arguments),
            prog=prog,
            description=about,
        )
    )
