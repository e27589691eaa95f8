# SPDX-License-Identifier: Apache-2.0
"""Train, resume and serve recurrent sequence models (LSTM, GRU) in JAX and Flax."""

from flax_lstm.cells import GRUCell, LSTMCell, SimpleRNNCell
from flax_lstm.config import Config, MeshConfig, TrainConfig, load_config
from flax_lstm.errors import UserError
from flax_lstm.inference import Run, load
from flax_lstm.layers import RNN, Bidirectional, Stack
from flax_lstm.loop import fit
from flax_lstm.models import RecurrentModel, SequenceModel
from flax_lstm.recurrence import backends
from flax_lstm.segments import SegmentModel
from flax_lstm.signals import Stopped
from flax_lstm.tasks import Classification, Forecasting, LanguageModeling, SequenceRegression

__all__ = [
    "RNN",
    "Bidirectional",
    "Classification",
    "Config",
    "Forecasting",
    "GRUCell",
    "LSTMCell",
    "LanguageModeling",
    "MeshConfig",
    "RecurrentModel",
    "Run",
    "SegmentModel",
    "SequenceModel",
    "SequenceRegression",
    "SimpleRNNCell",
    "Stack",
    "Stopped",
    "TrainConfig",
    "UserError",
    "backends",
    "fit",
    "load",
    "load_config",
]
