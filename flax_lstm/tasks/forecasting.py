# SPDX-License-Identifier: Apache-2.0
"""Forecasting of time series.

Axes: B batch, T time, N horizon, C target channels, K classes or vocabulary, Q quantiles.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import linen as nn

from flax_lstm.data.base import Batch, SeriesForm, Windows
from flax_lstm.data.windows import WindowDataset
from flax_lstm.errors import UserError, listing, require, within
from flax_lstm.machine.files import write_atomically
from flax_lstm.nn.likelihoods import (
    Likelihood,
    NegativeBinomial,
    Paths,
    StudentT,
    path_quantiles,
)
from flax_lstm.tasks.base import (
    Array,
    Baseline,
    ForecasterBuilder,
    Forward,
    Monitor,
    Sums,
    Task,
    beside,
    weighted,
)
from flax_lstm.tasks.judging import linear_of
from flax_lstm.tasks.metrics import Mean
from flax_lstm.tasks.plots import plot_forecasts, plot_panel

log = logging.getLogger(__name__)
Objective = Literal["mse", "mae", "huber", "quantile", "student_t", "negative_binomial"]
LIKELIHOODS: dict[str, Likelihood] = {
    "student_t": StudentT(),
    "negative_binomial": NegativeBinomial(),
}


class Levels(NamedTuple):
    """Forecasts at the task's levels, where a module would give parameters."""

    values_BNCQ: Any


