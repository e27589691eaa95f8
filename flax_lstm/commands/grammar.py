# SPDX-License-Identifier: Apache-2.0
"""One grammar for all commands: flags from dataclasses, by tyro, each with the comment behind its
field as help."""

import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from flax_lstm.config import Config, load_config, read_sections, sections
from flax_lstm.errors import UserError, nearest, require

Options = TypeVar("Options")

# The folder of a run, the first word after a command's name.
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Folders = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="DIR", help_behavior_hint="(one or more)"),
]

# What other tools call some fields.
USUAL = {
    "lr": "train.learning-rate",
    "epochs": "train.steps",
    "num-epochs": "train.steps",
    "max-steps": "train.steps",
    "bs": "train.batch-size",
    "hidden": "model.hidden-size",
    "units": "model.hidden-size",
    "layers": "model.num-layers",
    "output-dir": "workdir",
    "out-dir": "workdir",
    "seq-len": "data.lookback",
    "window": "data.lookback",
    "dataset": "config",
    "file": "data.path",
}


LONGEST = 1024  # letters of a setting: what is longer is no path, and fills the screen


def named(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """The folders, of which there has to be one."""
    require(len(folders) > 0, "name the folder of a run: DIR")
    return folders


def parse(kind: type[Options], arguments: Sequence[str], prog: str, about: str) -> Options:
    """The options of a command. Prints help or the mistake, and exits with 0 or 2."""
    return tyro.cli(
        tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(kind),
        args=list(arguments),
        prog=prog,
        description=wrapped(about),
    )


def wrapped(about: str) -> str:
    """The paragraphs in lines that fit a terminal of 80 columns. tyro joins lines, but for those
    that begin with no letter."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in about.split("\n\n")]
    return "\n\n".join(textwrap.fill(text, 79, subsequent_indent="  ") for text in paragraphs)


def parse_with_config(
    kind: type[Options], arguments: Sequence[str], prog: str, about: str
) -> tuple[Options, Config]:
    """The options of a command that has a field `config`, and that config with the fields that
    other flags override."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=vars(kind)["config"])
    chosen = sections(load_config(first.parse_known_args(arguments)[0].config))
    check_flags(arguments, kind, chosen)
    flat, convert = tyro.conf.arg(name=""), tyro.conf.FlagConversionOff
    options: Any = Annotated[kind, flat, tyro.conf.FlagCreatePairsOff]
    settings: Any = Annotated[chosen, flat, convert]
    whole = make_dataclass("Arguments", [("options", options), ("settings", settings)])
    parsed: Any = tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(whole),
        args=list(arguments),
        prog=prog,
        description=wrapped(about),
    )
    return parsed.options, read_sections(parsed.settings)


def check_flags(arguments: Sequence[str], *kinds: type) -> None:
    """Raises UserError for a flag that is called otherwise here, with its name."""
    longest = max(map(len, arguments), default=0)
    require(longest <= LONGEST, f"an argument of {longest:,} letters; {LONGEST:,} are the most")
    known = [name for kind in kinds for name in flag_names(kind)]
    for argument in arguments:
        name = argument[2:].split("=")[0].replace("_", "-")
        if not argument.startswith("--") or name in known or name == "help":
            continue
        same = [flag for flag in known if flag.split(".")[-1] == name]
        meant = [flag for flag in (USUAL.get(name), *same) if flag in known]
        if meant:
            steps = " (in steps, not epochs)" if "epochs" in name else ""
            raise UserError(f"--{name} is called --{meant[0]} here{steps}; --help lists all flags")
        if not known or "." not in name:
            continue
        section = name.split(".")[0]
        there = [flag for flag in known if flag.startswith(f"{section}.")]
        hint = (
            nearest(f"--{name}", [f"--{flag}" for flag in known])
            or f" Flags of {section}: {', '.join(there) or 'none'}."
        )
        raise UserError(f"--{name}: this config has no such flag.{hint} --help lists all flags")


def flag_names(kind: Any, prefix: str = "") -> list[str]:
    """`workdir`, `train.learning-rate` and so on."""
    names = []
    for f in fields(kind):
        name = prefix + f.name.replace("_", "-")
        inner = f.type if is_dataclass(f.type) else None
        names += flag_names(inner, f"{name}.") if inner else [name]
    return names
