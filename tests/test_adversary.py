# SPDX-License-Identifier: Apache-2.0
"""Inputs moved the worst way, against float64 NumPy on a model whose gradients can be written down:
softmax regression on the mean of the valid steps.

Axes: B batch, T time, D input features, K classes.
"""

from copy import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from flax import linen as nn

from flax_lstm import Classification, UserError
from flax_lstm.data.base import Batch
from flax_lstm.machine.sharding import make_mesh, put_batch
from flax_lstm.nn.models import SequenceModel, mean_pool
from flax_lstm.tasks.adversary import divergence, unit
from flax_lstm.training.optim import learning_rate, make_optimizer
from flax_lstm.training.steps import apply, make_steps

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, STEPS, FEATURES, CLASSES = 4, 5, 3, 2
RATE = 0.5


class Nothing(nn.Module):
    """A recurrent layer that gives its inputs back."""

    def __call__(self, x_BTD, lengths_B, state=None, *, deterministic=True):
        return None, x_BTD


MODULE = SequenceModel(Nothing(), CLASSES, pool=mean_pool)


def batch_of() -> Batch:
    generator = np.random.default_rng(0)
    return Batch(
        inputs=(generator.normal(size=(ROWS, STEPS, FEATURES)) * [1, 2, 0.1] + 0.5).astype("f4"),
        targets=np.array([0, 1, 1, 0], np.int32),
        lengths=np.array([5, 3, 1, 2], np.int32),
        weights=np.array([1, 2, 0.5, 0], np.float32),
    )


class Reference:
    """The same in float64."""

    def __init__(self, params, batch: Batch):
        head = params["head"]
        self.kernel_DK, self.bias_K = (np.asarray(head[n], np.float64) for n in ("kernel", "bias"))
        self.x_BTD = batch.inputs.astype(np.float64)
        self.valid_BT1 = (np.arange(STEPS) < batch.lengths[:, None])[..., None]
        self.target_BK = np.eye(CLASSES)[batch.targets]
        self.weights_B1 = batch.weights.astype(np.float64)[:, None]
        self.lengths_B1 = batch.lengths[:, None]
        self.deviation_D = self.x_BTD[self.valid_BT1[..., 0]].std(axis=0)

    def features(self, move_BTD=0.0):
        moved_BTD = (self.x_BTD + self.deviation_D * move_BTD) * self.valid_BT1
        return moved_BTD.sum(axis=1) / self.lengths_B1

    def shares(self, move_BTD=0.0):
        e = np.exp(self.features(move_BTD) @ self.kernel_DK + self.bias_K)
        return e / e.sum(axis=1, keepdims=True)

    def back(self, error_BK):
        """The gradient of the inputs, in their deviations, from that of the logits."""
        from_features_BD = error_BK @ self.kernel_DK.T / self.lengths_B1
        return from_features_BD[:, None] * self.deviation_D * self.valid_BT1

    def unit(self, x_BTD):
        norm = np.sqrt((x_BTD**2).sum(axis=(1, 2), keepdims=True))
        return x_BTD / np.where(norm > 0, norm, 1)

    def gradient(self, error_BK, move_BTD=0.0):
        return self.features(move_BTD).T @ (self.weights_B1 * error_BK) / self.weights_B1.sum()


def one_step(task: Classification):
    """Parameters before and after a step of gradient descent, the loss, and the batch."""
    batch, mesh, schedule = batch_of(), make_mesh(1), learning_rate("constant", RATE, 0, 10)
    optimizer = make_optimizer("sgd", schedule, 0.0, 0.0)
    steps = make_steps(
        MODULE,
        task.loss,
        lambda outputs, batch: outputs,
        optimizer,
        schedule,
        mesh,
        batch,
        adversaries=task.adversaries(),
    )
    state = steps.init()
    before = jax.device_get(state.params)
    state, metrics = steps.train(state, put_batch(batch, mesh))
    return before, jax.device_get(state.params), float(metrics["loss"]), batch


def replace_weights(reference: Reference, weights_B1: np.ndarray) -> Reference:
    changed = copy(reference)
    changed.weights_B1 = weights_B1
    return changed


def cross_entropy(reference, shares_BK):
    losses_B1 = -np.log((shares_BK * reference.target_BK).sum(axis=1, keepdims=True))
    return (reference.weights_B1 * losses_B1).sum() / reference.weights_B1.sum()


def test_an_adversarial_step_is_that_of_both_losses_in_float64():
    before, after, loss, batch = one_step(Classification(adversarial=2.0))
    reference = Reference(before, batch)
    clean_BK = reference.shares()
    error_BK = reference.weights_B1 * (clean_BK - reference.target_BK)
    move_BTD = 2.0 * reference.unit(reference.back(error_BK))
    moved_BK = reference.shares(move_BTD)
    expected = cross_entropy(reference, clean_BK) + cross_entropy(reference, moved_BK)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    assert cross_entropy(reference, moved_BK) > 1.05 * cross_entropy(reference, clean_BK)
    gradient_DK = reference.gradient(clean_BK - reference.target_BK)
    gradient_DK += reference.gradient(moved_BK - reference.target_BK, move_BTD)
    change_DK = (before["head"]["kernel"] - after["head"]["kernel"]) / RATE
    # The difference of float32 weights has lost some digits.
    np.testing.assert_allclose(change_DK, gradient_DK, rtol=1e-5, atol=1e-6)


