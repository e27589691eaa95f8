# SPDX-License-Identifier: Apache-2.0
"""Whatever a layer or the C++ kernel is called with: a clear error, never a crash, never numbers
out of somebody else's memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_native import needs_compiler
from wrong_calls import B, D, H, T, call_kernel, draw, wrong_call

from flax_lstm.errors import ArgumentError, UserError
from flax_lstm.nn.cells import CELLS, LSTMCell, LSTMState
from flax_lstm.nn.layers import RNN, Bidirectional, ScannedRNN, Stack
from flax_lstm.nn.recurrence import BACKENDS, native

LENGTHS = np.array([T, 2, 0])
each_backend = pytest.mark.parametrize("backend", ("auto", "scan", *BACKENDS))


def ready(name: str, backend: str) -> tuple[RNN, Any]:
    """A layer and its weights; a backend that is not for it or not here is skipped."""
    cell, x_BTD = CELLS[name](H), jnp.ones((B, T, D))
    if backend in BACKENDS and (reason := BACKENDS[backend].supports(cell, x_BTD, False, True)):
        pytest.skip(f"{backend}: {reason}")
    shapes = jax.eval_shape(RNN(cell).init, jax.random.key(0), x_BTD)
    return RNN(cell, backend=backend), jax.tree.map(lambda w: jnp.ones(w.shape), shapes)


@pytest.mark.parametrize("name", CELLS)
@each_backend
def test_500_wrong_calls_are_500_clear_errors(backend: str, name: str) -> None:
    """Over all cells and backends: each says in a line what was expected and what it got."""
    rng = np.random.default_rng([len(backend), len(name)])
    layer, variables = ready(name, backend)
    for _ in range(42):
        call, wrong = wrong_call(rng, name)
        with pytest.raises(ArgumentError) as caught:
            layer.apply(variables, **call)
        message = str(caught.value)
        told = {"x_BTD": "inputs: ", "lengths_B": "lengths: ", "state": "state: "}
        # With inputs of another batch, it is what no longer fits them that is told.
        if wrong != "x_BTD":
            assert message.startswith(told.get(wrong, "resets: ")), message
        assert "expected" in message and ", got " in message and "\n" not in message


@needs_compiler
def test_the_kernel_itself_refuses_every_wrong_shape() -> None:
    assert native.unavailable() is None
    rng = np.random.default_rng(1)
    for _ in range(12):
        assert "flax_lstm: " in call_kernel(rng, wrong=True)


@pytest.mark.slow
@needs_compiler
def test_address_sanitizer_sees_no_access_beyond_an_array(tmp_path: Path) -> None:
    """500 wrong calls of the kernel and 500 right ones of all sizes, zero among them."""
    compiler = native.compiler()
    # With that of C++, whose exceptions the sanitizer's asks for when it is loaded.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libstdc++")
    ]
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
    }
    here = Path(__file__).parent
    environment["PYTHONPATH"] = str(here.parent)

    def run(count: int, **extra: str) -> Any:
        command = [sys.executable, str(here / "wrong_calls.py"), str(count), "--asan"]
        return subprocess.run(
            command, env=environment | extra, capture_output=True, text=True, check=False
        )

    assert run(0).returncode == 0
    done = run(500, LD_PRELOAD=" ".join(libraries))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "500 of 500 wrong calls refused, 0 of 500 right ones\n"


@each_backend
def test_inputs_of_another_width_than_the_weights(backend: str) -> None:
    layer, variables = ready("lstm", backend)
    with pytest.raises(ArgumentError, match=f"expected {D} features.*got {D + 1}"):
        layer.apply(variables, jnp.ones((B, T, D + 1)))


@pytest.mark.parametrize("name", CELLS)
@each_backend
def test_one_state_for_all_rows_lists_and_tuples_are_taken(backend: str, name: str) -> None:
    """A learned initial state [1, H], a plain tuple in place of LSTMState, lengths in a list; and
    its gradient is the sum over rows."""
    layer, variables = ready(name, backend)
    rng = np.random.default_rng(0)
    x_BTD, one = (
        draw(rng, (B, T, D)),
        [draw(rng, (1, H)) for _ in range(2 if name == "lstm" else 1)],
    )
    state = tuple(one) if name == "lstm" else one[0]
    rows = jax.tree.map(lambda s: jnp.repeat(jnp.asarray(s), B, 0), state)

    def loss(state: Any, lengths_B: Any) -> Any:
        return jnp.sum(layer.apply(variables, x_BTD, lengths_B, state)[1] ** 2)

    ours = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, state), LENGTHS.tolist())
    value, gradient = jax.value_and_grad(loss)(rows, jnp.asarray(LENGTHS))
    expected = value, jax.tree.map(lambda g: jnp.sum(g, 0, keepdims=True), gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), ours, expected)


@pytest.mark.parametrize("filling", [np.nan, np.inf])
@pytest.mark.parametrize("reverse", [False, True])
@each_backend
def test_nothing_in_padding_reaches_outputs_or_gradients(
    backend: str, reverse: bool, filling: float
) -> None:
    layer, _ = ready("lstm", backend)
    rng = np.random.default_rng(0)
    clean = jnp.asarray(draw(rng, (B, T, D)))
    variables = layer.init(jax.random.key(0), clean)
    spoilt = jnp.where((np.arange(T) < LENGTHS[:, None])[..., None], clean, filling)

    def loss(variables: Any, x_BTD: Any) -> Any:
        state, y_BTH = layer.apply(variables, x_BTD, LENGTHS, reverse=reverse)
        return jnp.sum(y_BTH**2) + jnp.sum(state.c_BH**2), (state, y_BTH)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, run(variables, spoilt), run(variables, clean))


def test_states_of_stacks_and_directions_have_as_many_parts() -> None:
    both = Bidirectional(RNN(LSTMCell(H)), RNN(LSTMCell(H)))
    x_BTD, one = jnp.ones((B, T, D)), LSTMState(jnp.ones((B, H)), jnp.ones((B, H)))
    for layer, count, parts in ((both, 2, "directions"), (Stack([both]), 1, "layers")):
        variables = layer.init(jax.random.key(0), x_BTD)
        for state in (one, (one,) * (count + 1), jnp.ones((B, H))):
            with pytest.raises(ArgumentError, match=f"state: expected .* {count} {parts}, got"):
                layer.apply(variables, x_BTD, None, state)


def test_foreign_cells_and_unknown_backends_are_refused_by_name() -> None:
    x_BTD = jnp.ones((B, T, D))
    with pytest.raises(UserError, match="cpu cannot run GRUCell: it is none of flax_lstm's"):
        RNN(nn.GRUCell(H), backend="cpu").init(jax.random.key(0), x_BTD)
    with pytest.raises(UserError, match="there are auto, cpu, cudnn, fused, scan"):
        RNN(LSTMCell(H), backend="fast").init(jax.random.key(0), x_BTD)
    with pytest.raises(ArgumentError, match=r"a single sequence is x\[None\]"):
        RNN(LSTMCell(H)).init(jax.random.key(0), x_BTD[0])
    with pytest.raises(ArgumentError, match=r"resets: expected booleans \[time, batch\]"):
        x = (x_BTD, jnp.ones((B,), bool))
        ScannedRNN().init(jax.random.key(0), jnp.ones((T, D)), x)


def test_layers_can_be_hashed_and_tabulated() -> None:
    stack = Stack([RNN(LSTMCell(H)), RNN(LSTMCell(H))])
    assert hash(stack) == hash(Stack((RNN(LSTMCell(H)), RNN(LSTMCell(H)))))
    run = jax.jit(lambda layer, v, x: layer.apply(v, x)[1], static_argnums=0)
    x_BTD = jnp.ones((B, T, D))
    run(stack, stack.init(jax.random.key(0), x_BTD), x_BTD)
    text = stack.tabulate(jax.random.key(0), x_BTD, compute_flops=True)
    assert "flops" in text and "LSTMCell" in text
