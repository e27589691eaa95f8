# SPDX-License-Identifier: Apache-2.0
"""Every backend equals the scan: outputs, final states and all gradients, under random cotangents
on both.

A backend added to `flax_lstm.nn.recurrence.BACKENDS` is tested here at once. A case that its
`supports` refuses is skipped with that reason. `cudnn` has a stand-in where there is no GPU;
`JAX_PLATFORMS=cuda pytest tests/test_backends.py` calls cuDNN itself.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm.errors import UserError
from flax_lstm.nn import recurrence
from flax_lstm.nn.cells import CELLS, Cell, LSTMState, Weights, rnn_step
from flax_lstm.nn.layers import RNN, scan

Array = jax.Array
T, B, D, H = 7, 6, 3, 8
LENGTHS = (7, 3, 0, 1, 5, 7)

each_backend = pytest.mark.parametrize("backend", recurrence.BACKENDS)
quick = pytest.mark.usefixtures("quick_compile")
each_cell = pytest.mark.parametrize("name", CELLS)
pytestmark = pytest.mark.usefixtures("cudnn")


def random_like(seed: int, tree: Any) -> Any:
    """Normal numbers in the shapes and dtypes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def problem(
    name: str, dtype: Any, time: int = T, mask: bool | str = False, batch: int = B
) -> tuple[Cell, Any]:
    """A cell and random (weights, x, state, mask); with a mask "per gate" the inputs, too, are
    others for each gate."""
    cell = CELLS[name](H, dtype=dtype, param_dtype=dtype)
    gates = (cell.gates,) if mask == "per gate" else ()
    x_BTD = jax.ShapeDtypeStruct((batch, time, math.prod(gates) * D), dtype)
    weights = jax.eval_shape(
        lambda: nn.init(lambda cell: cell.weights(D), cell)(jax.random.key(0))
    )["params"]
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    state = jax.eval_shape(lambda: cell.initial_state(batch, state_dtype))
    weights, x_BTD, state = random_like(0, (weights, x_BTD, state))
    weights["recurrent"] = weights["recurrent"] / 2
    mask_BJ = (
        jnp.asarray(np.random.default_rng(1).integers(0, 2, (batch, *gates, H)) * 2, state_dtype)
        if mask
        else None
    )
    return cell, (weights, x_BTD, state, mask_BJ)


def run(backend: str, cell: Cell, lengths_B: Any, reverse: bool, primals: Any) -> Any:
    """(final state, outputs) of a backend, or of the scan that defines them all."""
    weights, x_BTD, state, mask_BJ = primals
    weights = Weights(
        weights["input"], weights["recurrent"], weights["bias"], weights.get("recurrent_bias")
    )
    if backend != "scan":
        return recurrence.BACKENDS[backend].run(
            cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse
        )

    def advance(cell: Any, state: Any, x_BGH: Array) -> Any:
        state = cell.step(weights, state, x_BGH, mask_BJ)
        return state, cell.output(state).astype(cell.compute_dtype(x_BTD))

    def whole(cell: Any) -> Any:
        return scan(advance, cell, state, cell.project(weights, x_BTD), lengths_B, reverse)

    return nn.apply(whole, cell)({})


def outcome(backend: str, cell: Cell, lengths_B: Any, reverse: bool, primals: Any) -> Any:
    """Final state and outputs, and the gradients for weights, inputs, initial state and (where
    there is one) mask."""

    @jax.jit
    def everything(primals: Any, lengths_B: Any) -> Any:
        out, pull = jax.vjp(lambda p: run(backend, cell, lengths_B, reverse, p), primals)
        return out, pull(random_like(2, out))[0]

    return everything(primals, lengths_B)


@functools.lru_cache(maxsize=4)
def scans(name: str, dtype: Any, lengths: Any, reverse: bool, time: int, mask: Any) -> Any:
    """Of the scan, once for all backends that are compared with it."""
    cell, primals = problem(name, dtype, time, mask, batch(lengths))
    return outcome("scan", cell, array(lengths), reverse, primals)


