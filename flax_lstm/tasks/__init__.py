# SPDX-License-Identifier: Apache-2.0
"""What is learnt: a file a task, with its loss, figures and baselines."""

from typing import TYPE_CHECKING

from flax_lstm.lazy import lazily

if TYPE_CHECKING:
    from flax_lstm.tasks.base import Baseline, Monitor, Task, weighted
    from flax_lstm.tasks.classification import Classification
    from flax_lstm.tasks.forecasting import Forecasting
    from flax_lstm.tasks.language import LanguageModeling
    from flax_lstm.tasks.regression import SequenceRegression
    from flax_lstm.tasks.tagging import Tagging

__all__ = [
    "Baseline",
    "Classification",
    "Forecasting",
    "LanguageModeling",
    "Monitor",
    "SequenceRegression",
    "Tagging",
    "Task",
    "weighted",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "base": ("Baseline", "Monitor", "Task", "weighted"),
        "classification": ("Classification",),
        "forecasting": ("Forecasting",),
        "language": ("LanguageModeling",),
        "regression": ("SequenceRegression",),
        "tagging": ("Tagging",),
    },
)
