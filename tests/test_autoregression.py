# SPDX-License-Identifier: Apache-2.0
"""The step-by-step forecaster: what is drawn follows from what is learned, and reaches the user."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import small_runs

from flax_lstm import (
    Config,
    Forecasting,
    SegmentModel,
    StepModel,
    TrainConfig,
    UserError,
    load,
)
from flax_lstm.data import SeriesTable
from flax_lstm.data.base import Known, SeriesForm
from flax_lstm.nn.autoregression import StepForecaster
from flax_lstm.nn.cells import GRUCell, LSTMCell
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.likelihoods import Sizes, StudentT

pytestmark = pytest.mark.usefixtures("quick_compile")
LOOKBACK, HORIZON, CHANNELS = 9, 5, 2


@dataclass(frozen=True)
class Certain:
    """The next value is known."""

    sizes: ClassVar[Sizes] = Sizes(1, 0, 0)

    def sample(self, key: jax.Array, parameters: jax.Array) -> jax.Array:
        return parameters[..., 0]


@pytest.mark.parametrize(("season", "cell"), [(1, LSTMCell(4)), (3, GRUCell(4))])
def test_what_is_drawn_is_what_teacher_forcing_gives_for_it(season, cell):
    generator = np.random.default_rng(season)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    form = SeriesForm(LOOKBACK, HORIZON, CHANNELS, season=season, categories=(3,))
    form = SeriesForm(**{**vars(form), "likelihood": Certain()})
    module = StepForecaster(RNN(cell, backend="scan"), form, "standard", paths=2)
    x_BTC = 5 + normal(3, LOOKBACK, CHANNELS).cumsum(axis=1)
    known = Known(
        phase=np.zeros(3, np.int32),
        future=normal(3, LOOKBACK + HORIZON, 2),
        observed=(generator.random(x_BTC.shape) < 0.8).astype(np.float32),
        static=normal(3, 1),
        codes=np.array([[0], [2], [1]], np.int32),
    )
    variables = module.init(jax.random.key(0), x_BTC, None, None, known)
    variables = jax.tree.map(lambda p: p + 0.3, variables)
    _, paths = module.apply(variables, x_BTC, None, None, known)
    drawn = paths.values_BNCS
    assert drawn.shape == (3, HORIZON, CHANNELS, 2)
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 1])
    targets = drawn[..., 0]
    _, given = module.apply(variables, x_BTC, None, None, known, targets=targets)
    np.testing.assert_allclose(given[..., 0], targets, rtol=2e-4, atol=2e-4)
    # What is known of the future matters, and so does what was drawn before.
    moved = known._replace(future=known.future + 1)
    _, other = module.apply(variables, x_BTC, None, None, moved, targets=targets)
    assert (np.abs(other - given) > 1e-4).all()
    _, shifted = module.apply(variables, x_BTC, None, None, known, targets=targets.at[:, 0].add(1))
    assert np.allclose(shifted[:, 0], given[:, 0]) and not np.allclose(shifted[:, 1], given[:, 1])


def test_forecasts_move_with_the_level_and_the_scale():
    form = SeriesForm(LOOKBACK, HORIZON, 1, season=3, likelihood=StudentT())
    module = StepModel(hidden_size=4, paths=3, backend="scan").forecaster(form)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LOOKBACK, 1)), jnp.float32)
    variables = module.init(jax.random.key(0), x)
    plain = module.apply(variables, x)[1].values_BNCS
    other = module.apply(variables, 100 + 10 * x)[1].values_BNCS
    np.testing.assert_allclose(other, 100 + 10 * plain, rtol=1e-3, atol=0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    times = pd.date_range("2024-01-01", periods=120, freq="h")
    wave = 10 + 3 * np.sin(np.arange(120) * np.pi / 3)
    noise = np.random.default_rng(0).normal(0, 0.3, 120)
    plan = (np.arange(120) % 5 == 0).astype(int)
    frame = pd.DataFrame({"time": times, "y": wave + noise + plan, "plan": plan})
    frame.to_csv(folder / "series.csv", index=False)
    path = str(folder / "series.csv")
    data = SeriesTable(
        path=path, targets=("y",), lookback=12, horizon=4, season=6, future=("plan",)
    )
    task = Forecasting(objective="student_t")
    train = TrainConfig(steps=4, batch_size=16, learning_rate=0.01, eval_every=4)
    model = StepModel(hidden_size=4, paths=5)
    small_runs.fit(Config("steps", data, task, model, train, small_runs.ONE_DEVICE), folder / "run")
    return load(folder / "run")


def test_paths_reach_the_user_with_their_quantiles(run):
    frame = run.config.data.read(run.config.data.path)
    frame.loc[116:, "y"] = np.nan
    found = run.predict(frame, paths=True)
    paths = found[[f"path{n}" for n in range(1, 6)]].to_numpy()
    assert len(found) == 4 and not np.isnan(paths).any()
    assert (paths.std(axis=1) > 0).all()
    median = np.median(paths, axis=1)
    np.testing.assert_allclose(found["forecast"], median, rtol=1e-4)
    pd.testing.assert_frame_equal(found, run.predict(frame, paths=True))  # drawn the same again
    assert "path1" not in run.predict(frame)


def test_cutoffs_give_the_forecasts_of_what_was_known(run):
    frame = run.config.data.read(run.config.data.path)
    cutoffs = ["2024-01-04 07:00", "2024-01-05"]
    found = run.predict(frame, cutoffs=cutoffs)
    assert found.columns[0] == "cutoff" and len(found) == 8
    for cutoff in cutoffs:
        earlier = frame.copy()
        earlier.loc[pd.to_datetime(earlier["time"]) > pd.Timestamp(cutoff), "y"] = np.nan
        part = found[found["cutoff"] == pd.Timestamp(cutoff)].drop(columns="cutoff")
        expected = run.predict(earlier)
        pd.testing.assert_frame_equal(part.reset_index(drop=True), expected)
        assert expected["time"].iloc[0] == pd.Timestamp(cutoff) + pd.Timedelta("1h")
    for cutoff, message in (("soon", "write a time"), ("2023-01-01", "the input begins at")):
        with pytest.raises(UserError, match=f"--cutoffs {cutoff}: {message}"):
            run.predict(frame, cutoffs=[cutoff])


def test_what_a_step_model_cannot_do_is_said():
    form = SeriesForm(LOOKBACK, HORIZON, 1)
    with pytest.raises(UserError, match=r"--task\.objective student_t"):
        StepModel().forecaster(form)
    likely = SeriesForm(LOOKBACK, HORIZON, 1, likelihood=StudentT())
    with pytest.raises(UserError, match="every input in the future as well"):
        StepModel().forecaster(likely).init(jax.random.key(0), jnp.ones((1, LOOKBACK, 2)))
    with pytest.raises(UserError, match="at least 3 steps"):
        StepModel().forecaster(SeriesForm(2, 2, likelihood=StudentT()))
    for wrong in ({"paths": 1}, {"hidden_size": 0}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=r"model\."):
            StepModel(**wrong)
    assert SegmentModel().forecaster(likely).form.outputs == 3
