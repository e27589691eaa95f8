# SPDX-License-Identifier: Apache-2.0
"""Word vectors from files, into the embedding, and parts that keep the weights they begin with."""

import gzip
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import small_runs

from flax_lstm import TrainConfig, UserError, load
from flax_lstm.data.text import TextTable
from flax_lstm.data.vectors import read_vectors
from flax_lstm.data.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = Vocabulary.train(["the film was new york fine"], 20)
LINES = ["The 1 -2.5 3e-1", "film 4 5 6", "new york 7 8 9", "the 9 9 9", "unknown 1 2 3"]


def known(path) -> dict[str, list[float]]:
    """What is read of a file, by word."""
    found = read_vectors(path, WORDS)
    assert found.vectors_NE.dtype == np.float32
    pairs = zip(found.ids_N, found.vectors_NE, strict=True)
    return {WORDS.decode([id]): vector.tolist() for id, vector in pairs}


@pytest.mark.parametrize(
    "name", ["glove.txt", "fast.vec", "glove.txt.gz", "GLOVE.TXT.GZ", "windows.vec"]
)
def test_every_form_of_file_reads_the_same(tmp_path, name):
    """`new york` is one word of the file, and none of the vocabulary; a broken byte is passed."""
    header = ["5 3"] if "vec" in name else []
    content = ("\r\n" if "windows" in name else "\n").join([*header, *LINES]).encode() + b"\n"
    content += b"br\xffken 1 2 3\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    expected = {"the": [1, -2.5, 0.3], "film": [4, 5, 6]}
    assert {word: pytest.approx(vector) for word, vector in expected.items()} == known(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"3 2\n", "is empty"),
        (b"the\n", "line 1 is no word with numbers"),
        (b"the 1 2\nfilm 1\n", "line 2 does not end in 2 finite numbers"),
        (b"the 1 2\nfilm 1 two\n", "line 2 does not end"),
        (b"the 1 2\nfilm 1 nan\n", "line 2 does not end"),
        (b"ein 1 2\n", "has none of the 9 words"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, said):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_vectors(path, WORDS)


def test_files_that_cannot_be_read_are_said(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_vectors(tmp_path / "none.vec", WORDS)
    spoilt = tmp_path / "v.txt.gz"
    for content in (b"no gzip", gzip.compress(b"the 1 2\n" * 99)[:-9]):
        spoilt.write_bytes(content)
        with pytest.raises(UserError, match="cannot read"):
            read_vectors(spoilt, WORDS)


def test_vectors_of_byte_pairs_are_refused():
    with pytest.raises(UserError, match=r"data\.tokenizer bpe"):
        TextTable("t.csv", vectors="v.txt", tokenizer="bpe", vocabulary_size=300)


def with_vectors(tmp_path, **train: Any):
    """A small run whose embedding begins with vectors of two words."""
    config = small_runs.text_run(tmp_path, steps=2, weight_decay=0.1)
    path = tmp_path / "v.txt"
    path.write_text("fine 1 2 3 4\nDull -1 -2 -3 -4\n")
    train = replace(config.train, **{"ema": 0.0, **train})
    return replace(config, data=replace(config.data, vectors=str(path)), train=train)


def table_of(run) -> dict[str, np.ndarray]:
    words, table = run.info.vocabulary, np.asarray(run.params()["embed"]["embedding"])
    return {word: table[words.id_of(word)] for word in ("fine", "dull", "a")}


def test_a_frozen_embedding_holds_the_vectors_at_the_end(tmp_path, caplog):
    """Bit for bit, weight decay notwithstanding; other words keep what they began with, and the
    other weights learn."""
    config = with_vectors(tmp_path, frozen=("embed",))
    plain = replace(config, data=replace(config.data, vectors=""))
    with caplog.at_level("INFO", logger="flax_lstm"):
        small_runs.fit(config, tmp_path / "frozen", test=False)
    assert "vectors of 4 numbers for 2 of the" in caplog.text
    small_runs.fit(plain, tmp_path / "plain", test=False)
    run, other = load(tmp_path / "frozen"), load(tmp_path / "plain")
    table, without = table_of(run), table_of(other)
    assert table["fine"].tolist() == [1, 2, 3, 4] and table["dull"].tolist() == [-1, -2, -3, -4]
    np.testing.assert_array_equal(table["a"], without["a"])
    pairs = zip(*(jax.tree.leaves(r.params()["recurrent"]) for r in (run, other)), strict=True)
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_an_embedding_that_learns_begins_with_the_vectors(tmp_path):
    small_runs.fit(with_vectors(tmp_path, learning_rate=1e-9), tmp_path / "run", test=False)
    table = table_of(load(tmp_path / "run"))
    np.testing.assert_allclose(table["fine"], [1, 2, 3, 4], rtol=1e-6)


def test_another_width_than_the_models_is_said_with_the_flag(tmp_path):
    config = with_vectors(tmp_path)
    (tmp_path / "v.txt").write_text("fine 1 2 3\n")
    with pytest.raises(UserError, match=r"3 numbers a word.*--model\.embed-size 3"):
        small_runs.fit(config, tmp_path / "run", test=False)


def test_a_part_that_the_model_does_not_have_is_said(tmp_path):
    config = small_runs.text_run(tmp_path, frozen=("embedding",))
    with pytest.raises(UserError, match=r"train\.frozen embedding: .* parts: dense, embed, head"):
        small_runs.fit(config, tmp_path / "run", test=False)


def test_no_part_is_frozen_unasked():
    assert TrainConfig().frozen == ()
