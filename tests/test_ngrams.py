# SPDX-License-Identifier: Apache-2.0
"""The linear classifier of n-grams that joins a recurrence."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from flax_lstm import ArgumentError, Classification, TextModel, UserError, load, load_config
from flax_lstm.__main__ import main
from flax_lstm.data.base import Batch
from flax_lstm.nn.ngrams import BUCKETS, NGrams, distinct_ngrams
from flax_lstm.tasks.tagging import Tagging
from flax_lstm.training.ngrams import log_count_ratios
from flax_lstm.training.optim import decayed

pytestmark = pytest.mark.usefixtures("quick_compile")


def grams(ids: list[int], longest: int) -> set[tuple[int, ...]]:
    """All n-grams of a list, by slicing."""
    sizes = range(1, longest + 1)
    return {tuple(ids[t : t + n]) for n in sizes for t in range(len(ids) - n + 1)}


def padded(rows: list[list[int]]) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Rows and their lengths; what follows a row is rubbish."""
    steps = max(map(len, rows)) + 2
    ids = np.full((len(rows), steps), 7, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return jnp.asarray(ids), jnp.asarray([len(row) for row in rows])


def hashes_of(ids, longest: int) -> set[int]:
    (found,) = distinct_ngrams(*padded([list(ids)]), longest)
    return {*map(int, found)} - {0}


def test_rows_share_a_hash_where_they_share_an_ngram():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 5, size).tolist() for size in (0, 1, 2, 9, 30, 30)]
    found = [{*map(int, row)} - {0} for row in distinct_ngrams(*padded(rows), 3)]
    expected = [grams(row, 3) for row in rows]
    assert [len(row) for row in found] == [len(row) for row in expected]
    for one, a in zip(found, expected, strict=True):
        for other, b in zip(found, expected, strict=True):
            assert len(one & other) == len(a & b)


def test_an_ngram_counts_once_however_often_a_row_has_it():
    (hashes,) = distinct_ngrams(*padded([[3, 3, 3, 3]]), 2)
    assert np.count_nonzero(hashes) == len(grams([3, 3, 3, 3], 2)) == 2


def test_ratios_are_those_of_naive_bayes():
    """Of two classes, by the definition, over n-grams that two rows or more have."""
    rows = [[1, 2], [1, 2], [1, 3], [4, 3], [4]]
    labels = np.array([0, 0, 1, 1, 1])
    found_MK, _ = log_count_ratios([np.array(row) for row in rows], np.eye(2)[labels], 2)
    kept = [(1,), (2,), (3,), (4,), (1, 2)]
    have = np.array([[gram in grams(row, 2) for gram in kept] for row in rows])
    p, q = 1.0 + have[labels == 0].sum(0), 1.0 + have[labels == 1].sum(0)
    expected = np.log((p / p.sum()) / (q / q.sum()))
    for gram, ratio in zip(kept, expected, strict=True):
        whole = hashes_of(gram, len(gram))
        shorter = hashes_of(gram, len(gram) - 1) if len(gram) > 1 else set()
        (new,) = whole - shorter
        np.testing.assert_allclose(found_MK[new % BUCKETS], [ratio / 2, -ratio / 2], rtol=1e-6)
    assert np.count_nonzero(found_MK[:, 0]) == np.count_nonzero(expected)


def test_of_many_rows_those_of_all_classes_are_counted():
    rows = [np.array([1]), np.array([2])]
    sorted_rows, labels = [rows[0]] * 12 + [rows[1]] * 12, np.repeat([0, 1], 12)
    found, checks = log_count_ratios(sorted_rows, np.eye(2)[labels], 1, most=8)
    expected, same = log_count_ratios(rows * 4, np.eye(2)[[0, 1] * 4], 1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(checks, same)


def test_scores_are_the_sum_of_what_the_ngrams_are_worth():
    ids, lengths = padded([[1, 2, 1], [2]])
    rng = np.random.default_rng(0)
    ratios, scales = rng.normal(size=(BUCKETS, 3)), rng.normal(size=BUCKETS)
    checks = np.zeros(BUCKETS)
    hashes = np.asarray(distinct_ngrams(ids, lengths, 2))
    checks[hashes % BUCKETS] = hashes // BUCKETS
    params = {"ratios": ratios, "scales": scales, "checks": checks}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    scores = NGrams(3, 2).apply({"params": params}, ids, lengths)
    for row, score in zip(distinct_ngrams(ids, lengths, 2), scores, strict=True):
        buckets = np.array([int(h) % BUCKETS for h in row if h])
        expected = (ratios[buckets] * scales[buckets][:, None]).sum(0)
        np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-5)
    others = {**params, "checks": params["checks"] + 1}  # which share the buckets
    np.testing.assert_array_equal(NGrams(3, 2).apply({"params": others}, ids, lengths), 0)


