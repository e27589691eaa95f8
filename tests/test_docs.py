# SPDX-License-Identifier: Apache-2.0
"""What the documents say can be done, done."""

import re
import shlex
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from commands import ROOT, call

from flax_lstm import MeshConfig, load, load_config
from flax_lstm.commands import plan, train
from flax_lstm.commands.grammar import parse_with_config
from flax_lstm.plan.chips import parse_topology

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def run_in_order(path, name):
    """Executes the Python blocks of a document as one module."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and saved configs find their classes by it
    try:
        for block in blocks(path, "python"):
            exec(
                compile(block, f"{path.name}: {block.strip().splitlines()[0]}", "exec"),
                module.__dict__,
            )
    finally:
        del sys.modules[name]
    return module


def test_the_examples_of_the_front_page(tmp_path, monkeypatch, quick_compile):
    """As printed, but with few steps and few units."""
    monkeypatch.chdir(tmp_path)

    def small(name):
        config = load_config(name)
        train = replace(config.train, steps=4, batch_size=8, eval_every=2, checkpoint_every=2)
        model = replace(config.model, hidden_size=8)
        return replace(config, train=train, model=model, mesh=MeshConfig(data=1))

    monkeypatch.setattr("flax_lstm.load_config", small, raising=False)
    module = run_in_order(ROOT / "README.md", "front_page")
    assert list(module.forecast)[:4] == ["time", "channel", "horizon", "forecast"]
    assert len(module.forecast) == 24 and module.forecast["time"].min() > module.hours[-1]
    assert len(module.answer) == 1 and 0.5 <= module.answer["probability"][0] <= 1
    assert module.y_BTH.shape == (8, 20, 32)


def test_extend(tmp_path, monkeypatch, quick_compile):
    monkeypatch.chdir(tmp_path)
    module = run_in_order(ROOT / "docs" / "extend.md", "extend_document")
    assert (
        module.result["task"] == "PoissonRegression"
        and (tmp_path / "runs/counts/result.json").exists()
    )


def test_convert(tmp_path, monkeypatch, quick_compile):
    monkeypatch.chdir(tmp_path)
    module = run_in_order(ROOT / "docs" / "convert.md", "convert_document")
    run = load("runs/reviews")
    begun = module.state_dict["embedding.weight"]
    kept = np.asarray(run.params()["embed"]["embedding"])
    assert 0 < np.abs(kept - begun).max() < 0.2, "trained from where it was, for ten steps"
    assert run.info.vocabulary.encode(["warm, word92"])[0].tolist() == [3, 1, 99]
    assert module.answer["predicted"][0] in ("good", "bad")


def test_extend_as_the_config_file_it_says_it_is(tmp_path, monkeypatch, capsys, quick_compile):
    """The same blocks, short of the last that trains, in a file: flags reach the own classes, and
    the run reloads."""
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks(ROOT / "docs" / "extend.md", "python"))
    source = source[: source.index("\nresult = fit")]
    (tmp_path / "counts.py").write_text(source)
    flags = "--data.rows 80 --model.hidden-size 3 --train.steps 2 --mesh.data 1"
    outcome = call(capsys, f"train --config counts.py {flags}")
    assert outcome.code == 0, outcome.err
    load_config("counts.py")
    run = load("runs/counts")
    assert (run.config.data.rows, run.config.model.hidden_size) == (80, 3)

    del sys.modules["flax_lstm_config_counts"]
    outcome = call(capsys, "evaluate runs/counts")
    assert outcome.code == 2 and "is not loaded" in outcome.err


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if not link.startswith(("http:", "https:", "mailto:", "#")):
            assert (path.parent / link.split("#")[0]).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(path):
    text = path.read_text()
    for name in re.findall(
        r"`((?:flax_lstm|configs|tests|tools|benchmarks|docs)/[\w./-]+\.\w+)`", text
    ):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_that_documents_place_in_files_are_there(path):
    """`flax_lstm/training/loop.py:fit`"""
    for file, name in re.findall(r"`(flax_lstm/[\w./-]+\.py):(\w+)`", path.read_text()):
        defined = re.search(rf"^(def|class) {name}\b|^{name}\b.*=", (ROOT / file).read_text(), re.M)
        assert defined, f"{path.name}: {file} has no {name}"


def test_the_page_on_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [p.name for p in (ROOT / "flax_lstm").iterdir() if (p / "__init__.py").exists()]
    assert len(rooms) > 7 and all(f"{room}/" in text for room in rooms)


def commands(path, begin="python train.py "):
    """The lines of a document that begin so, without that and without comments."""
    lines = "\n".join(blocks(path, "bash")).splitlines()
    return [
        shlex.split(line[len(begin) :], comments=True) for line in lines if line.startswith(begin)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_documents_name_configs_and_flags_that_exist(path):
    for arguments in commands(path):  # exits at a flag that is not there
        if not any(argument.endswith(".py") for argument in arguments):
            parse_with_config(train.Options, arguments, "train.py", "")
    for arguments in commands(path, "python -m flax_lstm plan "):
        options, _ = parse_with_config(plan.Options, arguments, "plan", "")
        assert parse_topology(options.topology)


def test_forecasting(tmp_path, monkeypatch, capsys, quick_compile):
    """Every command of the page, in order, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "docs" / "forecasting.md"
    run_in_order(path, "forecasting_document")
    few = "--train.steps 4 --train.eval-every 4 --train.batch-size 8 --model.hidden-size 4"
    for line in "".join(blocks(path, "bash")).splitlines():
        words = line.removeprefix("flax-lstm ")
        outcome = call(capsys, f"{words} {few} --mesh.data 1" if words[:5] == "train" else words)
        assert outcome.code == 0, f"{line}: {outcome.err}"
    assert (tmp_path / "runs/series_table/plots/backtest.png").exists()
    assert (tmp_path / "tomorrow.csv").read_text().count("\n") == 1 + 24