def batch(lengths: tuple[int, ...] | None) -> int:
    return B if lengths is None else len(lengths)


def array(lengths: tuple[int, ...] | None) -> np.ndarray | None:
    return None if lengths is None else np.array(lengths)


def compare(
    backend: str,
    name: str,
    dtype: Any,
    lengths: tuple[int, ...] | None,
    reverse: bool,
    rtol: float,
    atol: float,
    time: int = T,
    mask: bool | str = False,
) -> None:
    cell, primals = problem(name, dtype, time, mask, batch(lengths))
    if reason := recurrence.BACKENDS[backend].supports(cell, primals[1], mask):
        pytest.skip(f"{backend}: {reason}")
    ours = outcome(backend, cell, array(lengths), reverse, primals)
    expected = scans(name, dtype, lengths, reverse, time, mask)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)

    def close(path: Any, a: Array, b: Array) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
        a, b = (np.asarray(z, np.float64) for z in (a, b))
        np.testing.assert_allclose(
            a, b, rtol, atol * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, ours, expected)


@each_backend
@each_cell
@pytest.mark.parametrize(
    "reverse, ragged, mask",
    [
        (False, False, False),
        (False, True, True),
        (True, True, False),
        (True, False, True),
        (True, True, "per gate"),
    ],
)
@quick
def test_equals_the_scan(backend: str, name: str, reverse: bool, ragged: bool, mask: Any) -> None:
    lengths = LENGTHS if ragged else None
    compare(backend, name, jnp.float32, lengths, reverse, rtol=1e-4, atol=2e-6, mask=mask)


@each_backend
@each_cell
@quick
def test_rows_of_all_lengths_on_every_thread(backend: str, name: str) -> None:
    """XLA has as many threads as devices or processors: fewer rows might get one each."""
    lengths = LENGTHS * max(jax.device_count(), os.cpu_count() or 1)
    compare(backend, name, jnp.float32, lengths, True, rtol=1e-4, atol=1e-5, mask=True)


@each_backend
@each_cell
@quick
def test_equals_the_scan_in_float64(backend: str, name: str, x64: None) -> None:
    """So closely that a slip in the mathematics cannot hide in rounding."""
    compare(backend, name, jnp.float64, LENGTHS, True, rtol=1e-10, atol=1e-12, mask=True)


@each_backend
@each_cell
@pytest.mark.parametrize("mask", [False, "per gate"])
@quick
def test_near_the_scan_in_bfloat16(backend: str, name: str, mask: Any) -> None:
    compare(backend, name, jnp.bfloat16, LENGTHS, False, rtol=0.1, atol=0.03, mask=mask)


@each_backend
@each_cell
@quick
def test_one_step_and_all_rows_empty(backend: str, name: str) -> None:
    compare(backend, name, jnp.float32, None, False, rtol=1e-4, atol=2e-6, time=1)
    compare(backend, name, jnp.float32, (0,) * B, False, rtol=1e-4, atol=2e-6)


@each_backend
@each_cell
def test_long_sequences(backend: str, name: str) -> None:
    """Longer than any piece in which a backend may cut time."""
    lengths = (150, 149, 64, 0, 1, 129)
    compare(backend, name, jnp.float32, lengths, False, rtol=1e-3, atol=1e-5, time=150)


@functools.lru_cache(maxsize=2)
def layer_result(backend: str, name: str) -> Any:
    """Through `RNN`, with all kinds of dropout: its first weights, a loss, and the gradients."""
    x_BTD = random_like(3, jax.ShapeDtypeStruct((B, T, D), jnp.float32))
    dropouts = {"dropout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.2}
    layer = RNN(CELLS[name](H), backend=backend, **dropouts)
    if backend != "scan" and recurrence.BACKENDS[backend].supports(layer.cell, x_BTD, True):
        pytest.skip(f"{backend} does not run this layer")

    @jax.jit
    def result() -> Any:
        variables = layer.init(jax.random.key(0), x_BTD)

        def loss(variables: Any) -> Any:
            rngs = {"dropout": jax.random.key(1)}
            lengths_B = jnp.array(LENGTHS)
            _, y = layer.apply(variables, x_BTD, lengths_B, deterministic=False, rngs=rngs)
            return jnp.mean(y**2)

        return variables, *jax.value_and_grad(loss)(variables)

    return result()


@each_backend
@each_cell
def test_layer_with_backend_has_the_tree_and_result_of_the_scan(backend: str, name: str) -> None:
    """Weights begin the same whatever the backend."""
    ours, scans = layer_result(backend, name), layer_result("scan", name)
    assert jax.tree.structure(ours) == jax.tree.structure(scans)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, scans)


