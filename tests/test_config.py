# SPDX-License-Identifier: Apache-2.0
"""Configs: loaded from files, overridden by flags, saved and read back as data, compared on
resuming."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import small_runs

from flax_lstm import Config, UserError, load_config
from flax_lstm.__main__ import guarded
from flax_lstm.config import TrainConfig, override, shipped_configs
from flax_lstm.nn.models import RecurrentModel
from flax_lstm.nn.segments import SegmentModel
from flax_lstm.runs.saved_config import flatten, read_config, resume_config, save_config
from flax_lstm.runs.workdir import Workdir
from flax_lstm.tasks.forecasting import Forecasting

TRAIN_PY = Path(__file__).parent.parent / "train.py"
PROMISED = {
    *(
        "quickstart",
        "imdb_lstm",
        "imdb_gru",
        "imdb_stacked",
        "imdb_bilstm",
        "imdb_lm",
        "rotten_tomatoes",
    ),
    *("stocks", "electricity", "etth1", "adding_problem", "text_table", "series_table"),
    *("panel_table", "m4_hourly"),
}


def flags(config: Config, *arguments: str) -> Config:
    return override(config, arguments, "train.py", "about")


def wrong_flags(capsys, config: Config, *arguments: str) -> str:
    """What is printed about a mistake; it ends with exit status 2 and without a traceback."""

    def command(arguments):
        flags(config, *arguments)
        return 0

    try:
        code = guarded(command, arguments)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and len(said.splitlines()) < 40
    return said


def test_the_promised_configs_are_shipped():
    assert set(shipped_configs()) >= PROMISED


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_loads_and_is_read_back_equal(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    saved = tmp_path / "config.py"
    save_config(config, saved)
    assert read_config(saved) == config
    assert load_config(saved) == config  # what is read as data is also a config file


def test_unusual_values_are_read_back_equal(tmp_path):
    config = replace(
        load_config("stocks"),
        name='it\'s "quoted"\n and {odd} ' + "long " * 40,
        model=RecurrentModel(hidden_size=(128, 64, 3), dropout=1e-17),
        task=Forecasting(objective="quantile", quantiles=(0.1, 0.3, 0.5)),
        seed=3,
    )
    config = replace(
        config, data=replace(config.data, path="/tmp/ünï' \\ code.csv", targets=("a",))
    )
    save_config(config, tmp_path / "config.py")
    assert read_config(tmp_path / "config.py") == config
    save_config(replace(config, model=SegmentModel()), tmp_path / "config.py")
    assert read_config(tmp_path / "config.py").model == SegmentModel()


def test_reading_executes_nothing(tmp_path):
    saved, trace = tmp_path / "config.py", tmp_path / "trace"
    save_config(small_runs.adding_run(), saved)
    honest = saved.read_text()
    act = f"open({str(trace)!r}, 'w').close()"
    saved.write_text(f"{act}\n{honest}\n{act}\n")
    assert read_config(saved) == small_runs.adding_run()
    for wicked in (
        honest.replace("seed=0", f"seed={act}"),
        honest.replace("seed=0", "seed=__import__('os').getpid()"),
        honest.replace("get_config():", f"get_config():\n    {act}"),
        honest.replace("def get_config", f"@{act}\ndef get_config").replace(
            "seed=0", f"seed=[{act}]"
        ),
        f"import os\n{honest}".replace("seed=0", "seed=os.getpid()"),
        honest.replace("flax_lstm import Config", "tests_wicked import Config"),
    ):
        assert wicked != honest
        saved.write_text(wicked)
        with pytest.raises(UserError, match=str(saved)):
            read_config(saved)
    assert not trace.exists()
    load_config_would = f"{act}\n{honest}"
    saved.write_text(load_config_would)
    load_config(saved)
    assert trace.exists()  # --config, in contrast, executes the user's own file


@pytest.mark.parametrize(
    "content",
    [
        "",
        "def get_config(:",
        "def get_config():\n    return 3",
        "def get_config():\n    pass",
        "from flax_lstm.config import TrainConfig\n\ndef get_config():\n    return "
        "TrainConfig(stepz=3)",
        "from flax_lstm.config import TrainConfig\n\ndef get_config():\n    return TrainConfig()",
        "from flax_lstm.config import Nothing\n\ndef get_config():\n    return Nothing()",
        "from flax_lstm.nowhere import Nothing\n\ndef get_config():\n    return Nothing()",
        "def get_config():\n    return Config()",
        "\0",
    ],
)
def test_what_is_no_saved_config_is_a_user_error(content, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        read_config(path)


@dataclass(frozen=True)
class Own(Forecasting):
    """A task of the user's own."""

    weight: float = 2.0


