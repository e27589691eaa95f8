# SPDX-License-Identifier: Apache-2.0
"""Rolling origins over the test period of a run."""

import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from commands import call

from flax_lstm import (
    Config,
    Forecasting,
    MeshConfig,
    SegmentModel,
    TrainConfig,
    UserError,
    fit,
    load,
)
from flax_lstm.backtest import _configs, backtest, origins
from flax_lstm.commands.backtest import report_of, show
from flax_lstm.data import PanelTable, SeriesTable

pytestmark = pytest.mark.usefixtures("quick_compile")
TRAIN = TrainConfig(steps=4, batch_size=16, learning_rate=0.01, eval_every=4, checkpoint_every=4)
MODEL = SegmentModel(hidden_size=4, segment=3, dropout=0.0)


def wave(rows: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.3, size=rows)
    return 10 + np.sin(np.arange(rows) * np.pi / 3) * 3 + noise


@pytest.fixture(scope="module")
def series_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    times = pd.date_range("2024-01-01", periods=160, freq="h")
    frame = pd.DataFrame({"time": times, "a": wave(160, 0), "b": 100 * wave(160, 1)})
    frame.loc[150, "a"] = np.nan
    frame.to_csv(folder / "series.csv", index=False)
    data = SeriesTable(
        path=str(folder / "series.csv"), lookback=12, horizon=4, season=6, missing="forward_fill"
    )
    task = Forecasting(objective="quantile", quantiles=(0.1, 0.5, 0.9))
    config = Config("waves", data, task, MODEL, TRAIN, MeshConfig(data=1))
    fit(config, folder / "run", plots=False)
    return folder / "run"


@pytest.fixture(scope="module")
def panel_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panel")
    parts = [
        pd.DataFrame(
            {
                "unique_id": f"s{n}",
                "ds": pd.date_range("2024-01-01", periods=60 + n, freq="D"),
                "y": 10.0**n * wave(60 + n, n),
            }
        )
        for n in range(3)
    ]
    pd.concat(parts).to_parquet(folder / "panel.parquet", index=False)
    data = PanelTable(
        path=str(folder / "panel.parquet"), lookback=12, horizon=4, season=6, test=8, calendar=False
    )
    config = Config("panel", data, Forecasting(), MODEL, TRAIN, MeshConfig(data=1))
    fit(config, folder / "run", plots=False)
    return folder / "run"


def test_forecasts_are_those_of_predict_from_each_origin(series_run):
    result, run = backtest(series_run, windows=3), load(series_run)
    rows = result.rows()
    frame = run.config.data.read(run.config.data.path)
    assert rows["origin"].nunique() == 3 and len(rows) == 3 * 4 * 2
    assert rows["time"].max() == pd.Timestamp(frame["time"].iloc[-1])
    for origin, part in rows.groupby("origin"):
        known = frame[pd.to_datetime(frame["time"]) < origin]
        expected = run.predict(known)
        for name in ("forecast", "q0.1", "q0.9"):
            np.testing.assert_allclose(part[name], expected[name], rtol=1e-5)
        assert (part["time"].to_numpy() == expected["time"].to_numpy()).all()
    there = frame.melt("time", var_name="channel", value_name="actual")
    there["time"] = pd.to_datetime(there["time"])
    merged = rows.merge(there, on=["time", "channel"])
    values = pd.to_numeric(merged["actual_y"], errors="coerce")
    np.testing.assert_allclose(merged["actual_x"], values, rtol=1e-6)
    assert merged["actual_x"].isna().sum() == 1  # filled in for the model, not for the figures


def test_figures_over_all_origins_are_those_of_evaluate(series_run, panel_run):
    for folder in (series_run, panel_run):
        found = backtest(folder, step=1).figures()["model"]
        expected = load(folder).evaluate("test")
        assert found["mase"] == pytest.approx(expected["mase"], rel=0.01)
        assert found["smape"] == pytest.approx(expected["smape"], rel=0.01)
        # The linear forecast, too, is beside the figures of the run itself.
        shown = json.loads((folder / "result.json").read_text())["baselines"]["linear"]
        linear = backtest(folder, step=1).figures()["linear"]
        assert shown["mase"] == pytest.approx(linear["mase"], rel=0.01)
    coverage = backtest(series_run, step=1).figures()["model"]["coverage"]
    assert coverage == pytest.approx(load(series_run).evaluate("test")["coverage"], abs=0.01)


