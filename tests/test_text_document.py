# SPDX-License-Identifier: Apache-2.0
"""What docs/text.md says, done at a small scale."""

import json
import re
import shlex

import pandas as pd
import pytest
from commands import ROOT
from test_docs import blocks

from flax_lstm import load
from flax_lstm.__main__ import main

DOCUMENT = ROOT / "docs" / "text.md"
SMALL = ["--train.steps", "2", "--train.batch-size", "8", "--train.eval-every", "2"]
SMALL += ["--model.embed-size", "8", "--mesh.data", "1", "--no-report"]


@pytest.mark.slow
def test_the_document_on_texts(tmp_path, monkeypatch, capsys, quick_compile):
    monkeypatch.chdir(tmp_path)
    make_tables, in_python = blocks(DOCUMENT, "python")
    names: dict = {}
    exec(make_tables, names)
    told = {}
    for line in "".join(blocks(DOCUMENT, "bash")).splitlines():
        command = re.sub(r"--train.steps \d+|--model.hidden-size \d+", "", line)
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments += [*SMALL, "--model.hidden-size", "8"]
        assert main(arguments) == 0, (line, capsys.readouterr().err)
        told[arguments[0], arguments[1]] = capsys.readouterr()
    answers = pd.read_csv("answers.csv")
    assert [*answers] == ["text", "predicted", "probability", "probability_bad", "probability_good"]
    result = json.loads((tmp_path / "runs/text_table/result.json").read_text())
    assert result["baselines"]["linear"]["accuracy"] > 0.9
    assert told["predict", "runs/text_lm"].out.startswith("the film was")
    assert (tmp_path / "words.html").exists()
    assert load("runs/few").info.vocabulary == load("runs/text_lm").info.vocabulary

    exec(in_python, names)
    assert names["result"]["task"] == "Classification"
    assert names["explanation"].words == ["a", "joy"]