def test_weights_are_float32_where_float64_is_enabled():
    with jax.enable_x64(True):
        ids, lengths = padded([[1, 2]])
        params = NGrams(2, 2).init(jax.random.key(0), ids, lengths)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def with_ngrams(folder, **train):
    config = small_runs.text_run(folder, **train)
    return replace(config, model=replace(config.model, ngrams=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with n-grams in `run`."""
    folder = tmp_path_factory.mktemp("runs")
    small_runs.fit(with_ngrams(folder, steps=6), folder / "run")
    return folder


def test_a_run_keeps_the_ratios_it_begins_with_and_learns_their_scales(folder):
    run = load(folder / "run")
    found = run.params()["ngrams"]
    data = run.config.data.load(folder / "again")
    # To the rounding of six averages.
    ratios, checks = log_count_ratios(*data.labelled_tokens(), 2)
    np.testing.assert_allclose(found["ratios"], ratios, rtol=6 * 2**-23)
    np.testing.assert_allclose(found["checks"], checks, rtol=6 * 2**-23)
    assert np.count_nonzero(found["ratios"]) > 0 and np.count_nonzero(found["scales"]) > 0
    assert not np.any(np.asarray(found["scales"])[np.all(np.asarray(found["ratios"]) == 0, axis=1)])


def test_answers_add_up_both_parts(folder):
    """Without the scales of its n-grams the recurrence answers alone."""
    run = load(folder / "run")
    batch = next(iter(run.info.padded([np.array([3, 4, 5, 3])], 1)))
    module = run.config.task.build(run.config.model, run.info)
    params = run.params()
    both = module.apply({"params": params}, batch.inputs, batch.lengths)[1]
    silent = {**params, "ngrams": jax.tree.map(jnp.zeros_like, params["ngrams"])}
    alone = module.apply({"params": silent}, batch.inputs, batch.lengths)[1]
    part = NGrams(both.shape[1], 2).apply(
        {"params": params["ngrams"]}, jnp.asarray(batch.inputs), jnp.asarray(batch.lengths)
    )
    np.testing.assert_allclose(both, alone + part / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.forward()(batch), both, rtol=1e-4, atol=1e-5)


def test_each_part_learns_as_if_it_were_alone():
    """Training gets the answers of both; its loss is the mean of theirs."""
    model = TextModel(ngrams=2, hidden_size=2, embed_size=2)
    module, ids_and_lengths = model.sequence(2, 10), padded([[3, 4, 5, 3], [4]])
    variables = module.init(jax.random.key(0), *ids_and_lengths)
    alone = replace(model, ngrams=0).sequence(2, 10)
    params = {name: value for name, value in variables["params"].items() if name != "ngrams"}
    expected = alone.apply({"params": params}, *ids_and_lengths)[1]
    rng = {"dropout": jax.random.key(0)}
    told = module.apply(variables, *ids_and_lengths, deterministic=False, rngs=rng)[1]
    np.testing.assert_array_equal(told.recurrent_BO, expected)
    np.testing.assert_array_equal(told.ngrams_BO, 0)  # their scales are 0 at first

    batch = Batch(ids_and_lengths[0], jnp.array([0, 1]), ids_and_lengths[1], jnp.ones(2))
    classes, tags = Classification(label_smoothing=0.1), Tagging()
    for task, targets in ((classes, batch.targets), (tags, jnp.eye(2))):
        rows = batch._replace(targets=targets)
        losses = [task.loss(part, rows).value for part in told]
        np.testing.assert_allclose(task.loss(told, rows).value, np.mean(losses), rtol=1e-6)
        assert losses[0] != losses[1]


def test_ratios_do_not_decay():
    marked = decayed(
        {"ngrams": {"ratios": 0, "scales": 0, "checks": 0}, "head": {"bias": 0, "kernel": 0}}
    )
    assert marked == {
        "ngrams": {"ratios": False, "scales": True, "checks": False},
        "head": {"bias": False, "kernel": True},
    }


def test_what_ngrams_do_not_go_with_is_said(folder, capsys):
    with pytest.raises(UserError, match="for each token"):
        TextModel(ngrams=2).sequence(2, 10, per_step=True)
    with pytest.raises(UserError, match=r"model\.ngrams"):
        TextModel(ngrams=-1)
    module = TextModel(ngrams=2, hidden_size=2, embed_size=2).sequence(2, 10)
    ids, lengths = padded([[1, 2]])
    variables = module.init(jax.random.key(0), ids, lengths)
    state, _ = module.apply(variables, ids, lengths)
    with pytest.raises(ArgumentError, match="n-grams"):
        module.apply(variables, ids, lengths, state)
    explain = ["explain", str(folder / "run"), "--text", "good film"]
    assert main([*explain, "--method", "gradients"]) == 2
    assert "leave-one-out" in capsys.readouterr().err
    assert main(explain) == 0


def test_the_config_joins_ngrams_to_the_bidirectional_lstm():
    model = load_config("imdb_ngrams").model
    assert replace(model, ngrams=0) == load_config("imdb_bilstm").model
    assert model.ngrams == 3