def test_rules_by_hand(panel_run):
    result = backtest(panel_run)
    frame = pd.read_parquet(panel_run.parent / "panel.parquet")
    for row, (number, origin) in enumerate(
        zip(result.series_W, result.times_WN[:, 0], strict=True)
    ):
        name = result.dataset.buffer.ids[number]
        past = frame.loc[(frame.unique_id == name) & (frame.ds < origin), "y"].to_numpy()[-12:]
        expected = {
            "last_value": np.repeat(past[-1], 4),
            "seasonal_naive": past[-6:-2],
            "drift": past[-1] + np.arange(1, 5) * (past[-1] - past[0]) / 11,
            "mean": np.repeat(past.mean(), 4),
        }
        for rule, values in expected.items():
            np.testing.assert_allclose(result.forecasts[rule][row, :, 0], values, rtol=2e-4)
    (drawn,) = result.task._naive(result.dataset, result.windows_W).items()  # beside the pictures
    assert drawn[0] == "seasonal_naive"
    np.testing.assert_allclose(drawn[1], result.forecasts["seasonal_naive"])


def test_origins_are_counted_from_the_end_of_each_series(panel_run):
    dataset = backtest(panel_run).dataset  # 8 test steps and a horizon of 4: 5 windows a series
    assert origins(dataset, 0, 4).tolist() == [0, 4, 5, 9, 10, 14]
    assert origins(dataset, 1, 4).tolist() == [4, 9, 14]
    assert origins(dataset, 2, 1).tolist() == [3, 4, 8, 9, 13, 14]


def test_a_picture_shows_the_origins_that_are_asked_for(panel_run):
    result = backtest(panel_run)
    assert result.shown().tolist() == list(range(6))
    (begin,) = np.unique(result.times_WN[1, 0])
    shown = result.shown([str(begin)[:10]])
    assert (result.times_WN[shown, 0] == begin).all() and len(shown) >= 1
    for time, message in (("2020-01-01", "they begin from 2024-02"), ("soon", "write a time")):
        with pytest.raises(UserError, match=f"--draw {time}: .*{message}"):
            result.shown([time])
    between = str(result.dataset.times("test", np.array([3]))[0, 0])[:10]
    with pytest.raises(UserError, match=f"--draw {between}: not among the origins; --step 1"):
        result.shown([between])


def test_the_command_prints_and_writes(panel_run, tmp_path, capsys):
    outcome = call(capsys, f"backtest {panel_run} --json --output {tmp_path}/f.parquet")
    assert outcome.code == 0, outcome.err
    report, rows = json.loads(outcome.out), pd.read_parquet(tmp_path / "f.parquet")
    assert report["windows"] == 6 and len(rows) == 24 and rows.columns[0] == "unique_id"
    assert report["figures"]["model"]["mae"] == pytest.approx(
        np.abs(rows["forecast"] - rows["actual"]).mean()
    )
    assert set(report["by_series"]) == {"s0", "s1", "s2"}
    assert (panel_run / "plots" / "backtest.png").stat().st_size > 10_000
    shown = call(capsys, f"backtest {panel_run} {panel_run} --windows 1")
    assert "MASE" in shown.out and "linear" in shown.out
    assert "as good or better" in shown.out or "better than" in shown.out
    refused = call(capsys, f"backtest {panel_run} --output {tmp_path}/f.parquet")
    assert refused.code == 2 and "--overwrite" in refused.err


def test_a_config_is_trained_first(panel_run, tmp_path, capsys):
    training = f"--config {panel_run}/config.py --train.steps 2 --train.eval-every 2"
    outcome = call(capsys, f"backtest {tmp_path}/run --json {training} --windows 1")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["windows"] == 3  # of three series; nothing else is on stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    for flags, said in (
        ("--seed 1", "--seed is a flag of training: give the --config"),
        (f"{tmp_path} --config quickstart", "name one DIR, or none"),
        ("--config none-such", "none-such"),
        ("--config imdb_lstm", "for configs that forecast series"),
    ):
        refused = call(capsys, f"backtest {tmp_path}/run {flags}")
        assert refused.code == 2 and said in refused.err


