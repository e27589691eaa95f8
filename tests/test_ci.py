# SPDX-License-Identifier: Apache-2.0
"""Steps of CI: licences and known weaknesses of what is installed."""

import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent / "tools"))
import dependencies

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("said", "status", "ends", "told"),
    [
        ("No known vulnerabilities found", 0, 0, "no known weakness"),
        ("Found 1 known vulnerability in 1 package", 1, 1, "Found 1"),
        ("ConnectionError: Max retries exceeded", 1, 0, "skipped: no database"),
    ],
)
def test_a_weakness_fails_and_a_network_that_is_not_there_does_not(
    said, status, ends, told, tmp_path
):
    audit = tmp_path / "pip-audit"
    audit.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    audit.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "audit"], env=path, capture_output=True, text=True)
    assert done.returncode == ends and told in done.stdout


def test_what_is_required_is_followed_down():
    found = dependencies.closure(["jax>=0.10", "tokenizers; python_version < '3'"])
    assert {"jax", "jaxlib", "numpy"} <= found.keys() and "tokenizers" not in found


@pytest.mark.parametrize(("named", "status"), [("GPL-3.0-only", 1), ("BSD-3-Clause", 0)])
def test_a_licence_that_is_not_permissive_fails(named, status, monkeypatch, capsys):
    about = Message()
    about["License-Expression"] = named
    package = SimpleNamespace(version="1.0", metadata=about)
    monkeypatch.setattr(dependencies, "closure", lambda wanted: {"other": package})
    monkeypatch.setattr(sys, "argv", ["dependencies.py", "--check"])
    assert dependencies.main() == status
    assert ("GPL-3.0-only" in capsys.readouterr().out) == bool(status)


def test_the_constraints_hold_what_is_required():
    lines = (ROOT / ".ci" / "constraints-3.11.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert {"jax", "jaxlib", "flax", "orbax-checkpoint", "pytest", "numpy"} <= pinned
