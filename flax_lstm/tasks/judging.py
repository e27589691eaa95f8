# SPDX-License-Identifier: Apache-2.0
"""How good forecasts are, by the definitions of the field, over origins, series and steps of the
horizon; in NumPy and float64.

Axes: W windows (a series and an origin each), N horizon, C target channels, Q quantiles, T
look-back, E examples of a regression.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr

Array = np.ndarray
EXAMPLES = 20_000  # series of training windows, at most, that the linear forecast is fitted on
LEAST = 8  # at least
LONGEST = 2048  # steps of the look-back, at most, that it sees: the latest
RIDGES = tuple(10.0**n for n in range(-4, 3))  # strengths tried, as shares of the mean variance


@dataclass(frozen=True)
class Truth:
    """What was to be forecast, in the units of the data."""

    actual_WNC: Array
    counted_WNC: Array  # True where it was measured
    scale_WC: Array  # MASE's denominator: the error of the seasonal naive before the test

    def take(self, windows: Array, steps: slice = slice(None)) -> "Truth":
        """Some windows, and some steps of the horizon."""
        return Truth(
            self.actual_WNC[windows][:, steps],
            self.counted_WNC[windows][:, steps],
            self.scale_WC[windows],
        )

    def mean(self, values_WNC: Array) -> float:
        """Over what was measured; NaN where nothing was."""
        count = self.counted_WNC.sum()
        return float((values_WNC * self.counted_WNC).sum() / count) if count else float("nan")


def figures(
    truth: Truth, forecast_WNC: Array, quantiles_WNCQ: Array | None, levels: Sequence[float]
) -> dict[str, float]:
    """mae, rmse, mase, smape (per cent, of the sum of sizes: from 0 to 200), and where there are
    quantiles crps (the mean of twice the pinball loss, in the units of the data), wql (its sum over
    the sum of the targets' sizes: the CRPS of GluonTS), coverage of the outer two, and their
    width."""
    actual, error = truth.actual_WNC, np.abs(forecast_WNC - truth.actual_WNC)
    size = np.abs(forecast_WNC) + np.abs(actual)
    found = {
        "mae": truth.mean(error),
        "rmse": float(np.sqrt(truth.mean(error**2))),
        "mase": truth.mean(error / truth.scale_WC[:, None]),
        "smape": 100 * truth.mean(np.divide(2 * error, size, np.zeros_like(size), where=size > 0)),
    }
    if quantiles_WNCQ is None or not levels:
        return found
    pinball = pinball_loss(actual, quantiles_WNCQ, levels)
    found["crps"] = 2 * truth.mean(pinball)
    found["wql"] = found["crps"] / truth.mean(np.abs(actual))
    if len(levels) > 1:
        low, high = quantiles_WNCQ[..., 0], quantiles_WNCQ[..., -1]
        found["coverage"] = truth.mean((actual >= low) & (actual <= high))
        found["width"] = truth.mean(high - low)
    return found


def pinball_loss(actual: Array, quantiles: Array, levels: Sequence[float]) -> Array:
    """The mean over the levels (last axis of `quantiles`) of the pinball loss (Koenker & Bassett
    1978)."""
    error = actual[..., None] - quantiles
    level = np.asarray(levels)
    return np.maximum(level * error, (level - 1) * error).mean(axis=-1)


class Comparison(NamedTuple):
    """The test of Diebold & Mariano 1995 with the correction of Harvey, Leybourne & Newbold
    1997."""

    statistic: float  # below 0: the first is better
    p_value: float  # two-sided
    samples: int
    over: str  # "origins" or "series"


def diebold_mariano(difference: Array, lags: int, over: str = "origins") -> Comparison:
    """Whether the mean of a series of loss differences is 0: its variance from autocovariances up
    to `lags`, for forecasts of several steps overlap. Student's t with one degree of freedom less
    than there are samples."""
    count, mean = len(difference), float(difference.mean())
    centred = difference - mean
    lags = min(lags, count - 1)
    covariances = [float(centred[lag:] @ centred[: count - lag]) / count for lag in range(lags + 1)]
    variance = (covariances[0] + 2 * sum(covariances[1:])) / count
    if variance <= 0:
        variance = covariances[0] / count
    if variance == 0:
        return Comparison(0.0, 1.0, count, over)
    steps = lags + 1
    correction = np.sqrt(max(count + 1 - 2 * steps + steps * (steps - 1) / count, 1) / count)
    statistic = float(correction * mean / np.sqrt(variance))
    return Comparison(statistic, float(2 * stdtr(count - 1, -abs(statistic))), count, over)


def compare(
    truth: Truth, one_WNC: Array, other_WNC: Array, series_W: Array, origin_W: Array, lags: int
) -> Comparison | None:
    """Whether the absolute errors of two forecasts differ, in units of `truth.scale_WC`: over the
    origins, the series of each added up, or over the series, where there are fewer than eight
    origins. None where there are fewer than eight of either."""
    scaled = truth.counted_WNC / truth.scale_WC[:, None]
    losses = (np.abs(x - truth.actual_WNC) * scaled for x in (one_WNC, other_WNC))
    one_W, other_W = (x.sum(axis=(1, 2)) for x in losses)
    count_W = truth.counted_WNC.sum(axis=(1, 2))
    for over, group_W in (("origins", origin_W), ("series", series_W)):
        names, place_W = np.unique(group_W, return_inverse=True)
        if len(names) >= 8:
            count = np.bincount(place_W, count_W)
            sums = np.bincount(place_W, one_W - other_W)[count > 0] / count[count > 0]
            return diebold_mariano(sums, lags if over == "origins" else 0, over)
    return None


def better(outcome: Comparison | None, level: float = 0.05) -> str:
    """ "yes", "no" (the other is), or "not shown"."""
    if outcome is None or outcome.p_value >= level:
        return "not shown"
    return "yes" if outcome.statistic < 0 else "no"


class Linear(NamedTuple):
    """A linear forecast of a window relative to its last value."""

    weights_TN: Array
    bias_N: Array

    def __call__(self, inputs_WTC: Array) -> Array:
        """[W, N, C]."""
        last_W1C = inputs_WTC[:, -1:]
        relative = (inputs_WTC[:, -LONGEST:] - last_W1C).astype(np.float64)
        forecast = np.einsum("wtc,tn->wnc", relative, self.weights_TN)
        return forecast + self.bias_N[None, :, None] + last_W1C


def linear_of(dataset: Any) -> Linear | None:
    """The ridge regression fitted on a sample of a data set's training windows; None where hardly
    any is whole."""
    channels = len(dataset.info.targets)
    parts = []
    for split, count in (("train", EXAMPLES // channels), ("validation", EXAMPLES // 10)):
        last = dataset.size(split) - 1
        windows = np.unique(np.linspace(0, last, max(count, 1)).astype(int))
        pieces = np.array_split(windows, -(-len(windows) // 256))
        parts.append([dataset.batch(split, windows_B) for windows_B in pieces])
    return ridge(parts[0], parts[1], channels)


def ridge(train: Sequence[Any], validation: Sequence[Any], channels: int) -> Linear | None:
    """The ridge regression of the horizon on the look-back, one for all channels and series, in
    closed form (Hoerl & Kennard 1970), its strength chosen on validation. Both are batches;
    windows with a target that was not measured are left out. None with fewer than eight, or none
    to validate."""
    x_ET, y_EN = _examples(train, channels)
    valid_x, valid_y = _examples(validation, channels)
    if len(x_ET) < LEAST or not len(valid_x):
        return None
    mean_T, mean_N = x_ET.mean(axis=0), y_EN.mean(axis=0)
    x_ET, y_EN = x_ET - mean_T, y_EN - mean_N
    values_T, vectors_TT = np.linalg.eigh(x_ET.T @ x_ET)
    turned_TN = vectors_TT.T @ (x_ET.T @ y_EN)
    fits = []
    for strength in RIDGES:
        damped = np.maximum(values_T, 0) + strength * max(values_T.mean(), 1e-12)
        weights_TN = vectors_TT @ (turned_TN / damped[:, None])
        fits.append(Linear(weights_TN, mean_N - mean_T @ weights_TN))
    errors = [np.abs(valid_x @ fit.weights_TN + fit.bias_N - valid_y).mean() for fit in fits]
    return fits[int(np.argmin(errors))]


def _examples(batches: Sequence[Any], channels: int) -> tuple[Array, Array]:
    """Look-backs [E, T] and horizons [E, N] of all channels, relative to the last value."""
    inputs, targets = [], []
    for batch in batches:
        whole_BC = (np.asarray(batch.weights) > 0).all(axis=1)
        x_BTC = np.asarray(batch.inputs[:, -LONGEST:, :channels], np.float64)
        x_BCT = np.swapaxes(x_BTC, 1, 2)
        y_BCN = np.swapaxes(np.asarray(batch.targets, np.float64), 1, 2)
        last_BC1 = x_BCT[..., -1:]
        inputs.append((x_BCT - last_BC1)[whole_BC])
        targets.append((y_BCN - last_BC1)[whole_BC])
    return np.concatenate(inputs), np.concatenate(targets)
