# SPDX-License-Identifier: Apache-2.0
"""Words read with recurrent weights of 8 bits.

Axes: B batch, T time, V words, G gates, H hidden units, J hidden units of the previous step.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

import flax_lstm
from flax_lstm import TextModel
from flax_lstm.errors import UserError
from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.recurrence import cpu, int8, native
from flax_lstm.nn.words import ByteLayer, bytes_of, with_tables

B, T, V = 6, 9, 7
LENGTHS = np.array([T, 3, 0, T, 1, 7])
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.skipif(native.unavailable() is not None, reason="no native kernel"),
]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(
    name: str, whole_JGH: Any, scale_GH: Any, bias_H: Any, table_VGH: Any, words: Any, state: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The recurrence in float64, with h rounded to 127ths where it is multiplied."""
    *cells, h_BH = (np.array(leaf, np.float64) for leaf in state)
    y_BTH = np.zeros((B, T, h_BH.shape[1]))
    for b in range(B):
        for t in range(LENGTHS[b]):
            rounded_J = np.floor(np.clip(h_BH[b], -1, 1) * 127 + 0.5) / 127
            p = np.einsum("j,jgh->gh", rounded_J, whole_JGH * np.float64(scale_GH))
            x = table_VGH[words[b, t]].astype(np.float64)
            if name == "lstm":
                i, f, g, o = x + p
                cells[0][b] = sigmoid(f) * cells[0][b] + sigmoid(i) * np.tanh(g)
                h_BH[b] = sigmoid(o) * np.tanh(cells[0][b])
            elif name == "gru":
                r, z = sigmoid(x[:2] + p[:2])
                n = np.tanh(x[2] + r * (p[2] + bias_H))
                h_BH[b] = n + z * (h_BH[b] - n)
            else:
                h_BH[b] = np.tanh(x[0] + p[0])
            y_BTH[b, t] = h_BH[b]
    return y_BTH, [*cells, h_BH]


@pytest.mark.parametrize("units", [5, 19, 32])
@pytest.mark.parametrize("name", CELLS)
def test_the_kernel_multiplies_whole_numbers(name: Any, units: int) -> None:
    """From a state, with ragged rows and an empty one."""
    rng, cell = np.random.default_rng(units), CELLS[name](units)
    w_JGH = rng.normal(size=(units, cell.gates, units)).astype(np.float32) / np.sqrt(units)
    table_VGH = rng.normal(size=(V, cell.gates, units)).astype(np.float32)
    words, bias_H = rng.integers(0, V, (B, T)), rng.normal(size=units).astype(np.float32)
    state = [np.tanh(rng.normal(size=(B, units))).astype(np.float32) for _ in range(2)]
    leaves, structure = jax.tree.flatten(cell.initial_state(B))
    state = state[-len(leaves) :]

    own = {"recurrent": jnp.asarray(w_JGH)} | ({"recurrent_bias": bias_H} if name == "gru" else {})
    made = bytes_of(0, jnp.asarray(table_VGH), own)
    end, y_BTH = cpu.run_bytes(
        int8.Bytes(made["panels_0"], made["scale_0"]),
        made.get("recurrent_bias_0"),
        made["table_0"],
        jnp.asarray(words),
        jnp.asarray(LENGTHS),
        jax.tree.unflatten(structure, state),
        reverse=False,
    )
    whole_JGH, scale_GH = map(np.asarray, int8.whole_numbers(jnp.asarray(w_JGH)))
    assert whole_JGH.dtype == np.int8 and abs(whole_JGH).max() == 127
    np.testing.assert_allclose(whole_JGH * scale_GH, w_JGH, atol=scale_GH.max() * 0.5001)
    expected, ends = reference(name, whole_JGH, scale_GH, bias_H, table_VGH, words, state)
    # Sums are exact; what is taken off the table is some 128 * units * scale, rounded to float32. A
    # state that is so near the half of a 127th that this moves it would show as 1/127 of a weight.
    np.testing.assert_allclose(y_BTH, expected, atol=1e-5)
    for found, wanted in zip(jax.tree.leaves(end), ends, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_a_model_answers_nearly_the_same(name: Any, bidirectional: bool) -> None:
    rng = np.random.default_rng(0)
    model = TextModel(cell=name, hidden_size=(24, 7), embed_size=6, bidirectional=bidirectional)
    module, words_BT = model.sequence(3, V), rng.integers(0, V, (B, T))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), words_BT, LENGTHS))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.15, s.dtype), shapes)
    made = with_tables(module, params, eight_bits=True)
    assert made is not None
    reader, tables = made
    assert isinstance(reader.recurrent.layers[0], ByteLayer)
    _, expected = module.apply({"params": params}, words_BT, LENGTHS)
    _, found = reader.apply({"params": tables}, words_BT, LENGTHS)
    # A weight is rounded by at most 1/254 of the largest of its column, h by 1/254: the 24 terms
    # of a sum add up like a random walk.
    far = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < far < 0.02


def test_a_run_is_read_with_8_bits(tmp_path: Path) -> None:
    config = replace(small_runs.text_run(tmp_path), mesh=flax_lstm.MeshConfig(data=1))
    small_runs.fit(config, tmp_path / "run")
    run, small = flax_lstm.load(tmp_path / "run"), flax_lstm.load(tmp_path / "run", dtype="int8")
    whole, eight = (r.predict(["a good film", "bad", ""]) for r in (run, small))
    names = [name for name in whole if str(name).startswith("probability_")]
    np.testing.assert_allclose(eight[names], whole[names], atol=0.02)
    assert not np.array_equal(eight[names], whole[names])
    assert small.evaluate("validation")["loss"] == pytest.approx(
        run.evaluate("validation")["loss"], abs=0.02
    )


def test_what_cannot_be_read_with_8_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype float16: choose one of float32, bfloat16, int8"):
        small_runs.fit(
            replace(small_runs.adding_run(), mesh=flax_lstm.MeshConfig(data=1)),
            tmp_path / "numbers",
        )
        flax_lstm.load(tmp_path / "numbers", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dtype int8: .*numbers cannot be read with weights of 8"):
        flax_lstm.load(tmp_path / "numbers", dtype="int8")
