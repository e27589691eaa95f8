# SPDX-License-Identifier: Apache-2.0
"""The figures of a backtest against utilsforecast, the test of Diebold & Mariano and the linear
forecast against formulas written out."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from utilsforecast import losses

from flax_lstm.tasks import judging
from flax_lstm.tasks.judging import Linear, Truth, compare, diebold_mariano, figures, ridge

SERIES, HORIZON, SEASON, LEVELS = 5, 6, 3, (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def case():
    """Five series with one forecast each, and the rows that utilsforecast wants."""
    generator = np.random.default_rng(3)
    history = generator.normal(20, 5, size=(SERIES, 30)) * np.arange(1, SERIES + 1)[:, None]
    actual = history[:, -HORIZON:] + generator.normal(size=(SERIES, HORIZON))
    quantiles = np.sort(actual[..., None] + generator.normal(size=(SERIES, HORIZON, 3)), axis=-1)
    ids = [f"s{n}" for n in range(SERIES)]
    rows = pd.DataFrame(
        {
            "unique_id": np.repeat(ids, HORIZON),
            "ds": np.tile(np.arange(30, 30 + HORIZON), SERIES),
            "y": actual.ravel(),
            "model": quantiles[..., 1].ravel(),
            "cutoff": 29,
            **{f"model-q-{n}": quantiles[..., n].ravel() for n in range(3)},
        }
    )
    train = pd.DataFrame(
        {
            "unique_id": np.repeat(ids, 30),
            "ds": np.tile(np.arange(30), SERIES),
            "y": history.ravel(),
        }
    )
    scale = np.abs(history[:, SEASON:] - history[:, :-SEASON]).mean(axis=1)
    counted = np.ones((SERIES, HORIZON, 1), bool)
    truth = Truth(actual[..., None], counted, scale[:, None])
    return truth, quantiles[:, :, None], rows, train


def theirs(loss, rows, **more) -> float:
    return float(loss(rows, models=["model"], **more)["model"].mean())


def test_points_are_judged_as_utilsforecast_does(case):
    truth, quantiles, rows, train = case
    found = figures(truth, quantiles[..., 1], quantiles, LEVELS)
    assert found["mae"] == pytest.approx(theirs(losses.mae, rows))
    squares = losses.mse(rows, models=["model"])["model"].mean()
    assert found["rmse"] == pytest.approx(np.sqrt(squares))
    # There, the sum of sizes is not halved, and the figure is a share.
    assert found["smape"] == pytest.approx(200 * theirs(losses.smape, rows))
    mase = theirs(losses.mase, rows, seasonality=SEASON, train_df=train)
    assert found["mase"] == pytest.approx(mase)


def test_quantiles_are_judged_as_utilsforecast_does(case):
    truth, quantiles, rows, _ = case
    found = figures(truth, quantiles[..., 1], quantiles, LEVELS)
    each = [
        losses.quantile_loss(rows, models={"model": f"model-q-{n}"}, q=level)["model"].mean()
        for n, level in enumerate(LEVELS)
    ]
    assert found["crps"] == pytest.approx(2 * np.mean(each))
    assert found["wql"] == pytest.approx(2 * np.mean(each) / np.abs(rows["y"]).mean())
    inside = rows["y"].between(rows["model-q-0"], rows["model-q-2"])
    assert found["coverage"] == pytest.approx(inside.mean())
    assert found["width"] == pytest.approx((rows["model-q-2"] - rows["model-q-0"]).mean())


def test_what_was_not_measured_is_not_judged(case):
    truth, quantiles, *_ = case
    counted = truth.counted_WNC.copy()
    counted[0], counted[1, 2:] = False, False
    actual = np.where(counted, truth.actual_WNC, 1e9)
    found = figures(Truth(actual, counted, truth.scale_WC), quantiles[..., 1], quantiles, LEVELS)
    kept = counted[..., 0]
    error = np.abs(quantiles[..., 1] - truth.actual_WNC)[..., 0]
    assert found["mae"] == pytest.approx(error[kept].mean())
    assert found["wql"] == pytest.approx(found["crps"] / np.abs(truth.actual_WNC[kept]).mean())


def test_diebold_and_mariano_by_hand():
    difference = np.random.default_rng(1).normal(0.3, 1, size=40)
    found = diebold_mariano(difference, lags=2)
    count, steps, centred = 40, 3, difference - difference.mean()
    gamma = [np.sum(centred[lag:] * centred[: count - lag]) / count for lag in range(3)]
    plain = difference.mean() / np.sqrt((gamma[0] + 2 * (gamma[1] + gamma[2])) / count)
    corrected = plain * np.sqrt((count + 1 - 2 * steps + steps * (steps - 1) / count) / count)
    assert found.statistic == pytest.approx(corrected)
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(corrected), count - 1))
    # Without overlap and correction it is Student's test of a mean.
    alone = diebold_mariano(difference, lags=0)
    assert alone.p_value == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, rel=0.05)
    assert diebold_mariano(np.zeros(9), 0).p_value == 1


def test_forecasts_are_compared_over_origins_else_over_series():
    generator = np.random.default_rng(2)
    actual, ones = generator.normal(size=(20, 4, 1)), np.ones((20, 4, 1), bool)
    truth = Truth(actual, ones, np.ones((20, 1)))
    good, bad = actual + 0.1, actual + generator.normal(1, 0.1, size=actual.shape)
    many, one = np.arange(20), np.zeros(20)
    over_origins = compare(truth, good, bad, one, many, 0)
    over_series = compare(truth, good, bad, many, one, 0)
    assert (over_origins.over, over_series.over) == ("origins", "series")
    assert over_origins.statistic == pytest.approx(over_series.statistic)
    assert over_origins.statistic < 0 and over_origins.p_value < 1e-6
    assert compare(truth, good, bad, one, one, 0) is None


def test_the_linear_forecast_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.linear_model")
    from flax_lstm.data.base import Batch

    generator = np.random.default_rng(0)

    def batch(rows):
        walk = generator.normal(size=(rows, 12, 2)).cumsum(axis=1)
        return Batch(walk[:, :8], walk[:, 8:], None, np.ones((rows, 4, 2)))

    train, validation = batch(60), batch(20)
    found = ridge([train], [validation], 2)
    x = np.swapaxes(train.inputs - train.inputs[:, -1:], 1, 2).reshape(-1, 8)
    y = np.swapaxes(train.targets - train.inputs[:, -1:], 1, 2).reshape(-1, 4)
    centred = x - x.mean(axis=0)
    mean_variance = np.trace(centred.T @ centred) / 8
    fits = [sklearn.Ridge(alpha=10.0**n * mean_variance).fit(x, y) for n in range(-4, 3)]
    assert any(np.allclose(fit.coef_.T, found.weights_TN) for fit in fits)
    assert any(np.allclose(fit.intercept_, found.bias_N) for fit in fits)
    assert isinstance(found, Linear)
    forecast = found(validation.inputs)
    np.testing.assert_allclose(forecast.shape, (20, 4, 2))


def test_the_linear_forecast_sees_the_latest_of_a_long_past(monkeypatch):
    """So that its matrix of steps by steps stays small."""
    from flax_lstm.data.base import Batch

    monkeypatch.setattr(judging, "LONGEST", 5)
    generator = np.random.default_rng(0)
    walk = generator.normal(size=(60, 12, 2)).cumsum(axis=1)
    whole = Batch(walk[:, :8], walk[:, 8:], None, np.ones((60, 4, 2)))
    latest = whole._replace(inputs=walk[:, 3:8])
    found, expected = (ridge([batch], [batch], 2) for batch in (whole, latest))
    np.testing.assert_array_equal(found.weights_TN, expected.weights_TN)
    np.testing.assert_array_equal(found(whole.inputs), expected(latest.inputs))
