# SPDX-License-Identifier: Apache-2.0
"""The command line as a user types it: train, evaluate, predict, from anywhere."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import compiling
import jax
import numpy as np
import pandas as pd
import pytest
from commands import KEEP, ROOT, SERIES, SMALL, call, series, texts

from flax_lstm import load, load_config
from flax_lstm.__main__ import main
from flax_lstm.commands import COMMANDS
from flax_lstm.commands.tables import WRITERS
from flax_lstm.commands.train import main as train
from flax_lstm.config import shipped_configs
from flax_lstm.data.tables import read_table
from flax_lstm.runs.report import params_sha256, versions


@pytest.fixture(scope="module", autouse=True)
def quick():
    """XLA without its dear passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


QUANTILES = "--data.path load.csv --data.targets load --task.objective quantile --train.ema 0.5"


@pytest.fixture(scope="module")
def series_run(tmp_path_factory):
    """A run of quantile forecasts with averaged weights, its paths relative to its working
    directory."""
    home = tmp_path_factory.mktemp("series")
    series().to_csv(home / "load.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert train([*KEEP, "--workdir", "out/run", *f"{SERIES} {QUANTILES}".split()]) == 0
    return home / "out/run"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    home = tmp_path_factory.mktemp("texts")
    texts().to_csv(home / "reviews.csv", index=False)
    flags = (
        f"--config text_table --data.path {home}/reviews.csv --data.max-length 16 --workdir "
        f"{home}/run {SMALL}"
    )
    learn = (
        "--train.steps 120 --train.eval-every 120 --train.learning-rate 0.05 --train.ema 0 "
        "--model.embed-dropout 0"
    )
    model = (
        "--model.cell gru --model.embed-size 4 --model.bidirectional False --model.dropout 0 "
        "--model.head-dropout 0"
    )
    assert train([*KEEP, *f"{flags} {learn} {model} --model.hidden-size 8".split()]) == 0
    return home / "run"


def test_work_directory_has_the_promised_files(series_run):
    there = {path.name for path in series_run.iterdir()}
    assert {
        "config.py",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "assets",
        "tensorboard",
        "plots",
    } <= there
    assert (
        list((series_run / "tensorboard").iterdir())
        and (series_run / "plots" / "forecasts.png").stat().st_size
    )


def test_result_has_the_promised_fields(series_run):
    result = json.loads((series_run / "result.json").read_text())
    promised = (
        "task name steps best_step parameters params_sha256 wall_seconds sessions seed "
        "validation test baselines"
    )
    assert {*promised.split(), "versions", "device", "backend"} <= set(result)
    assert (result["task"], result["name"], result["steps"]) == ("Forecasting", "series_table", 4)
    assert set(result["test"]) == {
        *("loss", "mse", "mae", "mse_original", "mae_original", "smape", "mase", "crps"),
        *("wql", "coverage", "nominal", "width", "observed"),
    }
    assert set(result["baselines"]) == {"last_value", "seasonal_naive", "linear"}


def test_metrics_are_rows_of_increasing_steps(series_run):
    rows = [json.loads(line) for line in (series_run / "metrics.jsonl").read_text().splitlines()]
    keys = [(row["step"], row["split"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert [step for step, split in keys if split == "train"] == [2, 4]
    assert [step for step, split in keys if split == "validation"] == [2, 4]
    assert all({"loss", "seconds"} <= set(row) for row in rows)
    assert {"learning_rate", "grad_norm", "examples_per_second"} <= set(rows[0])


def test_figures_are_those_of_the_averaged_weights_at_the_best_step(series_run):
    result = json.loads((series_run / "result.json").read_text())
    rows = [json.loads(line) for line in (series_run / "metrics.jsonl").read_text().splitlines()]
    validation = {row["step"]: row for row in rows if row["split"] == "validation"}
    best = min(validation.values(), key=lambda row: row["loss"])
    assert result["best_step"] == best["step"]
    # The quantiles but not the point forecasts are calibrated at the end.
    points = ("mse", "mae", "mase", "smape", "observed")
    expected = {name: best[name] for name in points}
    assert {name: result["validation"][name] for name in points} == pytest.approx(
        expected, rel=1e-5
    )
    # The plain weights of the last step have another hash than their average.
    assert params_sha256(load(series_run).params("latest")) != result["params_sha256"]


def test_evaluate_prints_one_json_object_with_the_figures_of_the_result(series_run, capfd):
    result = json.loads((series_run / "result.json").read_text())
    for split in ("test", "validation"):
        outcome = call(capfd, f"evaluate --split {split} --json", series_run)
        figures = json.loads(outcome.out)  # fails on anything else on standard output
        assert outcome.code == 0 and outcome.out.count("\n") == 1
        assert {name: figures[name] for name in result[split]} == pytest.approx(
            result[split], rel=1e-6
        )
        assert figures["split"] == split and figures["step"] == result["best_step"]
    # The rows of test: 20 % of 120; windows of 2 steps.
    assert json.loads(call(capfd, "evaluate --json", series_run).out)["examples"] == 24 - 2 + 1


def test_evaluate_without_json_is_for_people(series_run, capsys):
    outcome = call(capsys, "evaluate", series_run)
    assert outcome.code == 0
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["split"] == "test" and float(lines["mse"]) > 0


def test_evaluate_takes_a_checkpoint_by_name_or_step(series_run, capsys):
    result = json.loads((series_run / "result.json").read_text())

    def evaluated(checkpoint):
        return json.loads(
            call(capsys, f"evaluate --json --checkpoint {checkpoint}", series_run).out
        )

    latest = evaluated("latest")
    assert latest["step"] == 4 and evaluated(4) == latest
    assert evaluated("best")["step"] == result["best_step"]
    outcome = call(capsys, "evaluate --checkpoint 77", series_run)
    assert outcome.code == 2 and "best, latest or one of" in outcome.err and "4" in outcome.err


def test_a_run_works_from_any_directory(series_run, tmp_path, monkeypatch, capsys):
    before = json.loads(call(capsys, "evaluate --json", series_run).out)
    monkeypatch.chdir(tmp_path)
    assert json.loads(call(capsys, "evaluate --json", series_run).out) == before
    assert os.path.isabs(load(series_run).config.data.path)


def test_the_same_command_on_a_finished_run_prints_its_result(series_run, monkeypatch, capsys):
    monkeypatch.chdir(series_run.parent.parent)
    before = (series_run / "result.json").read_bytes()
    outcome = call(capsys, f"train --workdir out/run {SERIES} {QUANTILES}")
    assert outcome.code == 0 and "finished" in outcome.err and "model" in outcome.err
    assert (series_run / "result.json").read_bytes() == before


def test_another_setting_on_a_finished_run_is_refused_field_by_field(
    series_run, monkeypatch, capsys
):
    monkeypatch.chdir(series_run.parent.parent)
    flags = f"{SERIES} {QUANTILES} --task.objective mse --train.learning-rate 0.5"
    outcome = call(capsys, f"train --workdir out/run {flags}")
    assert outcome.code == 2
    assert "task.objective: 'quantile' there, 'mse' now" in outcome.err
    assert "train.learning_rate: 0.001 there, 0.5 now" in outcome.err


def test_forecasts_are_long_rows_after_the_last_time(series_run, tmp_path, capsys):
    series(20).to_csv(tmp_path / "new.csv", index=False)
    outcome = call(
        capsys,
        "predict --input",
        tmp_path / "new.csv",
        "--output",
        tmp_path / "out.csv",
        series_run,
    )
    assert outcome.code == 0 and outcome.out == ""
    rows = pd.read_csv(tmp_path / "out.csv")
    assert list(rows.columns) == ["time", "channel", "horizon", "forecast", "q0.1", "q0.5", "q0.9"]
    assert rows.time.tolist() == ["2024-01-01 20:00:00", "2024-01-01 21:00:00"]
    assert rows.channel.tolist() == ["load", "load"] and rows.horizon.tolist() == [1, 2]
    np.testing.assert_allclose(rows.forecast, rows["q0.5"])


def test_classification_from_a_text(text_run, capsys):
    outcome = call(capsys, "predict --text", "a fine film, number 7", text_run)
    answer = json.loads(outcome.out)
    assert outcome.code == 0 and list(answer) == ["label", "probability", "probabilities"]
    assert (
        answer["label"] == "good" and answer["probability"] == answer["probabilities"]["good"] > 0.5
    )
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert (
        json.loads(call(capsys, "predict --text", "an awful film, number 8", text_run).out)["label"]
        == "bad"
    )


@pytest.mark.parametrize("extension", sorted(WRITERS))
def test_classification_of_a_table_keeps_rows_and_columns(text_run, tmp_path, capsys, extension):
    new = (
        texts(21).drop(columns="label").iloc[::-1].reset_index(drop=True)
    )  # longest ids first, not sorted by length
    WRITERS[extension](new, tmp_path / f"new{extension}")
    output = tmp_path / f"out{extension}"
    outcome = call(
        capsys, "predict --input", tmp_path / f"new{extension}", "--output", output, text_run
    )
    assert outcome.code == 0 and outcome.out == ""
    result = read_table(output)
    shares = ["probability_bad", "probability_good"]
    assert list(result.columns) == ["id", "text", "predicted", "probability", *shares]
    assert (
        result["id"].astype(int).tolist() == new["id"].tolist()
        and result["text"].tolist() == new["text"].tolist()
    )
    assert result["predicted"].tolist() == ["bad" if n % 2 == 0 else "good" for n in new["id"]]
    assert (result["probability"].astype(float) > 0.5).all()


def test_columns_of_the_input_that_a_prediction_would_hide_are_renamed(text_run, tmp_path, capsys):
    texts(5, label="?").to_csv(tmp_path / "new.csv", index=False)
    call(
        capsys, "predict --input", tmp_path / "new.csv", "--output", tmp_path / "out.csv", text_run
    )
    result = pd.read_csv(tmp_path / "out.csv")
    assert set(result["label"]) == {"?"} and set(result["predicted"]) == {"good", "bad"}
    (tmp_path / "out.csv").rename(tmp_path / "new.csv")
    call(
        capsys, "predict --input", tmp_path / "new.csv", "--output", tmp_path / "out.csv", text_run
    )
    again = pd.read_csv(tmp_path / "out.csv")
    assert again["predicted_input"].tolist() == result["predicted"].tolist()


def test_an_existing_output_is_kept_unless_asked(text_run, tmp_path, capsys):
    texts(3).to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "out.csv").write_text("mine\n")
    arguments = (
        "predict --input",
        tmp_path / "new.csv",
        "--output",
        tmp_path / "out.csv",
        text_run,
    )
    outcome = call(capsys, *arguments)
    assert (
        outcome.code == 2
        and "--overwrite" in outcome.err
        and (tmp_path / "out.csv").read_text() == "mine\n"
    )
    assert call(capsys, *arguments, "--overwrite").code == 0
    assert len(pd.read_csv(tmp_path / "out.csv")) == 3


@pytest.mark.parametrize(
    "run, gates, inputs, units", [("series_run", 4, 1 + 2, 4), ("text_run", 3, 4, 8)]
)
def test_the_cell_is_one_flag(request, run, gates, inputs, units):
    """Both configs have an LSTM; one run was given `--model.cell gru`. Inputs: channel and
    calendar, of which the day alone comes round twice, or tokens."""
    leaves = jax.tree_util.tree_leaves_with_path(load(request.getfixturevalue(run)).params())
    shapes = {path[-1].key: leaf.shape for path, leaf in leaves}
    assert shapes["input"] == (inputs, gates, units) and shapes["recurrent"] == (
        units,
        gates,
        units,
    )
    assert ("recurrent_bias" in shapes) == (gates == 3)


def test_underscores_are_as_good_as_hyphens(tmp_path, capsys):
    outcome = call(capsys, f"train --workdir {tmp_path}/run --train.batch_size 8 --train.steps 0")
    assert outcome.code == 2 and "train.steps" in outcome.err and "batch" not in outcome.err


def test_help_lists_every_knob(capsys):
    outcome = call(capsys, "train --config series_table --help")
    assert outcome.code == 0
    shown = " ".join(outcome.out.split())
    for flag in (
        "--model.hidden-size",
        "--data.lookback",
        "--task.objective",
        "--train.ema",
        "--mesh.fsdp",
        "--seed",
    ):
        assert flag in shown
    assert (
        "units, and the size" in shown and "{lstm,gru,rnn" in shown
    )  # the comment behind the field, and the choices


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help_that_fits_80_columns(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = call(capsys, f"{command} --help")
    assert outcome.code == 0 and outcome.out.startswith(f"usage: flax-lstm {command}")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "(default: )" not in outcome.out.split("options")[0]


def test_flags_are_those_of_the_commands_own_config(capsys, tmp_path):
    """`prepare` is for texts, and needs no --config to know that."""
    assert "--data.sequence-length" in call(capsys, "prepare --help").out
    rows = [f"text {n}" for n in range(60)]
    pd.DataFrame({"text": rows}).to_csv(tmp_path / "texts.csv", index=False)
    flags = f"--data.path {tmp_path}/texts.csv --data.vocabulary-size 40"
    outcome = call(capsys, f"prepare --out {tmp_path}/tokens {flags}")
    assert outcome.code == 0 and (tmp_path / "tokens" / "index.json").exists(), outcome.err


def test_usage_without_a_command(capsys):
    assert main([]) == 2
    assert "evaluate" in capsys.readouterr().out
    assert call(capsys, "evalute DIR") == (2, "", call(capsys, "evalute DIR").err)
    assert "Did you mean evaluate?" in call(capsys, "evalute DIR").err


def test_train_py_from_outside_the_checkout_and_the_module_are_the_same_program(
    tmp_path, capsys, monkeypatch
):
    series().to_csv(tmp_path / "load.csv", index=False)
    flags = f"{SERIES} --data.path load.csv --model.cell rnn".split()
    command, environment = (
        [sys.executable, ROOT / "train.py", *flags],
        {**os.environ, "XLA_FLAGS": compiling.flags(1)},
    )
    first = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert first.returncode == 0 and first.stdout == "" and "best step" in first.stderr, (
        first.stderr
    )
    workdir = tmp_path / "runs/series_table"  # NAME of the config, in the working directory
    assert (workdir / "result.json").exists() and load(workdir).config.model.cell == "rnn"

    monkeypatch.chdir(tmp_path)
    again = call(capsys, "train", *flags)
    assert again.code == 0 and "finished" in again.err


def test_a_config_by_path_or_by_bare_name(tmp_path, capsys):
    """Told apart by an impossible setting, which is found before anything is read."""
    for config in ("stocks", ROOT / "configs" / "stocks.py"):
        outcome = call(
            capsys, f"train --workdir {tmp_path}/run --data.lookback 5000 --config", config
        )
        assert outcome.code == 2 and "stocks has" in outcome.err
    outcome = call(capsys, f"train --workdir {tmp_path}/run --config stock")
    assert (
        outcome.code == 2 and "Did you mean stocks?" in outcome.err and "quickstart" in outcome.err
    )


def kinds(name):
    """The classes of the settings of a shipped config."""
    config = load_config(name)
    return [type(section) for section in (config.data, config.task, config.model)]


def test_every_flag_of_every_config_has_help_and_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    found = {kind.__name__: name for name in shipped_configs() for kind in kinds(name)}
    for config in sorted({*found.values()}):  # one or another with each class of settings
        shown = call(capsys, f"train --config {config} --help").out
        assert max(map(len, shown.splitlines())) <= 80
        entries = re.findall(r"^[│ ] (--[a-z]\S+)(.*?)(?=^[│ ] --[a-z]|\Z)", shown, re.S | re.M)
        assert len(entries) > 40
        for flag, text in entries:
            words = " ".join(re.sub(r"[│|─╭╮+-]", " ", text).split()).split("(default")[0]
            told = re.sub(r"\{.*?\}|\[.*\]|\b[A-Z]{3,}\b", "", words).strip()
            assert len(told) >= 8, f"{config} {flag}: {words}"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--train.learning-rate"),
        ("--batch_size", "--train.batch-size"),
        ("--hidden-size", "--model.hidden-size"),
        ("--epochs", "--train.steps"),
        ("--model.hiden-size", "--model.hidden-size"),
        ("--data.lookbak", "--data.lookback"),
    ],
)
def test_a_flag_by_another_name_is_answered_with_the_right_one(capsys, flag, meant):
    outcome = call(capsys, f"train {flag} 3")
    assert outcome.code == 2 and meant in outcome.err and len(outcome.err.splitlines()) == 1


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in ("train --help", "predict --help", "--help"):
        shell = f"{sys.executable} -m flax_lstm {command} | head -n 1"
        done = subprocess.run(
            shell, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.stderr == "" and done.stdout.startswith("usage: flax-lstm")


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flax-lstm 0.")


def test_a_checkout_that_is_not_installed_is_used_as_it_lies_there(monkeypatch, capsys):
    def nothing(package):
        if package == "flax-lstm":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("flax_lstm.machine.version.version", nothing)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "flax-lstm not installed\n"
    assert versions()["flax-lstm"] == "not installed" and versions()["jax"] == "1.0"


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, flax_lstm, flax_lstm.data.base, flax_lstm.commands.grammar\n"
        "print([m for m in ('jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets') if m in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
