# SPDX-License-Identifier: Apache-2.0
"""Several seeds of a config, and the mean of several runs as one model."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_runs

from flax_lstm import Ensemble, UserError, load
from flax_lstm.__main__ import main

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds each of a classifier of texts and of a quantile forecaster."""
    folder = tmp_path_factory.mktemp("ensemble")
    for kind in (small_runs.text_run, small_runs.series_run):
        name = kind.__name__.removesuffix("_run")
        (folder / name).mkdir()
        config = kind(folder / name)
        for seed in (0, 1):
            small_runs.fit(replace(config, seed=seed), folder / name / f"seed-{seed}")
    return folder


def by_seed(folder):
    return [load(folder / f"seed-{n}") for n in (0, 1)]


def test_classes_are_judged_by_their_mean_probability(folder):
    whole, parts = load(folder / "text"), by_seed(folder / "text")
    assert isinstance(whole, Ensemble)
    table = pd.DataFrame({"text": ["a fine", "dull b", "fine fine"]})
    found, apart = whole.predict(table), [run.predict(table) for run in parts]
    for label in whole.info.labels:
        name = f"probability_{label}"
        mean = np.mean([one[name] for one in apart], axis=0)
        np.testing.assert_allclose(found[name], mean, rtol=1e-6)  # of float32 logits
    rows = whole.dataset()
    forwards, losses = [run.forward() for run in parts], []
    for batch in rows.evaluation("test", 8):
        shares = np.exp([forward(batch) for forward in forwards], dtype=np.float64)
        mean = (shares / shares.sum(-1, keepdims=True)).mean(0)
        losses += [-np.log(mean[np.arange(8), batch.targets])[batch.weights > 0]]
    expected = np.concatenate(losses).mean()
    assert whole.evaluate()["loss"] == pytest.approx(expected, rel=1e-5)


def test_forecasts_are_the_mean_of_calibrated_ones(folder):
    whole, parts = load(folder / "series"), by_seed(folder / "series")
    table = pd.read_csv(whole.config.data.path)
    found, apart = whole.predict(table), [run.predict(table) for run in parts]
    for name in ("forecast", "q0.1", "q0.9"):
        mean = np.mean([one[name] for one in apart], axis=0)
        np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-5)
    assert found["time"].equals(apart[0]["time"])
    stretches = [run.config.task.stretch for run in parts]
    assert all(stretches) and stretches[0] != stretches[1]
    assert whole.config.task.stretch == ()


def test_figures_of_several_folders_are_printed_with_each_ones_step(folder, capsys):
    names = [str(folder / "text" / f"seed-{n}") for n in (0, 1)]
    assert main(["evaluate", *names, "--json"]) == 0
    apart = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(folder / "text"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == apart
    assert apart["step"] == [run.step() for run in by_seed(folder / "text")]
    assert (folder / "text" / "evaluation" / "test.json").exists()
    assert main(["predict", *names, "--text", "a fine"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("bad", "good")


def test_what_is_not_comparable_is_not_averaged(folder, capsys):
    assert main(["evaluate", str(folder / "text"), str(folder / "series" / "seed-0")]) == 2
    assert "differ in their data and task" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no weights in common"):
        load(folder / "text").params()
    with pytest.raises(UserError, match="no run here"):
        load(folder)


def test_seeds_are_trained_in_folders_of_their_own(tmp_path, capsys):
    flags = ["train", "--config", "adding_problem", "--seeds", "2", "--seed", "5", "--no-report"]
    small = {"train.steps": 2, "train.eval-every": 2, "data.length": 6, "model.hidden-size": 4}
    small |= {"data.validation-examples": 8, "data.test-examples": 8, "train.batch-size": 8}
    flags += [word for name, value in small.items() for word in (f"--{name}", str(value))]
    flags += ["--workdir", str(tmp_path / "many")]
    assert main(flags) == 0
    told = capsys.readouterr().err
    results = [
        json.loads((tmp_path / "many" / f"seed-{n}" / "result.json").read_text()) for n in (5, 6)
    ]
    assert [result["seed"] for result in results] == [5, 6]
    losses = [result["test"]["loss"] for result in results]
    assert f"{np.mean(losses):.4g}" in told and f"{np.std(losses, ddof=1):.4g}" in told
    assert main(flags) == 0  # both are finished
    assert capsys.readouterr().err.count("this run is finished") == 2
    assert main([*flags, "--workdir", str(tmp_path / "many" / "seed-5")]) == 2
    assert "holds a run of one seed" in capsys.readouterr().err
    assert main([*flags, "--seeds", "3", "--no-test"]) == 0  # the third has not read the test
    assert "adding_problem: validation, 3 seeds" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "many" / "seed-\u00b2").mkdir()
    (tmp_path / "many" / "seed-\u00b2" / "config.py").touch()
    assert len(load(tmp_path / "many").members) == 3
    last = ["--seed", str(2**32 - 1), "--workdir", str(tmp_path / "beyond")]
    assert main([*flags, *last]) == 2  # before the first of them is trained
    assert not (tmp_path / "beyond").exists()
    assert main([*flags, "--seeds", "0"]) == 2
    assert "--seeds 0" in capsys.readouterr().err
