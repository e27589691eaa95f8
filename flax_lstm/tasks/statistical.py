# SPDX-License-Identifier: Apache-2.0
"""ETS and AutoARIMA beside a forecaster, by statsforecast (the extra `stats`).

Axes: W windows (a series and an origin each), N horizon, C target channels.
"""

import logging
import warnings
from typing import Any

import numpy as np

from flax_lstm.errors import UserError

Array = np.ndarray
log = logging.getLogger(__name__)
LONGEST = 1000  # rows before an origin, at most, that a model is fitted to


def statistical_forecasts(dataset: Any, windows_W: Array) -> dict[str, Array]:
    """Forecasts (W, N, C) of `ets` and `arima` for these test windows, in the units of the data,
    each fitted to what its series was before the origin (Hyndman & Khandakar 2008). Where that is
    too little for a model, its last value, which is said. Raises UserError without the package."""
    try:
        from statsforecast.models import AutoARIMA, AutoETS
    except ImportError:
        raise UserError(
            "--statistical: needs the package statsforecast: pip install 'flax-lstm[stats]'"
        ) from None
    info, buffer = dataset.info, dataset.buffer
    channels, horizon = len(info.targets), info.horizon
    models = {"ets": AutoETS, "arima": AutoARIMA}
    shape = (len(windows_W), horizon, channels)
    found = {name: np.empty(shape) for name in models}
    series_W = dataset.series("test")[windows_W]
    given_up = dict.fromkeys(models, 0)
    for n, (first, series) in enumerate(
        zip(dataset.first_rows("test")[windows_W], series_W, strict=True)
    ):
        begin = max(buffer.begins[series], first - LONGEST)
        past_TC = dataset.unscale(buffer.values_RD[begin:first, :channels], int(series))
        for name, model in models.items():
            for channel in range(channels):
                past_T = np.ascontiguousarray(past_TC[:, channel])
                forecast_N = _forecast(model(season_length=info.season), past_T, horizon)
                if not np.isfinite(forecast_N).all():
                    forecast_N, given_up[name] = np.repeat(past_T[-1], horizon), given_up[name] + 1
                found[name][n, :, channel] = forecast_N
    for name, count in given_up.items():
        if count:
            log.warning(
                "%s could not be fitted for %d of %d forecasts (too few rows before them): the "
                "last value instead",
                *(name, count, len(windows_W) * channels),
            )
    return found


def _forecast(model: Any, past_T: Array, horizon: int) -> Array:
    """What a model says; NaN where it cannot be fitted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of searches that stop early
        try:
            return np.asarray(model.forecast(y=past_T, h=horizon)["mean"])
        except Exception:  # of short series its errors have many types
            return np.full(horizon, np.nan)
