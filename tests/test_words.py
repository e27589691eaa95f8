# SPDX-License-Identifier: Apache-2.0
"""Words looked up in a table give what embeddings times input weights give.

Axes: B batch, T time, V words.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import small_runs

import flax_lstm
from flax_lstm import LanguageModel, TextModel
from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.recurrence import native
from flax_lstm.nn.words import WordLayer, with_tables

B, T, V = 5, 9, 23
LENGTHS = np.array([T, 0, 1, 5, T])
EPS = float(jnp.finfo(jnp.bfloat16).eps)
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.skipif(native.unavailable() is not None, reason="no native kernel"),
]


def drawn(model: TextModel) -> tuple[Any, Any, np.ndarray]:
    """The module, its parameters, all of them at random, and words."""
    rng = np.random.default_rng(0)
    module, words_BT = model.sequence(3, V), rng.integers(0, V, (B, T))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), words_BT, LENGTHS))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.4, s.dtype), shapes)
    return module, params, words_BT


@pytest.mark.parametrize("bidirectional, pooling", [(False, "last"), (True, "concat")])
@pytest.mark.parametrize("name", CELLS)
def test_tables_give_what_embeddings_give(name: Any, bidirectional: bool, pooling: Any) -> None:
    """Ragged rows, an empty one among them, and a second layer above."""
    model = TextModel(
        cell=name,
        hidden_size=(19, 7),
        embed_size=6,
        bidirectional=bidirectional,
        pooling=pooling,
        embed_dropout=0.5,
        dropout=0.5,
    )
    module, params, words_BT = drawn(model)
    made = with_tables(module, params)
    assert made is not None
    reader, tables = made
    assert isinstance(reader.recurrent.layers[0], WordLayer) and "embed" not in tables
    state, expected = module.apply({"params": params}, words_BT, LENGTHS)
    end, found = reader.apply({"params": tables}, words_BT, LENGTHS)
    # Sums of 25 terms of size 1, added up in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), end, state)


def test_the_kernel_and_the_scan_look_up_the_same() -> None:
    module, params, words_BT = drawn(TextModel(hidden_size=19, embed_size=6, bidirectional=True))
    reader, tables = with_tables(module, params)
    fast = reader.apply({"params": tables}, words_BT, LENGTHS)
    layer = reader.recurrent.layers[0]
    plain = reader.clone(recurrent=reader.recurrent.clone(layers=(layer.clone(backend="scan"),)))
    slow = plain.apply({"params": tables}, words_BT, LENGTHS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fast, slow)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_row_by_itself_gives_what_it_gives_among_others(cell: str) -> None:
    """Several threads share a row that is alone, for which each unit's sum is the same sum."""
    model = TextModel(cell=cell, hidden_size=109, embed_size=6, bidirectional=True)
    module, params, words_BT = drawn(model)
    reader, tables = with_tables(module, params)
    words_BT = np.tile(words_BT, 40)[:, :150]
    lengths = np.array([150, 97, 1, 0])[: len(words_BT)]
    layer, params = reader.recurrent.layers[0], {"params": tables["recurrent"]["layers_0"]}
    read = jax.jit(lambda words, lengths: layer.apply(params, words, lengths))
    for n in range(len(lengths)):
        alone = read(words_BT[[n]], lengths[[n]])
        pair = read(words_BT[[n, n]], lengths[[n, n]])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:1]), alone, pair)


def test_tables_in_bfloat16() -> None:
    module, params, words_BT = drawn(TextModel(hidden_size=19, embed_size=6, dtype="bfloat16"))
    reader, tables = with_tables(module, params)
    _, expected = module.apply({"params": params}, words_BT, LENGTHS)
    _, found = reader.apply({"params": tables}, words_BT, LENGTHS)
    assert np.linalg.norm(found - expected) < EPS * np.linalg.norm(expected)


def test_models_without_a_table_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks words up for more than its first layer, or is not run by the kernel; and tables
    that would be too large."""
    small: Any = {"hidden_size": 8, "embed_size": 8}
    for model in (
        TextModel(**small, residual=True),
        TextModel(**small, cell="layernorm_lstm"),
        TextModel(**small, backend="fused"),
    ):
        module, params, _ = drawn(model)
        assert with_tables(module, params) is None
    tied = LanguageModel(**small, tied=True).language_model(V)
    assert with_tables(tied, None) is None
    module, params, _ = drawn(TextModel(**small))
    assert with_tables(module, params) is not None
    monkeypatch.setattr("flax_lstm.nn.words.LARGEST", 4 * V * 4 * 8 - 1)
    assert with_tables(module, params) is None


def test_a_run_that_answers_again_restores_and_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small_runs.text_run(tmp_path), mesh=flax_lstm.MeshConfig(data=1))
    small_runs.fit(config, tmp_path / "run")
    run = flax_lstm.load(tmp_path / "run")
    first = run.predict("a good film")

    def never(*_: Any) -> Any:
        raise AssertionError("restored or built again")

    monkeypatch.setattr(run, "params", never)
    monkeypatch.setattr(run, "step", never)
    monkeypatch.setattr("flax_lstm.inference.with_tables", never)
    pd.testing.assert_frame_equal(run.predict("a good film"), first)


def test_a_trained_model_predicts_by_tables_what_it_is_evaluated_by(tmp_path: Path) -> None:
    config = replace(small_runs.text_run(tmp_path), mesh=flax_lstm.MeshConfig(data=1))
    flax_lstm.fit(config, tmp_path / "run")
    run = flax_lstm.load(tmp_path / "run")
    batch = next(iter(run.dataset().evaluation("validation", config.train.batch_size)))
    batch = jax.tree.map(np.asarray, batch)
    _, expected = run._parts.steps.forward(run.params(), None, batch)
    found = run.forward()(batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    module = run.config.task.build(run.config.model, run.info)
    assert with_tables(module, run.params()) is not None

    rough = flax_lstm.load(tmp_path / "run", dtype="bfloat16").forward()(batch)
    assert 0 < np.linalg.norm(rough - found) < 2 * EPS * np.linalg.norm(found)
    with pytest.raises(flax_lstm.errors.UserError, match=r"float16.*float32, bfloat16"):
        flax_lstm.load(tmp_path / "run", dtype="float16")