def test_what_could_not_be_judged_is_null(panel_run, capsys):
    result = backtest(panel_run)
    counted = result.truth.counted_WNC.copy()
    counted[:, 1], counted[result.series_W == 0] = False, False
    blind = replace(result, truth=replace(result.truth, counted_WNC=counted))
    report = json.loads(json.dumps(report_of(blind), allow_nan=False))
    steps = report["by_horizon"]["model"]
    assert steps[1] is None and all(steps[n] > 0 for n in (0, 2, 3))
    assert report["by_series"]["s0"]["model"] is None and report["by_series"]["s1"]["model"] > 0
    show(report, "")
    assert "-" in capsys.readouterr().out


def test_models_are_compared_on_the_same_windows_under_their_own_names(
    series_run, panel_run, tmp_path, capsys
):
    """Another look-back, season and objective: each forecasts as it does alone."""
    config = load(series_run).config
    data = replace(config.data, lookback=24, season=1)
    other = replace(config, data=data, task=Forecasting(objective="mae"))
    fit(other, tmp_path / "long", plots=False)
    alone = [backtest(folder, windows=3) for folder in (series_run, tmp_path / "long")]
    both = backtest(series_run, windows=3, beside=[tmp_path / "long"])
    assert both.models == ("run", "long") and both.nominal().keys() == {"run"}
    for name, single in zip(both.models, alone, strict=True):
        np.testing.assert_array_equal(both.forecasts[name], single.forecasts["model"])
    rows = both.rows()
    np.testing.assert_array_equal(rows["run q0.9"], alone[0].rows()["q0.9"])
    np.testing.assert_array_equal(rows["long"], alone[1].rows()["forecast"])
    said = both.verdict().splitlines()
    ours, theirs = (both.figures()[name]["mase"] for name in both.models)
    best, second = ("run", "long") if ours < theirs else ("long", "run")
    assert len(said) == 3 and said[2].startswith(f"{best} is better than {second}: MASE")

    outcome = call(capsys, f"backtest {series_run} {tmp_path}/long --compare --json --windows 3")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["models"] == [*both.models] == [*report["diebold_mariano"]]
    assert report["figures"]["long"]["mase"] == pytest.approx(theirs)
    shown = call(capsys, f"backtest {series_run} {tmp_path}/long --compare --windows 3")
    assert shown.code == 0 and "coverage of run" in shown.out and "long" in shown.out
    for folders, said in (
        (f"{series_run}", "two folders or more"),
        (f"{series_run} {series_run}", "named twice"),
        (f"{series_run} {panel_run}", "differ in data.targets"),
    ):
        refused = call(capsys, f"backtest {folders} --compare")
        assert refused.code == 2 and said in refused.err


def test_models_of_other_data_or_times_are_not_compared(series_run, tmp_path):
    config = load(series_run).config
    frame = config.data.read(config.data.path)
    frame.assign(b=[1.01 * float(x) for x in frame["b"]]).to_csv(tmp_path / "b.csv", index=False)
    other, longer = replace(config.data, path=str(tmp_path / "b.csv")), (0.6, 0.1, 0.3)
    for name, data in (("other", other), ("longer", replace(config.data, split=longer))):
        fit(replace(config, data=data), tmp_path / name, plots=False)
    for one, two in ((series_run, tmp_path / "other"), (tmp_path / "longer", series_run)):
        with pytest.raises(UserError, match="different data, or test on other times"):
            backtest(one, beside=[two])
    assert len(backtest(series_run, windows=2, beside=[tmp_path / "longer"]).windows_W) == 2


def test_a_refit_says_a_line_for_each_origin(series_run, tmp_path, capsys):
    run = shutil.copytree(series_run, tmp_path / "run")
    outcome = call(capsys, f"backtest {run} --refit --windows 2 --json")
    assert outcome.code == 0 and json.loads(outcome.out)["windows"] == 2
    said = outcome.err.splitlines()
    lines = [line.split("; ")[0] for line in said if "; training" in line]
    assert lines == [f"{n} of 2 forecasts made" for n in (0, 1)]
    assert not [line for line in said if line.startswith("step ") or "last_value" in line]
    assert sum("frequency h" in line for line in said) == 1  # of the first origin's alone


