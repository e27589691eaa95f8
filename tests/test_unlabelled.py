# SPDX-License-Identifier: Apache-2.0
"""Texts without labels beside those with, for virtual adversarial training."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_runs

from flax_lstm import Classification, UserError
from flax_lstm.data.buckets import HalfUnlabelled, Rows, balanced
from flax_lstm.data.text import TextTable

pytestmark = pytest.mark.usefixtures("quick_compile")


def rows_of(first: int, count: int, length: int) -> Rows:
    """Rows whose tokens say which row it is."""
    tokens = [np.full(length, first + n, np.int32) for n in range(count)]
    return Rows(tokens, np.arange(count, dtype=np.int32) % 2)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_half_the_rows_of_a_batch_have_no_label(size):
    labelled, unlabelled = rows_of(100, 12, 3), rows_of(500, 40, 7)
    batches = HalfUnlabelled(labelled, unlabelled, (4, 8), size, seed=0)
    without, seen = {2: 1, 5: 3, 8: 4}[size], {100: [], 500: []}
    for step in range(len(batches)):
        batch = batches[step]
        assert batch.inputs.shape == (size, 8)
        first_B = batch.inputs[:, 0]
        np.testing.assert_array_equal(batch.weights, (first_B > 0) & (first_B < 500))
        np.testing.assert_array_equal(batch.lengths[first_B >= 500], [7] * without)
        seen[100] += first_B[(first_B > 0) & (first_B < 500)].tolist()
        seen[500] += first_B[first_B >= 500].tolist()
        np.testing.assert_array_equal(batch.inputs, batches[step].inputs)
    assert sorted(seen[100]) == [100 + n for n in range(12)]
    assert len({*seen[500]}) == len(seen[500]) == without * len(batches)
    assert len(batches) == -(-12 // (size - without))
    assert (batches[len(batches)].inputs != batches[0].inputs).any()  # another epoch


def test_every_part_of_a_batch_has_rows_of_both_kinds():
    for rows in (8, 32, 64):
        for parts in (1, 2, 4):
            for shape, axis in (((-1, parts), 0), ((parts, -1), 1)):  # every n-th row; stretches
                assert (balanced(rows).reshape(shape).mean(axis=axis) == 0.5).all()


@pytest.fixture
def files(tmp_path):
    """Labelled rows, and texts without labels, some of which are copies of rows that judge."""
    texts = [f"text {n} {'fine' if n % 2 else 'dull'}" for n in range(120)]
    table = pd.DataFrame({"text": texts, "label": ["bad", "good"] * 60})
    table.to_csv(tmp_path / "t.csv", index=False)
    others = [f"others {n} fine" for n in range(30)]
    pd.DataFrame({"text": others + texts}).to_csv(tmp_path / "more.csv", index=False)
    return TextTable(
        str(tmp_path / "t.csv"),
        unlabelled_path=str(tmp_path / "more.csv"),
        vocabulary_size=400,
        max_length=8,
    )


def test_no_text_that_judges_is_learnt_from(files, tmp_path):
    dataset = files.load(tmp_path)
    judging = {text for s in ("validation", "test") for text in dataset.read(s).texts}
    assert len(judging) > 10
    vocabulary, source, unlabelled = dataset.info.vocabulary, dataset.train(8, 0), set()
    for step in range(60):
        batch = source[step]
        for ids in batch.inputs[batch.weights == 0]:
            unlabelled.add(vocabulary.decode(ids[ids > 0]))
    encoded = {vocabulary.decode(ids) for ids in dataset.info.encode(sorted(judging))}
    known = {
        vocabulary.decode(ids)
        for ids in dataset.info.encode([f"others {n} fine" for n in range(30)])
    }
    assert known <= unlabelled and not encoded & unlabelled
    alone = replace(files, unlabelled_path="").load(tmp_path / "alone")
    for one, other in zip(dataset.labelled_tokens(), alone.labelled_tokens(), strict=True):
        assert len(one) == len(other)
    assert alone.info.class_counts == dataset.info.class_counts
    assert str(tmp_path / "more.csv") in map(str, files.files())


def test_what_a_run_learns_depends_on_them(files, tmp_path):
    """In two parts a step, each with rows of both kinds."""
    task = Classification(virtual=10.0, linear=False)
    config = replace(small_runs.text_run(tmp_path, steps=2, accumulate=2), task=task, data=files)
    found = small_runs.fit(config, tmp_path / "with", test=False)
    rows = small_runs.rows(tmp_path / "with")
    assert all(np.isfinite(row["loss"]) for row in rows if row["split"] == "train")
    more = pd.read_csv(files.unlabelled_path)
    more["text"] = "other " + more["text"]
    more.to_csv(files.unlabelled_path, index=False)
    again = small_runs.fit(config, tmp_path / "again", test=False)
    assert found["params_sha256"] != again["params_sha256"]


def test_what_does_not_go_with_them_is_said(files, tmp_path):
    plain = replace(small_runs.text_run(tmp_path, steps=2), data=files)
    with pytest.raises(UserError, match=r"by --task\.virtual alone"):
        small_runs.fit(plain, tmp_path / "plain")
    with pytest.raises(UserError, match=r"--train\.batch-size 2"):
        files.load(tmp_path).train(1, 0)
    with pytest.raises(UserError, match=r"data\.unlabelled and data\.prepared"):
        replace(files, prepared=str(tmp_path)).load(tmp_path / "p")
    judging = files.load(tmp_path).read("test").texts
    pd.DataFrame({"text": judging}).to_csv(files.unlabelled_path, index=False)
    with pytest.raises(UserError, match="no text but copies of rows that judge"):
        files.load(tmp_path / "copies").train(8, 0)
    gone = replace(files, unlabelled_path=str(tmp_path / "none.csv")).load(tmp_path / "none")
    assert len([*gone.evaluation("test", 8)]) > 0  # to judge, they are not read
    with pytest.raises(UserError, match=r"none\.csv"):
        gone.train(8, 0)


def test_reviews_without_labels_are_read(tmp_path):
    small_runs.real_reviews()
    config = small_runs.imdb_run(tmp_path)
    data = replace(config.data, unlabelled=True)
    expected = data.source.reviews("unsupervised").texts
    assert data.texts_without_labels() == expected and len(expected) > 2
    assert config.data.texts_without_labels() is None
    batch = data.load(tmp_path / "assets").train(4, 0)[0]
    np.testing.assert_array_equal(batch.weights, [1, 0, 0, 1])
