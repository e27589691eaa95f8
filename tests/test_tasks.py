# SPDX-License-Identifier: Apache-2.0
"""Figures of every task over ragged batches, against NumPy over all rows at once; baselines by
hand; learning."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import small_runs

from flax_lstm import (
    Classification,
    Forecasting,
    LanguageModeling,
    RecurrentModel,
    SequenceRegression,
    TextModel,
    UserError,
)
from flax_lstm.data.base import Batch
from flax_lstm.training.assembly import assemble
from flax_lstm.training.evaluation import add_up, evaluate, evaluate_baselines

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, SIZE = 21, 8  # the last batch of three has three rows of weight 0


def ragged(targets, outputs, inputs=None, weights=None, units=None):
    """Batches of 8 rows and their outputs; what fills the last is garbage of weight 0."""
    inputs = np.zeros((len(targets), 4), np.int32) if inputs is None else inputs
    weights = np.ones(len(targets), np.float32) if weights is None else weights
    lengths = np.full(len(targets), inputs.shape[1], np.int32)
    for start in range(0, len(targets), SIZE):
        parts = [
            part[start : start + SIZE] for part in (inputs, targets, lengths, weights, outputs)
        ]
        missing = SIZE - len(parts[0])
        garbage = [np.repeat(part[:1], missing, axis=0) for part in parts]
        garbage[3] = np.zeros_like(garbage[3])
        *batch, result = (np.concatenate(pair) for pair in zip(parts, garbage, strict=True))
        yield Batch(*batch, units=None if units is None else units[:SIZE]), result


def figures(task, info, targets, outputs, **more):
    measure = jax.jit(lambda outputs, batch: task.measure(outputs, batch, info))
    return task.figures(
        add_up(measure(result, batch) for batch, result in ragged(targets, outputs, **more)), info
    )


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_figures(classes):
    generator = np.random.default_rng(classes)
    actual = generator.integers(0, classes, ROWS).astype(np.int32)
    logits = np.round(generator.normal(size=(ROWS, classes)), 1).astype(np.float32)
    info = SimpleNamespace(labels=tuple("abc"[:classes]))
    found = figures(Classification(label_smoothing=0.1), info, actual, logits)
    predicted = logits.argmax(1)
    expected = {
        "loss": -log_softmax(logits.astype(np.float64))[
            np.arange(ROWS), actual
        ].mean(),  # without smoothing
        "accuracy": np.mean(predicted == actual),
        "f1": np.mean(
            [
                2
                * np.sum((predicted == k) & (actual == k))
                / (np.sum(predicted == k) + np.sum(actual == k))
                for k in range(classes)
            ]
        ),
    }
    if classes == 2:
        margin = np.round(logits[:, 1] - logits[:, 0], 4)
        difference = margin[actual == 1][:, None] - margin[actual == 0]
        expected["auc"] = np.mean((difference > 0) + 0.5 * (difference == 0))
    assert found == pytest.approx(expected, rel=1e-5)


def test_classification_loss_with_smoothing_and_weights():
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [9.0, 0.0, 0.0]], np.float32)
    batch = Batch(None, np.array([0, 2, 1], np.int32), None, np.array([1.0, 0.5, 0.0], np.float32))
    mean = Classification(label_smoothing=0.3).loss(jax.numpy.asarray(logits), batch)
    targets = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    by_hand = -(targets * log_softmax(logits[:2])).sum(1)
    assert mean.value == pytest.approx((by_hand[0] + 0.5 * by_hand[1]) / 1.5, rel=1e-6)


SERIES = SimpleNamespace(
    lookback=6,
    horizon=2,
    targets=("a", "b"),
    season=3,
    mean=(10.0, -3.0, 99.0),  # the third channel is an input alone
    std=(2.0, 50.0, 7.0),
    reference_C=np.array([2.0, 50.0]),
)
UNITS = np.array([[10.0 / 2.0, -3.0 / 50.0], [1.0, 1.0], [0.5, 0.8]], np.float32)


@pytest.mark.parametrize("objective", ["mse", "mae", "huber", "quantile"])
def test_forecasting_figures(objective):
    generator = np.random.default_rng(4)
    levels = (0.2, 0.4, 0.95)
    task = Forecasting(objective=objective, quantiles=levels)
    per_value = 3 if objective == "quantile" else 1
    actual = generator.normal(size=(ROWS, 2, 2)).astype(np.float32)
    outputs = generator.normal(size=(ROWS, 2, 2, per_value)).astype(np.float32)
    units = np.repeat(UNITS[None], ROWS, axis=0)
    found = figures(task, SERIES, actual, outputs, units=units)
    outputs = np.sort(outputs, axis=-1)  # quantiles that cross are put in order

    point = outputs[..., 1 if objective == "quantile" else 0].astype(
        np.float64
    )  # 0.4 is the nearest to the median
    a, std, mean = actual.astype(np.float64), np.array([2.0, 50.0]), np.array([10.0, -3.0])
    error, a_units, f_units = point - a, a * std + mean, point * std + mean
    each = outputs.astype(np.float64) - a[..., None]
    pinball = np.where(
        each < 0, -each * np.array(levels)[:per_value], each * (1 - np.array(levels)[:per_value])
    )
    expected = {
        "loss": {
            "mse": (error**2).mean(),
            "mae": np.abs(error).mean(),
            "huber": np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5).mean(),
            "quantile": pinball.mean(),
        }[objective],
        "mse": (error**2).mean(),
        "mae": np.abs(error).mean(),
        "mse_original": ((f_units - a_units) ** 2).mean(),
        "mae_original": np.abs(f_units - a_units).mean(),
        "smape": 100 * (2 * np.abs(f_units - a_units) / (np.abs(f_units) + np.abs(a_units))).mean(),
        "mase": (np.abs(error).mean(axis=(0, 1)) / np.array([0.5, 0.8])).mean(),
    }
    if objective == "quantile":
        expected["crps"] = 2 * pinball.mean()
        sizes = np.abs(a_units).sum(axis=(0, 1))
        expected["wql"] = (2 * pinball.mean(-1).sum(axis=(0, 1)) * std / sizes).mean()
        low, high = outputs[..., 0], outputs[..., -1]
        expected["coverage"] = ((actual >= low) & (actual <= high)).mean()
        expected["nominal"] = levels[-1] - levels[0]
        expected["width"] = ((high - low) * std).mean()
    expected["observed"] = actual.size
    assert found == pytest.approx(expected, rel=1e-5)


def test_smape_of_nothing_and_nothing_is_zero():
    zeros, units = np.zeros((ROWS, 2, 2), np.float32), np.ones((ROWS, 3, 2), np.float32)
    units[:, 0] = 0
    assert figures(Forecasting(), SERIES, zeros, zeros[..., None], units=units)["smape"] == 0


def test_forecasting_baselines_by_hand():
    inputs = np.arange(2 * 6 * 3, dtype=np.float32).reshape(2, 6, 3)
    batch = Batch(
        jax.numpy.asarray(inputs), np.zeros((2, 4, 2), np.float32), None, np.ones(2, np.float32)
    )
    info = SimpleNamespace(**{**vars(SERIES), "horizon": 4})
    rules = Forecasting(objective="quantile").baselines(info)
    assert list(rules) == ["last_value", "seasonal_naive"]
    last, seasonal = (np.asarray(rule(batch)) for rule in rules.values())
    assert last.shape == seasonal.shape == (2, 4, 2, 3)
    for quantile in range(3):
        np.testing.assert_array_equal(last[..., quantile], np.repeat(inputs[:, 5:6, :2], 4, axis=1))
        np.testing.assert_array_equal(seasonal[..., quantile], inputs[:, [3, 4, 5, 3], :2])
    for season in (1, 7):  # no season, or one longer than what is seen
        assert list(
            Forecasting().baselines(SimpleNamespace(**{**vars(SERIES), "season": season}))
        ) == ["last_value"]


class Noise:
    """Windows of standard normal numbers."""

    def __init__(self, seed: int):
        self.targets = np.random.default_rng(seed).normal(size=(3000, 2, 2)).astype(np.float32)

    def size(self, split):
        return len(self.targets)

    def batch(self, split, windows):
        targets = self.targets[windows]
        return Batch(targets, targets, None, np.ones_like(targets))


def test_intervals_are_calibrated_on_validation(tmp_path):
    """Quantiles twice too narrow, and a lower one much too low, cover what they should."""
    task = Forecasting(objective="quantile", quantiles=(0.1, 0.5, 0.8))
    right = np.array([-1.2816, 0.0, 0.8416])
    wrong = np.array([3, 1, 0.5]) * right
    forward = lambda batch: np.broadcast_to(wrong, (*batch.targets.shape, 3))  # noqa: E731
    settled = task.settle(Noise(0), forward, tmp_path)
    np.testing.assert_allclose(settled.stretch, [1 / 3, 1, 2], rtol=0.05)
    assert task.settled(tmp_path) == settled and task.settled(tmp_path / "none") == task
    targets = Noise(1).targets
    found = np.asarray(settled.ordered(jax.numpy.asarray(forward(Noise(1).batch("", slice(None))))))
    below = (targets[..., None] <= found).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(below, [0.1, 0.5, 0.8], atol=0.015)  # 12,000: error .004
    assert replace(task, calibrate=False).settle(Noise(0), forward, tmp_path).stretch == ()
    again = settled.settle(Noise(0), forward, tmp_path)  # a run that begins with another's settings
    assert again.stretch == settled.stretch


def test_the_loss_of_a_calibrated_task_is_that_of_its_quantiles():
    """They are stretched once: the crps is twice the mean pinball loss."""
    task = Forecasting(objective="quantile", stretch=(0.5, 1.0, 2.0))
    generator = np.random.default_rng(0)
    targets, outputs = generator.normal(size=(4, 2, 1)), generator.normal(size=(4, 2, 1, 3))
    units = np.tile(np.float32([[0], [1], [1]]), (4, 1, 1))
    batch = Batch(targets, targets, None, np.ones_like(targets), units=units)
    figures = task.measure(jax.numpy.asarray(outputs), batch, None)
    assert float(figures["crps"].value[0]) == pytest.approx(2 * float(figures["loss"].value))


@pytest.mark.parametrize("quantiles", [(), (0.0, 0.5), (0.5, 1.0), (0.9, 0.1), (0.5, 0.5)])
def test_quantiles_must_make_sense(quantiles):
    with pytest.raises(UserError, match=r"task.quantiles"):
        Forecasting(quantiles=quantiles)


@pytest.mark.parametrize("idle", [{"quantiles": (0.2, 0.5)}, {"calibrate": False}])
def test_settings_of_quantiles_do_something_or_are_refused(idle):
    Forecasting().check(None)
    Forecasting(objective="quantile", **idle).check(None)
    with pytest.raises(UserError, match="quantile or a distribution, not with mae"):
        Forecasting(objective="mae", **idle).check(None)


def test_nothing_is_pooled_where_every_step_has_a_target():
    RecurrentModel(pooling="mean").sequence(2)
    with pytest.raises(UserError, match=r"model\.pooling mean: .*nothing is pooled"):
        RecurrentModel(pooling="mean").sequence(2, per_step=True)


def test_language_figures_and_unigram_baseline():
    generator = np.random.default_rng(5)
    actual = generator.integers(0, 5, (ROWS, 4)).astype(np.int32)
    logits = generator.normal(size=(ROWS, 4, 5)).astype(np.float32)
    weights = generator.integers(0, 2, (ROWS, 4)).astype(np.float32)
    info = SimpleNamespace(token_counts=(0, 1, 5, 3, 11))
    found = figures(LanguageModeling(), info, actual, logits, weights=weights)
    each = -np.take_along_axis(log_softmax(logits.astype(np.float64)), actual[..., None], -1)[
        ..., 0
    ]
    loss = each[weights > 0].mean()
    accuracy = (logits.argmax(-1) == actual)[weights > 0].mean()
    assert found == pytest.approx(
        {"loss": loss, "perplexity": np.exp(loss), "accuracy": accuracy}, rel=1e-5
    )

    rule = LanguageModeling().baselines(info)["unigram"]
    outputs = np.asarray(rule(Batch(None, actual[:2], None, None)).scores())
    assert outputs.shape == (2, 4, 5)
    np.testing.assert_allclose(
        np.exp(outputs[0, 0]), np.array([0.5, 1, 5, 3, 11]) / 20.5, rtol=1e-5
    )


def test_regression_figures_and_mean_baseline():
    generator = np.random.default_rng(6)
    actual, outputs = generator.normal(size=(2, ROWS, 1)).astype(np.float32)
    info = SimpleNamespace(target_mean=1.25)
    found = figures(SequenceRegression(), info, actual, outputs)
    error = outputs.astype(np.float64) - actual
    mse = np.mean(error**2)
    assert found == pytest.approx({"loss": mse, "mse": mse, "mae": np.abs(error).mean()}, rel=1e-5)
    outputs = SequenceRegression().baselines(info)["mean"](Batch(None, actual, None, None))
    np.testing.assert_array_equal(outputs, np.full((ROWS, 1), 1.25, np.float32))


def test_majority_guesses_the_most_frequent_label_of_training():
    rule = Classification().baselines(SimpleNamespace(class_counts=(2, 6, 0)))["majority"]
    outputs = np.asarray(rule(Batch(None, np.zeros(4, np.int32), None, None)))
    assert outputs.shape == (4, 3) and (outputs.argmax(1) == 1).all()
    np.testing.assert_allclose(np.exp(outputs[0]), [0.25, 0.75, 0], atol=1e-6)


def test_evaluation_counts_every_row_once_whatever_the_batch_size(tmp_path):
    config = small_runs.adding_run()  # 10 rows of test
    dataset = config.data.load(tmp_path)
    info, task = dataset.info, config.task
    mesh, steps, _ = assemble(config, info)
    params = steps.init().params
    (whole,) = dataset.evaluation("test", 10)
    error = np.asarray(steps.forward(params, None, whole)[1], np.float64) - whole.targets
    expected = {"loss": np.mean(error**2), "mse": np.mean(error**2), "mae": np.abs(error).mean()}
    for size in (10, 8):
        found = evaluate(steps, params, task, info, dataset.evaluation("test", size), mesh)
        assert found == pytest.approx(expected, rel=1e-5)
        baselines = evaluate_baselines(
            task, info, lambda size=size: dataset.evaluation("test", size), mesh
        )
        assert baselines["mean"]["mae"] == pytest.approx(
            np.abs(1.0 - whole.targets).mean(), rel=1e-5
        )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_classification_begins_at_log_of_the_classes_and_overfits_one_batch(cell):
    generator = np.random.default_rng(7)
    info = SimpleNamespace(labels=tuple("abcde"), vocabulary_size=12)
    lengths = generator.integers(2, 7, SIZE).astype(np.int32)
    inputs = np.where(
        np.arange(6) < lengths[:, None], generator.integers(3, 12, (SIZE, 6)), 0
    ).astype(np.int32)
    labels = generator.integers(0, 5, SIZE).astype(np.int32)
    batch = jax.tree.map(
        jax.numpy.asarray, Batch(inputs, labels, lengths, np.ones(SIZE, np.float32))
    )
    task = Classification()
    module = task.build(TextModel(cell=cell, hidden_size=8, embed_size=8), info)
    params = jax.jit(module.init)(jax.random.key(0), batch.inputs, batch.lengths)["params"]
    optimizer = optax.adam(0.05)

    def loss(params):
        return (
            mean := task.loss(
                module.apply({"params": params}, batch.inputs, batch.lengths)[1], batch
            )
        ).total / (mean.weight)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(80):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(5), abs=0.2)
    assert losses[-1] < 0.05


def test_language_model_begins_at_log_of_the_vocabulary(tmp_path):
    config = small_runs.language_run(tmp_path)
    dataset = config.data.load(tmp_path / "assets")
    mesh, steps, _ = assemble(config, dataset.info)
    rows = dataset.evaluation("test", 8)
    found = evaluate(steps, steps.init().params, config.task, dataset.info, rows, mesh)
    assert found["loss"] == pytest.approx(np.log(dataset.info.vocabulary_size), abs=0.1)


def test_only_tasks_with_a_form_of_input_predict_from_tables():
    with pytest.raises(UserError, match="LanguageModeling has no predictions for a table"):
        LanguageModeling().predict(None, None, None, 8)
