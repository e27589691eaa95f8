# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: ids, round trips, sameness."""

import os

import numpy as np
import pytest

from flax_lstm.data import cache, vocabulary
from flax_lstm.data.vocabulary import END, PAD, UNKNOWN, Vocabulary
from flax_lstm.errors import UserError

TEXTS = ["The film, the FILM!", "the end isn't near", "a b c d e f g"]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_same_texts_same_ids(kind, tmp_path):
    paths = [tmp_path / "1" / "v.json", tmp_path / "2" / "v.json"]
    for path in paths:
        Vocabulary.train(TEXTS, 270, kind).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [p.name for p in paths[0].parent.iterdir()] == [
        "v.json"
    ]  # no half-written file stays behind


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_saved_and_loaded_encodes_the_same(kind, tmp_path):
    first = Vocabulary.train(TEXTS, 270, kind)
    first.save(tmp_path / "v.json")
    second = Vocabulary.load(tmp_path / "v.json")
    new = ["the END is a <pad> thing \ud800", "", "ünïcode 中文"]
    for one, two in zip(first.encode(new), second.encode(new), strict=True):
        assert one.dtype == np.int32 and one.tolist() == two.tolist()
    assert first.size == second.size


def test_words_are_lower_case_and_split_at_punctuation():
    words = Vocabulary.train(TEXTS, 100)
    assert words.decode(words.encode(["THE film,isn't  near!"])[0]) == "the film , isn ' t near !"


def test_special_ids():
    words = Vocabulary.train(TEXTS, 100)
    assert (PAD, UNKNOWN, END) == (0, 1, 2)
    assert words.decode([PAD, UNKNOWN, END]) == "<pad> <unk> <eos>"
    assert words.encode(["zebra the"])[0].tolist() == [UNKNOWN, words.encode(["the"])[0][0]]
    assert len(words.encode(["  "])[0]) == 0


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_special_tokens_written_in_a_text_are_text(kind):
    ids = Vocabulary.train(TEXTS, 270, kind).encode(["<pad> <eos>"])[0]
    assert PAD not in ids and END not in ids and len(ids) > 2


def test_most_frequent_words_are_kept():
    words = Vocabulary.train(["x x x y y z"], 5)
    assert words.size == 5
    assert words.encode(["x y z"])[0].tolist() == [3, 4, UNKNOWN]


def test_byte_pairs_know_every_text():
    pairs = Vocabulary.train(TEXTS, 300, "bpe")
    ids = pairs.encode(["never seen: ünïcode 中文 🎬"])[0]
    assert UNKNOWN not in ids
    assert pairs.decode(ids) == "never seen: ünïcode 中文 🎬"


def test_what_ids_stand_for_is_as_it_was_written():
    """Unknown words too, letters in their case; characters of several byte pairs are there once."""
    text = "The ZEBRA isn't  nea\u0308r 中文\u200d🎬!"
    words = Vocabulary.train(TEXTS, 100)
    expected = ["The", "ZEBRA", "isn", "'", "t", "nea\u0308r"]
    assert words.written(text)[:6] == expected
    pairs = Vocabulary.train(TEXTS, 300, "bpe")
    for known in (words, pairs):
        found = known.written(text)
        assert len(found) == len(known.encode([text])[0])
        # A mark that NFC has joined to the letter before may be no part of any pair.
        assert "".join(found).replace(" ", "") in (
            text.replace(" ", ""),
            text.replace(" ", "").replace("\u0308", ""),
        )


def test_spoilt_or_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        Vocabulary.load(tmp_path / "v.json")
    Vocabulary.train(TEXTS, 100).save(tmp_path / "v.json")
    (tmp_path / "v.json").write_text((tmp_path / "v.json").read_text()[:-9])
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


def test_large_corpora_are_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vocabulary, "LARGE", 10)
    texts = [*TEXTS, ""]
    expected = [ids.tolist() for ids in Vocabulary.train(texts, 100).encode(texts)]

    def encoded() -> list[list[int]]:
        return [ids.tolist() for ids in Vocabulary.train_cached(texts, 100).encode_cached(texts)]

    assert encoded() == expected
    files = sorted((tmp_path / "flax_lstm").glob("*.npz"))
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Vocabulary, "train", None)
        patch.setattr(Vocabulary, "encode", None)
        assert encoded() == expected  # by the files alone
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert encoded() == expected  # spoilt files are made anew
    assert Vocabulary.train_cached(texts, 5).size == 5  # other settings are another file
    words = Vocabulary.train(texts, 100)
    assert [len(ids) for ids in words.encode_cached([*TEXTS, "other"])] != [
        len(ids) for ids in expected
    ]
    texts[0] += " more"
    assert len(encoded()[0]) == len(expected[0]) + 1


def test_old_files_leave_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "FILES_KEPT", 2)
    for key in "abc":
        cache.remember(key, lambda: {"x": np.arange(3)})
    names = {path.name for path in (tmp_path / "flax_lstm").iterdir()}
    assert names == {f"{key}.{kind}" for key in "bc" for kind in ("npz", "sha256")}


def test_a_spoilt_or_planted_file_is_made_anew(tmp_path, monkeypatch):
    """Whatever byte is spoilt: zip's own sums leave out names, methods and flags."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return {"x": np.arange(3)}

    cache.remember("a", make)
    cache.remember("a", make)
    assert len(made) == 1
    path = tmp_path / "flax_lstm" / "a.npz"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        assert cache.remember("a", make)["x"].tolist() == [0, 1, 2]
    damaged = len(range(0, len(content), 7))
    assert len(made) == 1 + damaged
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        cache.remember("a", make)
        assert len(made) == 2 + damaged


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "flax_lstm").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.remember("a", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]


def test_words_of_another_program_keep_their_order(tmp_path):
    """And texts are cut as those of a vocabulary that was trained here."""
    words = ["warm", "Über", "film", ",", "zebra"]
    Vocabulary.of(words).save(tmp_path / "v.json")
    mine = Vocabulary.load(tmp_path / "v.json")
    assert mine.encode(["Film,  ÜBER warm unheard"])[0].tolist() == [5, 6, 4, 3, UNKNOWN]
    assert (mine.size, mine.id_of("ZEBRA"), mine.decode([PAD, END])) == (8, 7, "<pad> <eos>")
    for twice in (["a", "b", "A"], ["<eos>"]):
        with pytest.raises(UserError, match=f"{twice[-1].lower()!r} is twice"):
            Vocabulary.of(twice)
    for none in ("ab", [1], [None], ["a", b"b"]):
        with pytest.raises(UserError, match="a list of words"):
            Vocabulary.of(none)
