# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains."""

import io

from rich.console import Console

from flax_lstm import TrainConfig
from flax_lstm.runs.journal import Journal, distinct
from flax_lstm.runs.workdir import Workdir

FIGURES = {
    "loss": 0.123456,
    "mse": 0.9,
    "mae": 0.123456,
    "mse_original": 1e6,
    "smape_of_all": 3.1,
    "mae_original": 0.2,
    "crps": 0.2,
}


def journal(tmp_path, out: io.StringIO) -> Journal:
    console = Console(file=out, width=200)
    return Journal(Workdir(tmp_path), console, TrainConfig(), began=0.0)


def test_an_evaluation_fits_in_80_columns_and_shows_no_figure_twice(tmp_path):
    out = io.StringIO()
    with journal(tmp_path, out) as log:
        log.evaluated(1000, "validation", FIGURES, best=True)
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 1000  validation  mse 0.9  mae 0.1235  mse_original 1e+06  crps 0.2  (best)"
    ]
    assert len(lines[0]) <= 80
    assert (
        '"mae_original": 0.2' in (tmp_path / "metrics.jsonl").read_text()
    )  # what is not shown is kept


def test_a_loss_is_shown_where_it_is_none_of_the_others():
    assert distinct({"loss": 1.0, "accuracy": 0.5}) == ["loss", "accuracy"]
    assert distinct({"loss": 1.0, "mse": 1.0}) == ["mse"]
