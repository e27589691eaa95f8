# SPDX-License-Identifier: Apache-2.0
"""The segment-wise recurrent forecaster of SegRNN with a learned cycle, and its settings for the
`model` section of a config.

Axes: B batch, T time, D input features, H hidden units, N horizon, C target channels, Q outputs per
forecast value, M segments of S steps, W steps of a season, K seasons, R rows of the recurrence: one
channel of one example each.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.linear import default_embed_init

from flax_lstm.data.base import SeriesForm, Windows
from flax_lstm.errors import require, within
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.likelihoods import placed
from flax_lstm.nn.models import DTYPES, GLOROT, WIDEST, DTypeName, dense
from flax_lstm.nn.recurrence import BackendName
from flax_lstm.nn.variants import BY_NAME, CellName

Array = jax.Array
WindowName = Literal["last", "standard", "robust", "seasonal", "none"]
SMALLEST = 1e-4  # scale of a window, in units of the data as the model sees them


def window_level(
    kind: WindowName, x_BTC: Array, observed_BTC: Array, season: int = 1
) -> tuple[Array, Array]:
    """Location and scale [B, 1, C] by which a window is normalised, from its observed values alone:
    mean and standard deviation; median and mean absolute deviation from it; 0 and the error of the
    seasonal naive within the window; 0 and 1 for the other kinds. A constant window has a scale of
    `SMALLEST`; one of which too little was observed to tell, 1."""
    zero_B1C = jnp.zeros_like(x_BTC[:, :1])
    if kind in ("last", "none"):
        return zero_B1C, zero_B1C + 1
    count_B1C = jnp.maximum(observed_BTC.sum(axis=1, keepdims=True), 1)
    if kind == "seasonal":
        both_BTC = observed_BTC[:, season:] * observed_BTC[:, :-season]
        change_BTC = jnp.abs(x_BTC[:, season:] - x_BTC[:, :-season]) * both_BTC
        pairs_B1C = both_BTC.sum(axis=1, keepdims=True)
        count_B1C = jnp.maximum(pairs_B1C, 1)
        scale_B1C = change_BTC.sum(axis=1, keepdims=True) / count_B1C + SMALLEST
        return zero_B1C, jnp.where(pairs_B1C > 0, scale_B1C, 1)
    if kind == "standard":
        location_B1C = (x_BTC * observed_BTC).sum(axis=1, keepdims=True) / count_B1C
        square_BTC = jnp.square(x_BTC - location_B1C) * observed_BTC
        scale_B1C = jnp.sqrt(square_BTC.sum(axis=1, keepdims=True) / count_B1C + SMALLEST**2)
        return location_B1C, jnp.where(count_B1C > 1, scale_B1C, 1)
    location_B1C = _median(x_BTC, observed_BTC, count_B1C)
    distance_BTC = jnp.abs(x_BTC - location_B1C) * observed_BTC
    scale_B1C = distance_BTC.sum(axis=1, keepdims=True) / count_B1C + SMALLEST
    return location_B1C, jnp.where(count_B1C > 1, scale_B1C, 1)


def _median(x_BTC: Array, observed_BTC: Array, count_B1C: Array) -> Array:
    """[B, 1, C]: the median of what was observed; 0 where nothing was."""
    x_BTC = jnp.where(observed_BTC > 0, x_BTC, jnp.inf)
    sorted_BTC, count = jnp.sort(x_BTC, axis=1), count_B1C.astype(jnp.int32)
    low, high = (
        jnp.take_along_axis(sorted_BTC, places, axis=1) for places in ((count - 1) // 2, count // 2)
    )
    return jnp.nan_to_num((low + high) / 2, posinf=0.0)


def level_shape(profile_BWC: Array) -> Array:
    """A season in units of its own deviation."""
    centred_BWC = profile_BWC - profile_BWC.mean(axis=1, keepdims=True)
    spread_B1C = jnp.sqrt(jnp.square(centred_BWC).mean(axis=1, keepdims=True) + SMALLEST**2)
    return centred_BWC / spread_B1C


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: Array, count: int) -> Array:
    """[...] -> [count, ...], the same everywhere. The gradients are added up by a matmul, for XLA
    adds up slowly over the first axis on CPUs."""
    return jnp.broadcast_to(x[None], (count, *x.shape))


def _spread(x: Array, count: int) -> tuple[Array, None]:
    return spread(x, count), None


def _gather(count: int, _: None, gradient: Array) -> tuple[Array]:
    flat = jnp.ones(count, gradient.dtype) @ gradient.reshape(count, -1)
    return (flat.reshape(gradient.shape[1:]),)


spread.defvjp(_spread, _gather)


def unknown_says_nothing(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Embeddings as Flax begins them, but 0 for code 0: a category that training never had."""
    return default_embed_init(key, shape, dtype).at[0].set(0)


