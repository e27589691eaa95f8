# SPDX-License-Identifier: Apache-2.0
"""A run saved by version 0.1.0, whose config names modules that have moved, still works."""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flax_lstm import fit, load
from flax_lstm.runs.saved_config import read_config
from flax_lstm.runs.workdir import Workdir

ARCHIVE = Path(__file__).parent / "fixtures" / "old_run.tar.gz"  # 12 steps of a tiny quickstart


@pytest.fixture
def old_run(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "quickstart"


def test_its_config_is_read(old_run):
    config = read_config(old_run / "config.py")
    assert config.name == "quickstart" and config.model.hidden_size == 4


def test_it_gives_the_figures_it_gave(old_run):
    before = Workdir(old_run).read_result()
    figures = load(old_run).evaluate("test")
    assert figures["step"] == before["best_step"]
    np.testing.assert_allclose(figures["mae"], before["test"]["mae"], rtol=1e-4)


def test_it_predicts(old_run):
    run = load(old_run)
    frame = run.config.data.read("electricity")
    assert len(run.predict(frame)) == 24


def test_it_resumes(old_run):
    config = read_config(old_run / "config.py")
    longer = replace(config, train=replace(config.train, steps=16))
    result = fit(longer, old_run, plots=False)
    assert (result["steps"], result["sessions"]) == (16, 2)
