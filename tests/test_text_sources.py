# SPDX-License-Identifier: Apache-2.0
"""Where texts come from, apart from what is done with them."""

from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import pytest

import flax_lstm.data
from flax_lstm.data.corpus import Corpus
from flax_lstm.data.language import LanguageData
from flax_lstm.data.sources import Texts, TextSource
from flax_lstm.data.text import TextData

SHIPPED = [getattr(flax_lstm.data, name) for name in flax_lstm.data.__all__]
OF_TEXTS = [kind for kind in SHIPPED if isinstance(kind, type) and issubclass(kind, Corpus)]


@dataclass(frozen=True)
class Counting(TextSource):
    """Numbers in words, even or odd."""

    words: tuple[str, ...] = ("one", "two", "three", "four")

    def splits(self):
        labels = ["odd" if n % 2 == 0 else "even" for n in range(len(self.words))]
        rows = Texts([f"{word} and {word}" for word in self.words], labels)
        return {"train": rows, "validation": rows.take([0, 1]), "test": rows.take([2, 3])}


class Labels(TextData):
    source = Counting()


class Words(LanguageData):
    source = Counting()


def test_one_source_of_your_own_serves_classifiers_and_language_models(tmp_path):
    labelled = Labels(vocabulary_size=8).load(tmp_path / "labels")
    assert labelled.info.labels == ("even", "odd") and labelled.size("test") == 2
    assert labelled.read("test").texts == ["three and three", "four and four"]
    documents = Words(vocabulary_size=8, sequence_length=5).load(tmp_path / "words")
    assert documents.size("train") == 4 * (3 + 1)  # words, and the end of each document
    assert documents.info.vocabulary == labelled.info.vocabulary


def test_prepared_tokens_are_those_of_the_source(tmp_path):
    data = Labels(vocabulary_size=8)
    data.prepare(tmp_path / "tokens")
    prepared = replace(data, prepared=str(tmp_path / "tokens")).load(tmp_path / "assets")
    rows = zip(prepared.read("test").texts, prepared.read("test").labels, strict=True)
    assert [*rows] == [("three and three", "odd"), ("four and four", "even")]
    batch = next(prepared.evaluation("validation", 2))
    np.testing.assert_array_equal(batch.lengths, [3, 3])


@pytest.mark.parametrize("kind", OF_TEXTS)
def test_data_of_texts_inherit_their_settings_from_one_class(kind):
    assert sum(is_dataclass(base) for base in kind.__bases__) == 1
    assert TextSource in type(kind().source).__mro__


@pytest.mark.parametrize("kind", OF_TEXTS)
def test_every_setting_that_names_a_place_is_made_absolute(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"path", "test_path", "data_dir", "archive", "vectors", "prepared"}
    places = [f.name for f in fields(kind) if f.name in names]
    assert "prepared" in places
    settings = replace(kind(), **dict.fromkeys(places, "here")).absolute()
    assert {getattr(settings, name) for name in places} == {str(tmp_path / "here")}
    assert {getattr(kind().absolute(), name) for name in places} == {""}
