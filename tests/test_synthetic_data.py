# SPDX-License-Identifier: Apache-2.0
"""The adding problem of flax_lstm/data/synthetic.py."""

from pathlib import Path

import numpy as np
import pytest

from flax_lstm.data.synthetic import AddingProblem
from flax_lstm.errors import UserError

DATA = AddingProblem(length=31, examples=100, validation_examples=40, test_examples=50)


def test_definition():
    batch = DATA.load(Path()).train(64, 0)[5]
    values, markers = batch.inputs[..., 0], batch.inputs[..., 1]
    assert (
        batch.inputs.shape == (64, 31, 2)
        and batch.inputs.dtype == batch.targets.dtype == np.float32
    )
    assert ((markers == 0) | (markers == 1)).all() and values.min() >= 0 and values.max() < 1
    assert (markers[:, :15].sum(1) == 1).all() and (markers[:, 15:].sum(1) == 1).all()
    np.testing.assert_allclose(batch.targets[:, 0], (values * markers).sum(1), rtol=1e-6)
    assert (
        batch.targets.shape == (64, 1)
        and (batch.lengths == 31).all()
        and (batch.weights == 1).all()
    )


def test_markers_reach_every_step_and_the_mean_guess_errs_by_a_sixth():
    inputs, targets = DATA.draw(20_000, (9,))
    assert (inputs[..., 1].sum(0) > 0).all()
    assert targets.mean() == pytest.approx(1, abs=0.02)
    assert ((targets - 1) ** 2).mean() == pytest.approx(1 / 6, abs=0.01)


def test_training_never_repeats_and_is_a_function_of_seed_and_step():
    source, again = (DATA.load(Path()).train(16, 7) for _ in range(2))
    assert len(source) == 7
    assert (source[12].inputs == again[12].inputs).all()
    firsts = [source[step].inputs[0, 0, 0] for step in range(50)] + [
        DATA.load(Path()).train(16, 8)[0].inputs[0, 0, 0]
    ]
    assert len(set(firsts)) == 51


def test_fixed_splits():
    dataset = DATA.load(Path())
    seen = {}
    for split, size in (("validation", 40), ("test", 50)):
        batches = list(dataset.evaluation(split, 16))
        assert dataset.size(split) == size == sum(b.weights.sum() for b in batches)
        assert all(len(b.inputs) == 16 for b in batches)
        first = np.concatenate([b.inputs for b in batches])[:size]
        assert (next(dataset.evaluation(split, size)).inputs == first).all()
        seen[split] = set(first[:, 0, 0])
    train = {
        float(n)
        for seed in range(3)
        for step in range(3)
        for n in dataset.train(16, seed)[step].inputs[:, 0, 0]
    }
    assert not seen["validation"] & seen["test"] and not train & (seen["validation"] | seen["test"])


def test_info_and_errors(tmp_path):
    info = DATA.restore(tmp_path)
    sample, batch = info.sample(4), DATA.load(tmp_path).train(4, 0)[0]
    assert (
        sample.inputs.shape[::2] == batch.inputs.shape[::2]
        and sample.targets.shape == batch.targets.shape
    )
    assert (info.features, info.outputs, info.target_mean) == (
        2,
        1,
        1.0,
    ) and DATA.absolute() is DATA
    with pytest.raises(UserError, match=r"data.length 1: must be at least 2"):
        AddingProblem(length=1)
    with pytest.raises(UserError, match=r"data.test-examples 0"):
        AddingProblem(test_examples=0)
