# SPDX-License-Identifier: Apache-2.0
"""tools/mutate.py breaks what is there: every breakage finds its text, once."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_breakage_finds_its_text_once():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    mutate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutate)
    lost = {
        name: breakage.file
        for name, breakage in mutate.BREAKAGES.items()
        if (ROOT / breakage.file).read_text().count(breakage.old) != 1
    }
    assert not lost