class SegmentForecaster(nn.Module):
    """The segment-wise recurrent forecaster of SegRNN (Lin et al. 2023), channels read
    independently by one network, with the learned cycle of CycleNet (Lin et al. 2024).

    Each channel is normalised within its window (`window`); a learned vector of one value for each
    step of a season is subtracted from the look-back and added to the forecast (`cycle` steps; 0:
    none); what remains, relative to its last value (not for the window "none"), is cut into
    segments of S steps, each embedded; the recurrence runs over the M segments instead of the T
    steps. From its final state all future segments are decoded at once, each by one step of the
    same cell whose input tells the segment's position and the channel. A look-back that is no
    multiple of S loses its oldest steps; a horizon that is none is decoded to the next multiple and
    cut. With `highway` a linear forecast from the whole look-back, one for all channels, is added
    to what is decoded (the autoregressive part of LSTNet, Lai et al. 2018); with `highway_sparse`
    by one rule for all steps of a season, from the same step of the seasons before (SparseTSF, Lin
    et al. 2024). With `highway_seen` the queries see the whole look-back besides the state. What
    else is known (see `flax_lstm.data.base.Known`) is embedded per segment and added.
    Outputs [B, N, C, Q].
    """

    rnn: RNN
    width: int
    segment: int
    form: SeriesForm
    window: WindowName = "last"
    cycle: int = 0
    highway: bool = False
    highway_sparse: bool = False
    highway_seen: bool = True
    apart: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        known: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        form = self.form
        horizon, channels, width = form.horizon, form.channels, self.width
        batch, steps, _ = x_BTD.shape
        past, future = steps // self.segment, math.ceil(horizon / self.segment)

        x_BTC = x_BTD[:, :, :channels]
        observed_BTC = jnp.ones_like(x_BTC)
        if known is not None and known.observed is not None:
            observed_BTC = known.observed
        location_B1C, scale_B1C = window_level(self.window, x_BTC, observed_BTC, form.season)
        x_BTC = (x_BTC - location_B1C) / scale_B1C
        x_BTC, cycle_BNC = self._cycled(x_BTC, known)
        past_BTC, level_BNC = self._level(x_BTC)
        relative_BTC = x_BTC - past_BTC
        embedded = self._segments(relative_BTC, "embed")
        if known is not None and known.observed is not None:
            embedded += self._segments(known.observed, "observed")
        x_RMH = nn.relu(embedded)

        query_BCMH = self._queries(future)
        if self.window == "seasonal":
            shape_BCW = level_shape(x_BTC[:, -form.season :]).swapaxes(1, 2)
            shape_BCH = dense(width, dtype=self.dtype, name="profile")(shape_BCW)
            x_RMH = x_RMH + shape_BCH.reshape(-1, 1, width)
            query_BCMH = query_BCMH + shape_BCH[:, :, None]
        if known is not None:
            past_BCMH, future_BCMH = self._known(x_BTD[:, :, channels:], known, past, future)
            x_RMH = x_RMH + jnp.broadcast_to(past_BCMH, (batch, channels, past, width)).reshape(
                x_RMH.shape
            )
            query_BCMH = query_BCMH + future_BCMH

        level_BNC = level_BNC + cycle_BNC
        if self.highway:
            level_BNC = level_BNC + self._highway(x_BTC, relative_BTC)
            if self.highway_seen:
                x_BCT = relative_BTC.swapaxes(1, 2)
                seen_BCH = dense(width, dtype=self.dtype, name="look_back")(x_BCT)
                query_BCMH = query_BCMH + seen_BCH[:, :, None]

        state, _ = self.rnn(x_RMH, None, state, deterministic=deterministic)
        y_RMH = nn.Dropout(self.dropout)(
            self._decode(state, query_BCMH), deterministic=deterministic
        )
        size = self.segment * form.outputs
        # With a highway the forecast begins as what it is relative to, and training moves it away.
        initial = nn.initializers.zeros if self.highway else GLOROT
        head = dense(size, "hidden", None, initial, dtype=self.dtype, name="head")
        y_BCNQ = head(y_RMH).astype(jnp.float32).reshape(batch, channels, -1, form.outputs)
        y_BNCQ = y_BCNQ[:, :, :horizon].swapaxes(1, 2)
        return state, placed(y_BNCQ, level_BNC, location_B1C, scale_B1C, form)

    def _cycled(self, x_BTC: Array, known: Any) -> tuple[Array, Array]:
        """The look-back without the learned cycle, and the cycle [B, N, C] over the horizon."""
        batch, steps, channels = x_BTC.shape
        horizon = self.form.horizon
        if not self.cycle:
            return x_BTC, jnp.zeros((batch, horizon, channels), x_BTC.dtype)
        shape = (self.cycle, channels)
        cycle_WC = self.param("cycle", nn.initializers.zeros, shape, jnp.float32)
        phase_BS = known.phase[:, None] + jnp.arange(steps + horizon)[None]
        cycle_BSC = cycle_WC[phase_BS % self.cycle]
        return x_BTC - cycle_BSC[:, :steps], cycle_BSC[:, steps:]

    def _highway(self, x_BTC: Array, relative_BTC: Array) -> Array:
        """The linear forecast [B, N, C], 0 at first."""
        x_BCT = relative_BTC.swapaxes(1, 2)
        horizon, season = self.form.horizon, self.form.season
        if self.window == "seasonal":
            # Relative to itself the last season is nothing; relative to its last value it can be
            # undone, where the last value is the better forecast.
            last_BSC = x_BTC[:, -season:] - x_BTC[:, -1:]
            x_BCT = jnp.concatenate([x_BCT[..., :-season], last_BSC.swapaxes(1, 2)], axis=-1)
        linear = partial(
            nn.Dense, kernel_init=nn.initializers.zeros, use_bias=False, name="highway"
        )
        if not self.highway_sparse:
            return linear(horizon)(x_BCT).swapaxes(1, 2)
        x_BCT = x_BCT[..., x_BCT.shape[-1] % season :]
        x_BCWK = x_BCT.reshape(*x_BCT.shape[:2], -1, season).swapaxes(2, 3)
        y_BCWK = linear(math.ceil(horizon / season))(x_BCWK)
        y_BCN = y_BCWK.swapaxes(2, 3).reshape(*x_BCT.shape[:2], -1)[..., :horizon]
        return y_BCN.swapaxes(1, 2)

    def _decode(self, state: Any, query_BCMH: Array) -> Array:
        """[R, M, H]: one step of the cell from the final state for every segment of the horizon.
        The recurrent matmul is the same for all of them, and is done once; a query that is the same
        for all examples (B = 1) is projected once."""
        cell, (rows, channels, future, width) = self.rnn.cell, query_BCMH.shape
        weights = cell.cast(self.rnn.weights(width), query_BCMH)
        x_BCMGH = cell.project(weights, query_BCMH)
        batch = jax.tree.leaves(state)[0].shape[0] // channels
        x_BCMGH = spread(x_BCMGH[0], batch) if rows == 1 else x_BCMGH
        state = jax.tree.map(lambda s: s[:, None], state)
        state = cell.step(weights, state, x_BCMGH.reshape(-1, future, *x_BCMGH.shape[3:]))
        return cell.output(state).astype(query_BCMH.dtype)

    def _level(self, x_BTC: Array) -> tuple[Array, Array]:
        """What the look-back [B, T or 1, C] and the forecast [B, N or 1, C] are relative to: the
        last value, the last season again and again, or nothing."""
        steps, horizon, season = x_BTC.shape[1], self.form.horizon, self.form.season
        if self.window == "none":
            return jnp.zeros_like(x_BTC[:, :1]), jnp.zeros_like(x_BTC[:, :1])
        if self.window != "seasonal":
            return x_BTC[:, -1:], x_BTC[:, -1:]
        profile_BWC = x_BTC[:, -season:]
        places = np.arange(-steps, horizon) % season
        return profile_BWC[:, places[:steps]], profile_BWC[:, places[steps:]]

    def _segments(self, x_BTC: Array, name: str) -> Array:
        """[R, M, H]: each channel's segments, embedded."""
        batch, steps, channels = x_BTC.shape
        past = steps // self.segment
        x_BCT = x_BTC[:, steps - past * self.segment :].swapaxes(1, 2)
        x_RMS = x_BCT.reshape(batch * channels, past, self.segment)
        return dense(self.width, dtype=self.dtype, name=name)(x_RMS)

    def _queries(self, future: int) -> Array:
        """[1, C, M, H]: which segment of the horizon and, if `apart`, which channel is asked
        for."""
        half, channels = self.width // 2, self.form.channels
        normal = nn.initializers.normal(1.0)
        if not self.apart:
            position_MH = self.param("position", normal, (future, self.width))
            return jnp.broadcast_to(position_MH, (1, channels, *position_MH.shape))
        position_MH = self.param("position", normal, (future, half))
        channel_CH = self.param("channel", normal, (channels, self.width - half))
        query_CMH = jnp.concatenate(
            [
                jnp.broadcast_to(position_MH, (channels, *position_MH.shape)),
                jnp.broadcast_to(channel_CH[:, None], (channels, future, channel_CH.shape[1])),
            ],
            axis=-1,
        )
        return query_CMH[None]

    def _known(self, inputs_BTI: Array, known: Any, past: int, future: int) -> tuple[Array, Array]:
        """[B, 1, M, H] (or [1, 1, M, H] where it is the same for all examples) for the segments of
        the look-back and of the horizon: embeddings of what is known of both (calendar,
        covariates), of further inputs of the past, and of the series."""
        batch, steps, _ = inputs_BTI.shape
        begin, width = steps - past * self.segment, self.width
        both = jnp.zeros((1, 1, past + future, width), self.dtype)
        if known.future is not None:
            # Beyond a horizon that is cut, nothing is known.
            short = steps + future * self.segment - known.future.shape[1]
            padded = jnp.pad(known.future, ((0, 0), (0, short), (0, 0)))[:, begin:]
            segments = padded.reshape(batch, 1, past + future, -1)
            both = dense(width, dtype=self.dtype, name="covariates")(segments)
        if known.static is not None:
            static_BH = dense(width, dtype=self.dtype, name="static")(known.static)
            both = both + static_BH[:, None, None]
        for n, size in enumerate(self.form.categories):
            embed = nn.Embed(
                size,
                width,
                dtype=self.dtype,
                embedding_init=unknown_says_nothing,
                name=f"category_{n}",
            )
            both = both + embed(known.codes[:, n])[:, None, None]
        before, after = both[:, :, :past], both[:, :, past:]
        if inputs_BTI.shape[2]:
            segments = inputs_BTI[:, begin:].reshape(batch, 1, past, -1)
            before = before + dense(width, dtype=self.dtype, name="inputs")(segments)
        return before, after


