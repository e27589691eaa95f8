# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    homes: for each of its modules, the names that the package gives as its own. The modules
    themselves are names of it too.
    """
    module_of = {name: module for module, names in homes.items() for name in names}

    def getattribute(name: str) -> Any:
        if name in homes:
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return getattribute, lambda: sorted(module_of)
