# SPDX-License-Identifier: Apache-2.0
"""Whether the data, the task and the model of a config go together.

A task names what it needs of the data (`needs`) and of the model (`builds`), a model what it reads
(`reads`), and data the class of their `info` (`gives`). What is needed is a protocol: whatever has
its attributes and methods will do. Classes that name nothing are taken at their word.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import flax_lstm
import flax_lstm.data
from flax_lstm.config import Config
from flax_lstm.errors import UserError, listing, require


def check_parts(config: Config, info: object = None) -> None:
    """Raises UserError for a task and a model, a task and data, or a model and data that do not go
    together.

    info: of the data, once they are read; None: what their class promises.
    """
    task, data, model = type(config.task), type(config.data), type(config.model)
    builds = getattr(task, "builds", None)
    if builds is not None and not offers(model, builds):
        known = [kind.__name__ for kind in shipped(flax_lstm, "reads") if offers(kind, builds)]
        raise UserError(
            f"task {task.__name__} needs a model that builds {noun(builds)}; {model.__name__} does "
            f"not. Models that do: {listing(known)}"
        )
    require(
        bool(getattr(config.task, "virtual", 0))
        or not getattr(config.data, "has_unlabelled", False),
        "data.unlabelled: texts without labels are learnt from by --task.virtual alone: give it a "
        "norm, such as 5",
    )
    found = info if info is not None else getattr(data, "gives", None)
    for kind, part, needs in (
        ("task", task, getattr(task, "needs", None)),
        ("model", model, getattr(model, "reads", None)),
    ):
        if needs is not None and found is not None and not offers(found, needs):
            known = [d.__name__ for d in shipped(flax_lstm.data, "gives") if offers(d.gives, needs)]
            raise UserError(
                f"{kind} {part.__name__} needs data with {noun(needs)}; {data.__name__} has none. "
                f"Data with {noun(needs)}: {listing(known)}"
            )


def offers(kind: Any, trait: type) -> bool:
    """Whether instances of a class have the attributes and methods that a protocol asks for; of an
    instance, whether it has them and none is None."""
    if not isinstance(kind, type):
        return all(getattr(kind, name, None) is not None for name in wanted(trait))
    annotated = (vars(base).get("__annotations__", ()) for base in kind.__mro__)
    return wanted(trait) <= {*dir(kind), *(name for names in annotated for name in names)}


def wanted(trait: type) -> set[str]:
    """The names of what a protocol asks for."""
    own = [base for base in trait.__mro__ if getattr(base, "_is_protocol", False)]
    names = {name for base in own for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return {name for name in names if not name.startswith("_")}


def noun(trait: type) -> str:
    """What a protocol stands for: its docstring up to the first colon or full stop."""
    words = (trait.__doc__ or trait.__name__).split(":")[0].split(".")[0]
    return words[0].lower() + words[1:]


def shipped(package: ModuleType, mark: str) -> Iterator[Any]:
    """The classes that a package names, of which each has the attribute `mark`."""
    for name in package.__all__:
        kind = getattr(package, name)
        if isinstance(kind, type) and getattr(kind, mark, None) is not None:
            yield kind