@dataclass(frozen=True)
class SegmentModel:
    """The segment-wise forecaster of SegRNN with a learned cycle: long look-backs and horizons in
    few recurrent steps."""

    reads: ClassVar[type] = Windows

    cell: CellName = "gru"  # the recurrence over segments
    hidden_size: int = 512  # units, and the size of a segment's embedding
    segment: int = 0  # steps of a segment; 0: from season and look-back
    # how a window is normalised: last (value subtracted), standard (also by mean and deviation),
    # robust (median and mean absolute deviation), seasonal (the last season subtracted, the error
    # of doing so the scale), none
    window: WindowName = "last"
    cycle: bool = False  # learn the shape of a season, subtracted before and added after
    # add a linear forecast from the whole look-back, which the recurrence has to correct only
    highway: bool = False
    # the highway has one rule for all steps of a season: from the same step of the seasons before
    highway_sparse: bool = False
    highway_seen: bool = True  # with a highway the decoder sees the look-back besides the state
    apart: bool = True  # tell the decoder which channel it forecasts; False: one rule for all
    dropout: float = 0.5  # before the head
    dtype: DTypeName = "float32"  # what is computed in; weights and state stay float32
    backend: BackendName = "auto"  # how the recurrence is run

    def __post_init__(self) -> None:
        within("model.hidden-size", self.hidden_size, 2, WIDEST)
        within("model.segment", self.segment, 0)
        require(
            self.highway or not self.highway_sparse,
            "model.highway-sparse True says of which kind a highway is, and there is none: add "
            "--model.highway True, or take --model.highway-sparse False",
        )
        require(
            0 <= self.dropout < 1, f"model.dropout {self.dropout}: must be at least 0 and below 1"
        )

    def steps(self, form: SeriesForm) -> int:
        """Steps of a segment: as set, else a season of at most 48 steps or else 24, but never more
        than a third of the look-back."""
        if self.segment:
            return self.segment
        natural = form.season if 1 < form.season <= 48 else 24
        return min(natural, max(form.lookback // 3, 1))

    def forecaster(self, form: SeriesForm) -> SegmentForecaster:
        """A module that forecasts series of this form."""
        segment = self.steps(form)
        require(
            form.lookback >= segment,
            f"model.segment {segment} is longer than data.lookback {form.lookback}; choose a "
            "shorter segment",
        )
        require(
            self.window != "seasonal" or form.season <= form.lookback // 2,
            f"model.window seasonal needs a look-back of two seasons: data.season {form.season}, "
            f"data.lookback {form.lookback}; take a longer look-back, --data.season 1 (relative to "
            "the last value), or --model.window last",
        )
        require(
            not self.highway_sparse or form.season <= form.lookback,
            f"model.highway-sparse needs a look-back of a season: data.season {form.season}, "
            f"data.lookback {form.lookback}; take a longer look-back, or leave it False",
        )
        dtype = DTYPES[self.dtype]
        return SegmentForecaster(
            RNN(BY_NAME[self.cell](self.hidden_size, dtype=dtype), backend=self.backend),
            self.hidden_size,
            segment,
            form,
            self.window,
            form.season if self.cycle and form.season > 1 else 0,
            self.highway,
            self.highway_sparse,
            self.highway_seen,
            self.apart,
            self.dropout,
            dtype,
        )
