# SPDX-License-Identifier: Apache-2.0
"""The modules for Flax NNX do what NNX's own do, from their weights, and are modules as these are.

Axes: B batch, T time, D input features, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from orbax import checkpoint as orbax
from test_convert import assert_same, random_params

from flax_lstm import convert
from flax_lstm import nnx as ours
from flax_lstm.errors import ArgumentError
from flax_lstm.nn import layers
from flax_lstm.nn.cells import CELLS

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D, H = 5, 3, 3, 4
LENGTHS = jnp.array([5, 2, 3])
OURS = {"lstm": ours.LSTMCell, "gru": ours.GRUCell, "rnn": ours.SimpleRNNCell}


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape or (B, T, D)), jnp.float32)


def from_theirs(module: Any) -> Any:
    """Weights of an RNN of NNX, as ours."""
    return convert.from_flax(nnx.to_pure_dict(nnx.state(module, nnx.Param)))["layers_0"]


def close(a: Any, b: Any) -> None:
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6),
        jax.tree.leaves(a),
        jax.tree.leaves(b),
    )


@pytest.mark.parametrize(
    "kind, name",
    [
        (nnx.OptimizedLSTMCell, "lstm"),
        (nnx.LSTMCell, "lstm"),
        (nnx.GRUCell, "gru"),
        (nnx.SimpleCell, "rnn"),
    ],
)
def test_an_rnn_of_nnx_from_its_weights(kind: Any, name: str) -> None:
    """With every option of the call; biases that are not zero."""
    theirs = nnx.RNN(kind(D, H, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0)))
    rnn = ours.RNN(OURS[name](D, H, rngs=nnx.Rngs(1)))
    rnn.load(from_theirs(theirs))
    x_BTD = inputs()
    carry = jax.tree.map(lambda a: a + 0.5, theirs.cell.initialize_carry((B, D), nnx.Rngs(0)))
    for options in (
        {},
        {"initial_carry": carry},
        {"reverse": True},
        {"reverse": True, "keep_order": True},
        {"seq_lengths": LENGTHS},
        {"seq_lengths": LENGTHS, "reverse": True},
        {"seq_lengths": LENGTHS, "reverse": True, "keep_order": True},
    ):
        final, y_BTH = theirs(x_BTD, return_carry=True, **options)
        if "seq_lengths" in options:  # ours are zero in padding
            y_BTH = y_BTH * (jnp.arange(T)[None] < LENGTHS[:, None])[..., None]
        close(rnn(x_BTD, return_carry=True, **options), (final, y_BTH))
    x_TBD = jnp.swapaxes(x_BTD, 0, 1)
    close(rnn(x_TBD, time_major=True), theirs(x_TBD, time_major=True))


def test_options_of_the_module_are_those_of_its_calls() -> None:
    cell, x_BTD = ours.GRUCell(D, H, rngs=nnx.Rngs(0)), inputs()
    module = ours.RNN(cell, time_major=True, return_carry=True, reverse=True, keep_order=True)
    plain = ours.RNN(cell)
    carry, y_TBH = module(jnp.swapaxes(x_BTD, 0, 1))
    expected = plain(x_BTD, return_carry=True, reverse=True, keep_order=True)
    close((carry, jnp.swapaxes(y_TBH, 0, 1)), expected)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_number_of_batch_axes(batch: tuple[int, ...]) -> None:
    rnn, x = ours.RNN(ours.LSTMCell(D, H, rngs=nnx.Rngs(0))), inputs(*batch, T, D)
    carry = jax.tree.map(lambda a: a + 1, rnn.cell.initialize_carry((*batch, D)))
    lengths = jnp.full(batch, 4)
    final, y = rnn(x, initial_carry=carry, seq_lengths=lengths, return_carry=True)
    assert y.shape == (*batch, T, H) and final[0].shape == (*batch, H)
    flat, z = rnn(
        x.reshape(-1, T, D),
        initial_carry=jax.tree.map(lambda a: a.reshape(-1, H), carry),
        seq_lengths=lengths.reshape(-1),
        return_carry=True,
    )
    close((final[1].reshape(-1, H), y.reshape(-1, T, H)), (flat[1], z))


@pytest.mark.parametrize("name", CELLS)
def test_begins_and_differentiates_as_the_linen_layer(name: str) -> None:
    """The same weights from the same key, and the same gradients."""
    rngs = nnx.Rngs(0)
    cell = OURS[name](D, H, rngs=nnx.Rngs(0))
    params = CELLS[name](H).init(rngs.params(), D, method="weights")["params"]
    assert_same(jax.tree.map(np.asarray, cell.params()), jax.tree.map(np.asarray, params))
    rnn, x_BTD = ours.RNN(cell), inputs()
    gradients = nnx.grad(lambda rnn: jnp.sum(rnn(x_BTD, seq_lengths=LENGTHS) ** 2))(rnn)
    expected = jax.grad(
        lambda p: jnp.sum(layers.RNN(CELLS[name](H)).apply({"params": p}, x_BTD, LENGTHS)[1] ** 2)
    )({"cell": params})
    close(nnx.to_pure_dict(gradients)["cell"], expected["cell"])


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = ours.RNN(ours.LSTMCell(D, H, rngs=rngs), dropout=0.5, rngs=rngs)
        self.head = nnx.Linear(H, 1, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.head(self.rnn(x_BTD)[:, -1])


def test_trains_under_jit_with_an_optimizer_and_splits_and_merges(tmp_path: Any) -> None:
    model, x_BTD = Classifier(nnx.Rngs(0)), inputs()
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

    def loss(model: Classifier) -> jax.Array:
        return jnp.mean((model(x_BTD) - x_BTD[:, 0, :1]) ** 2)

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(loss)(model))

    model.eval()
    before = loss(model)
    model.train()
    for _ in range(20):
        step(model, optimizer)
    model.eval()
    assert loss(model) < 0.5 * before
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x_BTD), model(x_BTD))
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 5

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", params)
    other = Classifier(nnx.Rngs(1))
    other.eval()
    nnx.update(other, restored)
    np.testing.assert_array_equal(other(x_BTD), model(x_BTD))


def test_dropout_draws_from_its_stream_and_is_turned_off_by_eval() -> None:
    def module() -> ours.RNN:
        rngs = nnx.Rngs(0, dropout=1)
        return ours.RNN(ours.GRUCell(D, H, rngs=rngs), recurrent_dropout=0.5, rngs=rngs)

    one, other, x_BTD = module(), module(), inputs()
    first, second = one(x_BTD), one(x_BTD)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, other(x_BTD))
    one.eval()
    plain = ours.RNN(one.cell)
    np.testing.assert_array_equal(one(x_BTD), plain(x_BTD))
    np.testing.assert_array_equal(first, module()(x_BTD, deterministic=False))
    with pytest.raises(ArgumentError, match="pass rngs"):
        ours.RNN(one.cell, dropout=0.5)(x_BTD)


def test_resets_begin_a_sequence_anew() -> None:
    rnn, x_BTD = ours.RNN(ours.GRUCell(D, H, rngs=nnx.Rngs(0))), inputs()
    reset = jnp.zeros((B, T), bool).at[:, 2].set(True)
    y_BTH = rnn(x_BTD, reset=reset)
    close(y_BTH[:, 2:], rnn(x_BTD[:, 2:]))
    close(jnp.swapaxes(rnn(jnp.swapaxes(x_BTD, 0, 1), reset=reset.T, time_major=True), 0, 1), y_BTH)


def stack(cell: str, bidirectional: bool) -> ours.Stack:
    rngs, width = nnx.Rngs(0), H * (1 + bidirectional)

    def layer(features: int) -> Any:
        rnns = [ours.RNN(OURS[cell](features, H, rngs=rngs)) for _ in range(1 + bidirectional)]
        return ours.Bidirectional(*rnns) if bidirectional else rnns[0]

    return ours.Stack([layer(D), layer(width)])


@pytest.mark.parametrize("cell, bidirectional", [("lstm", True), ("gru", False), ("rnn", True)])
def test_weights_of_a_torch_stack_in_and_out(cell: str, bidirectional: bool) -> None:
    """By `convert`; the outputs are those of the Linen layers."""
    params, module, x_BTD = random_params(cell, bidirectional), stack(cell, bidirectional), inputs()
    module.load(convert.from_torch(convert.to_torch(params)))
    assert_same(convert.from_torch(convert.to_torch(module.params())), params)
    carry, y_BTH = module(x_BTD, seq_lengths=LENGTHS, return_carry=True)
    final, z_BTH = module.linen().apply({"params": params}, x_BTD, LENGTHS)
    assert jax.tree.structure(carry) == jax.tree.structure(final)
    close((carry, y_BTH), (final, z_BTH))
    again = module(x_BTD, initial_carry=carry, seq_lengths=LENGTHS)
    close(again, module.linen().apply({"params": params}, x_BTD, LENGTHS, final)[1])


def test_bidirectional_of_nnx_and_another_way_of_merging() -> None:
    """Ours in ours, ours in NNX's, and by hand."""
    rnns = [ours.RNN(ours.LSTMCell(D, H, rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    x_BTD = inputs()
    y, z = rnns[0](x_BTD), rnns[1](x_BTD, reverse=True, keep_order=True)
    close(ours.Bidirectional(*rnns)(x_BTD), jnp.concatenate([y, z], axis=-1))
    close(nnx.Bidirectional(*rnns)(x_BTD), jnp.concatenate([y, z], axis=-1))
    (first, second), total = ours.Bidirectional(*rnns, merge_fn=jnp.add, return_carry=True)(x_BTD)
    close((first.h_BH, second.h_BH, total), (y[:, -1], z[:, 0], y + z))


class Noisy(ours.OptimizedLSTMCell):
    """A cell that somebody derived for `nnx.RNN`, with dropout of its own in the carry."""

    def __init__(self, *, rngs: nnx.Rngs, **settings: Any) -> None:
        super().__init__(rngs=rngs, keep_rngs=True, **settings)
        self.noise = nnx.Dropout(0.5, rng_collection="noise", rngs=rngs)

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        c, h = carry
        carry, y = super().__call__((c, h), inputs)
        return jax.tree.map(self.noise, carry), y


def test_a_cell_of_others_is_run_by_nnx() -> None:
    rngs, x_BTD = nnx.Rngs(0, noise=1), inputs()
    rnn = ours.RNN(Noisy(in_features=D, hidden_features=H, rngs=rngs), broadcast_rngs="noise")
    assert rnn(x_BTD).shape == (B, T, H)
    assert rnn.cell.noise.rngs.count[...] == 1
    assert nnx.RNN(rnn.cell, broadcast_rngs="noise")(x_BTD).shape == (B, T, H)
    foreign = nnx.OptimizedLSTMCell(D, H, rngs=rngs)
    close(ours.RNN(foreign)(x_BTD), nnx.RNN(foreign)(x_BTD))
    with pytest.raises(ArgumentError, match="OptimizedLSTMCell is run by nnx"):
        ours.RNN(foreign, backend="fused")(x_BTD)


def test_a_cell_step_by_step_its_carry_and_dtypes() -> None:
    cell = ours.LSTMCell(D, H, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x_BD = jnp.ones((B, D), jnp.bfloat16)
    carry = cell.initialize_carry(x_BD.shape, nnx.Rngs(0))
    (c, h), y = cell(carry, x_BD)
    assert (y.dtype, y.shape, c.dtype, h.dtype) == (jnp.bfloat16, (B, H), jnp.float32, jnp.float32)
    ones = cell.initialize_carry((7, 2, D), nnx.Rngs(0), nnx.initializers.ones)
    assert all(leaf.shape == (7, 2, H) and (leaf == 1).all() for leaf in ones)

    drawn = ours.GRUCell(D, H, carry_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    carry = drawn.initialize_carry((B, D), nnx.Rngs(3))
    rnn, x_BTD = ours.RNN(drawn), inputs()
    close(rnn(x_BTD, rngs=nnx.Rngs(3)), rnn(x_BTD, initial_carry=carry))
    with pytest.raises(ArgumentError, match="pass rngs"):
        drawn.initialize_carry((B, D))


def test_initializers_and_activations_of_nnx() -> None:
    cell = ours.LSTMCell(
        16,
        16,
        gate_fn=nnx.relu,
        activation_fn=nnx.elu,
        kernel_init=nnx.initializers.orthogonal(),
        recurrent_kernel_init=nnx.initializers.orthogonal(),
        bias_init=nnx.initializers.constant(0.1),
        rngs=nnx.Rngs(0),
    )
    for gate in range(4):
        for weight in (cell.input[...], cell.recurrent[...]):
            matrix = weight[:, gate]
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-5)
    np.testing.assert_array_equal(cell.bias[...], np.full((4, 16), 0.1, np.float32))
    theirs = nn.LSTMCell(16, gate_fn=nn.relu, activation_fn=nn.elu)
    zeros = theirs.initialize_carry(jax.random.key(0), (B, 16))
    params = convert.to_flax({"layers_0": {"cell": cell.params()}})[0]["cell"]
    x_BD = inputs(B, 16)
    close(cell(zeros, x_BD), theirs.apply({"params": params}, zeros, x_BD))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ours.LSTMCell(D, H, rngs=nnx.Rngs(0)).load({"input": np.zeros(2)}), "expected"),
        (lambda: stack("gru", False).load(random_params("lstm", False)), "recurrent_bias"),
        (lambda: stack("gru", False).load({}), "layers_0, layers_1, got"),
        (lambda: ours.RNN(ours.LSTMCell(D + 1, H, rngs=nnx.Rngs(0)))(inputs()), "4 features"),
        (lambda: ours.LSTMCell(D, H, rngs=nnx.Rngs(0))(jnp.zeros(H), jnp.ones(7)), "3 features"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        call()