def test_a_virtual_step_moves_along_the_only_direction_there_is():
    """With two classes and a linear model every gradient of the divergence has one direction, up to
    its sign, which the random start decides: the loss is that of one of the two signs in each
    row, and the answers before the move are taken as given. The last row has no label, and
    counts as one row where answers are compared."""
    before, after, loss, batch = one_step(Classification(virtual=3.0))
    reference = Reference(before, batch)
    clean_BK = reference.shares()
    move_BTD = 3.0 * reference.unit(reference.back(np.array([[1.0, -1.0]]).repeat(ROWS, axis=0)))
    compared_B1, found = np.array([[1], [2], [0.5], [1]]), []
    for signs in np.array(np.meshgrid(*[[-1, 1]] * ROWS)).reshape(ROWS, -1).T:
        signed_BTD = signs[:, None, None] * move_BTD
        moved_BK = reference.shares(signed_BTD)
        change_B1 = (clean_BK * np.log(clean_BK / moved_BK)).sum(axis=1, keepdims=True)
        change = (compared_B1 * change_B1).sum() / compared_B1.sum()
        if np.isclose(loss, cross_entropy(reference, clean_BK) + change, rtol=2e-6):
            gradient_DK = reference.gradient(clean_BK - reference.target_BK)
            others = replace_weights(reference, compared_B1)
            found.append(gradient_DK + others.gradient(moved_BK - clean_BK, signed_BTD))
    (gradient_DK,) = found
    change_DK = (before["head"]["kernel"] - after["head"]["kernel"]) / RATE
    # Features up to 4 and shares that cancel, each rounded to 2^-24: some ten such errors.
    np.testing.assert_allclose(change_DK, gradient_DK, rtol=1e-5, atol=4 * 2**-24 * 40)


def test_moves_count_in_deviations_of_the_valid_steps():
    """Padding neither counts nor moves: what stands there changes no answer."""
    batch = batch_of()
    params = MODULE.init(jax.random.key(0), batch.inputs, batch.lengths)["params"]
    move_BTD = np.random.default_rng(1).normal(size=batch.inputs.shape).astype(np.float32)
    reference = Reference(params, batch)
    for inputs in (batch.inputs, np.where(reference.valid_BT1, batch.inputs, 1e6)):
        _, logits_BK = apply(
            MODULE, params, None, batch._replace(inputs=jnp.asarray(inputs)), move=move_BTD
        )
        shares_BK = jax.nn.softmax(logits_BK)
        np.testing.assert_allclose(shares_BK, reference.shares(move_BTD), rtol=2e-5)


def test_initial_variables_are_weights_alone():
    batch = batch_of()
    assert [*MODULE.init(jax.random.key(0), batch.inputs, batch.lengths)] == ["params"]


def test_unit_rows_of_any_size_and_zeros():
    rows = np.random.default_rng(0).normal(size=(3, 4, 2))
    scaled = rows * np.array([1e-30, 0.0, 1e30])[:, None, None]
    norm = np.sqrt((rows**2).sum(axis=(1, 2), keepdims=True))
    expected = rows / norm * np.array([1, 0, 1])[:, None, None]
    np.testing.assert_allclose(unit(jnp.asarray(scaled, jnp.float32)), expected, rtol=1e-5)


def test_divergence_takes_the_answer_before_as_given():
    logits, moved = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[0.0, 0.5, 1.0]])
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (logits, moved))
    np.testing.assert_allclose(divergence(logits, moved), (p * np.log(p / q)).sum(1), rtol=1e-5)
    assert not jax.grad(lambda x: divergence(x, moved).sum())(logits).any()


def test_a_run_of_words_in_two_parts(tmp_path):
    """Through the kernel of the recurrence, whose gradients have no gradients of their own."""
    config = small_runs.text_run(tmp_path, steps=2, accumulate=2)
    plain = small_runs.fit(config, tmp_path / "plain", test=False)
    task = Classification(adversarial=1.0, virtual=1.0, linear=False)
    moved = small_runs.fit(replace(config, task=task), tmp_path / "moved", test=False)
    assert moved["params_sha256"] != plain["params_sha256"]


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(UserError, match=r"task\.virtual .* finite norm"):
        Classification(virtual=size)


def test_a_module_without_inputs_to_move_is_refused():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x_BTD, lengths_B, state, covariates, *, deterministic=True):
            return None, nn.Dense(CLASSES)(x_BTD[:, 0])

    task, batch, mesh = Classification(adversarial=1.0), batch_of(), make_mesh(1)
    schedule = learning_rate("constant", RATE, 0, 10)
    optimizer = make_optimizer("sgd", schedule, 0.0, 0.0)
    steps = make_steps(
        Own(),
        task.loss,
        task.loss,
        optimizer,
        schedule,
        mesh,
        batch,
        adversaries=task.adversaries(),
    )
    with pytest.raises(UserError, match="whose inputs can be moved"):
        steps.train(steps.init(), put_batch(batch, mesh))
