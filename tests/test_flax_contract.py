# SPDX-License-Identifier: Apache-2.0
"""Our cells are what `flax.linen` expects of an `RNNCellBase`: step by step and in `flax.linen.RNN`
with every option, held to the textbook in float64 NumPy.

Axes: B batch, T time, D input features, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_cells import TEXTBOOK, random, random_weights

from flax_lstm.errors import UserError
from flax_lstm.nn.cells import CELLS, GRUCell, LSTMCell, LSTMState

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D, H = 5, 3, 2, 4
each_cell = pytest.mark.parametrize("name", CELLS)


def textbook(name: str, x_TD: np.ndarray, begin: list[np.ndarray]) -> tuple[Any, np.ndarray]:
    """The state after one row's steps, and its outputs."""
    state, outputs = begin, []
    for x_D in x_TD:
        state = list(TEXTBOOK[name](random_weights(name), x_D, *state))
        outputs.append(state[-1])
    return state, np.array(outputs)


def expected(
    name: str,
    x_BTD: np.ndarray,
    carry: list[np.ndarray],
    lengths: Any = None,
    reverse: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Final states, and the outputs of the valid steps in the order in which they were computed."""
    rows = []
    for row, x_TD in enumerate(x_BTD):
        valid = x_TD[: None if lengths is None else lengths[row]]
        begin = [part[row] for part in carry]
        rows.append(textbook(name, valid[::-1] if reverse else valid, begin))
    return [np.stack(part) for part in zip(*(r[0] for r in rows), strict=True)], [
        r[1] for r in rows
    ]


def begin(name: str, *batch: int) -> list[np.ndarray]:
    return [random(*batch, H, seed=part) for part in range(2 if name == "lstm" else 1)]


def as_carry(name: str, parts: list[np.ndarray]) -> Any:
    """As Flax's own cells have it: a plain tuple (c, h), or the array alone."""
    arrays = tuple(map(jnp.asarray, parts))
    return arrays if name == "lstm" else arrays[0]


@each_cell
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"time_major": True},
        {"reverse": True},
        {"reverse": True, "keep_order": True},
        {"unroll": 2},
        {"lengths": [5, 1, 3]},
        {"lengths": [2, 5, 3], "reverse": True, "keep_order": True},
    ],
    ids=str,
)
def test_in_flax_rnn_with_every_option(name: str, options: dict[str, Any], x64: None) -> None:
    options = dict(options)
    lengths = options.pop("lengths", None)
    x_BTD, carry, reverse = random(B, T, D), begin(name, B), options.get("reverse", False)
    rnn = nn.RNN(CELLS[name](H, param_dtype=jnp.float64), return_carry=True, **options)
    time_first = options.get("time_major", False)
    final, y = jax.jit(rnn.apply)(
        {"params": {"cell": random_weights(name)}},
        jnp.swapaxes(x_BTD, 0, 1) if time_first else jnp.asarray(x_BTD),
        initial_carry=as_carry(name, carry),
        seq_lengths=None if lengths is None else jnp.array(lengths),
    )
    assert jax.tree.structure(final) == jax.tree.structure(as_carry(name, carry))
    y_BTH = np.swapaxes(y, 0, 1) if time_first else np.asarray(y)
    state, outputs = expected(name, x_BTD, carry, lengths, reverse)
    for ours, theirs in zip(jax.tree.leaves(final), state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)
    for row, output in enumerate(outputs):
        kept = output[::-1] if options.get("keep_order") else output
        np.testing.assert_allclose(y_BTH[row, : len(kept)], kept, rtol=1e-11, atol=1e-13)


