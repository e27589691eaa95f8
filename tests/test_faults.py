# SPDX-License-Identifier: Apache-2.0
"""The faults of tools/chaos.py, a few times each: `pytest -m faults`."""

import sys
from pathlib import Path

import pytest

# By its own name, for its sessions are forked from a process that imports it.
sys.path.append(str(Path(__file__).parent.parent / "tools"))
import chaos

TRIALS = {"bytes": 30, "kill": 4, "full-disk": 3, "soak": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return chaos.Chaos(tmp_path_factory.mktemp("chaos"), seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("fault", chaos.FAULTS)
def test_no_fault_ends_as_none_may(fault, runs):
    _, inflict = chaos.FAULTS[fault]
    outcomes = [inflict(runs, number) for number in range(TRIALS.get(fault, 2))]
    assert not {*outcomes} & {*chaos.BAD}
