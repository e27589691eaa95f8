# SPDX-License-Identifier: Apache-2.0
"""A run that was interrupted ends as if it had not been, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs
from small_runs import fit, interrupted

from flax_lstm import Config, Stopped
from flax_lstm.nn import recurrence


@pytest.fixture(autouse=True)
def quick(quick_compile):
    pass


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The folder of the runs' data: one for all tests, so that equal configs are compiled once."""
    return tmp_path_factory.mktemp("tables")


def assert_same_end(config: Config, one: Path, other: Path) -> None:
    """The checkpoints of the last step, the logs and the results are equal, but for the clock and
    the sessions."""
    arrays, progress = small_runs.saved(config, one, config.train.steps)
    others, other_progress = small_runs.saved(config, other, config.train.steps)
    assert arrays.keys() == others.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)
    assert progress.best == other_progress.best
    assert small_runs.timeless(small_runs.rows(one)) == small_runs.timeless(small_runs.rows(other))
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (one, other)]
    for result in results:
        del result["wall_seconds"], result["sessions"]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        ("text", signal.SIGTERM, 75),
        ("series", signal.SIGINT, 130),
        ("language", signal.SIGTERM, 75),
    ],
)
def test_ten_steps_are_four_a_signal_and_six(kind, number, code, tables, tmp_path):
    config = getattr(small_runs, f"{kind}_run")(tables)
    fit(config, tmp_path / "whole")
    with pytest.raises(Stopped, match="step 4; everything is saved") as stopped:
        fit(config, tmp_path / "parts", interrupted(4, number))
    assert stopped.value.code == code
    result = fit(config, tmp_path / "parts")
    assert result["sessions"] == 2
    assert_same_end(config, tmp_path / "whole", tmp_path / "parts")


def test_a_signal_while_the_data_are_read_is_not_lost(tmp_path, monkeypatch):
    config = small_runs.adding_run()
    load = type(config.data).load

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(config.data), "load", interrupted)
        with pytest.raises(Stopped, match="step 0; everything is saved") as stopped:
            fit(config, tmp_path / "parts")
    assert stopped.value.code == 75
    fit(config, tmp_path / "parts")
    fit(config, tmp_path / "whole")
    assert_same_end(config, tmp_path / "whole", tmp_path / "parts")


def test_ten_steps_are_five_and_five_more(tmp_path):
    config = small_runs.adding_run()
    whole = fit(config, tmp_path / "whole")
    first = fit(replace(config, train=replace(config.train, steps=5)), tmp_path / "parts")
    assert first["steps"] == 5 and first["params_sha256"] != whole["params_sha256"]
    assert fit(config, tmp_path / "parts")["params_sha256"] == whole["params_sha256"]
    assert json.loads((tmp_path / "parts" / "result.5.json").read_text()) == first
    # The first run's test figures are those of its own best step, in a row of the log that the
    # whole run lacks.
    log = [
        row
        for row in small_runs.rows(tmp_path / "parts")
        if (row["step"], row["split"]) != (5, "test")
    ]
    (tmp_path / "parts" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in log)
    )
    assert_same_end(config, tmp_path / "whole", tmp_path / "parts")


def test_the_schedule_keeps_the_length_of_the_first_run(tables, tmp_path):
    config = small_runs.adding_run(schedule_steps=0, log_every=1)
    fit(replace(config, train=replace(config.train, steps=4)), tmp_path / "run")
    fit(config, tmp_path / "run")
    rates = {
        row["step"]: row["learning_rate"]
        for row in small_runs.rows(tmp_path / "run")
        if row["split"] == "train"
    }
    assert rates[3] == pytest.approx(0.01) and rates[4] == pytest.approx(
        0.005
    )  # 2 steps of warm-up, a cosine over 2
    assert [rates[step] for step in range(5, 11)] == [0.0] * 6


