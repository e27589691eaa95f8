# SPDX-License-Identifier: Apache-2.0
"""Data sets in memory and in files. Nothing in this folder imports JAX or Flax.

The names below are imported when they are first used (PEP 562).
"""

from typing import TYPE_CHECKING

from flax_lstm.lazy import lazily

if TYPE_CHECKING:
    from flax_lstm.data.base import Batch, Data
    from flax_lstm.data.imdb import Imdb
    from flax_lstm.data.language import ImdbLanguage, LanguageTable
    from flax_lstm.data.panel import PanelTable
    from flax_lstm.data.rotten_tomatoes import RottenTomatoes
    from flax_lstm.data.sequences import Sequences
    from flax_lstm.data.series import SeriesTable
    from flax_lstm.data.synthetic import AddingProblem
    from flax_lstm.data.text import TagTable, TextTable

__all__ = [
    "AddingProblem",
    "Batch",
    "Data",
    "Imdb",
    "ImdbLanguage",
    "LanguageTable",
    "PanelTable",
    "RottenTomatoes",
    "Sequences",
    "SeriesTable",
    "TagTable",
    "TextTable",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "base": ("Batch", "Data"),
        "imdb": ("Imdb",),
        "language": ("ImdbLanguage", "LanguageTable"),
        "panel": ("PanelTable",),
        "rotten_tomatoes": ("RottenTomatoes",),
        "sequences": ("Sequences",),
        "series": ("SeriesTable",),
        "synthetic": ("AddingProblem",),
        "text": ("TagTable", "TextTable"),
    },
)
