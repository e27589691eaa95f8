# SPDX-License-Identifier: Apache-2.0
"""What a user's type checker and editor know of the package: it says that it has types."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import jax
from flax_lstm import RNN, Bidirectional, Config, Forecasting, LSTMCell, Stack, TrainConfig
from dataclasses import replace
from flax_lstm import SegmentModel, fit, load, load_config
from flax_lstm.data import SeriesTable

config: Config = load_config("quickstart")
mine = Config("mine", SeriesTable(), Forecasting(), SegmentModel(), TrainConfig(steps=10))
reveal_type(fit(mine))
run = load("runs/mine")
reveal_type(run)
reveal_type(run.evaluate())
reveal_type(run.predict("a text"))
reveal_type(RNN(LSTMCell(8)))
reveal_type(config.train.steps)
reveal_type(config.data)
reveal_type(Stack([RNN(LSTMCell(8))])(jax.numpy.zeros((1, 2, 3)))[1])
replace(mine, data=replace(mine.data, path="x"), task=replace(mine.task, objective="mse"))
fit(mine, wokdir="x")
SeriesTable(lookback="long")
"""


def test_a_small_program_of_a_user_is_checked(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    settings = ["--strict", "--ignore-missing-imports", "--follow-imports", "silent"]
    command = [sys.executable, "-m", "mypy", *settings, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    revealed = [line.split('"')[1] for line in done.stdout.splitlines() if "Revealed" in line]
    names = [kind.split(".")[-1] for kind in revealed]
    results = ["dict[str, Any]", "Run", "dict[str, Any]", "DataFrame"]
    assert names == [*results, "RNN", "int", "Data", "Array"], done.stdout
    mistakes = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(mistakes) == 2, done.stdout
    assert "wokdir" in mistakes[0] and "lookback" in mistakes[1]
