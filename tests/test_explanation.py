# SPDX-License-Identifier: Apache-2.0
"""Which words an answer rests on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import small_runs

from flax_lstm import fit, load
from flax_lstm.__main__ import main
from flax_lstm.tasks.explanation import Explanation

pytestmark = pytest.mark.usefixtures("quick_compile")
TEXT = "a b fine c"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    fit(small_runs.text_run(folder, learning_rate=0.1), folder / "run", plots=False)
    return load(folder / "run")


def log_share(run, text, label):
    return np.log(run.predict(text)[f"probability_{label}"].iloc[0])


def test_leaving_a_word_out_is_predicting_without_it(run):
    for label in (None, "bad"):
        found = run.explain(TEXT, label)
        assert found.words == TEXT.split()
        assert found.label == (label or run.predict(TEXT)["predicted"].iloc[0])
        whole = log_share(run, TEXT, found.label)
        assert np.log(found.probability) == pytest.approx(whole, rel=1e-5)
        for t, word in enumerate(found.words):
            rest = " ".join(w for u, w in enumerate(found.words) if u != t)
            expected = whole - log_share(run, rest, found.label)
            assert found.contributions[t] == pytest.approx(expected, abs=1e-5), word


def test_integrated_gradients_add_up_to_what_the_embeddings_change(run):
    """Against the same model with a table of zeros; to the error of a midpoint rule of 32 steps."""
    found = run.explain(TEXT, "good", method="gradients")
    module = run.config.task.build(run.config.model, run.info)
    blank = dict(run.params())
    blank["embed"] = jax.tree.map(jnp.zeros_like, blank["embed"])
    ids = run.info.encode([TEXT])[0][None]
    logits = module.apply({"params": blank}, ids)[1]
    nothing = jax.nn.log_softmax(logits[0])[run.info.labels.index("good")]
    change = log_share(run, TEXT, "good") - float(nothing)
    assert abs(change) > 1e-3
    assert sum(found.contributions) == pytest.approx(change, rel=2e-3, abs=1e-5)


def test_words_are_shown_as_the_text_has_them(run):
    """Also those that the model does not know, of the part that it reads."""
    text = "A Zebra, FINE"
    assert run.explain(text).words == ["A", "Zebra", ",", "FINE"]
    long = " ".join(f"Word{n}" for n in range(run.info.max_length + 3))
    assert run.explain(long).words == long.split()[3:]


def test_html_shows_words_as_they_are():
    page = Explanation("a<b", 0.5, ["<i>", "fine"], [-0.5, 1.0]).as_html()
    assert "a&lt;b" in page and "&lt;i&gt;" in page and "<i>" not in page
    assert page.index("220,0,0,0.50") < page.index("0,160,0,1.00")
    assert "<p></p>" in Explanation("a", 0.5, [], []).as_html()


def test_explain_from_the_command_line(run, tmp_path, capsys):
    command = ["explain", str(run.workdir), "--text", TEXT]
    assert main([*command, "--json", "--html", str(tmp_path / "x.html")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["words"] == TEXT.split() and len(told["contributions"]) == 4
    assert (tmp_path / "x.html").read_text().count("<span") == 4
    assert main([*command, "--method", "gradients"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    for flags, said in (
        (["--label", "odd"], "choose one of bad, good"),
        (["--html", str(tmp_path)], "--html"),
        (["--text", " "], "no words"),
    ):
        assert main([*command, *flags]) == 2 and said in capsys.readouterr().err


def test_predict_says_which_words_its_answers_rest_on(run, tmp_path, capsys):
    """What `explain` says of each; an empty text has none."""
    found = run.explain(TEXT)
    expected = [[w, round(c, 4)] for w, c in zip(found.words, found.contributions, strict=True)]
    command = ["predict", str(run.workdir), "--explain"]
    assert main([*command, "--text", TEXT]) == 0
    assert json.loads(capsys.readouterr().out)["words"] == expected
    asked, answered = tmp_path / "asked.csv", tmp_path / "answered.csv"
    pd.DataFrame({"text": [TEXT, ""], "words": [4, 0]}).to_csv(asked, index=False)
    assert main([*command, "--input", str(asked), "--output", str(answered)]) == 0
    table = pd.read_csv(answered)
    assert [json.loads(cell) for cell in table["words"]] == [expected, []]
    assert table["words_input"].tolist() == [4, 0]
    assert main([*command, "--prompt", "a"]) == 2
    assert "--explain: of what a classifier answers" in capsys.readouterr().err
