# SPDX-License-Identifier: Apache-2.0
"""The faults of tools/chaos.py, a few times each: `pytest -m faults`."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "chaos", Path(__file__).parent.parent / "tools" / "chaos.py"
)
chaos = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(chaos)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return chaos.Chaos(tmp_path_factory.mktemp("chaos"), seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("fault", chaos.FAULTS)
def test_no_fault_ends_as_none_may(fault, runs):
    _, inflict = chaos.FAULTS[fault]
    outcomes = [inflict(runs, number) for number in range(40 if fault == "bytes" else 2)]
    assert not {*outcomes} & {*chaos.BAD}
