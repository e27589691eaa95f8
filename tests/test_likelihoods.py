# SPDX-License-Identifier: Apache-2.0
"""Distributions against SciPy, and the losses, quantiles and refusals that come of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_lstm import Forecasting, UserError
from flax_lstm.data.base import Batch, SeriesForm
from flax_lstm.nn.likelihoods import (
    NegativeBinomial,
    Paths,
    StudentT,
    in_counts,
    path_quantiles,
    placed,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
LEVELS = (0.01, 0.1, 0.5, 0.9, 0.975)
GENERATOR = np.random.default_rng(0)
SHAPE = (3, 4, 2)  # [B, N, C]
MEAN, STD = np.array([30.0, 2.0]), np.array([12.0, 3.0])
UNITS = np.repeat(np.stack([MEAN / STD, np.ones(2), np.ones(2), STD])[None], 3, 0).astype("f4")


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(np.asarray(x, np.float64)))


def test_students_t_is_scipys():
    location, shape = GENERATOR.normal(size=(2, *SHAPE)).astype(np.float32)
    spread = GENERATOR.uniform(0.1, 3, size=SHAPE).astype(np.float32)
    parameters = jnp.stack([location, spread, 20 * shape], axis=-1)
    targets = GENERATOR.normal(size=SHAPE).astype(np.float32)
    theirs = stats.t(2 + softplus(20 * shape), location, spread)
    ours = StudentT().log_density(parameters, targets, UNITS)
    np.testing.assert_allclose(ours, theirs.logpdf(targets), rtol=2e-4, atol=2e-5)
    found = StudentT().quantiles(parameters, LEVELS, UNITS)
    expected = np.stack([theirs.ppf(level) for level in LEVELS], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_negative_binomial_is_scipys():
    location, shape = GENERATOR.normal(size=(2, *SHAPE)).astype(np.float32)
    parameters = jnp.stack([location, shape], axis=-1)
    counts = GENERATOR.poisson(20, size=SHAPE)
    targets = ((counts - MEAN) / STD).astype(np.float32)
    mean = softplus(location * STD + MEAN)
    size = 1 / (softplus(shape) + 1e-3)
    theirs = stats.nbinom(size, size / (size + mean))
    ours = NegativeBinomial().log_density(parameters, targets, UNITS)
    np.testing.assert_allclose(ours, theirs.logpmf(counts), rtol=2e-4, atol=2e-4)
    found = NegativeBinomial().quantiles(parameters, LEVELS, UNITS)
    found_counts = np.asarray(found) * STD[:, None] + MEAN[:, None]
    expected = np.stack([theirs.ppf(level) for level in LEVELS], axis=-1)
    np.testing.assert_allclose(found_counts, expected, atol=1e-3)
    np.testing.assert_allclose(in_counts(targets, UNITS), counts, atol=1e-4)


def test_no_count_is_below_zero_however_its_quantiles_are_stretched():
    parameters = jnp.asarray(GENERATOR.normal(size=(*SHAPE, 2)), jnp.float32)
    levels = (0.1, 0.5, 0.9)
    task = Forecasting(objective="negative_binomial", quantiles=levels, stretch=(30.0, 1.0, 2.0))
    found = np.asarray(task.ordered(parameters, UNITS)) * STD[:, None] + MEAN[:, None]
    plain = np.asarray(NegativeBinomial().quantiles(parameters, levels, UNITS))
    low, middle, high = np.moveaxis(plain * STD[:, None] + MEAN[:, None], -1, 0)
    expected = [np.maximum(middle + 30 * (low - middle), 0), middle, middle + 2 * (high - middle)]
    assert (expected[0] == 0).any()
    np.testing.assert_allclose(found, np.stack(expected, axis=-1), atol=1e-3)


def test_large_counts_have_a_gradient_and_quantiles():
    units = np.ones((1, 4, 1), np.float32) * np.array([0, 1, 1, 1e4])[:, None]
    parameters = jnp.array([[[[5.0, -20.0]]]])  # 50,000 at nearly no dispersion
    count = jnp.full((1, 1, 1), 5.01)

    def loss(p):
        return -NegativeBinomial().log_density(p, count, units).sum()

    gradient = jax.grad(loss)(parameters)
    assert np.isfinite(gradient).all() and gradient[0, 0, 0, 0] < 0  # the mean is to rise
    low, high = NegativeBinomial().quantiles(parameters, (0.1, 0.9), units)[0, 0, 0] * 1e4
    theirs = stats.nbinom(1000, 1000 / 51000)  # float32 has the probabilities to some 1e-4
    np.testing.assert_allclose([low, high], theirs.ppf([0.1, 0.9]), rtol=2e-3)


def test_samples_have_the_quantiles_of_their_distribution():
    parameters = jnp.broadcast_to(jnp.array([2.0, 0.5, 1.0]), (20_000, 3))
    drawn = StudentT().sample(jax.random.key(0), parameters)
    paths = Paths(drawn[None, None, None])
    expected = StudentT().quantiles(parameters[:1, None, None], LEVELS, UNITS)[0, 0, 0]
    # Standard errors of quantiles are below 0.02 but at the level of 0.01.
    np.testing.assert_allclose(path_quantiles(paths, LEVELS)[0, 0, 0, 1:], expected[1:], atol=0.06)


@pytest.mark.parametrize("likelihood", [StudentT(), NegativeBinomial()])
def test_parameters_move_with_their_window(likelihood):
    form = SeriesForm(4, 4, channels=2, likelihood=likelihood)
    y = jnp.asarray(GENERATOR.normal(size=(*SHAPE, form.outputs)), jnp.float32)
    level = jnp.ones(SHAPE)
    location, scale = jnp.full((3, 1, 2), 7.0), jnp.full((3, 1, 2), 10.0)
    found = placed(y, level, location, scale, form)
    np.testing.assert_allclose(found[..., 0], (y[..., 0] + 1) * 10 + 7, rtol=1e-6)
    if likelihood.sizes.lengths:
        np.testing.assert_allclose(found[..., 1], (softplus(y[..., 1]) + 1e-3) * 10, rtol=1e-5)
    np.testing.assert_array_equal(found[..., -1], y[..., -1])


def batch(targets: np.ndarray, weights: np.ndarray) -> Batch:
    return Batch(np.zeros((3, 5, 2), np.float32), targets, None, weights, units=UNITS)


def test_the_loss_is_the_likelihood_of_what_was_measured():
    task = Forecasting(objective="student_t", quantiles=LEVELS)
    parameters = np.abs(GENERATOR.normal(size=(*SHAPE, 3))).astype(np.float32)
    targets, weights = GENERATOR.normal(size=SHAPE), GENERATOR.random(SHAPE) < 0.7
    density = stats.t(2 + softplus(parameters[..., 2]), parameters[..., 0], parameters[..., 1])
    expected = -density.logpdf(targets)[weights].mean()
    data = batch(targets.astype(np.float32), weights.astype(np.float32))
    assert task.loss(jnp.asarray(parameters), data).value == pytest.approx(expected, rel=1e-4)
    # Of sample paths there is no density: the pinball loss of their quantiles.
    paths = np.sort(GENERATOR.normal(size=(*SHAPE, 50)), axis=-1).astype(np.float32)
    error = targets[..., None] - np.moveaxis(np.quantile(paths, LEVELS, axis=-1), 0, -1)
    pinball = np.maximum(np.array(LEVELS) * error, (np.array(LEVELS) - 1) * error)
    found = task.loss(Paths(jnp.asarray(paths)), data).value
    assert found == pytest.approx(pinball[weights].mean(), rel=1e-4)


def test_rules_are_judged_beside_a_distribution():
    task = Forecasting(objective="student_t", quantiles=LEVELS)
    info = type("Info", (), {"lookback": 5, "horizon": 4, "season": 2, "targets": ("a", "b")})()
    info.reference_C = np.ones(2)
    data = batch(np.ones(SHAPE, np.float32), np.ones(SHAPE, np.float32))
    rule = task.baselines(info)["last_value"]
    sums = jax.jit(lambda b: task.measure(rule(b), b, info))(data._replace(lengths=np.zeros(3)))
    found = task.figures(sums, info)
    assert found["mae"] == pytest.approx(1) and found["crps"] == pytest.approx(1, abs=0.1)
    assert np.isnan(found["loss"])


class Counted:
    """A data set of these values."""

    def __init__(self, values: np.ndarray):
        self.info = type("Info", (), {"targets": ("sold",)})()
        self.values = values

    def measured(self) -> np.ndarray:
        return self.values[:, None]


@pytest.mark.parametrize("value", [-1.0, 2.5, 3e6])
def test_what_is_no_count_is_refused(value):
    task = Forecasting(objective="negative_binomial")
    task.check(Counted(np.array([0, 1.0004, np.nan, 8e5])))
    with pytest.raises(UserError, match=r"is for counts .* column 'sold' holds"):
        task.check(Counted(np.array([0.0, value, np.nan])))
    dataclasses.replace(task, objective="student_t").check(Counted(np.array([value])))
