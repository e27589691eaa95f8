# SPDX-License-Identifier: Apache-2.0
"""What docs/results.md prints of a run is what the run's own file says."""

import json
import re
from functools import reduce
from operator import getitem

from commands import ROOT

ROW = re.compile(r"^\| `results/([\w.-]+\.json)` \| `([\w.]+)` \| ([\d.]+) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "results.md").read_text())


def printed(value: float, like: str) -> str:
    """A number as it stands in the document: so many decimals, and no zero before the point."""
    decimals = len(like.partition(".")[2])
    text = f"{value:.{decimals}f}"
    return text.removeprefix("0") if decimals else text


def test_every_printed_figure_is_that_of_its_file():
    assert len(ROWS) >= 7
    for file, figure, told in ROWS:
        content = json.loads((ROOT / "results" / file).read_text())
        value = reduce(getitem, figure.split("."), content)
        assert printed(value, told) == told, (file, figure)


def test_every_file_is_behind_a_row():
    found = {path.name for path in (ROOT / "results").iterdir()}
    assert found == {file for file, _, _ in ROWS}


def test_the_test_split_is_that_of_the_checkpoint_which_validation_chose():
    """And whatever was judged was judged whole."""
    for path in (ROOT / "results").glob("*.test.json"):
        judged = json.loads(path.read_text())
        run = json.loads(path.with_name(path.name.replace(".test.", ".")).read_text())
        assert judged["split"] == "test" and judged["step"] == run["best_step"]
        if run["name"].startswith("imdb"):
            assert judged["examples"] == 25_000