@each_backend
def test_over_a_sharded_batch(backend: str) -> None:
    """Eight devices, each with its rows, give what one gives."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    cell, primals = problem("lstm", jnp.float32)
    if reason := recurrence.BACKENDS[backend].supports(cell, primals[1], False):
        pytest.skip(f"{backend}: {reason}")
    weights, x_BTD, state, _ = primals
    x_BTD, state = jax.tree.map(lambda a: jnp.concatenate([a] * 4), (x_BTD, state))
    lengths_B = jnp.array(LENGTHS * 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    one = outcome(backend, cell, lengths_B, False, (weights, x_BTD, state, None))
    x_BTD, state, lengths_B = jax.device_put((x_BTD, state, lengths_B), rows)
    eight = outcome(backend, cell, lengths_B, False, (weights, x_BTD, state, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, eight)


class OtherCell(Cell):
    """A recurrence that no backend knows: it multiplies by its recurrent weights twice."""

    @staticmethod
    def equations(
        weights: Weights, h_BH: Array, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Array:
        return rnn_step(weights, rnn_step(weights, h_BH, x_BGH, mask_BJ), x_BGH, mask_BJ)


def test_auto_falls_back_to_the_scan() -> None:
    x_BTD = random_like(3, jax.ShapeDtypeStruct((B, T, D), jnp.float32))
    layer = RNN(OtherCell(H))
    assert recurrence.resolve("auto", layer.cell, x_BTD) is None
    variables = layer.init(jax.random.key(0), x_BTD)
    (_, y), (_, z) = (
        RNN(OtherCell(H), backend=b).apply(variables, x_BTD, jnp.array(LENGTHS))
        for b in ("auto", "scan")
    )
    np.testing.assert_array_equal(y, z)


@each_backend
def test_a_backend_asked_for_by_name_says_why_not(backend: str) -> None:
    with pytest.raises(UserError, match=f"{backend} cannot run.*Use auto or scan"):
        recurrence.resolve(backend, OtherCell(H), jnp.zeros((B, T, D)))


def test_backends_are_described() -> None:
    described = recurrence.backends()
    assert list(described) == [*recurrence.BACKENDS, "scan"]
    assert all(len(line) > 10 for line in described.values())


def test_scan_is_the_loop_written_out(x64: None) -> None:
    """The oracle of this file against a plain loop over rows and steps."""
    cell, primals = problem("lstm", jnp.float64, mask=True)
    weights, x_BTD, state, mask_BJ = primals
    w = Weights(weights["input"], weights["recurrent"], weights["bias"])
    for reverse in (False, True):
        final, y_BTH = run("scan", cell, jnp.asarray(LENGTHS), reverse, primals)
        for row, length in enumerate(LENGTHS):
            one = slice(row, row + 1)
            now = LSTMState(state.c_BH[one], state.h_BH[one])
            for t in range(length)[:: -1 if reverse else 1]:
                now = cell.step(w, now, cell.project(w, x_BTD[one, t]), mask_BJ[one])
                np.testing.assert_allclose(y_BTH[one, t], now.h_BH, rtol=1e-12)
            np.testing.assert_array_equal(y_BTH[row, length:], 0)
            np.testing.assert_allclose(final.c_BH[one], now.c_BH, rtol=1e-12)
            np.testing.assert_allclose(final.h_BH[one], now.h_BH, rtol=1e-12)
