# SPDX-License-Identifier: Apache-2.0
"""Thousands of odd words, spoilt tables and spoilt folders, given to every command but `train`: a
result, or a few lines and status 2. Never a traceback, a hang, a figure that is none, or half a
file. See `test_fuzz.py`.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_runs
from hypothesis import strategies as st
from nasty import CELLS, WORDS
from test_fuzz import CASES, SUFFIXES, changed, changes, ends_well, place, tried

import flax_lstm.plan
from flax_lstm import inference
from flax_lstm.commands.tables import write_table
from flax_lstm.data.prepared import Prepared
from flax_lstm.errors import UserError

MANY = CASES[1:]  # what needs a run that is trained is for the slow tests
KINDS = ("text", "series", "language")
PREPARE = ("--config", "text_lm", "--data.vocabulary-size", "20")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of each kind in `runs/KIND`, and its table."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        config = getattr(small_runs, f"{kind}_run")(folder)
        small_runs.fit(config, folder / "runs" / kind)
    yield folder
    small_runs.forget()


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of the runs, several folders deep, and this the working directory."""
    here = tmp_path / "some" / "where"
    shutil.copytree(trained, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(inference, "assemble", small_runs.remembered)
    monkeypatch.setattr(flax_lstm.plan, "plan", done)
    return here


def done(*_: Any) -> None:
    """In the place of compilers, in a process of their own."""
    raise SystemExit(0)


# Words


FLAGS = {
    "backtest runs/series": ("windows", "step", "output", "json", "refit", "workdir"),
    "evaluate runs/text": ("split", "input", "checkpoint", "json"),
    "evaluate runs/series": ("split", "input", "checkpoint"),
    "explain runs/text": ("text", "label", "method", "html", "checkpoint"),
    "explain runs/series": ("text",),
    "checkpoints runs/text": ("verify", "json"),
    "predict runs/text": ("text", "checkpoint", "prompt", "input"),
    "predict runs/series --input series.csv": ("output", "cutoffs", "checkpoint", "paths"),
    "predict runs/language": ("prompt", "tokens", "temperature", "top-p", "seed"),
    "prepare --data.path documents.csv": ("out", "config", "verify", "data.vocabulary-size"),
    "plan --config quickstart": ("topology", "config", "no-scaling", "json", "mesh.fsdp"),
}
GIVEN = {  # what a command needs beside the flag that is tried
    "explain": {"text": "fine"},
    "prepare": {"out": "tokens"},
    "predict runs/series": {"output": "out.csv"},
    "predict runs/language": {"prompt": "a b", "tokens": "3"},
}
SIZES = (
    "cpu:0",
    "cpu:3",
    "cpu:99999999999",
    "v5e:1x0",
    "v5e:3x7",
    "v5e:16x16x16",
    "h200:-1",
    "v5e:",
)
SPLIT = ("train", "best", "latest", "10", "text", "good", "gradients", "2024-01-04", "out.tsv")


@pytest.mark.parametrize("examples", MANY)
def test_every_command_takes_any_word_or_refuses_it(folder, capsys, examples):
    every = [(command, flag) for command, flags in FLAGS.items() for flag in flags]

    def property(case: tuple[str, str], word: str) -> None:
        command, flag = case
        more = {flag: word}
        for begins, needs in GIVEN.items():
            more = {**needs, **more} if command.startswith(begins) else more
        ends_well(capsys, *command.split(), *(f"--{name}={value}" for name, value in more.items()))
        assert not [*folder.rglob("*.part")]
        for name in ("tokens", "out.csv", "out.tsv"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    words = st.sampled_from([*WORDS, *SIZES, *SPLIT])
    tried(examples, property, st.sampled_from(every), words)


# Tables


def sound(value: Any) -> bool:
    """Whether no number in it is none."""
    if isinstance(value, dict | list):
        return all(map(sound, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("examples", MANY)
def test_new_tables_are_judged_and_predicted_or_refused(folder, capsys, examples):
    tables = {"text": pd.read_csv("texts.csv"), "series": pd.read_csv("series.csv")}

    def property(kind: str, cells: list[Any], suffix: str, spoilt: list[Any]) -> None:
        frame = tables[kind].astype(object)
        for row, column, value in cells:
            at = min(int(row * len(frame)), len(frame) - 1)
            frame.iat[at, min(int(column * frame.shape[1]), frame.shape[1] - 1)] = value
        there = Path(tempfile.mkdtemp(dir=folder))
        path, output = there / f"new{suffix}", there / "out.jsonl"
        try:
            write_table(frame, path)
        except UserError:  # of a cell that no such file can hold
            return
        for change in spoilt:
            path.write_bytes(changed(path.read_bytes(), *change))
        given = (f"runs/{kind}", "--input", str(path))
        judged = ends_well(capsys, "evaluate", *given, "--json")
        assert judged.code == 2 or sound(json.loads(judged.out))
        predicted = ends_well(capsys, "predict", *given, "--output", str(output))
        assert output.exists() == (predicted.code == 0)
        assert {*there.iterdir()} <= {path, output}
        shutil.rmtree(there)

    many = st.lists(st.tuples(place, place, st.sampled_from(CELLS)), max_size=3)
    kinds = st.sampled_from([*tables])
    suffixes = st.sampled_from([suffix for suffix in SUFFIXES if not suffix.endswith("gz")])
    tried(examples, property, kinds, many, suffixes, st.lists(changes, max_size=2))


@pytest.mark.parametrize("examples", MANY)
def test_any_text_is_explained(folder, capsys, examples):
    def property(text: str, method: str) -> None:
        given = ("runs/text", f"--text={text}", "--method", method, "--json")
        found = ends_well(capsys, "explain", *given)
        assert found.code == 2 or sound(json.loads(found.out))

    texts = st.text(max_size=60) | st.sampled_from(WORDS)
    tried(examples, property, texts, st.sampled_from(["leave-one-out", "gradients"]))


# Folders


def spoil(path: Path, how: list[Any]) -> None:
    """A file of a folder: changed, or (no changes) gone."""
    if not how:
        path.unlink()
    for change in how:
        path.write_bytes(changed(path.read_bytes(), *change))


def a_file(folder: Path, where: float) -> Path:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return found[min(int(where * len(found)), len(found) - 1)]


AFTERWARDS = (
    ("checkpoints", "runs/KIND", "--verify"),
    ("checkpoints", "runs/KIND", "--json"),
    ("evaluate", "runs/KIND", "--split", "validation", "--json"),
    ("evaluate", "runs/KIND", "--checkpoint", "latest", "--json"),
    ("predict", "runs/KIND", "--text", "fine"),
    ("backtest", "runs/KIND", "--json"),
    ("explain", "runs/KIND", "--text", "fine"),
)


@pytest.mark.parametrize("examples", MANY)
def test_a_run_of_which_files_are_spoilt_is_used_or_refused(folder, capsys, examples):
    """Its figures are those of the run, or it has none."""
    figures = {}
    for kind in ("text", "series"):
        for command in AFTERWARDS[2:4]:
            given = [word.replace("KIND", kind) for word in command]
            figures[kind, command] = ends_well(capsys, *given).out

    def property(kind: str, command: Any, damages: list[Any]) -> None:
        shutil.rmtree(folder / "runs" / kind)
        shutil.copytree(folder / "whole" / kind, folder / "runs" / kind)
        for where, how in damages:
            spoil(a_file(folder / "runs" / kind, where), how)
        found = ends_well(capsys, *(word.replace("KIND", kind) for word in command))
        if found.code == 0 and (kind, command) in figures:
            assert found.out == figures[kind, command]

    (folder / "runs").rename(folder / "whole")
    shutil.copytree(folder / "whole", folder / "runs")
    damages = st.tuples(place, st.lists(changes, max_size=2))
    many = st.lists(damages, min_size=1, max_size=2)
    tried(
        examples, property, st.sampled_from(["text", "series"]), st.sampled_from(AFTERWARDS), many
    )


@pytest.mark.parametrize("examples", CASES)
def test_spoilt_texts_and_tokens_are_prepared_anew_or_refused(
    tmp_path, monkeypatch, capsys, examples
):
    """Texts that are spoilt, then what was prepared of them. What --verify passes, opens."""
    small_runs.language_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    path, tokens = tmp_path / "documents.csv", tmp_path / "tokens"
    whole = path.read_bytes()

    def property(texts: list[Any], damages: list[Any]) -> None:
        shutil.rmtree(tokens, ignore_errors=True)
        path.write_bytes(whole)
        for change in texts:
            path.write_bytes(changed(path.read_bytes(), *change))
        given = (*PREPARE, "--data.path", "documents.csv", "--out", "tokens")
        first = ends_well(capsys, "prepare", *given)
        for where, how in damages:
            if any(tokens.glob("*")):
                spoil(a_file(tokens, where), how)
        verified = ends_well(capsys, "prepare", "--out", "tokens", "--verify")
        if first.code == 0 and not damages:
            assert verified.code == 0
        if verified.code == 0:
            Prepared.open(tokens)
        ends_well(capsys, "prepare", *given)

    damages = st.tuples(place, st.lists(changes, max_size=2))
    tried(examples, property, st.lists(changes, max_size=2), st.lists(damages, max_size=2))
