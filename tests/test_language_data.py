# SPDX-License-Identifier: Apache-2.0
"""Documents for language models: every token once, lanes that go on, epochs in orders of their
own."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from flax_lstm.data.language import Lanes, LanguageBatches, LanguageTable
from flax_lstm.data.vocabulary import END
from flax_lstm.errors import UserError


def documents(count: int, seed: int = 0) -> list[np.ndarray]:
    """Ids that occur once each, every document closed by the separator."""
    lengths = np.random.default_rng(seed).integers(0, 9, count)
    ids = np.split(np.arange(3, 3 + lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])
    return [np.append(part, np.int32(END)) for part in ids]


def read(batches) -> tuple[list[int], list[int]]:
    """What the lanes read, one lane after another, and their targets."""
    valid = np.concatenate([batch.weights for batch in batches], axis=1) > 0
    inputs = np.concatenate([batch.inputs for batch in batches], axis=1)
    targets = np.concatenate([batch.targets for batch in batches], axis=1)
    return inputs[valid].tolist(), targets[valid].tolist()


@pytest.mark.parametrize(
    ("count", "lanes", "length"), [(40, 4, 7), (40, 4, 5), (3, 8, 5), (1, 1, 3), (17, 3, 1)]
)
def test_lanes_read_the_stream_once(count, lanes, length):
    stream = np.concatenate([np.array([END], np.int32), *documents(count)])
    source = Lanes(stream, lanes, length)
    batches = [source[step] for step in range(len(source))]
    inputs, targets = read(batches)
    assert targets == stream[1:].tolist()  # every token once
    assert inputs == stream[:-1].tolist()  # what is read is the token before
    for step, batch in enumerate(batches):
        assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (lanes, length)
        assert batch.inputs.dtype == batch.targets.dtype == batch.lengths.dtype == np.int32
        assert batch.reset.tolist() == [step == 0] * lanes
        assert (
            batch.weights == (np.arange(length) < batch.lengths[:, None])
        ).all()  # padding on the right
        assert (batch.inputs[batch.weights == 0] == 0).all()
        if step + 1 < len(batches):
            full = [
                lane
                for lane in range(lanes)
                if (lane + 1) * -(-(len(stream) - 1) // lanes) < len(stream)
            ]
            assert (batch.lengths[full] == length).all()


def test_epochs_have_their_own_order_of_documents():
    docs = documents(50)
    source = LanguageBatches(docs, 4, 6, seed=1)

    def epoch(source, number):
        return read([source[number * len(source) + i] for i in range(len(source))])[1]

    first, second = epoch(source, 0), epoch(source, 1)
    assert first != second and Counter(first) == Counter(second) == Counter(
        np.concatenate(docs).tolist()
    )
    assert epoch(source, 0) == first
    assert epoch(LanguageBatches(docs, 4, 6, seed=1), 1) == second
    assert epoch(LanguageBatches(docs, 4, 6, seed=2), 0) != first
    assert source[len(source)].reset.all() and not source[len(source) + 1].reset.any()
    whole = [tuple(d) for d in docs]
    cut = np.split(np.array(first), np.flatnonzero(np.array(first) == END) + 1)[:-1]
    assert sorted(map(tuple, cut)) == sorted(whole)  # documents stay whole


@pytest.fixture
def data(tmp_path) -> LanguageTable:
    (tmp_path / "t.csv").write_text("text\n" + "".join(f"word{i} and more\n" for i in range(100)))
    return LanguageTable(str(tmp_path / "t.csv"), sequence_length=5)


def test_table(data, tmp_path):
    dataset = data.load(tmp_path / "assets")
    info = dataset.info
    assert sum(dataset.size(split) for split in ("train", "validation", "test")) == 400
    assert (
        sum(info.token_counts) == dataset.size("train")
        and len(info.token_counts) == info.vocabulary_size
    )
    assert info.token_counts[END] == dataset.size("train") // 4
    for split in ("train", "test"):
        targets = read(list(dataset.evaluation(split, 3)))[1]
        assert Counter(targets)[END] == len(targets) // 4 == dataset.size(split) // 4
    assert Counter(targets)[1] == len(targets) // 4  # no test word is in the vocabulary
    assert info.sample(6).inputs.shape == dataset.train(6, 0)[0].inputs.shape == (6, 5)
    again = data.restore(tmp_path / "assets")
    assert again.token_counts == info.token_counts and again.vocabulary_size == info.vocabulary_size


def test_folder_of_texts(tmp_path):
    for i in range(30):
        path = tmp_path / "texts" / str(i % 3) / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i}")
    dataset = LanguageTable(
        str(tmp_path / "texts"), validation_fraction=0.2, test_fraction=0.2
    ).load(tmp_path / "assets")
    assert sum(dataset.size(split) for split in ("train", "validation", "test")) == 90
    with pytest.raises(UserError, match="no file of texts"):
        LanguageTable(str(tmp_path / "assets")).load(tmp_path / "assets")


def test_evaluation_is_bounded_and_training_is_not(data, tmp_path):
    """Every text has four tokens: three of them reach nine. Which, is drawn, but steadily."""
    whole = data.load(tmp_path / "assets")
    bounded = dataclasses.replace(data, evaluation_tokens=9)
    found = [bounded.load(tmp_path / "assets") for _ in range(2)]
    assert found[0].size("train") == whole.size("train")
    for split in ("validation", "test"):
        assert found[0].size(split) == 12 < whole.size(split)
        tokens = [read([*part.evaluation(split, 2)])[1] for part in found]
        assert tokens[0] == tokens[1]
        assert set(tokens[0]) <= set(read([*whole.evaluation(split, 2)])[1])
    with pytest.raises(UserError, match="evaluation-tokens"):
        LanguageTable(evaluation_tokens=-1)


def test_sequence_length_is_positive():
    with pytest.raises(UserError, match="sequence-length"):
        LanguageTable(sequence_length=0)
