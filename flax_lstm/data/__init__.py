# SPDX-License-Identifier: Apache-2.0
"""Data sets in memory and in files. Nothing in this folder imports JAX or Flax.

The names below are imported when they are first used (PEP 562).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_lstm.data.base import Batch, Data
    from flax_lstm.data.imdb import Imdb
    from flax_lstm.data.language import ImdbLanguage, LanguageTable
    from flax_lstm.data.rotten_tomatoes import RottenTomatoes
    from flax_lstm.data.series import SeriesTable
    from flax_lstm.data.synthetic import AddingProblem
    from flax_lstm.data.text import TextTable

# Where each public name lives.
_HOMES = {
    "base": ("Batch", "Data"),
    "imdb": ("Imdb",),
    "language": ("ImdbLanguage", "LanguageTable"),
    "rotten_tomatoes": ("RottenTomatoes",),
    "series": ("SeriesTable",),
    "synthetic": ("AddingProblem",),
    "text": ("TextTable",),
}

__all__ = [
    "AddingProblem",
    "Batch",
    "Data",
    "Imdb",
    "ImdbLanguage",
    "LanguageTable",
    "RottenTomatoes",
    "SeriesTable",
    "TextTable",
]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"flax_lstm.data.{module}"), name)
    raise AttributeError(f"module 'flax_lstm.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
