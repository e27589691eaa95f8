# SPDX-License-Identifier: Apache-2.0
"""Train, resume and serve recurrent sequence models (LSTM, GRU) in JAX and Flax.

The names below are imported when they are first used (PEP 562), so that `import flax_lstm` costs
nothing.
"""

from typing import TYPE_CHECKING

from flax_lstm.lazy import lazily

if TYPE_CHECKING:
    from flax_lstm.config import Config, MeshConfig, TrainConfig, load_config
    from flax_lstm.errors import ArgumentError, UserError
    from flax_lstm.inference import Ensemble, Run, load
    from flax_lstm.nn.autoregression import StepModel
    from flax_lstm.nn.cells import GRUCell, LSTMCell, SimpleRNNCell
    from flax_lstm.nn.layers import RNN, Bidirectional, ScannedRNN, Stack
    from flax_lstm.nn.models import (
        LanguageModel,
        RecurrentForecaster,
        RecurrentModel,
        SequenceModel,
        TextModel,
    )
    from flax_lstm.nn.recurrence import backends, portable
    from flax_lstm.nn.segments import SegmentModel
    from flax_lstm.nn.variants import LayerNormGRUCell, LayerNormLSTMCell, ProjectedLSTMCell
    from flax_lstm.tasks.classification import Classification
    from flax_lstm.tasks.forecasting import Forecasting
    from flax_lstm.tasks.language import LanguageModeling
    from flax_lstm.tasks.regression import SequenceRegression
    from flax_lstm.tasks.tagging import Tagging
    from flax_lstm.training.loop import fit
    from flax_lstm.training.signals import Stopped

__all__ = [
    "RNN",
    "ArgumentError",
    "Bidirectional",
    "Classification",
    "Config",
    "Ensemble",
    "Forecasting",
    "GRUCell",
    "LSTMCell",
    "LanguageModel",
    "LanguageModeling",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "MeshConfig",
    "ProjectedLSTMCell",
    "RecurrentForecaster",
    "RecurrentModel",
    "Run",
    "ScannedRNN",
    "SegmentModel",
    "SequenceModel",
    "SequenceRegression",
    "SimpleRNNCell",
    "Stack",
    "StepModel",
    "Stopped",
    "Tagging",
    "TextModel",
    "TrainConfig",
    "UserError",
    "backends",
    "fit",
    "load",
    "load_config",
    "portable",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "config": ("Config", "MeshConfig", "TrainConfig", "load_config"),
        "convert": (),
        "errors": ("ArgumentError", "UserError"),
        "inference": ("Ensemble", "Run", "load"),
        "nn.autoregression": ("StepModel",),
        "nn.cells": ("GRUCell", "LSTMCell", "SimpleRNNCell"),
        "nn.layers": ("RNN", "Bidirectional", "ScannedRNN", "Stack"),
        "nn.models": (
            "LanguageModel",
            "RecurrentForecaster",
            "RecurrentModel",
            "SequenceModel",
            "TextModel",
        ),
        "nn.recurrence": ("backends", "portable"),
        "nn.segments": ("SegmentModel",),
        "nn.variants": ("LayerNormGRUCell", "LayerNormLSTMCell", "ProjectedLSTMCell"),
        "nnx": (),
        "tasks.classification": ("Classification",),
        "tasks.forecasting": ("Forecasting",),
        "tasks.language": ("LanguageModeling",),
        "tasks.regression": ("SequenceRegression",),
        "tasks.tagging": ("Tagging",),
        "training.loop": ("fit",),
        "training.signals": ("Stopped",),
    },
)
