# SPDX-License-Identifier: Apache-2.0
"""The segment-wise recurrent forecaster of SegRNN, and its settings for the `model` section of a
config.

Axes: B batch, T time, D input features, H hidden units, N horizon, C target channels, Q outputs per
forecast value,
M segments of S steps, R rows of the recurrence: one channel of one example each.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.data.base import Windows
from flax_lstm.errors import require
from flax_lstm.nn.cells import CELLS, CellName
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.models import DTYPES, DTypeName, dense
from flax_lstm.nn.recurrence import BackendName

Array = jax.Array


class SegmentForecaster(nn.Module):
    """The segment-wise recurrent forecaster of SegRNN (Lin et al. 2023), channels read
    independently by one network.

    Each channel, relative to its last value, is cut into segments of S steps, each embedded; the
    recurrence runs over the M segments instead of the T steps. From its final state all future
    segments are decoded at once, each by one step of the same cell whose input tells the segment's
    position and the channel. A look-back that is no multiple of S loses its oldest steps; a horizon
    that is none is decoded to the next multiple and cut. Known covariates, if any, are embedded per
    segment and added to both. Outputs [B, N, C, Q].
    """

    rnn: RNN
    width: int
    segment: int
    horizon: int
    channels: int
    per_value: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        covariates: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        batch, steps, _ = x_BTD.shape
        size, channels, width = self.segment, self.channels, self.width
        past, future = steps // size, math.ceil(self.horizon / size)
        last_BC = x_BTD[:, -1, :channels]
        x_BTC = x_BTD[:, steps - past * size :, :channels] - last_BC[:, None]
        x_RMS = x_BTC.swapaxes(1, 2).reshape(
            batch * channels, past, size
        )  # a row R is one channel of one example
        x_RMH = nn.relu(dense(width, dtype=self.dtype, name="embed")(x_RMS))

        position_MH = self.param("position", nn.initializers.normal(1.0), (future, width // 2))
        channel_CH = self.param(
            "channel", nn.initializers.normal(1.0), (channels, width - width // 2)
        )
        query_CMH = jnp.concatenate(
            [
                jnp.broadcast_to(position_MH, (channels, *position_MH.shape)),
                jnp.broadcast_to(channel_CH[:, None], (channels, future, channel_CH.shape[1])),
            ],
            axis=-1,
        )
        query_BCMH = jnp.broadcast_to(query_CMH, (batch, *query_CMH.shape))
        if covariates is not None:
            begin, end = steps - past * size, steps + future * size
            pad = (
                (0, 0),
                (0, end - covariates.shape[1]),
                (0, 0),
            )  # beyond a horizon that is cut, nothing is known
            known = jnp.pad(covariates, pad)[:, begin:].reshape(batch, 1, past + future, -1)
            known_B1MH = dense(width, dtype=self.dtype, name="covariates")(known)
            past_BCMH = jnp.broadcast_to(known_B1MH[:, :, :past], (batch, channels, past, width))
            x_RMH = x_RMH + past_BCMH.reshape(x_RMH.shape)
            query_BCMH = query_BCMH + known_B1MH[:, :, past:]

        state, _ = self.rnn(x_RMH, None, state, deterministic=deterministic)
        repeated = jax.tree.map(lambda s: jnp.repeat(s, future, axis=0), state)
        _, y_R1H = self.rnn(
            query_BCMH.reshape(-1, 1, width), None, repeated, deterministic=deterministic
        )
        y_RH = nn.Dropout(self.dropout)(y_R1H[:, 0], deterministic=deterministic)
        head = dense(size * self.per_value, "hidden", None, dtype=self.dtype, name="head")
        y = head(y_RH).astype(jnp.float32)
        y_BCNQ = y.reshape(batch, channels, future * size, self.per_value)[:, :, : self.horizon]
        return state, y_BCNQ.swapaxes(1, 2) + last_BC[:, None, :, None]


@dataclass(frozen=True)
class SegmentModel:
    """The segment-wise forecaster of SegRNN: long look-backs and horizons in few recurrent
    steps."""

    reads: ClassVar[type] = Windows

    cell: CellName = "gru"  # the recurrence over segments
    hidden_size: int = 512  # units, and the size of a segment's embedding
    segment: int = 24  # steps of a segment
    dropout: float = 0.5  # before the head
    dtype: DTypeName = "float32"  # what is computed in; weights and state stay float32
    backend: BackendName = "auto"  # how the recurrence is run

    def __post_init__(self) -> None:
        require(self.hidden_size > 1, f"model.hidden-size {self.hidden_size}: must be at least 2")
        require(self.segment > 0, f"model.segment {self.segment}: must be at least 1")
        require(
            0 <= self.dropout < 1, f"model.dropout {self.dropout}: must be at least 0 and below 1"
        )

    def forecaster(
        self, lookback: int, horizon: int, channels: int, per_value: int
    ) -> SegmentForecaster:
        """A module that forecasts `per_value` numbers for each of `horizon` steps of `channels`
        channels."""
        require(
            lookback >= self.segment,
            f"model.segment {self.segment} is longer than data.lookback {lookback}; choose a "
            "shorter segment",
        )
        dtype = DTYPES[self.dtype]
        return SegmentForecaster(
            RNN(CELLS[self.cell](self.hidden_size, dtype=dtype), backend=self.backend),
            self.hidden_size,
            self.segment,
            horizon,
            channels,
            per_value,
            self.dropout,
            dtype,
        )