def test_classes_of_the_user_are_read_back_where_they_are_loaded(tmp_path):
    config = replace(load_config("stocks"), task=Own(weight=3.0))
    path = tmp_path / "config.py"
    save_config(config, path)
    assert read_config(path) == config
    path.write_text(
        path.read_text().replace(f"from {__name__} import Own", "from elsewhere import Own")
    )
    with pytest.raises(UserError, match="class Own of the module elsewhere, which is not loaded"):
        read_config(path)


def test_a_config_file_that_does_not_exist_or_is_mistyped(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no such file.*quickstart"):
        load_config(tmp_path / "absent.py")
    with pytest.raises(UserError, match=r"Did you mean quickstart\?.*Shipped:.*etth1"):
        load_config("quikstart")
    monkeypatch.chdir(tmp_path)
    (
        tmp_path / "quickstart"
    ).mkdir()  # a folder of that name, say of a run, hides no shipped config
    assert load_config("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x = 1\ndef get_config(:\n", "line 2: SyntaxError"),
        (
            "x = 1\n\nimport nowhere_at_all\n",
            "line 3: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("x = 1\n", "AttributeError"),
        ("def get_config():\n    return 3\n", "must return a flax_lstm.Config"),
        (
            "from flax_lstm import TrainConfig\nTrainConfig(steps=0)\n",
            "train.steps 0: must be at least 1",
        ),
        ("from flax_lstm import TrainConfig\nTrainConfig(stepz=0)\n", "line 2: TypeError"),
    ],
)
def test_a_config_file_with_a_mistake_says_where(content, said, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    for name in ("own.py", tmp_path / "own.py"):  # relative and absolute
        with pytest.raises(UserError, match=said):
            load_config(name)


def test_flags_override_fields():
    config = load_config("stocks")
    changed = flags(
        config,
        *(
            "--model.hidden-size",
            "128",
            "64",
            "--train.batch_size",
            "16",
            "--train.learning-rate",
            "3e-4",
        ),
        *(
            "--data.targets",
            "a",
            "b",
            "--task.quantiles",
            "0.2",
            "0.5",
            "--mesh.data",
            "-1",
            "--seed",
            "7",
        ),
        *(
            "--model.bidirectional",
            "True",
            "--model.cell",
            "gru",
            "--data.split",
            "0.5",
            "0.25",
            "0.25",
        ),
    )
    assert changed.model == replace(
        config.model, hidden_size=(128, 64), bidirectional=True, cell="gru"
    )
    assert changed.train == replace(config.train, batch_size=16, learning_rate=3e-4)
    assert changed.data == replace(config.data, targets=("a", "b"), split=(0.5, 0.25, 0.25))
    assert (
        changed.task.quantiles == (0.2, 0.5) and changed.seed == 7 and changed.mesh == config.mesh
    )
    assert flags(config, "--model.hidden_size", "32").model.hidden_size == 32
    assert flags(config) == config


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--model.cell", "lsmt", ["lstm", "gru", "rnn"]),
        ("--model.backend", "cuda", ["auto", "fused", "scan"]),
        ("--model.dtype", "float16", ["float32", "bfloat16"]),
        ("--train.schedule", "linear", ["constant", "cooldown", "cosine", "plateau"]),
        ("--model.hiden-size", "3", ["--model.hidden-size"]),
        ("--train.steps", "many", ["train.steps"]),
        ("--train.steps", "-5", ["train.steps -5", "at least 1"]),
        ("--model.hidden-size", "-8", ["model.hidden-size -8", "at least 1"]),
        ("--model.dropout", "1.5", ["model.dropout 1.5"]),
        ("--train.learning-rate", "inf", ["train.learning-rate inf"]),
        ("--train.weight-decay", "nan", ["train.weight-decay nan"]),
        ("--train.accumulate", "5", ["does not divide", "32"]),
        ("--data.horizon", "-1", ["data.horizon -1"]),
        ("--task.quantiles", "0.9", ["0.5"]),
        ("--model.num-layers", "0", ["model.num-layers 0"]),
    ],
)
def test_a_wrong_flag_is_answered_on_one_screen(flag, value, said, capsys):
    arguments = (flag, value, "0.5") if flag == "--task.quantiles" else (flag, value)
    printed = wrong_flags(capsys, load_config("stocks"), *arguments)
    assert all(word in printed for word in said), printed


