# SPDX-License-Identifier: Apache-2.0
"""The step-by-step forecaster: a distribution of the next value from all before, and sample paths
of the whole horizon by drawing one value after the other.

Axes: B batch, T time, N horizon, C target channels, R rows (one channel of one example each), F
features of a step, H hidden units, P parameters of the distribution, S sample paths, K covariates,
L steps kept of a path.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.data.base import SeriesForm, Windows
from flax_lstm.errors import UserError, require, within
from flax_lstm.machine.sharding import named
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.likelihoods import Paths, StudentT, placed
from flax_lstm.nn.models import DTYPES, WIDEST, DTypeName, check_rate
from flax_lstm.nn.recurrence import BackendName
from flax_lstm.nn.segments import WindowName, window_level
from flax_lstm.nn.variants import BY_NAME, CellName

Array = jax.Array


class StepForecaster(nn.Module):
    """DeepAR (Salinas et al. 2020) with forecasts relative to the value a season before.

    Every channel of an example is read by one network, normalised within its window. At each step
    it sees the last value and the one a season before the next, both relative to values a season
    before them (without a season, to the one before), what is known of the next step, and what the
    series is; it gives the parameters of the next value's distribution.

    While training, `targets` are the inputs of the horizon's steps (teacher forcing), so that one
    call of the recurrence reads look-back and horizon; outputs are parameters [B, N, C, P]. Without
    targets `paths` futures are drawn for each row, all side by side, and outputs are `Paths`. What
    is drawn depends on nothing but the model and the batch: the same batch gives the same paths.
    """

    rnn: RNN
    form: SeriesForm
    window: WindowName = "standard"
    paths: int = 100
    dropout: float = 0.0

    forced: ClassVar[bool] = True  # is trained with the targets as its own inputs

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        known: Any = None,
        *,
        targets: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        form, (batch, steps, width) = self.form, x_BTD.shape
        if width > form.channels:
            raise UserError(
                "data.inputs: a model that draws one step after the other needs every input in the "
                "future as well; name columns known in advance (--data.future), or take the "
                "SegmentModel"
            )
        season = form.season if 1 < form.season < steps - 1 else 1
        observed_BTC = jnp.ones_like(x_BTD)
        if known is not None and known.observed is not None:
            observed_BTC = known.observed
        location_B1C, scale_B1C = window_level(self.window, x_BTD, observed_BTC, season)
        z_BTC = (x_BTD - location_B1C) / scale_B1C
        extra_BCSF = self._known(known, observed_BTC, batch, steps)

        extra_RSF = extra_BCSF.reshape(-1, *extra_BCSF.shape[2:])
        head = self._head()
        if targets is None:
            z_RSN = self._draw(rows_of(z_BTC), extra_RSF, season, head)
            z_BCSN = z_RSN.reshape(batch, form.channels, self.paths, form.horizon)
            z_BNCS = z_BCSN.transpose(0, 3, 1, 2)
            return None, Paths(z_BNCS * scale_B1C[..., None] + location_B1C[..., None])
        z_RS = rows_of(jnp.concatenate([z_BTC, (targets - location_B1C) / scale_B1C], axis=1))
        x_RSF = jnp.concatenate([step_features(z_RS, season), extra_RSF[:, season + 1 :]], axis=-1)
        state, y_RSH = self.rnn(x_RSF, None, None, deterministic=deterministic)
        dropout = nn.Dropout(self.dropout)
        y_RNH = dropout(y_RSH[:, -form.horizon :], deterministic=deterministic)
        y_BCNP = head(y_RNH.reshape(-1, y_RNH.shape[-1])).reshape(
            batch, form.channels, form.horizon, form.outputs
        )
        level_RN = z_RS[:, -form.horizon - season : -season]
        level_BNC = level_RN.reshape(batch, form.channels, -1).swapaxes(1, 2)
        return state, placed(y_BCNP.swapaxes(1, 2), level_BNC, location_B1C, scale_B1C, form)

    def _head(self) -> Callable[[Array], Array]:
        """From outputs of the recurrence to parameters; also within a scan, where Flax makes no
        layers."""
        weights = named(nn.initializers.glorot_uniform(), "hidden", None)
        size = (self.rnn.cell.features, self.form.outputs)
        kernel_HP = self.param("head", weights, size, jnp.float32)
        bias_1P = self.param("bias", nn.initializers.zeros, (1, self.form.outputs), jnp.float32)
        return lambda y_XH: y_XH.astype(jnp.float32) @ kernel_HP + bias_1P

    def _draw(
        self, z_RT: Array, extra_RSF: Array, season: int, head: Callable[[Array], Array]
    ) -> Array:
        """[R, S, N]: futures drawn step by step after the look-back, in units of the window."""
        cell, count, steps = self.rnn.cell, self.paths, z_RT.shape[1]
        before_RTF = extra_RSF[:, season + 1 : steps]
        x_RTF = jnp.concatenate([step_features(z_RT, season), before_RTF], axis=-1)
        state, _ = self.rnn(x_RTF, None, None)
        weights = cell.cast(self.rnn.weights(x_RTF.shape[-1]), z_RT)
        one_B1C, extra_RNF = jnp.ones((1, 1, 1)), extra_RSF[:, steps:]

        def many(x: Array) -> Array:
            return jnp.repeat(x, count, axis=0)

        def advance(carry: Any, inputs: Any) -> tuple[Any, Array]:
            state, kept_PL = carry
            extra_RF, key = inputs
            x_PF = jnp.concatenate([features_of(kept_PL), many(extra_RF)], axis=-1)
            state = cell.step(weights, state, cell.project(weights, x_PF))
            y_P11P = head(cell.output(state))[:, None, None]
            level_P11 = kept_PL[:, 1, None, None]
            parameters = placed(y_P11P, level_P11, 0 * one_B1C, one_B1C, self.form)
            z_P = self.form.likelihood.sample(key, parameters)[:, 0, 0]
            return (state, jnp.concatenate([kept_PL[:, 1:], z_P[:, None]], axis=1)), z_P

        keys = jax.random.split(jax.random.key(0), extra_RNF.shape[1])
        begin = (jax.tree.map(many, state), many(z_RT[:, -season - 1 :]))
        _, drawn_NP = jax.lax.scan(advance, begin, (extra_RNF.swapaxes(0, 1), keys))
        return drawn_NP.T.reshape(-1, count, extra_RNF.shape[1])

    def _known(self, known: Any, observed_BTC: Array, batch: int, steps: int) -> Array:
        """[B, C, T + N, F]: what is known of each step besides values, for each channel."""
        form = self.form
        length, channels = steps + form.horizon, form.channels
        shape = (batch, channels, length)
        parts = [jnp.ones((*shape, 1))]
        if channels > 1:
            parts.append(jnp.broadcast_to(jnp.eye(channels)[None, :, None], (*shape, channels)))
        if known is None:
            return jnp.concatenate(parts, axis=-1)
        if known.observed is not None:
            # Whether the value before the step was measured; those of the horizon are drawn.
            seen_BTC = jnp.concatenate([observed_BTC[:, :1], observed_BTC], axis=1)
            seen_BSC = jnp.pad(
                seen_BTC, ((0, 0), (0, form.horizon - 1), (0, 0)), constant_values=1.0
            )
            parts.append(seen_BSC.swapaxes(1, 2)[..., None])
        if known.future is not None:
            covariates = known.future[:, None]
            parts.append(jnp.broadcast_to(covariates, (*shape, covariates.shape[-1])))
        of_series = [] if known.static is None else [known.static]
        of_series += [
            jax.nn.one_hot(known.codes[:, n], size) for n, size in enumerate(form.categories)
        ]
        parts += [
            jnp.broadcast_to(x_BF[:, None, None], (*shape, x_BF.shape[-1])) for x_BF in of_series
        ]
        return jnp.concatenate(parts, axis=-1)


def rows_of(x_BTC: Array) -> Array:
    """[R, T]: every channel by itself."""
    return x_BTC.swapaxes(1, 2).reshape(-1, x_BTC.shape[1])


def features_of(kept_PL: Array) -> Array:
    """[P, 2] from the last season + 1 values: how far the last is from that a season before it, and
    the one a season before the next from the last."""
    last = kept_PL[:, -1]
    return jnp.stack([last - kept_PL[:, 0], kept_PL[:, 1] - last], axis=-1)


def step_features(z_RS: Array, season: int) -> Array:
    """[R, S - season - 1, 2]: `features_of` for every step that has so many before it."""
    before, last = z_RS[:, : -season - 1], z_RS[:, season:-1]
    return jnp.stack([last - before, z_RS[:, 1:-season] - last], axis=-1)


@dataclass(frozen=True)
class StepModel:
    """The step-by-step forecaster: slower than the segment-wise one, for those who want sample
    paths of the whole horizon."""

    reads: ClassVar[type] = Windows

    cell: CellName = "gru"  # the recurrence over steps
    hidden_size: int = 64  # units
    # how a window is normalised before values are seen relative to those a season before: standard
    # (mean and deviation), robust, seasonal (the error of the last season), last or none (as it is)
    window: WindowName = "standard"
    paths: int = 100  # futures drawn of each window
    dropout: float = 0.0  # before the head
    dtype: DTypeName = "float32"  # what is computed in; weights and state stay float32
    backend: BackendName = "auto"  # how the recurrence is run

    def __post_init__(self) -> None:
        within("model.hidden-size", self.hidden_size, 1, WIDEST)
        within("model.paths", self.paths, 2, 10_000)
        check_rate("dropout", self.dropout)

    def forecaster(self, form: SeriesForm) -> StepForecaster:
        """A module that forecasts series of this form."""
        require(
            isinstance(form.likelihood, StudentT),
            "a StepModel draws from a distribution: --task.objective student_t",
        )
        require(
            form.lookback >= 3,
            f"data.lookback {form.lookback}: a StepModel needs at least 3 steps",
        )
        cell = BY_NAME[self.cell](self.hidden_size, dtype=DTYPES[self.dtype])
        rnn = RNN(cell, backend=self.backend)
        return StepForecaster(rnn, form, self.window, self.paths, self.dropout)
