# SPDX-License-Identifier: Apache-2.0
"""Mistakes: every one ends with status 2 and a few lines that say what is wrong and what to do, and
costs nothing."""

import json
import os
import shutil

import jax
import pandas as pd
import pytest
from commands import KEEP, SERIES, SMALL, call, files, series, texts

from flax_lstm import UserError, load, load_config
from flax_lstm.commands.tables import WRITERS
from flax_lstm.commands.train import main as train
from flax_lstm.runs.saved_config import read_config, save_config
from flax_lstm.runs.workdir import Workdir

TEXTS = f"--config text_table {SMALL}"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """XLA without its dear passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def refuse(outcome, *parts):
    """Checks that a command was refused in the way all are, saying these parts."""
    said = " ".join(outcome.err.replace("│", " ").split())
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err and outcome.err.count("\n") < 40
    assert outcome.out == ""
    for part in parts:
        assert part in said, f"{part!r} is not in: {said}"


# Data files


def write(name, text):
    def prepare(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / name

    return prepare


def table(frame, name="data.csv"):
    return write(name, frame.to_csv(index=False))


def swapped(frame, a, b):
    order = list(range(len(frame)))
    order[a], order[b] = order[b], order[a]
    return frame.iloc[order]


def with_value(frame, row, column, value):
    frame = frame.astype({column: object})
    frame.loc[row, column] = value
    return frame


BAD_SERIES = {
    "missing file": (lambda folder: folder / "none.csv", "", ["none.csv does not exist"]),
    "empty file": (write("data.csv", ""), "", ["data.csv is empty"]),
    "no rows": (write("data.csv", "when,load\n"), "", ["data.csv has no rows"]),
    "one column": (
        write("data.csv", "when\n2024-01-01\n"),
        "",
        ["no numeric column to forecast", "when"],
    ),
    "NUL bytes": (
        write("data.csv", b"when,load\n2024-01-01,1\n2024-01-02,\0\n"),
        "",
        ["NUL byte in line 3"],
    ),
    "not UTF-8": (
        write("data.csv", b"when,load\n2024-01-01,\xff\n"),
        "",
        ["not UTF-8", "0xff", "line 2"],
    ),
    "a line too long": (
        write("data.csv", "when,load\n2024-01-01,1,2\n"),
        "",
        ["line 2: 3 values under 2 column"],
    ),
    "no Parquet": (write("data.parquet", "when,load\n"), "", ["cannot read", "as Parquet"]),
    "unknown kind": (
        write("data.xlsx", "x"),
        "",
        ["unknown kind of file '.xlsx'", ".csv", ".parquet"],
    ),
    "a folder": (lambda folder: folder, "", ["is a folder"]),
    "wrong column": (
        table(series()),
        "--data.targets laod",
        ["no column 'laod'", "Did you mean load", "when, load"],
    ),
    "wrong time column": (
        table(series()),
        "--data.time-column date",
        ["no column 'date'", "when, load, price"],
    ),
    "no time": (
        table(series()),
        "--data.time-column load",
        ["'load' holds", "ISO 8601", "--data.time-column"],
    ),
    "text for a number": (
        table(with_value(series(), 6, "load", "many")),
        "",
        ["'load' holds what is no number", "'many' (row 7)"],
    ),
    "no number": (
        table(with_value(series(), 6, "load", "")),
        "",
        ["absent values", "row(s): 7", "interpolate"],
    ),
    "NaN": (
        table(with_value(series(), 6, "load", "NaN")),
        "",
        ["absent values", "row(s): 7", "interpolate"],
    ),
    "infinity": (
        table(with_value(series(), 6, "load", "inf")),
        "",
        ["'load' is infinite in row 7"],
    ),
    "unsorted": (
        table(swapped(series(), 4, 9)),
        "",
        ["row 6", "is earlier than the time of row 5", "sorted"],
    ),
    "duplicate": (
        table(pd.concat([series()[:9], series()[8:]])),
        "",
        ["row 10", "repeats", "row 9"],
    ),
    "look-back too long": (
        table(series()),
        "--data.lookback 100",
        ["84 rows, too few for data.lookback 100", "sum to 84 at most"],
    ),
    "segment too long": (
        table(series()),
        "--config etth1 --model.segment 48 --data.split 0.7 0.1 0.2",
        ["model.segment 48 is longer than data.lookback 8"],
    ),
}
BAD_TEXTS = {
    "missing file": (lambda folder: folder / "none.csv", "", ["none.csv does not exist"]),
    "folder without texts": (lambda folder: folder, "", ["LABEL/*.txt"]),
    "wrong text column": (
        table(texts()),
        "--data.text-column txt",
        ["'txt'", "Did you mean text", "id, text, label"],
    ),
    "wrong label column": (
        table(texts()),
        "--data.label-column stars",
        ["'stars' (--data.label-column)", "id, text"],
    ),
    "one class": (table(texts(label="good")), "", ["label 'good'", "at least 2"]),
    "absent text": (
        table(with_value(texts(), 2, "text", "")),
        "",
        ["column 'text' is empty in 1 row(s): 3"],
    ),
    "absent label": (
        table(with_value(texts(), 2, "label", "")),
        "",
        ["column 'label' is empty in 1 row(s): 3"],
    ),
    "numbers for texts": (
        write("data.jsonl", '{"text": 3, "label": 1}\n'),
        "",
        ["type int in row 1, not text"],
    ),
    "no JSON": (
        write("data.jsonl", '{"text": "a", "label": 1}\n{"text"\n'),
        "",
        ["line 2 is not JSON"],
    ),
    "few rows": (table(texts(2)), "", ["no row for the split"]),
    "open quote": (write("data.csv", 'text,label\n"a,1\n'), "", ["line 2", "quote"]),
}


@pytest.mark.parametrize("case", BAD_SERIES)
def test_series_that_cannot_be_trained_on(tmp_path, capsys, case):
    prepare, flags, parts = BAD_SERIES[case]
    path = prepare(tmp_path)
    refuse(
        call(capsys, f"train {SERIES} {flags}", "--data.path", path, "--workdir", tmp_path / "run"),
        *parts,
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_texts_that_cannot_be_trained_on(tmp_path, capsys, case):
    prepare, flags, parts = BAD_TEXTS[case]
    path = prepare(tmp_path)
    refuse(
        call(capsys, f"train {TEXTS} {flags}", "--data.path", path, "--workdir", tmp_path / "run"),
        *parts,
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_test_label_that_training_has_never_seen(tmp_path, capsys):
    texts().to_csv(tmp_path / "train.csv", index=False)
    texts(8, label="goood").to_csv(tmp_path / "test.csv", index=False)
    paths = ("--data.path", tmp_path / "train.csv", "--data.test-path", tmp_path / "test.csv")
    outcome = call(capsys, f"train {TEXTS}", *paths, "--workdir", tmp_path / "run")
    refuse(
        outcome, "label 'goood' of 8 row(s) of the test split", "Did you mean good?", "bad, good"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read and write everything")
def test_a_file_that_may_not_be_read_and_a_folder_that_may_not_be_written(tmp_path, capsys):
    series().to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "data.csv").chmod(0)
    outcome = call(
        capsys, f"train {SERIES} --data.path {tmp_path}/data.csv --workdir {tmp_path}/run"
    )
    refuse(outcome, "cannot read", "data.csv")
    (tmp_path / "closed").mkdir(mode=0o500)
    outcome = call(
        capsys, f"train {SERIES} --data.path {tmp_path}/data.csv --workdir {tmp_path}/closed"
    )
    refuse(outcome, "closed", "name another folder")


# Settings


BAD_FLAGS = {
    "negative size": ("--model.hidden-size -3", ["model.hidden-size -3", "at least 1"]),
    "no steps": ("--train.steps 0", ["train.steps 0: must be at least 1"]),
    "rate": ("--train.learning-rate 0", ["train.learning-rate 0.0: must be positive"]),
    "no number": ("--train.learning-rate fast", ["--train.learning-rate", "fast"]),
    "no integer": ("--train.steps 2.5", ["--train.steps", "2.5"]),
    "unknown cell": ("--model.cell ltsm", ["--model.cell", "ltsm", "lstm", "gru", "rnn"]),
    "unknown schedule": (
        "--train.schedule linear",
        ["--train.schedule", "constant", "cooldown", "cosine", "plateau"],
    ),
    "dropout": ("--model.dropout 1.0", ["model.dropout 1.0", "below 1"]),
    "parts": ("--train.accumulate 3", ["train.accumulate 3 does not divide", "1, 2, 4, 8"]),
    "ema": ("--train.ema 1", ["train.ema 1.0"]),
    "split": ("--data.split 0.7 0.3 0.3", ["data.split", "sum to at most 1"]),
    "misspelt flag": ("--model.hiden-size 8", ["--model.hiden-size", "--model.hidden-size"]),
    "misspelt section": ("--modle.hidden-size 8", ["--modle.hidden-size", "--model.hidden-size"]),
    "flag without value": ("--train.steps", ["--train.steps"]),
    "left-over word": ("quickstart", ["quickstart"]),
    "devices": ("--mesh.data 3 --mesh.fsdp 3", ["8 devices"]),
    "batch over devices": (
        "--mesh.data -1 --train.batch-size 12",
        ["train.batch-size 12", "8, 16"],
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_settings_that_make_no_sense(tmp_path, capsys, case):
    flags, parts = BAD_FLAGS[case]
    series().to_csv(tmp_path / "data.csv", index=False)
    outcome = call(
        capsys, f"train {SERIES} --data.path {tmp_path}/data.csv --workdir {tmp_path}/run {flags}"
    )
    refuse(outcome, *parts)


BAD_CONFIGS = {
    "syntax": ("x = 1\ndef get_config(:\n", ["own.py, line 2", "SyntaxError"]),
    "import": ("\nimport nowhere_to_be_found\n", ["own.py, line 2", "nowhere_to_be_found"]),
    "no function": ("x = 1\n", ["own.py", "get_config"]),
    "no config": ("def get_config():\n    return 3\n", ["must return a flax_lstm.Config"]),
    "raises": ("def get_config():\n    return 1 / 0\n", ["own.py, line 2", "ZeroDivisionError"]),
    "bad value": (
        "from flax_lstm import RecurrentModel\nmodel = RecurrentModel(hidden_size=0)\n",
        ["model.hidden-size 0"],
    ),
    "bad field": (
        "from flax_lstm import RecurrentModel\nmodel = RecurrentModel(hidden=8)\n",
        ["own.py, line 2", "unexpected keyword argument 'hidden'"],
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_files_that_cannot_be_used(tmp_path, capsys, case):
    text, parts = BAD_CONFIGS[case]
    (tmp_path / "own.py").write_text(text)
    refuse(
        call(capsys, "train --config", tmp_path / "own.py", "--workdir", tmp_path / "run"), *parts
    )
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_not_there(tmp_path, capsys):
    for name in (tmp_path / "none.py", "none", tmp_path, "sub/quickstart"):
        refuse(
            call(capsys, "train --config", name, "--workdir", tmp_path / "run"),
            str(name),
            "quickstart",
        )


# Work directories


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a table and a finished run."""
    home = tmp_path_factory.mktemp("home")
    series().to_csv(home / "data.csv", index=False)
    command = (
        f"{SERIES} --data.path {home}/data.csv --workdir {home}/run --train.checkpoint-every 1"
    )
    assert train([*KEEP, *command.split()]) == 0
    return home


