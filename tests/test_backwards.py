# SPDX-License-Identifier: Apache-2.0
"""Texts that are read from their end to their beginning."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import small_runs

from flax_lstm import Ensemble, TextModel, UserError, load
from flax_lstm.data.vocabulary import END
from flax_lstm.errors import ArgumentError
from flax_lstm.tasks.explanation import integrated_gradients

pytestmark = pytest.mark.usefixtures("quick_compile")


def backwards(config, **model):
    return replace(config, model=replace(config.model, backwards=True, **model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model and a classifier after it, in both directions."""
    folder = tmp_path_factory.mktemp("runs")
    language = small_runs.language_run(folder, steps=4)
    turned = replace(language, data=replace(language.data, backwards=True))
    forwards = small_runs.text_run(folder, steps=4)
    for name, data, text in (
        ("forwards", language, forwards),
        ("backwards", turned, backwards(forwards)),
    ):
        small_runs.fit(data, folder / f"language-{name}")
        begin = load(folder / f"language-{name}")
        small_runs.fit(text, folder / name, init_from=begin)
    return folder


@pytest.mark.parametrize("pooling", ["last", "concat", "attention"])
def test_a_model_gives_for_a_row_what_it_would_for_the_turned_row(pooling):
    forward = TextModel(hidden_size=4, embed_size=3, pooling=pooling, num_layers=2)
    words_BT = np.array([[3, 4, 5, 6, 7], [8, 9, 3, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    turned_BT = np.array([[7, 6, 5, 4, 3], [3, 9, 8, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    lengths_B = np.array([5, 3, 0], np.int32)
    module, other = (m.sequence(2, 10) for m in (forward, replace(forward, backwards=True)))
    params = module.init(jax.random.key(0), words_BT, lengths_B)
    _, expected = module.apply(params, turned_BT, lengths_B)
    _, found = other.apply(params, words_BT, lengths_B)
    np.testing.assert_array_equal(found, expected)
    assert (np.abs(module.apply(params, words_BT, lengths_B)[1] - found)[:2] > 1e-6).all()


def test_a_language_model_reads_the_same_documents_each_turned_round(folder):
    one, other = (load(folder / f"language-{name}") for name in ("forwards", "backwards"))
    assert one.info.vocabulary == other.info.vocabulary
    for split in ("train", "validation"):
        streams = []
        for run in (one, other):
            batches = [*run.dataset().evaluation(split, 1)]
            ids = np.concatenate([b.targets[0, : b.lengths[0]] for b in batches])
            streams.append(np.split(ids, np.flatnonzero(ids == END) + 1)[:-1])
        assert len(streams[0]) > 2
        for document, turned in zip(*streams, strict=True):
            np.testing.assert_array_equal(document[:-1], turned[:-1][::-1])


def test_what_it_writes_comes_before_the_prompt(folder):
    run = load(folder / "language-backwards")
    said = run.generate("a b", tokens=6, temperature=0)
    assert said.endswith("a b") and len(said.split()) == 8
    inputs = run.info.vocabulary.encode(["a b"])[0][::-1]
    # The first word by hand: of the end of a text, then b, then a.
    module = run.config.task.build(run.config.model, run.info)
    words_BT = np.array([[END, *inputs]], np.int32)
    _, logits_BTV = module.apply({"params": run.params()}, words_BT)
    logits_V = np.asarray(logits_BTV[0, -1], np.float64)
    logits_V[:2] = -np.inf
    assert run.info.vocabulary.decode([int(logits_V.argmax())]) == said.split()[-3]


def test_both_directions_are_averaged(folder):
    whole, parts = (
        load(folder / "forwards", folder / "backwards"),
        [load(folder / name) for name in ("forwards", "backwards")],
    )
    assert isinstance(whole, Ensemble)
    texts = ["a fine b", "dull", "c d e fine"]
    one, other = (run.predict(texts)["probability_good"] for run in parts)
    assert (np.abs(one - other) > 1e-6).all()
    found = whole.predict(texts)["probability_good"]
    np.testing.assert_allclose(found, (one + other) / 2, rtol=1e-6)


def test_words_are_explained_in_the_places_where_they_are(folder):
    """The contributions are those of the turned text, in the places of this one."""
    run = load(folder / "backwards")
    explained = run.explain("a c b", method="gradients")
    assert explained.words == ["a", "c", "b"]
    turned = replace(run.config.model, backwards=False).sequence(2, run.info.vocabulary_size)
    ids = run.info.encode(["b c a"])[0]
    k = run.info.labels.index(explained.label)
    expected = integrated_gradients(turned, run.params(), ids, k)[::-1]
    np.testing.assert_allclose(explained.contributions, expected, rtol=1e-4, atol=1e-7)


def test_a_run_that_reads_the_other_way_is_no_beginning(folder):
    forwards = small_runs.text_run(folder, steps=4)
    language = small_runs.language_run(folder)
    turned = replace(language, data=replace(language.data, backwards=True))
    for config, name, said in (
        (language, "backwards", "reads texts backwards.*--data.backwards True"),
        (turned, "forwards", "reads texts forwards.*--data.backwards False"),
        (forwards, "backwards", "reads texts backwards.*--model.backwards True"),
        (backwards(forwards), "forwards", "reads texts forwards.*--model.backwards False"),
    ):
        with pytest.raises(UserError, match=said):
            small_runs.fit(config, folder / "no", init_from=load(folder / f"language-{name}"))


def test_what_does_not_go_with_it_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="bidirectional model reads backwards as well"):
        TextModel(backwards=True, bidirectional=True)
    with pytest.raises(UserError, match="each token"):
        TextModel(backwards=True).sequence(2, 10, per_step=True)
    with pytest.raises(UserError, match="read forwards only"):
        replace(small_runs.language_run(tmp_path).data, backwards=True, prepared="there")
    with pytest.raises(UserError, match="read forwards only; leave it"):
        replace(small_runs.language_run(tmp_path).data, backwards=True).prepare(tmp_path / "out")
    module = TextModel(hidden_size=2, backwards=True).sequence(2, 10)
    words_BT = np.ones((1, 3), np.int32)
    state, params = None, module.init(jax.random.key(0), words_BT)
    state, _ = module.apply(params, words_BT)
    with pytest.raises(ArgumentError, match="reads backwards"):
        module.apply(params, words_BT, None, state)
