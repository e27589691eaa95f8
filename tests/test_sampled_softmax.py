# SPDX-License-Identifier: Apache-2.0
"""The sampled softmax: what it draws, that its denominator is unbiased, and exact with every
word."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from flax_lstm import LanguageModel, LanguageModeling, UserError
from flax_lstm.data.base import Batch
from flax_lstm.data.vocabulary import Vocabulary
from flax_lstm.nn.models import Factored
from flax_lstm.tasks.sampled_softmax import chances, draw, sampled_cross_entropy

WORDS, FEATURES, ROWS = 50, 4, 6


@pytest.fixture(scope="module")
def head():
    """Features, weights, bias and targets, in float64's NumPy; rows with a frequent target, a rare
    one, and the same twice."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(ROWS, FEATURES))
    weights = generator.normal(size=(WORDS, FEATURES))
    return features, weights, generator.normal(size=WORDS), np.array([0, 49, 20, 20, 3, 48])


def float32(*arrays):
    return [jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else jnp.int32) for a in arrays]


def exact(features, weights, bias, targets):
    scores = features @ weights.T + bias
    return np.log(np.exp(scores).sum(1)) - scores[np.arange(ROWS), targets]


def test_with_every_word_it_is_the_softmax_with_its_gradient(head):
    features, weights, bias, targets = float32(*head)

    def sampled(features, weights, bias):
        among = draw(WORDS, WORDS, jnp.float32(0.3))
        return sampled_cross_entropy(features, weights, bias, targets, among).sum()

    def full(features, weights, bias):
        scores = features @ weights.T + bias[None]
        return -jax.nn.log_softmax(scores)[jnp.arange(ROWS), targets].sum()

    assert float(sampled(features, weights, bias)) == pytest.approx(exact(*head).sum(), rel=1e-5)
    ours = jax.grad(sampled, (0, 1, 2))(features, weights, bias)
    theirs = jax.grad(full, (0, 1, 2))(features, weights, bias)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_evaluation_scores_every_word_a_step_at_a_time():
    """The same figures, and never the scores of all steps, by far the largest array there is."""
    generator = np.random.default_rng(1)
    features, weights, bias = (generator.normal(size=s) for s in ((3, 5, 4), (50, 4), 50))
    outputs = Factored(*float32(features, weights, bias), jnp.zeros(()))
    targets, counted = generator.integers(0, 50, (3, 5)), np.ones((3, 5), np.float32)
    counted[1, 3:] = 0
    batch = Batch(jnp.asarray(targets), jnp.asarray(targets), None, jnp.asarray(counted))
    measure = lambda outputs: LanguageModeling().measure(outputs, batch, None)  # noqa: E731
    found, whole = measure(outputs), measure(outputs.scores())
    for figure in ("loss", "accuracy"):
        np.testing.assert_allclose(found[figure], whole[figure], rtol=1e-6)
    expected = np.log(np.exp(features @ weights.T + bias).sum(-1)) - np.take_along_axis(
        features @ weights.T + bias, targets[..., None], -1
    ).squeeze(-1)
    assert float(found["loss"].value) == pytest.approx((expected * counted).sum() / 13, rel=1e-5)
    assert "3,5,50]" in str(jax.make_jaxpr(measure)(outputs.scores()))
    assert "3,5,50]" not in str(jax.make_jaxpr(measure)(outputs))


def test_the_denominator_is_right_on_average(head):
    """exp(loss) is the denominator over the target's part of it: its mean over a fine grid of u,
    the only randomness, is the integral over it to the grid's step."""
    features, weights, bias, targets = float32(*head)
    grid = (jnp.arange(4000) + 0.5) / 4000

    def ratio(u):
        among = draw(WORDS, 12, u)
        return jnp.exp(sampled_cross_entropy(features, weights, bias, targets, among))

    estimates = np.asarray(jax.jit(jax.vmap(ratio))(grid), np.float64)
    np.testing.assert_allclose(estimates.mean(0), np.exp(exact(*head)), rtol=5e-3)
    assert (estimates.std(0) > 0.01).all()  # they do differ from draw to draw


@pytest.mark.parametrize(("words", "candidates"), [(50, 12), (50, 49), (20_000, 1024), (3, 1)])
def test_candidates_differ_and_come_as_often_as_said(words, candidates):
    chance, certain = chances(words, candidates)
    assert chance.sum() == pytest.approx(candidates)
    assert (chance[:certain] == 1).all() and (chance[certain:] < 1).all()
    assert (np.diff(chance) <= 0).all()
    ratio = np.log1p(1 / np.arange(1, words + 1))[certain:] / chance[certain:]
    np.testing.assert_allclose(ratio, ratio[0])  # log-uniform beyond the certain ones
    draws = jax.jit(jax.vmap(lambda u: draw(words, candidates, u)))((jnp.arange(500) + 0.5) / 500)
    ids = np.asarray(draws.ids_S)
    assert ids.shape == (500, candidates) and ids.max() < words
    assert all(len(set(row)) == candidates for row in ids.tolist())
    counts = np.bincount(ids.ravel(), minlength=words) / 500
    np.testing.assert_allclose(counts, chance, atol=2 / 500)
    np.testing.assert_allclose(draws.log_chance_S, np.log(chance)[ids], rtol=1e-5, atol=1e-6)


def test_words_are_numbered_by_falling_frequency():
    vocabulary = Vocabulary.train(["c b a a", "b a c", "a c c c c d"], 10)
    assert vocabulary.decode(range(3, 7)) == "c a b d"


def test_training_is_sampled_and_evaluation_is_not(tmp_path):
    """The loss of a step is that of a few words; of an evaluation, that of all."""
    config = small_runs.language_run(tmp_path)
    info = config.data.load(tmp_path / "assets").info
    task = LanguageModeling(candidates=5)
    module = task.build(config.model, info)
    batch = jax.tree.map(jnp.asarray, info.sample(4))
    batch = batch._replace(weights=jnp.ones_like(batch.weights))
    variables = module.init(jax.random.key(0), batch.inputs)
    given = module.apply(variables, batch.inputs)[1]
    assert given.scores().shape == (*batch.inputs.shape, info.vocabulary_size)
    keys = {"dropout": jax.random.key(1)}
    outputs = module.apply(variables, batch.inputs, deterministic=False, rngs=keys)[1]
    assert outputs.features_BTE.shape == (*batch.inputs.shape, config.model.embed_size)
    evaluated, trained = task.measure(given, batch, info)["loss"], task.loss(outputs, batch)
    whole = task.loss(given.scores(), batch)
    assert float(evaluated.value) == pytest.approx(float(whole.value), rel=1e-6)
    assert trained.weight == evaluated.weight
    everything = LanguageModeling(candidates=info.vocabulary_size).loss(outputs, batch)
    assert float(trained.value) != pytest.approx(float(everything.value), rel=1e-4)


def test_what_cannot_be_sampled_is_said():
    with pytest.raises(UserError, match=r"task\.candidates -1"):
        LanguageModeling(candidates=-1)
    with pytest.raises(UserError, match=r"--model\.tied True"):
        LanguageModeling(candidates=8).build(LanguageModel(), SimpleNamespace(vocabulary_size=9))
