# SPDX-License-Identifier: Apache-2.0
"""Does the level of a series come back to its mean? Ridge regressions on stretches of ETTh1 before
its test months.

    python benchmarks/levels.py ETTh1.csv [--lookback 96] [--horizons 96 336 720]

One regression forecasts values relative to the last one, as `model.window last` does, so that any
level goes on; the other forecasts the values as they are (`none`), scaled by what it was fitted on,
so that a level can fall back to its mean. Both are fitted on all rows before a stretch of two
months and judged on the stretch, all channels by one rule, the mean shape of the day taken away.
Prints mse of mixtures of the two, by the share of the second.

Axes: T rows, C channels, W windows of channels, S steps of look-back and horizon, L look-back.
"""

import argparse

import numpy as np
import pandas as pd

DAY = 24
FIT = (4320, 5760, 7200, 8640, 10080)  # rows before each stretch
STRETCH = 1440  # rows: two months
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RIDGE = 0.1  # of the mean square of an input
APART = 6  # rows from one window to the next

Array = np.ndarray


def windows(values_TC: Array, lookback: int, horizon: int) -> tuple[Array, Array]:
    """(W, L) and (W, horizon), channel by channel."""
    size = lookback + horizon
    every_WCS = np.lib.stride_tricks.sliding_window_view(values_TC, size, axis=0)[::APART]
    every_WS = every_WCS.reshape(-1, size)
    return every_WS[:, :lookback], every_WS[:, lookback:]


def forecast(past_WL: Array, future_WN: Array, judged_WL: Array) -> Array:
    """(W, N): the ridge regression without intercept of the first two, for the third."""
    square_LL = past_WL.T @ past_WL
    size = len(square_LL)
    weights_LN = np.linalg.solve(
        square_LL + RIDGE * np.trace(square_LL) / size * np.eye(size), past_WL.T @ future_WN
    )
    return np.asarray(judged_WL @ weights_LN)


def errors(values_TC: Array, fit: int, lookback: int, horizon: int) -> list[float]:
    """Mean squared error of the mixtures on the stretch after `fit` rows, in units of the deviation
    of those rows."""
    values_TC = (values_TC - values_TC[:fit].mean(axis=0)) / values_TC[:fit].std(axis=0)
    day_DC = values_TC[:fit].reshape(-1, DAY, values_TC.shape[1]).mean(axis=0)
    shape_TC = np.tile(day_DC - day_DC.mean(axis=0), (len(values_TC) // DAY + 1, 1))
    values_TC = values_TC - shape_TC[: len(values_TC)]
    past_WL, future_WN = windows(values_TC[:fit], lookback, horizon)
    # The look-back of the first window lies before the stretch.
    judged_WL, actual_WN = windows(values_TC[fit - lookback : fit + STRETCH], lookback, horizon)
    level_W1, last_W1 = past_WL[:, -1:], judged_WL[:, -1:]
    kept_WN = last_W1 + forecast(past_WL - level_W1, future_WN - level_W1, judged_WL - last_W1)
    free_WN = forecast(past_WL, future_WN, judged_WL)
    mixed = ((1 - share) * kept_WN + share * free_WN for share in SHARES)
    return [float(np.square(mixed_WN - actual_WN).mean()) for mixed_WN in mixed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--lookback", type=int, default=96)
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 336, 720])
    options = parser.parse_args()
    values_TC = pd.read_csv(options.path).iloc[:, 1:].to_numpy(np.float64)
    print("horizon | rows before | " + " | ".join(f"{share:g}" for share in SHARES))
    for horizon in options.horizons:
        found = [errors(values_TC, fit, options.lookback, horizon) for fit in FIT]
        for fit, row in zip((*FIT, "mean"), (*found, np.mean(found, axis=0)), strict=True):
            print(f"{horizon} | {fit} | " + " | ".join(f"{mse:.3f}" for mse in row))


if __name__ == "__main__":
    main()
