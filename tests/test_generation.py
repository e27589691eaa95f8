# SPDX-License-Identifier: Apache-2.0
"""How a language model continues a text."""

import numpy as np
import pytest
import small_runs

from flax_lstm import UserError, fit, load
from flax_lstm.__main__ import main
from flax_lstm.data.vocabulary import END
from flax_lstm.tasks.generation import choose, continue_text

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_words_are_drawn_as_often_as_the_softmax_says():
    """20,000 draws: within five standard errors of the share; none of padding or unknown."""
    logits = np.array([9.0, 9.0, 0.0, 1.0, 2.0])
    generator = np.random.default_rng(0)
    for temperature, top_p, words in (
        (1.0, 1.0, [2, 3, 4]),
        (0.5, 1.0, [2, 3, 4]),
        (1.0, 0.7, [3, 4]),
    ):
        drawn = [choose(logits, temperature, top_p, generator) for _ in range(20_000)]
        share = np.exp(logits[words] / temperature)
        share /= share.sum()
        found = np.bincount(drawn, minlength=5)[words] / 20_000
        assert set(drawn) == set(words)
        assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / 20_000)).all()
    assert choose(logits, 0, 1.0, generator) == 4
    assert choose(logits, 1.0, 1e-9, generator) == 4


def test_a_text_ends_where_the_model_ends_it():
    seen = []

    def advance(ids):
        seen.append(list(ids))
        return np.eye(6)[[3, 4, END][len(seen) - 1]] * 50.0

    assert continue_text(advance, [5], 10, temperature=0) == [3, 4]
    assert seen == [[END, 5], [3], [4]]  # each word is read once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    fit(small_runs.language_run(folder, steps=4), folder / "run", plots=False)
    return folder


def test_word_by_word_is_the_whole_text_at_once(folder, monkeypatch):
    """The logits that words are drawn by, with a state that is carried, against those of the
    finished text in one pass."""
    seen = []

    def likeliest(logits, *rest):
        seen.append(logits)
        return choose(logits, 0, 1.0, None)

    monkeypatch.setattr("flax_lstm.tasks.generation.choose", likeliest)
    run = load(folder / "run")
    text = run.generate("a b", tokens=6)
    ids = [END, *run.info.vocabulary.encode([text])[0].tolist()]
    assert len(ids) == 9 and text.startswith("a b ")
    module = run.config.task.build(run.config.model, run.info)
    whole = np.asarray(module.apply({"params": run.params()}, np.array([ids]))[1][0])
    np.testing.assert_allclose(seen, whole[2:-1], rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(whole[2:-1], axis=0)).max() > 1e-4  # it does matter what was read


def test_prompt_from_the_command_line(folder, capsys):
    command = ["predict", str(folder / "run"), "--prompt", "a b", "--tokens", "5"]
    assert main([*command, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("a b ") and main([*command, "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    others = set()
    for seed in range(2, 6):
        assert main([*command, "--seed", str(seed)]) == 0
        others.add(capsys.readouterr().out)
    assert others - {first}
    for flags, said in (
        (["--top-p", "0"], "--top-p 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--text", "x"], "either --text"),
    ):
        assert main([*command, *flags]) == 2 and said in capsys.readouterr().err
    assert main(["predict", str(folder / "run"), "--text", "a b"]) == 2
    assert "is a language model, which continues a text: --prompt" in capsys.readouterr().err
    assert main(["predict", "nowhere", "--text", "x", "--top-p", "0.9"]) == 2
    assert "--top-p: for a text that a language model" in capsys.readouterr().err
    with pytest.raises(UserError, match="no language model"):
        fit(small_runs.adding_run(steps=1), folder / "adding", plots=False)
        load(folder / "adding").generate("a")
