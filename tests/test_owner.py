# SPDX-License-Identifier: Apache-2.0
"""A run has one owner, one content of its data, and says what differs when it is resumed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import small_runs
from commands import call
from small_runs import fit, interrupted

from flax_lstm import Stopped, UserError, load
from flax_lstm.data import fingerprint
from flax_lstm.data.fingerprint import content_sha256
from flax_lstm.machine.lock import locked

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on a table, whose folder no test changes, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_runs.text_run(folder)
    fit(config, folder / "run")
    return config, folder


def longer(config, steps):
    return replace(config, train=replace(config.train, steps=steps))


def test_a_second_run_on_the_folder_is_refused_and_told_by_whom(finished, capsys):
    config, folder = finished
    with locked(folder / "run" / "lock", "this test"):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on \S+, since 20\d\d-") as e:
            fit(config, folder / "run")
        assert len(str(e.value).splitlines()) == 1
        assert load(folder / "run").evaluate("validation")["examples"] > 0  # readers may
    assert fit(config, folder / "run")["steps"] == 10


def test_the_lock_ends_with_its_process(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from flax_lstm.machine.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'it'): print('has it', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, tmp_path / "lock"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    with (
        pytest.raises(UserError, match=f"process {process.pid} on"),
        locked(tmp_path / "lock", "x"),
    ):
        pytest.fail("two have it")
    process.kill()
    process.wait()
    process.stdout.close()
    with locked(tmp_path / "lock", "x"):
        pass


def test_the_same_command_on_changed_data_is_refused(finished, tmp_path):
    """Also where the run is finished; figures of a saved run are given with a warning."""
    config = small_runs.text_run(tmp_path)
    result = fit(config, tmp_path / "run")
    table = tmp_path / "texts.csv"
    content = table.read_text()
    assert result["data_sha256"] == content_sha256([table])
    table.write_text(content.replace("fine", "fair", 1))
    for wanted in (config, longer(config, 12)):
        with pytest.raises(UserError, match="data are not those that this run began with") as e:
            fit(wanted, tmp_path / "run")
        assert result["data_sha256"] in str(e.value)
        assert content_sha256([table]) in str(e.value)
    table.write_text(content)
    assert fit(config, tmp_path / "run") == result


def test_a_start_that_failed_takes_the_table_that_was_mended(tmp_path):
    config = small_runs.text_run(tmp_path)
    table = tmp_path / "texts.csv"
    content = table.read_text()
    table.write_text(content.replace("label", "class", 1))
    with pytest.raises(UserError, match="label"):
        fit(config, tmp_path / "run")
    table.write_text(content)
    assert fit(config, tmp_path / "run")["data_sha256"] == content_sha256([table])


def test_figures_on_other_data_come_with_a_warning(finished, tmp_path, caplog):
    _, folder = finished
    table = folder / "texts.csv"
    content = table.read_text()
    load(folder / "run").evaluate("validation")
    assert "not those that" not in caplog.text
    table.write_text(content + '"a fine one",good\n')
    load(folder / "run").evaluate("validation")
    table.write_text(content)
    assert "not those that" in caplog.text


def test_the_fingerprint_is_of_content_and_remembered_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 4)
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text("a,b\n1,2\n")
    other.write_text("a,b\n1,2\n")
    assert content_sha256([one]) == content_sha256([other]) != content_sha256([one, other])
    stat = one.stat()
    before = content_sha256([one])
    one.write_text("a,b\n1,3\n")
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_sha256([one]) == before  # it cannot know
    one.touch()
    assert content_sha256([one]) != before
    folder = tmp_path / "folder"
    (folder / "pos").mkdir(parents=True)
    (folder / "pos" / "1.txt").write_text("fine")
    before = content_sha256([folder])
    (folder / "pos" / "1.txt").rename(folder / "pos" / "2.txt")
    assert content_sha256([folder]) != before
    assert content_sha256([]) is None


@pytest.mark.parametrize("damage", ["a letter", "a file gone", "a letter, and the manifest gone"])
def test_damage_to_what_was_fitted_is_noticed(damage, tmp_path):
    config, workdir = small_runs.text_run(tmp_path), tmp_path / "run"
    with pytest.raises(Stopped):
        fit(config, workdir, interrupted(4))
    manifest = workdir / "assets" / "manifest.json"
    path = max((workdir / "assets").glob("*.json"), key=lambda path: path.stat().st_size)
    content, sealed = path.read_bytes(), manifest.read_bytes()
    if damage == "a file gone":
        path.unlink()
    else:
        path.write_bytes(content.replace(b"fine", b"fire", 1))
        assert path.read_bytes() != content
    if "manifest" in damage:
        manifest.unlink()
    for action in (lambda: fit(config, workdir), lambda: load(workdir)):
        with pytest.raises(UserError, match=str(manifest if "manifest" in damage else path)):
            action()
    if "manifest" in damage:  # the way on that the message names
        shutil.rmtree(workdir / "assets")
    else:
        path.write_bytes(content)
    assert fit(config, workdir)["steps"] == 10
    assert (path.read_bytes(), manifest.read_bytes()) == (content, sealed)


def test_what_differs_from_the_session_before_is_told(tmp_path, capsys):
    config, workdir = small_runs.adding_run(), tmp_path / "run"
    with pytest.raises(Stopped):
        fit(config, workdir, interrupted(4))
    for path in (workdir / "checkpoints").glob("*/manifest.json"):  # as one of another machine
        metadata = path.parent / "progress" / "metadata"
        saved = json.loads(metadata.read_bytes())
        assert saved["conditions"].keys() >= {"device", "processes", "cores", "jax", "jaxlib"}
        saved["conditions"] |= {"cores": 64, "jax": "0.9"}
        metadata.write_text(json.dumps(saved))
        from flax_lstm.runs.manifest import seal

        path.unlink()
        seal(path.parent)
    capsys.readouterr()
    result = fit(config, workdir)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: figures will not be bit for bit" in said
    assert f"cores 64 then, {result['cores']} now" in said and "jax 0.9 then" in said
    assert "device" not in said.split("uninterrupted run:")[1].split(" parameters")[0]


def test_a_schedule_that_is_used_up_is_told_and_can_be_lengthened(tmp_path, capsys):
    config = small_runs.adding_run(schedule_steps=0, steps=4)
    fit(config, tmp_path / "run")
    assert "the schedule" not in capsys.readouterr().err
    fit(longer(config, 6), tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "ended at step 4: all 2 steps to come are made at a learning rate of 0" in said
    more = small_runs.adding_run(schedule_steps=9, steps=8, log_every=1)
    with pytest.raises(UserError, match="schedule_steps: 4 there, 9 now"):
        fit(more, tmp_path / "run")
    fit(more, tmp_path / "run", resume_with=["schedule-steps"])
    rates = [r["learning_rate"] for r in small_runs.rows(tmp_path / "run") if "learning_rate" in r]
    assert rates[-3] == 0 < rates[-2]


def test_a_diverged_run_goes_on_at_another_rate(tmp_path):
    """Only with the settings that are named, and then as if it had always been so."""
    config, workdir = small_runs.adding_run(schedule="constant", warmup_steps=0), tmp_path / "run"
    with pytest.raises(Stopped):
        fit(config, workdir, interrupted(5))
    slower = replace(config, seed=3, train=replace(config.train, learning_rate=1e-5, clip=0.5))
    with pytest.raises(UserError, match=r"other settings:(.|\n)*--resume-with allows"):
        fit(slower, workdir)
    with pytest.raises(UserError, match=r"(?s)clip: 1\.0 there, 0\.5 now\n  seed"):
        fit(slower, workdir, resume_with=["learning_rate"])
    with pytest.raises(UserError, match=r"--resume-with batch-size: .*learning-rate, clip, seed"):
        fit(slower, workdir, resume_with=["batch-size"])
    unclipped = replace(config, train=replace(config.train, clip=0))
    with pytest.raises(UserError, match="goes on clipping"):
        fit(unclipped, workdir, resume_with=["clip"])
    fit(slower, workdir, resume_with=["learning-rate", "clip", "seed"])
    rows = [row for row in small_runs.rows(workdir) if row["split"] == "train"]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.01, 1e-5, 1e-5, 1e-5])
    assert fit(slower, workdir)["steps"] == 10


def test_the_command_lists_and_verifies_checkpoints(tmp_path, capsys):
    config, workdir = small_runs.adding_run(), tmp_path / "run"
    fit(config, workdir)
    code, out, _ = call(capsys, "checkpoints", workdir, "--verify", "--json")
    rows = json.loads(out)["checkpoints"]
    assert code == 0 and [row["step"] for row in rows] == [9, 10] and rows[1]["latest"]
    assert all(row["intact"] and row["damage"] is None and row["bytes"] > 1000 for row in rows)
    array = max((workdir / "checkpoints" / "9" / "params" / "d").iterdir())
    content = array.read_bytes()
    array.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
    assert call(capsys, "checkpoints", workdir).code == 0  # names and sizes alone
    code, out, err = call(capsys, "checkpoints", workdir, "--verify")
    assert code == 2 and "Traceback" not in err
    assert str(array) in out.splitlines()[0] and "as it was saved" in out.splitlines()[1]
    array.write_bytes(content[:-1])
    assert call(capsys, "checkpoints", workdir).code == 2
    assert call(capsys, "checkpoints", tmp_path).code == 2
    assert np.isfinite(load(workdir).evaluate("test", "10")["mse"])
