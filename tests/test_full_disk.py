# SPDX-License-Identifier: Apache-2.0
"""What cannot be written is told in a line, and lost neither at once nor in the next session."""

import errno
import json
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import small_runs
from small_runs import fit

from flax_lstm import UserError
from flax_lstm.commands.train import quiet_late_answers
from flax_lstm.machine.files import draft, write_atomically, written_or_told
from flax_lstm.machine.sharding import put_batch
from flax_lstm.runs.journal import MetricsLog

pytestmark = pytest.mark.usefixtures("quick_compile")


def without_room(path):
    """A file that cannot be made until its folder is: a link that leads nowhere."""
    path.symlink_to(path.parent.with_name("not there yet") / "file")


def with_room(path):
    path.readlink().parent.mkdir()


def at_step(step, action):
    """Surroundings in which something happens as the batch of a step is taken."""
    taken = []

    def put(batch, mesh):
        taken.append(1)
        if len(taken) == step:
            action()
        return put_batch(batch, mesh)

    return {"put_batch": put}


def test_rows_that_find_no_room_come_later(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    without_room(path)
    log = MetricsLog(path)
    for step in (1, 2):
        with pytest.raises(OSError):
            log.append(step, "train", {"loss": float(step)}, 0.0)
    assert [row["step"] for row in log.rows()] == [1, 2]  # though not in the file
    with_room(path)
    log.append(3, "train", {"loss": 3.0}, 0.0)
    assert not log.unwritten
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_rows_that_found_no_room_come_in_the_next_session_once(tmp_path):
    """One had still been written by the session that is gone, the other had not."""
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(1, "train", {"loss": 1.0}, 0.0)
    lines = [json.dumps({"step": step, "split": "train"}) + "\n" for step in (1, 2)]
    log = MetricsLog(path, lines)
    log.rewind(2)
    assert [row["step"] for row in log.rows()] == [1, 2] and not log.unwritten


def test_a_run_whose_log_cannot_be_written_is_not_finished_and_goes_on_whole(tmp_path, capsys):
    config = small_runs.adding_run()
    fit(config, tmp_path / "whole")
    run = tmp_path / "run"
    run.mkdir()
    # The log alone: checkpoints are saved, and have its rows.
    without = at_step(1, lambda: without_room(run / "metrics.jsonl"))
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No such file"):
        fit(config, run, without)
    assert capsys.readouterr().err.count("training goes on, and rows are kept") == 1
    assert not (run / "result.json").exists()
    with_room(run / "metrics.jsonl")
    fit(config, run)
    rows, whole = (
        small_runs.timeless(small_runs.rows(place)) for place in (run, tmp_path / "whole")
    )
    assert rows == whole


def test_a_result_that_cannot_be_written_is_told(tmp_path):
    config = small_runs.adding_run()
    part = tmp_path / "run" / "result.json.part"
    with pytest.raises(UserError, match=r"result\.json.*cannot be written") as told:
        fit(config, tmp_path / "run", at_step(1, part.mkdir))
    assert len(str(told.value).splitlines()) == 1
    part.rmdir()
    assert fit(config, tmp_path / "run")["steps"] == 10


def test_plots_that_find_no_room_cost_a_line(tmp_path, capsys):
    def full(rows, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    result = fit(small_runs.adding_run(), tmp_path / "run", {"plot_curves": full}, plots=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert "no plots are drawn (No space left on device)" in capsys.readouterr().err


def test_a_run_whose_folder_is_removed_ends_with_a_line(tmp_path):
    """And what it had written by then is in nobody's way."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match="was removed while it trained") as told:
        fit(small_runs.adding_run(), run, at_step(2, lambda: shutil.rmtree(run)))
    assert len(str(told.value).splitlines()) == 1
    (run / "checkpoints" / "3.unproven.orbax-checkpoint-tmp").mkdir(parents=True)
    MetricsLog(run / "metrics.jsonl").append(3, "train", {"loss": 1.0}, 0.0)
    assert fit(small_runs.adding_run(), run)["steps"] == 10
    assert len([row for row in small_runs.rows(run) if row["step"] < 4]) == 1
    for name in ("checkpoints/3", "notes"):
        other = tmp_path / name.replace("/", "-")
        (other / name).mkdir(parents=True)
        with pytest.raises(UserError, match="holds other things and no run"):
            fit(small_runs.adding_run(), other)


def test_errors_about_other_files_are_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError), written_or_told(tmp_path / "run"):
        (tmp_path / "elsewhere" / "data.csv").read_text()
    with pytest.raises(UserError, match="No space left"), written_or_told(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_late_answers_to_a_save_that_failed_are_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])
    quiet_late_answers()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [str(told.exc_value) for told in shown] == ["something else"]


def test_a_file_is_written_whole_or_stays(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    (tmp_path / "file.part").mkdir()
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("shared", [False, True])
def test_a_draft_goes_with_the_writer_that_fails(tmp_path, shared):
    path = tmp_path / ("n" * 250)  # with ".part" a name may have
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), draft(path, shared=shared) as new:
        new.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"


def test_errors_of_the_disk_that_orbax_leaves_lying_are_no_tracebacks(caplog, monkeypatch):
    """asyncio tells of a task whose error nobody took; of other errors it still does."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    logger = logging.getLogger("asyncio")
    monkeypatch.setattr(logger, "filters", [])
    quiet_late_answers()
    for error in (OSError(28, "No space left on device"), ValueError("another")):
        logger.error("Task exception was never retrieved", exc_info=error)
    assert [record.exc_info[0] for record in caplog.records] == [ValueError]
