# SPDX-License-Identifier: Apache-2.0
"""Forecasting of time series.

Axes: B batch, T time, N horizon, C target channels, K classes or vocabulary, Q quantiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import linen as nn

from flax_lstm.data.base import Batch, Windows
from flax_lstm.errors import require
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    ForecasterBuilder,
    Forward,
    Monitor,
    Sums,
    Task,
    weighted,
)
from flax_lstm.tasks.metrics import Mean
from flax_lstm.tasks.plots import plot_forecasts

Objective = Literal["mse", "mae", "huber", "quantile"]


@dataclass(frozen=True)
class Forecasting(Task):
    """Future values of every target channel, at every step of the horizon.

    Losses on values scaled by the statistics of the training split. With objective "quantile" the
    module forecasts each of `quantiles` by the pinball loss (Koenker & Bassett 1978); the one
    nearest 0.5 serves as the point forecast.
    """

    objective: Objective = "mse"  # the loss: mse, mae, huber (delta 1), or quantile (pinball)
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)  # forecast where objective is quantile

    monitor: ClassVar[Monitor] = Monitor("loss")
    needs: ClassVar[type | None] = Windows
    builds: ClassVar[type | None] = ForecasterBuilder

    def __post_init__(self) -> None:
        require(
            len(self.quantiles) > 0 and all(0 < q < 1 for q in self.quantiles),
            f"task.quantiles {self.quantiles}: name quantiles between 0 and 1, such as 0.1 0.5 0.9",
        )
        require(
            tuple(sorted(set(self.quantiles))) == self.quantiles,
            f"task.quantiles {self.quantiles}: must be in increasing order, without repeats",
        )

    @property
    def levels(self) -> tuple[float, ...]:
        """The quantiles forecast; none for a point loss."""
        return self.quantiles if self.objective == "quantile" else ()

    @property
    def point(self) -> int:
        """Which of the outputs on the last axis is the point forecast."""
        return int(np.argmin(np.abs(np.subtract(self.levels, 0.5)))) if self.levels else 0

    def build(self, model: ForecasterBuilder, info: Windows) -> nn.Module:
        return model.forecaster(
            info.lookback, info.horizon, len(info.targets), max(len(self.levels), 1)
        )

    def loss(self, outputs: Array, batch: Batch) -> Mean:
        error = batch.targets[..., None] - outputs  # [B, N, C, Q]
        losses: dict[Objective, Callable[[], Array]] = {
            "mse": lambda: jnp.square(error),
            "mae": lambda: jnp.abs(error),
            "huber": lambda: optax.huber_loss(error),
            "quantile": lambda: self._pinball(error),
        }
        return weighted(losses[self.objective](), batch.weights[:, None, None, None])

    def _pinball(self, error: Array) -> Array:
        levels = jnp.asarray(self.quantiles, error.dtype).reshape((1,) * (error.ndim - 1) + (-1,))
        return jnp.maximum(levels * error, (levels - 1) * error)

    def measure(self, outputs: Array, batch: Batch, info: Windows) -> Sums:
        actual, forecast = batch.targets, outputs[..., self.point]
        weights = batch.weights[:, None, None]
        mean = jnp.asarray(info.mean, jnp.float32)[: actual.shape[-1]].reshape(1, 1, -1)
        std = jnp.asarray(info.std, jnp.float32)[: actual.shape[-1]].reshape(1, 1, -1)
        error = forecast - actual
        size = jnp.abs(forecast * std + mean) + jnp.abs(actual * std + mean)
        relative = jnp.where(size > 0, 2 * jnp.abs(error) * std / jnp.where(size > 0, size, 1), 0)
        values = {"mse": jnp.square(error), "mae": jnp.abs(error), "smape": relative}
        count = jnp.sum(batch.weights) * actual.shape[1]
        sums = {
            name: Mean(jnp.sum(value * weights, axis=(0, 1)), count)
            for name, value in values.items()
        }
        if self.levels:
            pinball = self._pinball(actual[..., None] - outputs)
            sums["crps"] = weighted(2 * pinball, batch.weights[:, None, None, None])
        return {**sums, "loss": self.loss(outputs, batch)}

    def figures(self, sums: Sums, info: Windows) -> dict[str, float]:
        """Scaled: loss, mse, mae, and crps where there are quantiles (twice the mean pinball loss,
        an approximation by
        these quantiles: Gneiting & Raftery 2007). In the units of the data: mse_original,
        mae_original; smape in per cent; mase: the error over that of the seasonal naive within the
        training split (Hyndman & Koehler 2006)."""
        mse, mae = sums["mse"].value, sums["mae"].value  # [C]
        std = np.asarray(info.std, np.float64)[: len(mse)]
        figures = {
            "loss": sums["loss"].value,
            "mse": mse.mean(),
            "mae": mae.mean(),
            "mse_original": (mse * std**2).mean(),
            "mae_original": (mae * std).mean(),
            "smape": 100 * sums["smape"].value.mean(),
            "mase": (mae / np.asarray(info.naive_scale, np.float64)).mean(),
        }
        if "crps" in sums:
            figures["crps"] = sums["crps"].value
        return {name: float(value) for name, value in figures.items()}

    def baselines(self, info: Windows) -> dict[str, Baseline]:
        channels, horizon, season = len(info.targets), info.horizon, info.season
        per_value = max(len(self.levels), 1)

        def repeat(values: Array) -> Array:
            return jnp.repeat(values[..., None], per_value, axis=-1)

        def last_value(batch: Batch) -> Array:
            return repeat(jnp.repeat(batch.inputs[:, -1:, :channels], horizon, axis=1))

        def seasonal_naive(batch: Batch) -> Array:
            steps = batch.inputs.shape[1] - season + np.arange(horizon) % season
            return repeat(batch.inputs[:, steps, :channels])

        rules: dict[str, Baseline] = {"last_value": last_value}
        return {**rules, "seasonal_naive": seasonal_naive} if 1 < season <= info.lookback else rules

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """Long rows `time, channel, horizon, forecast` for the steps after the table's last row,
        and a column `q0.1` and so on for each quantile."""
        batch, times = info.window(table)
        outputs = forward(batch)[0].astype(np.float64)  # [N, C, Q]
        channels = len(info.targets)
        values = info.unscale(outputs.swapaxes(-1, -2)).swapaxes(-1, -2)
        steps = np.arange(1, info.horizon + 1)
        columns = {
            "time": np.repeat(np.asarray(times), channels),
            "channel": np.tile(np.asarray(info.targets, object), info.horizon),
            "horizon": np.repeat(steps, channels),
            "forecast": values[..., self.point].ravel(),
        }
        return pd.DataFrame(
            {**columns, **{f"q{q}": values[..., n].ravel() for n, q in enumerate(self.levels)}}
        )

    def illustrate(self, dataset: Any, forward: Forward, folder: Path) -> None:
        """`forecasts.png`: forecasts against truth at the end of the test split."""
        info = dataset.info
        windows, horizon = dataset.size("test"), info.horizon
        shown = min(
            windows, max(4 * horizon, 120)
        )  # the last steps; each horizon is forecast from where the last ended
        starts = list(range(windows - 1, windows - shown - 1, -horizon))[::-1]
        batch = dataset.batch("test", np.arange(windows - shown, windows))
        forecasts = np.asarray(forward(batch), np.float64)
        truth = info.unscale(np.concatenate([batch.targets[:, 0], batch.targets[-1, 1:]]))
        times = dataset.times("test")[windows - shown :]
        plot_forecasts(
            np.concatenate([times[:, 0], times[-1, 1:]]),
            [start - windows + shown for start in starts],
            truth,
            [
                info.unscale(forecasts[start - windows + shown].swapaxes(-1, -2)).swapaxes(-1, -2)
                for start in starts
            ],
            info.targets,
            folder / "forecasts.png",
            self.levels,
            self.point,
        )