@pytest.mark.parametrize("flag", ["--train.batch-size=-1", "--config=quikstart"])
def test_a_mistake_ends_the_program_with_2(flag, tmp_path):
    outcome = subprocess.run(
        [sys.executable, str(TRAIN_PY), flag],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 2, outcome.stderr
    assert (
        outcome.stdout == ""
        and "Traceback" not in outcome.stderr
        and len(outcome.stderr.splitlines()) < 25
    )
    assert not os.listdir(tmp_path)


def test_sizes_and_layers_must_agree():
    assert RecurrentModel(hidden_size=8, num_layers=3).sizes == (8, 8, 8)
    assert RecurrentModel(hidden_size=(8, 4)).sizes == (8, 4)
    for wrong in (
        {"hidden_size": (8, 4), "num_layers": 3},
        {"hidden_size": ()},
        {"hidden_size": (8, 0)},
    ):
        with pytest.raises(UserError, match="hidden-size"):
            RecurrentModel(**wrong)


def changed(config: Config, section: str, **values) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def test_what_may_differ_on_resuming(tmp_path):
    saved = small_runs.adding_run(schedule_steps=10)
    for wanted in (
        changed(saved, "mesh", data=2, fsdp=2),
        changed(saved, "train", log_every=7, eval_every=7, checkpoint_every=7),
        changed(saved, "train", steps=20),
        changed(saved, "model", backend="scan"),
    ):
        assert resume_config(saved, wanted, tmp_path) == wanted
    # A schedule whose length nobody asks for keeps that of the first run.
    wanted = changed(saved, "train", steps=20, schedule_steps=0)
    assert resume_config(saved, wanted, tmp_path).train == replace(wanted.train, schedule_steps=10)


def test_other_differences_are_refused_field_by_field(tmp_path):
    saved = small_runs.adding_run(schedule_steps=10)
    wanted = changed(
        changed(saved, "train", learning_rate=0.5, eval_every=9), "model", hidden_size=(4, 4)
    )
    wanted = replace(changed(wanted, "data", length=9), seed=4)
    with pytest.raises(UserError) as error:
        resume_config(saved, wanted, tmp_path)
    lines = str(error.value).splitlines()
    assert str(tmp_path) in lines[0] and "--workdir" in lines[-1]
    assert set(lines[1:-1]) == {
        "  train.learning_rate: 0.01 there, 0.5 now",
        "  model.hidden_size: 4 there, (4, 4) now",
        "  data.length: 8 there, 9 now",
        "  seed: 0 there, 4 now",
    }
    for wanted in (
        replace(saved, task=Forecasting()),
        changed(saved, "train", schedule_steps=20),
        changed(saved, "train", batch_size=16),
        replace(saved, name="other"),
    ):
        with pytest.raises(UserError, match="other settings"):
            resume_config(saved, wanted, tmp_path)
    with pytest.raises(UserError, match=r"begun for 10; it can be made longer, not shorter"):
        resume_config(saved, changed(saved, "train", steps=9), tmp_path)


def test_flatten_names_the_types_of_the_sections():
    flat = flatten(small_runs.adding_run())
    assert (
        flat["model"] == "RecurrentModel"
        and flat["task"] == "SequenceRegression"
        and flat["data.length"] == 8
    )
    assert all(f"train.{name}" in flat for name in TrainConfig.__dataclass_fields__)


def test_a_work_directory_that_is_none(tmp_path):
    config = small_runs.adding_run()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="a file of that name is in the way"):
        Workdir(tmp_path / "file").open(config)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is in the way"):
        Workdir(tmp_path / "link").open(config)
    with pytest.raises(UserError, match=r"cannot be (written|made)"):
        Workdir(tmp_path / "file" / "below").open(config)
    with pytest.raises(UserError, match="holds other things and no run"):
        Workdir(tmp_path).open(config)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "config.py").exists()


def test_a_work_directory_of_another_run(tmp_path):
    config = small_runs.adding_run()
    assert Workdir(tmp_path / "a" / "b").open(config) == config
    (tmp_path / "a" / "b" / "checkpoints" / "3").mkdir(parents=True)
    assert Workdir(tmp_path / "a" / "b").open(config) == config
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        Workdir(tmp_path / "a" / "b").open(replace(config, seed=1))
    assert read_config(tmp_path / "a" / "b" / "config.py") == config


def test_the_schedule_is_settled_in_the_saved_config(tmp_path):
    config = Workdir(tmp_path / "run").open(small_runs.adding_run(schedule_steps=0, steps=12))
    assert (
        config.train.schedule_steps
        == 12
        == read_config(tmp_path / "run" / "config.py").train.schedule_steps
    )
