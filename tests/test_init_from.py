# SPDX-License-Identifier: Apache-2.0
"""A classifier that begins with what a language model learnt."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import small_runs

from flax_lstm import UserError, fit, load
from flax_lstm.__main__ import main
from flax_lstm.data import SeriesTable
from flax_lstm.data.vocabulary import Vocabulary
from flax_lstm.runs.saved_config import save_config

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run of a language model in `language`."""
    folder = tmp_path_factory.mktemp("runs")
    fit(small_runs.language_run(folder, steps=4), folder / "language", plots=False)
    return folder


def classifier(folder, **train):
    """Of the same widths, with a vocabulary of another size in its config."""
    config = small_runs.text_run(folder, steps=4, **train)
    config = replace(config, train=replace(config.train, ema=0.0))
    return replace(config, data=replace(config.data, vocabulary_size=500))


def test_encoder_embedding_and_vocabulary_come_from_the_other_run(folder, capsys):
    """All that is below the head is frozen, so that it is there at the end, bit for bit."""
    language = load(folder / "language")
    config = classifier(folder, unfreeze_every=100)
    fit(config, folder / "frozen", plots=False, init_from=language)
    told = " ".join(capsys.readouterr().err.split())
    run = load(folder / "frozen")
    assert run.info.vocabulary == language.info.vocabulary
    theirs, ours = language.params(), run.params()
    for part in ("embed", "recurrent"):
        for a, b in zip(jax.tree.leaves(theirs[part]), jax.tree.leaves(ours[part]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert "of the model's" in told and "head/kernel" in told and "head_bias" in told


def test_the_same_command_again_resumes(folder):
    language = load(folder / "language")
    config = classifier(folder)
    whole = fit(config, folder / "whole", plots=False, init_from=language)
    half = replace(config, train=replace(config.train, steps=2, schedule_steps=10))
    fit(half, folder / "halves", plots=False, init_from=language)
    halves = fit(config, folder / "halves", plots=False, init_from=language)
    assert halves["sessions"] == 2
    assert halves["params_sha256"] == whole["params_sha256"]


def test_a_run_with_another_vocabulary_is_refused(folder):
    data = classifier(folder).data
    data.load(folder / "other" / "assets")
    with pytest.raises(UserError, match="another vocabulary"):
        data.inherit(folder / "language" / "assets", folder / "other" / "assets")


def test_other_shapes_are_told_with_the_settings_that_fit(folder, capsys):
    config = classifier(folder)
    width = config.model.hidden_size
    config = replace(config, model=replace(config.model, hidden_size=2 * width, embed_size=3))
    with pytest.raises(UserError, match="none fits the model"):
        fit(config, folder / "wider", plots=False, init_from=load(folder / "language"))
    told = capsys.readouterr().err
    assert f"language has weights of other shapes: --model.hidden-size {width} --model.emb" in told


def test_from_the_command_line(folder, capsys):
    save_config(classifier(folder), folder / "settings.py")
    cli = ["train", "--config", str(folder / "settings.py"), "--workdir", str(folder / "cli")]
    cli += ["--no-report", "--init-from"]
    assert main([*cli, str(folder / "nothing")]) == 2
    assert "no run here" in capsys.readouterr().err
    assert main([*cli, str(folder / "language")]) == 0
    assert load(folder / "cli").info.vocabulary == load(folder / "language").info.vocabulary


def test_vocabularies_are_equal_where_their_ids_are():
    one, same, other = (Vocabulary.train([text], 9) for text in ("a b b", "a b b", "a b c"))
    assert one == same and hash(one) == hash(same) and one != other and one != "a b b"


def test_words_of_another_program_are_for_texts_cut_into_words(folder):
    """And for a new folder: ids that a run has begun with stay."""
    data, assets = classifier(folder).data, folder / "words" / "assets"
    data.adopt(["warm", "cold"], assets)
    data.adopt(["warm", "cold"], assets)
    with pytest.raises(UserError, match="another vocabulary than the words given"):
        data.adopt(["cold", "warm"], assets)
    with pytest.raises(UserError, match="tokenizer word"):
        replace(data, tokenizer="bpe").adopt(["warm"], assets)
    with pytest.raises(UserError, match="SeriesTable has no vocabulary"):
        SeriesTable().adopt(["warm"], assets)


def test_a_start_that_came_to_nothing_leaves_no_vocabulary(folder):
    """Without --init-from the same command has the vocabulary of its own texts."""
    config = classifier(folder)
    (folder / "begun").mkdir()
    save_config(config.with_schedule_settled(), folder / "begun" / "config.py")
    config.data.inherit(folder / "language" / "assets", folder / "begun" / "assets")
    fit(config, folder / "begun", plots=False, test=False)
    own = config.data.load(folder / "fresh" / "assets").info.vocabulary
    assert load(folder / "begun").info.vocabulary == own
    assert own != load(folder / "language").info.vocabulary


def test_runs_that_know_words_by_other_ids_are_not_averaged(folder):
    """The settings of their data are the same."""
    config = classifier(folder)
    fit(config, folder / "theirs", plots=False, test=False, init_from=load(folder / "language"))
    fit(config, folder / "own", plots=False, test=False)
    with pytest.raises(UserError, match="differ in their assets"):
        load(folder / "own", folder / "theirs")
