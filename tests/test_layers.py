# SPDX-License-Identifier: Apache-2.0
"""What the layers promise of padding, states, direction, causality, dropout and parameters. The
recurrences themselves are checked in `test_cells.py`, `test_parity.py` and `test_backends.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm import convert
from flax_lstm.nn.cells import CELLS, Cell, LSTMCell
from flax_lstm.nn.layers import RNN, Bidirectional, Stack

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D, H = 6, 4, 3, 4
LENGTHS = np.array([6, 3, 0, 1])
VALID = (np.arange(T) < LENGTHS[:, None])[..., None]


def rnn(name: str, hidden: int = H, **options: Any) -> RNN:
    return RNN(CELLS[name](hidden), backend="scan", **options)


def both(name: str, hidden: int = H, **options: Any) -> Bidirectional:
    return Bidirectional(rnn(name, hidden, **options), rnn(name, hidden, **options))


KINDS: dict[
    str, Callable[[str], tuple[nn.Module, dict[str, Any]]]
] = {  # the layer, and how to call it
    "forward": lambda name: (rnn(name), {}),
    "reverse": lambda name: (rnn(name), {"reverse": True}),
    "bidirectional": lambda name: (both(name), {}),
    "stack": lambda name: (Stack([rnn(name, 3), both(name, 2), rnn(name, 5)], residual=True), {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_cell = pytest.mark.parametrize("name", CELLS)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def random_variables(layer: nn.Module, inputs: int = D) -> Any:
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, inputs)))
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda w: jnp.asarray(0.7 * rng.normal(size=w.shape), jnp.float32), shapes)


def state_shapes(layer: nn.Module, variables: Any) -> Any:
    return jax.eval_shape(lambda v: layer.apply(v, jnp.zeros((B, 1, D)))[0], variables)


def assert_close(a: Any, b: Any, atol: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


@each_kind
@each_cell
def test_padding_is_never_seen(kind: str, name: str) -> None:
    """Other numbers in it change nothing, outputs and gradients are zero there, and an empty row
    keeps its state."""
    layer, options = KINDS[kind](name)
    variables = random_variables(layer)
    begin = jax.tree.map(lambda s: random(*s.shape, seed=1), state_shapes(layer, variables))

    @jax.jit
    def everything(x_BTD: Any) -> Any:
        def run(variables: Any, x_BTD: Any, begin: Any) -> Any:
            return layer.apply(variables, x_BTD, LENGTHS, begin, **options)

        out, pull = jax.vjp(run, variables, x_BTD, begin)
        return out, pull(
            jax.tree.map(lambda o: jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape), out)
        )

    x_BTD = random(B, T, D)
    first = everything(jnp.where(VALID, x_BTD, 0))
    assert_close(everything(jnp.where(VALID, x_BTD, 1e4 * random(B, T, D, seed=2))), first, atol=0)

    (final, y), (_, dx, d_begin) = first
    assert np.all(np.asarray(y)[~np.broadcast_to(VALID, y.shape)] == 0) and np.all(
        np.asarray(y)[0] != 0
    )
    assert np.all(np.asarray(dx)[~np.broadcast_to(VALID, dx.shape)] == 0) and np.all(
        np.asarray(dx)[0] != 0
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), final, begin)
    assert all(np.all(leaf[2] != 0) for leaf in jax.tree.leaves(d_begin))


@each_cell
def test_each_row_is_as_if_alone(name: str) -> None:
    """And with more padding to its right."""
    layer, _ = KINDS["stack"](name)
    variables, x_BTD = random_variables(layer), random(B, T, D)
    final, y_BTH = jax.jit(layer.apply)(variables, x_BTD, LENGTHS)
    wide, z_BTH = jax.jit(layer.apply)(
        variables, jnp.pad(x_BTD, ((0, 0), (0, 3), (0, 0)), constant_values=7), LENGTHS
    )
    assert_close((wide, z_BTH[:, :T]), (final, y_BTH))
    assert not z_BTH[:, T:].any()
    for row, length in enumerate(LENGTHS):
        if length:
            one = slice(row, row + 1)
            end, y = jax.jit(layer.apply)(variables, x_BTD[one, :length])
            assert_close(
                (end, y), (jax.tree.map(lambda s, one=one: s[one], final), y_BTH[one, :length])
            )


@each_cell
def test_state_carries_on(name: str) -> None:
    """All steps at once, or half of them and then the rest from the state reached; rows may end in
    either half."""
    layer = Stack([rnn(name, 3), rnn(name, 5)])
    variables, x_BTD, half = random_variables(layer), random(B, T, D), T // 2
    begin = jax.tree.map(lambda s: random(*s.shape, seed=1), state_shapes(layer, variables))
    run = jax.jit(layer.apply)
    final, y_BTH = run(variables, x_BTD, LENGTHS, begin)
    middle, first = run(variables, x_BTD[:, :half], np.minimum(LENGTHS, half), begin)
    end, second = run(variables, x_BTD[:, half:], np.maximum(LENGTHS - half, 0), middle)
    assert_close((end, jnp.concatenate([first, second], axis=1)), (final, y_BTH))
    zeros = jax.tree.map(jnp.zeros_like, begin)
    assert_close(run(variables, x_BTD, LENGTHS, zeros), run(variables, x_BTD, LENGTHS))


def reversed_rows(x_BTD: jax.Array) -> jax.Array:
    rows = [
        np.concatenate([x[:n][::-1], x[n:]])
        for x, n in zip(np.asarray(x_BTD), LENGTHS, strict=True)
    ]
    return jnp.asarray(np.stack(rows))


@each_cell
def test_reverse_reads_each_row_from_its_end(name: str) -> None:
    layer = rnn(name)
    variables, x_BTD = random_variables(layer), random(B, T, D)
    final, y_BTH = layer.apply(variables, x_BTD, LENGTHS, reverse=True)
    end, flipped = layer.apply(variables, reversed_rows(x_BTD), LENGTHS)
    assert_close((final, y_BTH), (end, reversed_rows(flipped)))
    assert np.abs(y_BTH - layer.apply(variables, x_BTD, LENGTHS)[1]).max() > 0.1

    pair = both(name)
    weights = {"params": {"forward": variables["params"], "backward": variables["params"]}}
    (_, last), z_BTH = pair.apply(weights, x_BTD, LENGTHS)
    assert_close((last, z_BTH[..., H:]), (final, y_BTH))
    assert_close(z_BTH[..., :H], layer.apply(variables, x_BTD, LENGTHS)[1])


@each_kind
@each_cell
def test_who_sees_whom(kind: str, name: str) -> None:
    """d y_t / d x_s is zero where s is in the future of t, and nowhere else."""
    layer, options = KINDS[kind](name)
    variables = random_variables(layer)
    run = jax.jit(jax.jacrev(lambda x_TD: layer.apply(variables, x_TD[None], **options)[1][0]))
    seen_TT = np.abs(run(random(T, D))).max(axis=(1, 3)) > 0
    t, s = np.ogrid[:T, :T]
    expected = {"forward": s <= t, "reverse": s >= t}.get(kind, np.ones((T, T), bool))
    np.testing.assert_array_equal(seen_TT, expected)


def test_parameters_have_these_names_and_shapes() -> None:
    layer = Stack([rnn("lstm", 5), both("gru", 2), rnn("rnn", 7)])
    shapes = jax.tree.map(lambda w: w.shape, random_variables(layer))
    gru = {
        "cell": {"input": (5, 3, 2), "recurrent": (2, 3, 2), "bias": (3, 2), "recurrent_bias": (2,)}
    }
    assert shapes == {
        "params": {
            "layers_0": {"cell": {"input": (D, 4, 5), "recurrent": (5, 4, 5), "bias": (4, 5)}},
            "layers_1": {"forward": gru, "backward": gru},
            "layers_2": {"cell": {"input": (4, 1, 7), "recurrent": (7, 1, 7), "bias": (1, 7)}},
        }
    }


def test_residual_adds_where_widths_agree() -> None:
    layers = [rnn("gru", D), rnn("gru", 4), both("gru", 2)]
    stack = Stack(layers, residual=True)
    variables, x_BTD = random_variables(stack), random(B, T, D)
    own = [{"params": variables["params"][f"layers_{n}"]} for n in range(3)]
    _, first = layers[0].apply(own[0], x_BTD, LENGTHS)
    _, second = layers[1].apply(own[1], x_BTD + first, LENGTHS)
    _, third = layers[2].apply(own[2], second, LENGTHS)
    assert_close(stack.apply(variables, x_BTD, LENGTHS)[1], second + third)


def test_inputs_need_three_axes() -> None:
    with pytest.raises(ValueError, match=r"\[batch, time, features\]"):
        rnn("lstm").init(jax.random.key(0), jnp.zeros((T, D)))


@pytest.mark.parametrize("reverse", [False, True])
def test_cells_of_flax_are_scanned_as_they_are(reverse: bool) -> None:
    layer = RNN(nn.OptimizedLSTMCell(H))
    variables, x_BTD = random_variables(layer), random(B, T, D)
    assert set(variables["params"]["cell"]) == {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"}
    (c, h), y_BTH = layer.apply(variables, x_BTD, LENGTHS, reverse=reverse)
    ours = {"params": convert.from_flax(variables["params"])["layers_0"]}
    state, z_BTH = rnn("lstm").apply(ours, x_BTD, LENGTHS, reverse=reverse)
    assert_close((c, h, y_BTH), (*state, z_BTH))
    for option in ("recurrent_dropout", "weight_dropout"):
        with pytest.raises(ValueError, match=option):
            RNN(nn.OptimizedLSTMCell(H), **{option: 0.5}).init(jax.random.key(0), x_BTD)


# Dropout, seen through cells that hand out what they are given.


class Echo(nn.RNNCellBase):
    """Outputs its input."""

    def __call__(self, carry: Any, inputs: Any) -> Any:
        return carry, inputs

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return jnp.zeros((input_shape[0], 1))

    @property
    def num_feature_axes(self) -> int:
        return 1


class ShowMask(Cell):
    """Outputs the mask of its hidden units, ones without one."""

    @staticmethod
    def equations(weights: Any, h_BH: Any, x_BGH: Any, mask_BJ: Any = None) -> Any:
        return jnp.ones_like(h_BH) if mask_BJ is None else mask_BJ


class ShowWeights(Cell):
    """Outputs a row of its recurrent weights."""

    @staticmethod
    def equations(weights: Any, h_BH: Any, x_BGH: Any, mask_BJ: Any = None) -> Any:
        return jnp.broadcast_to(weights.recurrent_JGH[:1, 0], h_BH.shape)


def masks_of(layer: nn.Module, x_BTD: Any, *seeds: int, deterministic: bool = False) -> Any:
    """The weights and, for each seed, the outputs."""
    variables = random_variables(layer, x_BTD.shape[-1])
    run = jax.jit(
        lambda key: layer.apply(
            variables, x_BTD, deterministic=deterministic, rngs={"dropout": jax.random.key(key)}
        )[1]
    )
    return variables, *(np.asarray(run(seed)) for seed in seeds)


@pytest.mark.parametrize(
    "layer",
    [RNN(Echo(), dropout=0.2), RNN(ShowMask(200), recurrent_dropout=0.2)],
    ids=["input", "recurrent"],
)
def test_one_mask_a_sequence(layer: RNN) -> None:
    x_BTD = jnp.ones((20, 5, 200))
    _, mask, again, other = masks_of(layer, x_BTD, 1, 1, 2)
    np.testing.assert_array_equal(
        mask, np.broadcast_to(mask[:, :1], mask.shape), "the same at every step"
    )
    assert set(np.unique(mask)) == {0, np.float32(1 / 0.8)}
    assert abs(np.mean(mask[:, 0] == 0) - 0.2) < 0.03
    assert np.all(np.any(mask[1:, 0] != mask[:-1, 0], axis=-1)), "another for every row"
    np.testing.assert_array_equal(mask, again)
    assert np.any(mask != other)
    _, none = masks_of(layer, x_BTD, 1, deterministic=True)
    np.testing.assert_array_equal(none, np.ones_like(mask))


def test_drop_connect_is_on_the_weights() -> None:
    layer, x_BTD = RNN(ShowWeights(300), weight_dropout=0.2), jnp.ones((3, 2, D))
    variables, y_BTH = masks_of(layer, x_BTD, 1)
    np.testing.assert_array_equal(
        y_BTH, np.broadcast_to(y_BTH[:1, :1], y_BTH.shape), "one for batch and steps"
    )
    row = np.asarray(variables["params"]["cell"]["recurrent"][0, 0])
    kept = y_BTH[0, 0] != 0
    np.testing.assert_allclose(y_BTH[0, 0], np.where(kept, row / 0.8, 0), rtol=1e-5)
    assert 0.1 < np.mean(~kept) < 0.3
    _, none = masks_of(layer, x_BTD, 1, deterministic=True)
    np.testing.assert_array_equal(none[0, 0], row)


def test_directions_and_layers_draw_masks_of_their_own() -> None:
    def show() -> RNN:
        return RNN(ShowMask(100), recurrent_dropout=0.5)

    _, mask = masks_of(Bidirectional(show(), show()), jnp.ones((2, 3, D)), 1)
    assert np.any(mask[..., :100] != mask[..., 100:])
    layer = Stack([show(), show()], residual=True)
    _, total = masks_of(layer, jnp.ones((2, 3, D)), 1)
    assert set(np.unique(total)) == {0, 2, 4}, "the sum of two masks"


def test_deterministic_is_without_dropout() -> None:
    options = {"dropout": 0.5, "recurrent_dropout": 0.5, "weight_dropout": 0.5}
    x_BTD = random(B, T, D)
    _, plain = masks_of(both("lstm"), x_BTD, 1)
    _, deterministic = masks_of(both("lstm", **options), x_BTD, 1, deterministic=True)
    np.testing.assert_array_equal(deterministic, plain)
    _, one, again, other = masks_of(both("lstm", **options), x_BTD, 1, 1, 2)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain).max() > 0.05 and np.abs(one - other).max() > 0.05


def test_recurrent_dropout_reaches_the_matmul_alone() -> None:
    """With all recurrent weights zero it has nothing to act on: the carried state is as without
    it."""
    plain, dropping = rnn("lstm"), rnn("lstm", recurrent_dropout=0.9)
    variables, x_BTD = random_variables(plain), random(B, T, D)
    weights = variables["params"]["cell"]
    cut = {"params": {"cell": weights | {"recurrent": jnp.zeros_like(weights["recurrent"])}}}
    rngs = {"dropout": jax.random.key(0)}
    assert_close(
        dropping.apply(cut, x_BTD, deterministic=False, rngs=rngs), plain.apply(cut, x_BTD)
    )


def test_auto_is_the_scan_to_within_rounding() -> None:
    layer = Stack([Bidirectional(RNN(LSTMCell(H)), RNN(LSTMCell(H))), RNN(LSTMCell(H))])
    scans = Stack([both("lstm"), rnn("lstm")])
    variables, x_BTD = random_variables(scans), random(B, T, D)
    assert_close(layer.apply(variables, x_BTD, LENGTHS), scans.apply(variables, x_BTD, LENGTHS))