@pytest.fixture
def run(home, tmp_path):
    """A copy of the run, to be spoilt."""
    return shutil.copytree(home / "run", tmp_path / "run")


@pytest.fixture
def again(home, run, capsys):
    """The command that trained it, with other flags at the end."""
    return lambda flags="": call(
        capsys,
        f"train {SERIES} --data.path {home}/data.csv --train.checkpoint-every 1",
        *("--workdir", run, *flags.split()),
    )


def test_work_directories_that_are_something_else(home, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = files(tmp_path)
    for workdir, part in (
        ("file", "a file of that name"),
        ("file/run", "cannot be"),
        ("full", "other things"),
    ):
        outcome = call(
            capsys, f"train {SERIES} --data.path {home}/data.csv --workdir", tmp_path / workdir
        )
        refuse(
            outcome,
            str(tmp_path / workdir),
            part,
            "another folder" if workdir != "full" else "new or empty folder",
        )
    assert files(tmp_path) == before


def test_a_run_with_other_settings_is_left_alone(run, again):
    before = files(run)
    outcome = again("--model.hidden-size 5 --seed 3")
    refuse(
        outcome, "model.hidden_size: 4 there, 5 now", "seed: 0 there, 3 now", "another --workdir"
    )
    refuse(again("--train.steps 2"), "train.steps 2", "longer, not shorter")
    assert files(run) == before


def test_a_failed_start_does_not_block_the_corrected_one(home, tmp_path, capsys):
    """A wrong column, then a rate that explodes, then a good command; the batch larger than the
    data is padded."""
    command = (
        f"train {SERIES} --data.path {home}/data.csv --workdir {tmp_path}/run "
        "--train.batch-size 256"
    )
    refuse(call(capsys, f"{command} --data.targets laod"), "no column 'laod'")
    refuse(
        call(capsys, f"{command} --data.targets load --train.learning-rate 1e30 --train.clip 0"),
        "loss is",
    )
    outcome = call(capsys, f"{command} --data.targets price --data.lookback 6")
    assert outcome.code == 0, outcome.err
    assert (
        load(tmp_path / "run").info.targets == ("price",)
        and load(tmp_path / "run").info.lookback == 6
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len({(row["step"], row["split"]) for row in rows}) == len(rows)


def test_only_what_a_failed_start_leaves_is_taken_over(tmp_path):
    config = load_config("quickstart")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "picture.png").write_text("mine")
    (tmp_path / "data.csv").write_text("mine")
    save_config(load_config("stocks").with_schedule_settled(), tmp_path / "config.py")
    before = files(tmp_path)
    with pytest.raises(UserError, match="other settings"):
        Workdir(tmp_path).open(config)
    assert files(tmp_path) == before

    (tmp_path / "data.csv").unlink()
    assert Workdir(tmp_path).open(config) == config.with_schedule_settled()
    assert (
        not (tmp_path / "assets").exists()
        and read_config(tmp_path / "config.py").name == "quickstart"
    )


def test_a_start_cut_short_leaves_nothing_fitted(tmp_path):
    """Nobody knows what it was fitted for: perhaps for the weights of another run."""
    config = load_config("quickstart")
    Workdir(tmp_path / "run").open(config)
    (tmp_path / "run" / "assets").mkdir()
    (tmp_path / "run" / "assets" / "info.json").write_text("fitted")
    assert Workdir(tmp_path / "run").open(config) == config.with_schedule_settled()
    assert not (tmp_path / "run" / "assets").exists()


def test_folders_that_hold_no_run(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for command in ("evaluate", "predict --text x"):
        for name in ("none", "empty", "file"):
            refuse(
                call(capsys, command, tmp_path / name),
                str(tmp_path / name),
                "no run here",
                "train.py",
            )
    shutil.rmtree(run / "checkpoints")
    refuse(call(capsys, "evaluate", run), str(run), "no checkpoint yet")


def test_a_saved_config_is_data_and_never_run(run, again, tmp_path, capsys):
    text = (run / "config.py").read_text()
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')"
    for spoilt in (
        f"{trap}\nimport nonsense(\n",
        f"{text}\n{trap}\n".replace("return Config(", f"return {trap} and Config("),
        text.replace("seed=0", f"seed={trap}"),
        text.replace("hidden_size=4", "hiden_size=4"),
        text.replace("from flax_lstm import Config", "from subprocess import Popen"),
        text[: len(text) // 2],
        "",
    ):
        (run / "config.py").write_text(spoilt)
        before = files(run)
        for outcome in (call(capsys, "evaluate", run), again()):
            refuse(outcome, "config.py")
        assert files(run) == before
    assert not (tmp_path / "trap").exists()


def test_a_config_edited_by_hand_does_not_fit_its_checkpoint(run, again, capsys):
    text = (run / "config.py").read_text()
    (run / "config.py").write_text(text.replace("hidden_size=4", "hidden_size=6"))
    refuse(
        call(capsys, "evaluate", run), "checkpoint of another model", "(4, 4) there, (4, 6) here"
    )
    (run / "result.json").unlink()
    refuse(again("--model.hidden-size 6"), "checkpoint of another model")


@pytest.mark.parametrize("kind", ["empty", "cut short", "absent", "json"])
def test_spoilt_checkpoints(run, again, capsys, kind):
    """The latest: figures of it are refused, training goes on from the one before."""
    (run / "result.json").unlink()
    folder = run / "checkpoints" / "4"
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if kind == "empty":
            path.write_bytes(b"")
        elif kind == "cut short":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif kind == "absent" and "params" in path.parts:
            path.unlink()
        elif kind == "json" and "progress" in path.parts:
            path.write_text("[")
    before = files(run)
    refuse(call(capsys, "evaluate --checkpoint latest", run), "checkpoints", "cannot be read", "4")
    assert files(run) == before
    outcome = again()
    said = " ".join(outcome.err.split())
    assert outcome.code == 0 and "Traceback" not in said
    assert "set aside as 4.damaged; going on from step 3, 1 earlier" in said


def test_a_spoilt_result_is_said(run, again):
    (run / "result.json").write_text('{"steps": ')
    refuse(again(), "result.json", "delete it")
    (run / "result.json").write_text('{"steps": 4}')
    refuse(again(), "result.json", "delete it")


def test_spoilt_assets(run, capsys):
    (run / "assets" / "info.json").write_text('{"mean": ')
    refuse(call(capsys, "evaluate", run), "info.json")
    (run / "assets" / "info.json").write_text('{"mean": 3}')
    refuse(call(capsys, "evaluate", run), "info.json")
    (run / "assets" / "info.json").unlink()
    refuse(call(capsys, "evaluate", run), "info.json")


def test_a_torn_log_is_no_obstacle(run, again):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    (run / "result.json").unlink()
    assert again().code == 0


# Evaluate and predict


def test_data_that_went_away(home, run, tmp_path, capsys):
    text = (run / "config.py").read_text()
    (run / "config.py").write_text(text.replace(f"{home}/data.csv", f"{tmp_path}/gone.csv"))
    refuse(call(capsys, "evaluate", run), f"{tmp_path}/gone.csv does not exist")


def test_arguments_of_evaluate(home, capsys):
    refuse(call(capsys, "evaluate --split tset", home / "run"), "train", "validation", "test")
    refuse(
        call(capsys, "evaluate --checkpoint last", home / "run"),
        "--checkpoint last",
        "best, latest or one of",
    )
    refuse(call(capsys, "evaluate"), "DIR")


BAD_PREDICTIONS = {
    "neither": ("", ["give either --text TEXT", "or --input FILE and --output FILE"]),
    "both": ("--text x --input {home}/data.csv --output {out}.csv", ["give either"]),
    "no output": ("--input {home}/data.csv", ["give either"]),
    "a text for a series": ("--text x", ["not a run on texts", "--input"]),
    "input missing": ("--input {out}.csv --output {out}.csv", ["does not exist"]),
    "folder missing": (
        "--input {home}/data.csv --output {out}/none/out.csv",
        ["the folder", "does not exist"],
    ),
    "output a folder": ("--input {home}/data.csv --output {home}", ["extension"]),
    "extension": ("--input {home}/data.csv --output {out}.xlsx", [".csv, .tsv, .jsonl, .parquet"]),
    "input extension": (
        "--input {home}/run/config.py --output {out}.csv",
        ["unknown kind of file '.py'"],
    ),
    "checkpoint": (
        "--input {home}/data.csv --output {out}.csv --checkpoint 77",
        ["best, latest or one of"],
    ),
}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_predictions_that_cannot_be_made(home, tmp_path, capsys, case):
    flags, parts = BAD_PREDICTIONS[case]
    refuse(
        call(capsys, f"predict {home}/run " + flags.format(home=home, out=tmp_path / "out")), *parts
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frame, part",
    [
        (series().drop(columns="price"), "no column 'price'"),
        (series(5), "has 5 rows; the model looks back on 8"),
        (
            series()[::2],
            "every 0 days 02:00:00; the model was trained on one every 0 days 01:00:00",
        ),
        (with_value(series(), 119, "load", "?"), "'?' (row 120)"),
    ],
)
def test_inputs_that_cannot_be_forecast_from(home, tmp_path, capsys, frame, part):
    frame.to_csv(tmp_path / "in.csv", index=False)
    outcome = call(
        capsys, f"predict {home}/run --input {tmp_path}/in.csv --output {tmp_path}/out.csv"
    )
    refuse(outcome, part)
    assert not (tmp_path / "out.csv").exists()


def test_a_disk_that_fills_up_costs_no_earlier_output(home, tmp_path, capsys, monkeypatch):
    def write(table, path):
        path.write_text("half of ")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(WRITERS, ".csv", write)
    (tmp_path / "out.csv").write_text("earlier")
    outcome = call(
        capsys,
        f"predict {home}/run --input {home}/data.csv --output {tmp_path}/out.csv --overwrite",
    )
    refuse(outcome, "out.csv", "No space left")
    assert files(tmp_path) == {"out.csv": b"earlier"}


def test_a_run_without_a_form_of_input(tmp_path, capsys):
    Workdir(tmp_path / "run").open(load_config("adding_problem"))
    (tmp_path / "in.csv").write_text("a,b\n1,2\n")
    outcome = call(
        capsys, f"predict {tmp_path}/run --input {tmp_path}/in.csv --output {tmp_path}/out.csv"
    )
    refuse(outcome, "AddingProblem has no form of input")