@dataclass(frozen=True)
class Forecasting(Task):
    """Future values of every target channel, at every step of the horizon.

    Losses on values scaled by the statistics of the training split. With objective "quantile" the
    module forecasts each of `quantiles` by the pinball loss (Koenker & Bassett 1978); the one
    nearest 0.5 serves as the point forecast. With "student_t" or "negative_binomial" (counts) it
    forecasts a distribution, trained by its likelihood, and the quantiles are those of it.
    """

    # The loss: mse, mae, huber (delta 1), quantile (pinball), or the likelihood of a distribution:
    # student_t, or negative_binomial for counts
    objective: Objective = "mse"
    # Forecast where objective is quantile or a distribution
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    calibrate: bool = True  # widen or narrow the quantiles by what validation shows, at the end
    # By how much the distance of each quantile from the point forecast is stretched; found at the
    # end of training and kept with the run, empty until then
    stretch: tuple[float, ...] = ()

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
        require(
            len(self.stretch) in (0, len(self.quantiles)),
            f"task.stretch {self.stretch}: one factor for each of task.quantiles, or none",
        )
        for factor in self.stretch:
            within("task.stretch", factor, 0)

    @property
    def levels(self) -> tuple[float, ...]:
        """The quantiles forecast; none for a point loss."""
        return self.quantiles if self.objective == "quantile" or self.likelihood else ()

    @property
    def likelihood(self) -> Likelihood | None:
        """What the outputs are the parameters of; None: they are forecasts."""
        return LIKELIHOODS.get(self.objective)

    @property
    def point(self) -> int:
        """Which of the outputs on the last axis is the point forecast."""
        return int(np.argmin(np.abs(np.subtract(self.levels, 0.5)))) if self.levels else 0

    def build(self, model: ForecasterBuilder, info: Windows) -> nn.Module:
        return model.forecaster(
            SeriesForm(
                lookback=info.lookback,
                horizon=info.horizon,
                channels=len(info.targets),
                per_value=max(len(self.levels), 1),
                season=info.season,
                categories=info.categories,
                likelihood=self.likelihood,
            )
        )

    def check(self, dataset: Any) -> None:
        """Raises UserError for targets that are no counts where they have to be, and for settings
        of quantiles where there are none."""
        told = "act with task.objective quantile or a distribution, not with"
        default = type(self)
        require(
            bool(self.levels) or (self.quantiles, self.calibrate) == (default.quantiles, True),
            f"task.quantiles and task.calibrate {told} {self.objective}: leave them as they are "
            f"(--task.quantiles {' '.join(map(str, default.quantiles))}), or choose another "
            "objective",
        )
        if self.objective != "negative_binomial":
            return
        for name, values in zip(dataset.info.targets, dataset.measured().T, strict=True):
            # They were scaled in float32.
            off = np.abs(values - np.round(values)) > 1e-3 + 1e-6 * np.abs(values)
            wrong = values[off | (values < -0.5) | (values > 1e6)]
            require(
                len(wrong) == 0,
                "task.objective negative_binomial is for counts (0, 1, 2, ... to a million); "
                f"column {name!r} holds {wrong[0] if len(wrong) else 0:g}: take student_t or "
                "quantile",
            )

    def ordered(self, outputs: Any, units_BUC: Any = None) -> Array:
        """Forecasts [B, N, C, Q] with quantiles that never cross: sorted, which cannot raise the
        pinball loss (Chernozhukov et al. 2010), and stretched once the task is calibrated."""
        if not self.levels:
            return outputs
        if isinstance(outputs, Levels):
            outputs = outputs.values_BNCQ
        elif isinstance(outputs, Paths):
            outputs = path_quantiles(outputs, self.levels)
        elif self.likelihood is not None:
            outputs = self.likelihood.quantiles(outputs, self.levels, units_BUC)
        outputs = jnp.sort(outputs, axis=-1)
        if not self.stretch:
            return outputs
        point = outputs[..., self.point, None]
        factors = jnp.asarray(self.stretch).reshape((1,) * (outputs.ndim - 1) + (-1,))
        outputs = jnp.sort(point + (outputs - point) * factors, axis=-1)
        return self.likelihood.possible(outputs, units_BUC) if self.likelihood else outputs

    def final(self, outputs: Any, batch: Batch) -> Any:
        values = np.asarray(self.ordered(outputs, batch.units))
        return values if self.likelihood is None else Levels(values)

    def pooled(self, outputs: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *values: np.mean(values, axis=0), *outputs)

    def settle(self, dataset: Any, forward: Forward, folder: Path) -> "Forecasting":
        """The task with its quantiles calibrated on the validation windows, as `settled` will find
        it in the folder; the same task where there is nothing to calibrate.

        Split conformal prediction (Romano et al. 2019) with the distance from the point forecast as
        the scale: the factor of a level is the one by which the distance of its quantile has to be
        stretched for the level's share of the validation targets to lie below.
        """
        if not self.calibrate or len(self.levels) < 2:
            return self
        # Factors are of what the model says, whatever an earlier run had found.
        plain = replace(self, stretch=())
        windows = np.unique(np.linspace(0, dataset.size("validation") - 1, CALIBRATION).astype(int))
        scores: list[np.ndarray] = []
        for windows_B in np.array_split(windows, -(-len(windows) // 256)):
            batch = dataset.batch("validation", windows_B)
            outputs = np.asarray(plain.ordered(forward(batch), batch.units), np.float64)
            point = outputs[..., self.point, None]
            distance = outputs - point
            known = (batch.weights > 0)[..., None] & (np.arange(len(self.levels)) != self.point)
            usable = known & (np.abs(distance) > 1e-9)
            ratio = np.full(outputs.shape, np.nan)
            np.divide(batch.targets[..., None] - point, distance, out=ratio, where=usable)
            scores.append(ratio.reshape(-1, len(self.levels)))
        factors = tuple(
            1.0 if n == self.point else _stretch(ratio, level, n > self.point)
            for n, (ratio, level) in enumerate(
                zip(np.concatenate(scores).T, self.levels, strict=True)
            )
        )
        write_atomically(folder / CALIBRATION_FILE, json.dumps({"stretch": factors}) + "\n")
        return replace(self, stretch=factors)

    def settled(self, folder: Path) -> "Forecasting":
        """The task as a run left it at its end."""
        path = folder / CALIBRATION_FILE
        if not path.exists():
            return self
        try:
            return replace(self, stretch=tuple(json.loads(path.read_text())["stretch"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path}, the calibration of a run: {error}") from None

    def loss(self, outputs: Any, batch: Batch) -> Mean:
        """The mean over what was measured: of the objective; of the pinball loss for sample paths;
        of nothing (NaN) for a rule, where a distribution is asked for."""
        if isinstance(outputs, Levels):
            return Mean(jnp.full((), jnp.nan), jnp.ones(()))
        if self.likelihood is not None and not isinstance(outputs, Paths):
            assert batch.units is not None
            density = self.likelihood.log_density(outputs, batch.targets, batch.units)
            return weighted(-density, counted(batch))
        error = batch.targets[..., None] - self.ordered(outputs, batch.units)  # [B, N, C, Q]
        losses: dict[Objective, Callable[[], Array]] = {
            "mse": lambda: jnp.square(error),
            "mae": lambda: jnp.abs(error),
            "huber": lambda: optax.huber_loss(error),
        }
        value = losses.get(self.objective, lambda: self._pinball(error))()
        return weighted(value, counted(batch)[..., None])

    def _pinball(self, error: Array) -> Array:
        levels = jnp.asarray(self.quantiles, error.dtype).reshape((1,) * (error.ndim - 1) + (-1,))
        return jnp.maximum(levels * error, (levels - 1) * error)

    def measure(self, outputs: Any, batch: Batch, info: Windows) -> Sums:
        loss = self.loss(outputs, batch)
        outputs = self.ordered(outputs, batch.units)
        actual, forecast = batch.targets, outputs[..., self.point]
        weights = counted(batch)
        assert batch.units is not None
        mean, unit, naive = (batch.units[:, n, None] for n in range(3))  # [B, 1, C]
        error = forecast - actual
        size = jnp.abs(forecast + mean) + jnp.abs(actual + mean)
        values = {
            "mse": jnp.square(error),
            "mae": jnp.abs(error),
            "mse_original": jnp.square(error * unit),
            "mae_original": jnp.abs(error) * unit,
            "smape": jnp.where(size > 0, 2 * jnp.abs(error) / jnp.where(size > 0, size, 1), 0),
            "mase": jnp.abs(error) / naive,
        }
        if self.levels:
            # [B, N, C], the mean over the levels of twice the pinball loss
            values["crps"] = 2 * self._pinball(actual[..., None] - outputs).mean(axis=-1)
        if len(self.levels) > 1:
            low, high = outputs[..., 0], outputs[..., -1]
            values["coverage"] = ((actual >= low) & (actual <= high)).astype(jnp.float32)
            values["width"] = (high - low) * unit
        count = jnp.sum(weights, axis=(0, 1))
        sums = {
            name: Mean(jnp.sum(value * weights, axis=(0, 1)), count)
            for name, value in values.items()
        }
        if self.levels:
            total = jnp.sum(jnp.abs(actual + mean) * unit * weights, axis=(0, 1))
            sums["wql"] = Mean(jnp.sum(values["crps"] * unit * weights, axis=(0, 1)), total)
        return {**sums, "loss": loss}

    def figures(self, sums: Sums, info: Windows) -> dict[str, float]:
        """Means over all targets that were measured, of each channel and then over channels; how
        many there were is `observed`.

        Scaled: loss, mse, mae, and crps where there are quantiles (twice the mean pinball loss, an
        approximation by these quantiles: Gneiting & Raftery 2007). In the units of the data:
        mse_original, mae_original; smape in per cent; mase: the error over that of the seasonal
        naive within the training split (Hyndman & Koehler 2006); wql: the sum of twice the pinball
        losses over the sum of the targets' sizes, mean over the levels (the CRPS of GluonTS and
        GIFT-Eval); coverage: the share of targets between the outer quantiles, nominal: what it
        should be, and width: how far these are apart, in the units of the data."""
        reference = np.asarray(info.reference_C, np.float64)
        means = {name: mean.value for name, mean in sums.items()}  # [C], the loss a number
        for name in ("mse_original", "mae_original", "width"):
            if name in means:
                means[name] = means[name] * reference
        means["mse_original"] = means["mse_original"] * reference
        means["smape"] = 100 * means["smape"]
        order = ("loss", *(name for name in means if name != "loss"))
        figures = {name: mean_of_known(means[name]) for name in order}
        if "coverage" in figures:
            figures["nominal"] = self.levels[-1] - self.levels[0]
        return {**figures, "observed": float(np.sum(sums["mse"].weight))}

    def baselines(self, info: Windows) -> dict[str, Baseline]:
        per_value = max(len(self.levels), 1)

        def repeated(rule: Baseline) -> Baseline:
            def forecast(batch: Batch) -> Any:
                values = jnp.repeat(rule(batch)[..., None], per_value, axis=-1)
                return values if self.likelihood is None else Levels(values)

            return forecast

        rules = naive_forecasts(len(info.targets), info.lookback, info.horizon, info.season)
        shown = ("last_value", "seasonal_naive")
        return {name: repeated(rules[name]) for name in shown if name in rules}

    def rivals(self, dataset: Any, split: str, folder: Path) -> dict[str, dict[str, float]]:
        """`linear`: the ridge regression of `flax_lstm.tasks.judging`, where it can be fitted."""
        linear = linear_of(dataset) if isinstance(dataset, WindowDataset) else None
        if linear is None:
            return {}
        info, per_value = dataset.info, max(len(self.levels), 1)
        measure = jax.jit(lambda outputs, batch: self.measure(outputs, batch, info))
        total: Any = None
        for batch in dataset.evaluation(split, 256):
            forecast = linear(batch.inputs[..., : len(info.targets)]).astype(np.float32)
            values = np.repeat(forecast[..., None], per_value, axis=-1)
            sums = measure(values if self.likelihood is None else Levels(values), batch)
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        return {"linear": self.figures(total, info)}

    def predict(
        self, table: pd.DataFrame, info: Any, forward: Forward, batch_size: int
    ) -> pd.DataFrame:
        """See `forecast`."""
        return self.forecast(table, info, forward, batch_size)

    def forecast(
        self,
        table: pd.DataFrame,
        info: Any,
        forward: Forward,
        batch_size: int,
        cutoffs: Sequence[str] = (),
        paths: bool = False,
    ) -> pd.DataFrame:
        """Long rows `time, channel, horizon, forecast` for the steps after the last row of each
        series, and a column `q0.1` and so on for each quantile; of a panel, its id column first.

        cutoffs: forecast from what was known at each of these times instead, told in a column
        `cutoff`.
        paths: columns `path1` and so on with the sample paths of a model that draws them.
        """
        if not cutoffs:
            dataset = info.ahead(table)
            windows = np.arange(dataset.size("test"))
            return self.forecasts(dataset, "test", windows, forward, batch_size, paths)
        parts = []
        for cutoff in cutoffs:
            moment, known = info.until(table, cutoff)
            stamp = info.grid.written(pd.DatetimeIndex([moment]))[0]
            part = self.forecast(known, info, forward, batch_size, paths=paths)
            early = part.loc[(part["horizon"] == 1) & (part["time"] <= stamp)]
            if len(early):
                names = early[info.id_column].unique() if info.id_column else ["the input"]
                log.warning(
                    "--cutoffs %s: forecast from an earlier end of their own: %s",
                    *(cutoff, listing(names, 5)),
                )
            part.insert(1 if info.id_column else 0, "cutoff", stamp)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def forecasts(
        self,
        dataset: Any,
        split: str,
        windows_W: np.ndarray,
        forward: Forward,
        batch_size: int,
        paths: bool = False,
    ) -> pd.DataFrame:
        """The forecasts of these windows of a split, as `predict` writes them."""
        info, parts, drawn = dataset.info, [], []
        for windows_B in np.array_split(windows_W, -(-len(windows_W) // batch_size)):
            batch = dataset.batch(split, windows_B)
            outputs: Any = forward(batch)
            series_B = dataset.series(split)[windows_B]
            parts.append(self._unscaled(self.ordered(outputs, batch.units), dataset, series_B))
            if paths:
                require(
                    isinstance(outputs, Paths),
                    "sample paths are drawn by a StepModel, one run at a time; this one forecasts "
                    "each step by itself",
                )
                drawn.append(self._unscaled(outputs.values_BNCS, dataset, series_B))
        values = np.concatenate(parts)  # [W, N, C, Q]
        windows, horizon, channels = values.shape[:3]
        stamps = dataset.stamps(split, windows_W)
        ids = dataset.buffer.ids[dataset.series(split)[windows_W]]
        columns: dict[str, Any] = {
            "time": info.grid.written(stamps).repeat(channels),
            "channel": np.tile(np.asarray(info.targets, object), windows * horizon),
            "horizon": np.tile(np.repeat(np.arange(1, horizon + 1), channels), windows),
            "forecast": values[..., self.point].ravel(),
        }
        columns |= {f"q{q}": values[..., n].ravel() for n, q in enumerate(self.levels)}
        if drawn:
            paths_WNCS = np.concatenate(drawn)
            count = paths_WNCS.shape[-1]
            columns |= {f"path{n + 1}": paths_WNCS[..., n].ravel() for n in range(count)}
        forecasts = pd.DataFrame(columns)
        if not info.id_column:
            return forecasts
        series = pd.DataFrame({info.id_column: np.repeat(ids, horizon * channels)})
        return beside(series, columns)

    def original(
        self, dataset: Any, split: str, windows_B: np.ndarray, forward: Forward
    ) -> np.ndarray:
        """Forecasts [B, N, C, Q] of these windows in the units of the data, float64."""
        batch = dataset.batch(split, windows_B)
        series_B = dataset.series(split)[windows_B]
        return self._unscaled(self.ordered(forward(batch), batch.units), dataset, series_B)

    @staticmethod
    def _unscaled(values_BNCQ: Any, dataset: Any, series_B: np.ndarray) -> np.ndarray:
        values = np.asarray(values_BNCQ, np.float64).swapaxes(-1, -2)
        return dataset.unscale(values, series_B).swapaxes(-1, -2)

    def illustrate(self, dataset: Any, forward: Forward, folder: Path) -> None:
        """`forecasts.png`: forecasts, and the naive ones, against truth at the end of the test
        split; of a panel, the last forecast of a sample of its series."""
        plot = self._plot_panel if dataset.info.id_column else self._plot_series
        plot(dataset, forward, folder / "forecasts.png")

    def _plot_series(self, dataset: Any, forward: Forward, path: Path) -> None:
        info = dataset.info
        windows, horizon = dataset.size("test"), info.horizon
        # The last steps; each horizon is forecast from where the last ended.
        shown = min(windows, max(4 * horizon, 120))
        starts = list(range(windows - 1, windows - shown - 1, -horizon))[::-1]
        everything = np.arange(windows - shown, windows)
        batch = dataset.batch("test", everything)
        truth = np.concatenate([batch.targets[:, 0], batch.targets[-1, 1:]]).astype(np.float64)
        known = np.concatenate([batch.weights[:, 0], batch.weights[-1, 1:]]) > 0
        times = dataset.times("test", everything)
        line = pd.DatetimeIndex(np.concatenate([times[:, 0], times[-1, 1:]]))
        plot_forecasts(
            info.grid.written(line).to_numpy(),
            [start - windows + shown for start in starts],
            dataset.unscale(np.where(known, truth, np.nan)),
            list(self.original(dataset, "test", np.array(starts), forward)),
            info.targets,
            path,
            self.levels,
            self.point,
            self._naive(dataset, np.array(starts)),
        )

    def _naive(self, dataset: Any, windows_B: np.ndarray) -> dict[str, np.ndarray]:
        """The naive forecast [B, N, C] of these test windows, by its name."""
        info = dataset.info
        rules = naive_forecasts(len(info.targets), info.lookback, info.horizon, info.season)
        name = "seasonal_naive" if "seasonal_naive" in rules else "last_value"
        scaled = np.asarray(rules[name](dataset.batch("test", windows_B)))
        return {name: dataset.unscale(scaled, dataset.series("test")[windows_B])}

    def _plot_panel(self, dataset: Any, forward: Forward, path: Path) -> None:
        info, series_W = dataset.info, dataset.series("test")
        found = np.unique(series_W)
        chosen = found[np.unique(np.linspace(0, len(found) - 1, PANELS).astype(int))]
        # The last window of each.
        windows_B = np.searchsorted(series_W, chosen, side="right") - 1
        past = min(info.lookback, max(2 * info.horizon, 2 * info.season))
        truth = dataset.around("test", windows_B, past)[..., 0]
        forecasts = self.original(dataset, "test", windows_B, forward)[:, :, 0]
        ids = [str(name) for name in dataset.buffer.ids[chosen]]
        naive = {name: x[..., 0] for name, x in self._naive(dataset, windows_B).items()}
        plot_panel(ids, truth, forecasts, path, self.levels, self.point, naive)


PANELS = 12  # series drawn of a panel
CALIBRATION = 4096  # validation windows, at most, on which quantiles are calibrated
CALIBRATION_FILE = "calibration.json"


def _stretch(ratio: np.ndarray, level: float, above: bool) -> float:
    """The factor for one level, from (target - point) / (quantile - point), NaN where unknown; 1
    where nothing is known. The level is corrected for the finite number (Romano et al. 2019)."""
    ratio = ratio[~np.isnan(ratio)]
    if not len(ratio):
        return 1.0
    share = min(np.ceil((len(ratio) + 1) * (level if above else 1 - level)) / len(ratio), 1.0)
    return max(float(np.quantile(ratio, share)), 0.0)


def mean_of_known(values: Any) -> float:
    """The mean of those that are numbers; NaN where none is."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def counted(batch: Batch) -> Array:
    """[B, N, C]: how much each target counts."""
    weights = jnp.asarray(batch.weights)
    return jnp.broadcast_to(
        weights.reshape(*weights.shape, *(1,) * (3 - weights.ndim)), batch.targets.shape
    )


def naive_forecasts(channels: int, lookback: int, horizon: int, season: int) -> dict[str, Baseline]:
    """Forecasts [B, N, C] that learn nothing (Hyndman & Athanasopoulos 2021, section 5.2): the last
    value, that of the season before (where a season fits into the look-back), the line through the
    first and the last value of the look-back, and its mean."""

    def last_value(batch: Batch) -> Array:
        return jnp.repeat(batch.inputs[:, -1:, :channels], horizon, axis=1)

    def seasonal_naive(batch: Batch) -> Array:
        steps = batch.inputs.shape[1] - season + np.arange(horizon) % season
        return batch.inputs[:, steps, :channels]

    def drift(batch: Batch) -> Array:
        first, last = batch.inputs[:, :1, :channels], batch.inputs[:, -1:, :channels]
        ahead = jnp.arange(1, horizon + 1)[None, :, None] / max(lookback - 1, 1)
        return last + (last - first) * ahead

    def mean(batch: Batch) -> Array:
        return jnp.repeat(batch.inputs[..., :channels].mean(axis=1, keepdims=True), horizon, axis=1)

    rules: dict[str, Baseline] = {"last_value": last_value}
    if 1 < season <= lookback:
        rules["seasonal_naive"] = seasonal_naive
    return {**rules, "drift": drift, "mean": mean}