@each_cell
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
def test_any_number_of_batch_axes(name: str, batch: tuple[int, ...], x64: None) -> None:
    """A step of many rows is the step of each, and the state of zeros has their batch axes."""
    cell, x = CELLS[name](H, param_dtype=jnp.float64), random(*batch, D)
    zeros = cell.initialize_carry(jax.random.key(0), x.shape)
    assert {leaf.shape for leaf in jax.tree.leaves(zeros)} == {(*batch, H)}
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))
    parts = begin(name, *batch)
    carry, y = cell.apply({"params": random_weights(name)}, as_carry(name, parts), jnp.asarray(x))
    rows, _ = expected(name, x.reshape(-1, 1, D), [part.reshape(-1, H) for part in parts])
    for ours, theirs in zip(jax.tree.leaves(carry), rows, strict=True):
        np.testing.assert_allclose(ours, theirs.reshape(*batch, H), rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal(y, jax.tree.leaves(carry)[-1])


@each_cell
def test_flax_rnn_takes_two_batch_axes_and_none(name: str) -> None:
    rnn = nn.RNN(CELLS[name](H), return_carry=True)
    params = {"params": {"cell": jax.tree.map(jnp.float32, random_weights(name))}}
    x_BBTD = jnp.asarray(random(2, 3, T, D), jnp.float32)
    final, y = rnn.apply(params, x_BBTD)
    assert y.shape == (2, 3, T, H)
    one, y_TH = rnn.apply(params, x_BBTD[1, 2])
    np.testing.assert_allclose(y_TH, y[1, 2], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1, 2], atol=1e-6), one, final)


@each_cell
def test_lifted_by_flax_scan_as_a_class(name: str) -> None:
    """`nn.scan(Cell)` is a cell over time, with the weights of the cell itself."""
    scanned = nn.scan(
        CELLS[name],
        in_axes=1,
        out_axes=1,
        variable_broadcast="params",
        split_rngs={"params": False},
    )(H)
    x_BTD = jnp.asarray(random(B, T, D), jnp.float32)
    carry = scanned.initialize_carry(jax.random.key(0), x_BTD[:, 0].shape)
    (carry, y_BTH), variables = scanned.init_with_output(jax.random.key(0), carry, x_BTD)
    theirs = nn.RNN(CELLS[name](H)).apply({"params": {"cell": variables["params"]}}, x_BTD)
    np.testing.assert_allclose(y_BTH, theirs, atol=1e-6)


def test_flax_bidirectional_of_our_cells() -> None:
    """With cells of their own, one that is shared, and another way of merging."""
    x_BTD = jnp.asarray(random(B, T, D), jnp.float32)
    shared = LSTMCell(H)
    for forward, backward, merge, width in (
        (LSTMCell(H), LSTMCell(H), None, 2 * H),
        (shared, shared, None, 2 * H),
        (GRUCell(H), GRUCell(H), jnp.add, H),
    ):
        options = {} if merge is None else {"merge_fn": merge}
        both = nn.Bidirectional(nn.RNN(forward), nn.RNN(backward), return_carry=True, **options)
        ((first, second), y), variables = both.init_with_output(jax.random.key(0), x_BTD)
        assert y.shape == (B, T, width)
        assert {leaf.shape for leaf in jax.tree.leaves((first, second))} == {(B, H)}
        assert len(variables["params"]) == (1 if forward is backward else 2)


def test_the_carry_comes_back_as_it_was_given() -> None:
    params, x_BD = {"params": jax.tree.map(jnp.float32, random_weights("lstm"))}, jnp.ones((B, D))
    parts = [jnp.asarray(part, jnp.float32) for part in begin("lstm", B)]
    for carry in (tuple(parts), parts, LSTMState(*parts)):
        new, _ = LSTMCell(H).apply(params, carry, x_BD)
        assert type(new) is type(carry)
        np.testing.assert_array_equal(new[0], LSTMCell(H).apply(params, tuple(parts), x_BD)[0][0])


@pytest.mark.parametrize(
    "carry",
    [
        jnp.zeros((B, H)),
        (jnp.zeros((1, H)), jnp.zeros((1, H))),
        (jnp.zeros((B, H)), jnp.zeros((B, H + 1))),
        (jnp.zeros(H), jnp.zeros(H)),
        (),
    ],
    ids=str,
)
def test_a_wrong_carry_is_refused_with_its_shapes(carry: Any) -> None:
    params = {"params": jax.tree.map(jnp.float32, random_weights("lstm"))}
    with pytest.raises(UserError, match=r"carry of LSTMCell\(4\) .*\(3, 4\), \(3, 4\); here it is"):
        LSTMCell(H).apply(params, carry, jnp.ones((B, D)))