@pytest.mark.slow
def test_a_refit_knows_nothing_of_what_follows(series_run):
    result = backtest(series_run, windows=2, refit=True)
    assert len(result.windows_W) == 2
    for origin in np.unique(result.times_WN[:, 0]):
        folder = series_run / "backtest" / str(origin).replace(":", "")[:17]
        table = pd.read_parquet(folder.with_suffix(".parquet"))
        info = load(folder).info
        before = pd.to_datetime(table["time"]) < origin
        assert len(table) == before.sum() + 4
        # The scaler is of the rows before validation, and so before the origin.
        train = pd.to_numeric(table["b"])[: before.sum() - 16]
        assert info.mean[1] == pytest.approx(train.mean())


def trading(rows: int, closed: set[int], name: str) -> pd.DataFrame:
    """Business days without those on which a market was closed."""
    days = [
        day for n, day in enumerate(pd.bdate_range("2024-01-01", periods=rows)) if n not in closed
    ]
    return pd.DataFrame({"unique_id": name, "ds": days, "y": wave(len(days), 0)})


@pytest.mark.parametrize("panel", [False, True])
def test_a_refit_ends_with_its_forecast_whatever_was_closed_in_it(tmp_path, panel):
    """One market is closed within a horizon, the other is not: each table ends with its own."""
    frame = trading(100, {5, 97}, "a")
    common = {"lookback": 10, "horizon": 4, "season": 5, "calendar": False}
    data = SeriesTable(time_column="ds", targets=("y",), **common)
    if panel:
        frame = pd.concat([frame, trading(99, {7}, "b")], ignore_index=True)
        data = PanelTable(**common, test=8)
    data = data.holding(frame)
    dataset = data.load(tmp_path / "assets")
    task = Forecasting(objective="quantile", stretch=(2.0, 1.0, 2.0))
    run = SimpleNamespace(workdir=tmp_path, config=Config("run", data, task, MODEL, TRAIN))
    windows_W = origins(dataset, 2, 1)
    found = {}
    for folder, numbers, config in _configs(run, data, dataset, windows_W):
        assert config.task.stretch == ()  # it is calibrated anew
        again = config.data.load(folder / "assets")
        assert dataset.info.horizon == again.info.horizon
        for n in numbers:
            series, times = (
                dataset.series("test")[windows_W[n]],
                dataset.times("test", windows_W)[n],
            )
            own = np.flatnonzero(again.series("test") == series)
            np.testing.assert_array_equal(again.times("test", own[-1:])[0], times)
            found[int(n)] = times
    assert sorted(found) == list(range(len(windows_W)))


class Naive:
    """Stands in for a model of statsforecast: the last season again, or the last value."""

    least = 0  # rows that it needs

    def __init__(self, season_length: int):
        self.season = season_length

    def forecast(self, y: np.ndarray, h: int) -> dict[str, np.ndarray]:
        if len(y) < self.least:
            raise NotImplementedError("tiny datasets")
        return {"mean": np.resize(y[-self.season :], h)}


def test_statistical_models_know_what_was_before_their_origin(
    panel_run, monkeypatch, capsys, caplog
):
    package, models = ModuleType("statsforecast"), ModuleType("statsforecast.models")
    models.AutoETS = models.AutoARIMA = Naive
    monkeypatch.setitem(sys.modules, "statsforecast", package)
    monkeypatch.setitem(sys.modules, "statsforecast.models", models)
    result = backtest(panel_run, statistical=True)
    for name in ("ets", "arima"):
        np.testing.assert_allclose(
            result.forecasts[name], result.forecasts["seasonal_naive"], rtol=2e-4
        )
        assert name in result.figures()
    monkeypatch.setattr(Naive, "least", 53)  # there are 52 rows before the first origin
    found = backtest(panel_run, statistical=True).forecasts
    np.testing.assert_allclose(found["ets"][0], found["last_value"][0], rtol=1e-5)
    np.testing.assert_allclose(found["ets"][1:], result.forecasts["ets"][1:])
    assert "arima could not be fitted for 1 of 6 forecasts" in caplog.text
    monkeypatch.setitem(sys.modules, "statsforecast.models", None)
    outcome = call(capsys, f"backtest {panel_run} --statistical")
    assert outcome.code == 2 and "pip install 'flax-lstm[stats]'" in outcome.err


def test_ets_and_arima_of_statsforecast_find_a_season(series_run):
    pytest.importorskip("statsforecast")
    result = backtest(series_run, windows=1, statistical=True)
    found = result.figures()
    assert max(found[name]["mase"] for name in ("ets", "arima")) < found["mean"]["mase"]