def test_rows_beyond_the_checkpoint_and_a_torn_line_are_set_aside(tmp_path):
    config, workdir = small_runs.adding_run(), tmp_path / "run"
    fit(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(config, workdir, interrupted(7))
    kept = small_runs.rows(workdir)
    beyond = [
        '{"step": 8, "split": "train", "loss": 1.0}',
        '{"step": 9, "split": "validation", "loss": 1.0}',
    ]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write("\n".join([*beyond, '{"step": 10, "spl']))
    fit(config, workdir)
    assert (workdir / "metrics.discarded.jsonl").read_text().splitlines() == [
        *beyond,
        '{"step": 10, "spl',
    ]
    log = small_runs.rows(workdir)
    assert log[: len(kept)] == kept
    assert small_runs.timeless(log) == small_runs.timeless(small_runs.rows(tmp_path / "whole"))
    keys = [(row["step"], row["split"]) for row in log]
    assert len(set(keys)) == len(keys)
    for split in ("train", "validation"):
        steps = [step for step, name in keys if name == split]
        assert steps == sorted(steps) and len(steps) == {"train": 5, "validation": 2}[split]


def test_an_evaluation_that_falls_on_the_restored_step_does_not_lose_the_best(tmp_path):
    config, workdir = small_runs.adding_run(), tmp_path / "run"
    with pytest.raises(Stopped):
        fit(config, workdir, interrupted(4))
    result = fit(replace(config, train=replace(config.train, eval_every=2)), workdir)
    assert [row["step"] for row in small_runs.rows(workdir) if row["split"] == "validation"] == [
        6,
        8,
        10,
    ]
    assert result["best_step"] == 10


def test_a_run_that_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    config, workdir = small_runs.adding_run(), tmp_path / "run"
    stop = {"put_batch": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        fit(config, workdir, stop)
    assert fit(config, workdir)["params_sha256"] == fit(config, tmp_path / "whole")["params_sha256"]


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(tmp_path, capsys):
    """One bit of the latest: the one before it is used, and the end is the same."""
    config, workdir = small_runs.adding_run(), tmp_path / "run"
    fit(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(config, workdir, interrupted(7))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["5", "6", "7"]
    array = max((workdir / "checkpoints" / "7" / "params" / "d").iterdir())
    content = array.read_bytes()
    array.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    capsys.readouterr()
    assert fit(config, workdir)["sessions"] == 2
    said = capsys.readouterr().err
    assert str(array) in said and "going on from step 6, 1 earlier" in said
    assert (workdir / "checkpoints" / "7.damaged").is_dir()
    assert_same_end(config, tmp_path / "whole", workdir)


# The same by real processes. The config file sends its own process a signal as the batch of a step
# is taken, where the environment asks for it.
CONFIG = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import small_runs
from functools import partial
from flax_lstm.machine.sharding import put_batch as put
from flax_lstm.training import loop

left = int(os.environ.get("BATCHES", "-1"))

def put_batch(batch, mesh):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return put(batch, mesh)

loop.Surroundings = partial(loop.Surroundings, put_batch=put_batch)

def get_config():
    return small_runs.adding_run(**eval(os.environ.get("TRAIN", "{{}}")))
"""
TRAIN_PY = Path(__file__).parent.parent / "train.py"


def command(folder: Path) -> list[str]:
    (folder / "own.py").write_text(CONFIG)
    return [sys.executable, str(TRAIN_PY), "--config", "own.py", "--workdir", "run"]


def environment(**more: object) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **{name: str(value) for name, value in more.items()},
    }


def test_exit_codes_of_signals_and_the_same_command_resumes(tmp_path):
    whole = fit(small_runs.adding_run(), tmp_path / "whole")
    for batches, number, code, step in (
        (4, signal.SIGTERM, 75, 4),
        (4, signal.SIGKILL, -9, None),  # at step 8, resumed from 4: beyond the evaluation of step 5
    ):
        outcome = subprocess.run(
            command(tmp_path),
            cwd=tmp_path,
            env=environment(BATCHES=batches, SIGNAL=int(number)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome.returncode == code, outcome.stderr
        if step:
            assert (
                f"Stopped at step {step}; everything is saved. The same command goes on"
                in outcome.stderr
            )
            assert "Traceback" not in outcome.stderr and outcome.stdout == ""
    result = fit(small_runs.adding_run(), tmp_path / "run")
    assert (
        result["params_sha256"] == whole["params_sha256"]
        and result["best_step"] == whole["best_step"]
    )
    assert small_runs.timeless(small_runs.rows(tmp_path / "run")) == small_runs.timeless(
        small_runs.rows(tmp_path / "whole")
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    train = {
        "steps": 1500,
        "schedule_steps": 1500,
        "eval_every": 50,
        "checkpoint_every": 7,
        "log_every": 5,
    }
    whole = fit(small_runs.adding_run(**train), tmp_path / "whole")
    generator = np.random.default_rng(0)
    killed = 0
    while True:
        process = subprocess.Popen(
            command(tmp_path), cwd=tmp_path, env=environment(TRAIN=train), stderr=subprocess.DEVNULL
        )
        try:
            # From before the first checkpoint on; a run is some 20 s, so that it takes several
            # sessions anywhere.
            code = process.wait(timeout=generator.uniform(4, 14) if killed < 12 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            continue
        assert code == 0
        break
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert killed > 2 and result["params_sha256"] == whole["params_sha256"]
    assert result["best_step"] == whole["best_step"] and result["test"] == whole["test"]
    assert small_runs.timeless(small_runs.rows(tmp_path / "run")) == small_runs.timeless(
        small_runs.rows(tmp_path / "whole")
    )


def test_a_run_keeps_its_backend(tmp_path, monkeypatch, capsys):
    """Also where `auto` would take another by now; one that is gone is replaced, with a warning."""
    config = small_runs.adding_run(steps=5)
    fused = replace(config, model=replace(config.model, backend="fused"))
    assert fit(fused, tmp_path / "run")["backend"] == "fused"
    longer = replace(config, train=replace(config.train, steps=10))
    assert fit(longer, tmp_path / "run")["backend"] == "fused"

    capsys.readouterr()
    monkeypatch.setattr(recurrence.fused, "supports", lambda *_: "it is gone")
    monkeypatch.setattr(recurrence.cpu, "supports", lambda *_: "it is gone")
    longest = replace(config, train=replace(config.train, steps=12))
    small_runs.forget()
    assert fit(longest, tmp_path / "run")["backend"] == "scan"
    assert capsys.readouterr().err.count("warning: this run used another backend") == 1
