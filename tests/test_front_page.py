# SPDX-License-Identifier: Apache-2.0
"""The README on the page of a package index, where no file lies beside it."""

import importlib.util
import re
import subprocess
import tomllib

import pytest
from commands import ROOT
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGET = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def alone():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.alone


def test_every_link_of_the_page_leads_somewhere():
    """The text that a build takes."""
    text = ProjectMetadata(str(ROOT), PluginManager()).core.readme
    written = TARGET.findall((ROOT / "README.md").read_text())
    far = [link for link in written if link.startswith("https:")]
    assert 0 < len(far) < len(written)
    kept = written if "Source" in PYPROJECT["project"].get("urls", {}) else far
    assert len(TARGET.findall(text)) == len(kept)
    assert all(link.startswith("https:") for link in TARGET.findall(text))
    assert "```python\nimport pandas as pd" in text


def test_links_to_files_beside_it(alone):
    text = "![a picture](docs/images/a.png)\n[words](docs/b.md#c), [far](https://d.org), [e](#f)"
    assert alone(text, None) == "\nwords, [far](https://d.org), [e](#f)"
    assert alone(text, "https://g.org/h") == (
        "![a picture](https://g.org/h/raw/main/docs/images/a.png)\n"
        "[words](https://g.org/h/blob/main/docs/b.md#c), [far](https://d.org), [e](#f)"
    )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_source_distribution_has_all_that_is_kept():
    command = ["git", "ls-files"]
    kept = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {path.split("/")[0] for path in kept.splitlines()}
    included = {*PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert included <= names
    assert names - included == {".github", ".gitignore", "pyproject.toml"}
