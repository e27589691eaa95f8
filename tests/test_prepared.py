# SPDX-License-Identifier: Apache-2.0
"""Texts in files of tokens: written once, resumed, read as they would be from memory.

Axes: B lanes, T tokens of a window.
"""

import gzip
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_runs

from flax_lstm import UserError, load
from flax_lstm.__main__ import main
from flax_lstm.data import TagTable, preparing
from flax_lstm.data.documents import stream_documents
from flax_lstm.data.language import LanguageTable
from flax_lstm.data.prepared import PieceBatches, Prepared
from flax_lstm.data.vocabulary import END, Vocabulary
from flax_lstm.training.ngrams import log_count_ratios

pytestmark = pytest.mark.usefixtures("quick_compile")


def write_corpus(folder, count: int = 200) -> None:
    """Documents of some words in files of every kind."""
    generator = np.random.default_rng(0)
    texts = [
        f"{n} " + " ".join(generator.choice(list("abcdefgh"), generator.integers(1, 30)))
        for n in range(count)
    ]
    folder.mkdir()
    rows = pd.DataFrame({"text": texts})
    rows[:50].to_parquet(folder / "a.parquet")
    lines = [json.dumps({"text": text, "other": 1}) + "\n" for text in texts[50:120]]
    (folder / "b.jsonl").write_text("".join(lines[:30]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    for number, text in enumerate(texts[120:]):
        content = text.encode()
        path = folder / "d" / f"{number:03}.txt"
        path.parent.mkdir(exist_ok=True)
        if number % 2:
            path.write_bytes(content)
        else:
            path.with_suffix(".txt.gz").write_bytes(gzip.compress(content))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder `texts`, its settings, and what was prepared of it in small parts."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "texts")
    data = LanguageTable(
        path=str(folder / "texts"), vocabulary_size=60, sequence_length=5, evaluation_tokens=150
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "CHARACTERS", 1000)
        data.prepare(folder / "tokens")
    return folder, data


def test_every_kind_of_file_gives_its_texts(corpus):
    folder, _ = corpus
    numbers = [int(text.split()[0]) for text in stream_documents(folder / "texts", "text")]
    assert numbers[:120] == [*range(120)] and sorted(numbers) == [*range(200)]


def test_a_plain_text_has_a_document_in_each_line(tmp_path):
    """As corpora of language models are; in a folder a file is one document."""
    lines = [f"{n} words of a line" for n in range(40)]
    plain, packed = tmp_path / "corpus.txt", tmp_path / "corpus.txt.gz"
    plain.write_text("\n\n".join(lines) + "\n \n")
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    for path in (plain, packed):
        assert [*stream_documents(path, "text")] == lines
        shares = LanguageTable(path=str(path)).source.splits()
        assert sorted(t for part in shares.values() for t in part.texts) == sorted(lines)
    assert len([*stream_documents(tmp_path, "text")]) == 2
    with pytest.raises(UserError, match="does not exist"):
        stream_documents(tmp_path / "other.txt", "text")


def test_tokens_counts_and_judged_documents_are_those_from_memory(corpus, tmp_path):
    folder, data = corpus
    whole = data.load(tmp_path / "memory")
    files = replace(data, prepared=str(folder / "tokens")).load(tmp_path / "files")
    assert len(files._prepared.parts["train"]) > 3
    assert files.info == whole.info
    for split in ("train", "validation", "test"):
        assert files.size(split) == whole.size(split)
    for split in ("validation", "test"):
        batches = zip(files.evaluation(split, 4), whole.evaluation(split, 4), strict=True)
        for ours, theirs in batches:
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


def test_an_epoch_reads_every_token_once_each_in_its_own_order(corpus):
    """What a lane reads between resets is a run of the stream, each target the token after."""
    folder, _ = corpus
    stream = Prepared.open(folder / "tokens").stream("train")
    whole = stream.read(0, len(stream))
    assert whole[0] == END and len(whole) == len(stream)
    source = PieceBatches(stream, 4, 5, seed=3)
    again = PieceBatches(stream, 4, 5, seed=3)
    orders = []
    for epoch in range(2):
        seen: list[int] = []
        lanes: list[list[int]] = [[] for _ in range(4)]
        for step in range(epoch * len(source), (epoch + 1) * len(source)):
            batch = source[step]
            for a, b in zip(batch, again[step], strict=True):
                np.testing.assert_array_equal(a, b)
            assert batch.inputs.dtype == batch.targets.dtype == np.int32
            for lane in range(4):
                count = batch.lengths[lane]
                inputs, targets = batch.inputs[lane], batch.targets[lane]
                assert (inputs[count:] == 0).all() and batch.weights[lane].sum() == count
                assert (inputs[1:count] == targets[: max(count - 1, 0)]).all()
                if lanes[lane] and not batch.reset[lane] and count:
                    assert inputs[0] == lanes[lane][-1]  # it goes on
                lanes[lane] = targets[:count].tolist() or lanes[lane]
                seen += targets[:count].tolist()
        assert Counter(seen) == Counter(whole[1:].tolist())
        orders.append(seen)
    assert orders[0] != orders[1]
    other = PieceBatches(stream, 4, 5, seed=4)
    assert any((other[n].targets != source[n].targets).any() for n in range(len(source)))


def test_any_stretch_across_parts_is_read_as_it_was_written(corpus):
    stream = Prepared.open(corpus[0] / "tokens").stream("train")
    whole = stream.read(0, len(stream))
    for start, stop in np.random.default_rng(0).integers(0, len(stream) + 1, (50, 2)):
        np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])


def test_a_prepare_that_was_cut_short_goes_on_and_ends_alike(corpus, tmp_path, monkeypatch):
    """Parts that were finished are not encoded again; until the end nothing can be trained from."""
    folder, data = corpus
    monkeypatch.setattr(preparing, "CHARACTERS", 1000)
    encode, left = Vocabulary.encode, [9]

    def dies(self, texts):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encode(self, texts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Vocabulary, "encode", dies)
        data.prepare(tmp_path / "tokens")
    with pytest.raises(UserError, match="goes on where it was"):
        Prepared.open(tmp_path / "tokens")
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("tokens/*.tokens")}
    assert len(kept) >= 6
    data.prepare(tmp_path / "tokens")
    finished = sorted(kept)[:6]
    assert all((tmp_path / "tokens" / n).stat().st_mtime_ns == kept[n] for n in finished)
    for path in (folder / "tokens").iterdir():
        assert (tmp_path / "tokens" / path.name).read_bytes() == path.read_bytes()


def test_a_prepare_that_was_killed_at_any_file_goes_on_and_leaves_nothing_else(
    corpus, tmp_path, monkeypatch
):
    """Killed when a draft is whole, and has not its name yet: for every file in turn."""
    data = corpus[1]
    data.prepare(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    rename, left = Path.replace, [0]

    def dies(self, target):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    for number in range(1, 11):  # settings, vocabulary, tokens and rows of three splits, note
        left[0], folder = number, tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(folder)
        data.prepare(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_other_texts_or_settings_are_noticed(corpus, tmp_path):
    _, data = corpus
    frame = pd.DataFrame({"text": [f"a b {n}" for n in range(60)]})
    frame.to_parquet(tmp_path / "t.parquet")
    data = replace(data, path=str(tmp_path / "t.parquet"))
    data.prepare(tmp_path / "tokens")
    before = Prepared.open(tmp_path / "tokens").stream("train")
    frame.loc[3, "text"] = "h h h h"
    frame.to_parquet(tmp_path / "t.parquet")
    data.prepare(tmp_path / "tokens")
    assert len(Prepared.open(tmp_path / "tokens").stream("train")) == len(before) + 1
    with pytest.raises(UserError, match=r"other settings .*split_seed 0 there, 1 now"):
        replace(data, split_seed=1).prepare(tmp_path / "tokens")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(UserError, match=r"holds other files \(thesis\.doc\)"):
        data.prepare(tmp_path / "full")


def test_spoilt_folders_are_said(corpus, tmp_path, capsys):
    folder, data = corpus
    (tmp_path / "t").mkdir()
    for path in (folder / "tokens").iterdir():
        (tmp_path / "t" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"prepared with --data\.vocabulary-size 60, not 70"):
        replace(data, prepared=str(tmp_path / "t"), vocabulary_size=70).load(tmp_path / "a")
    Vocabulary.train(["other words"], 60).save(tmp_path / "b" / "vocabulary.json")
    with pytest.raises(UserError, match="another vocabulary"):
        replace(data, prepared=str(tmp_path / "t")).load(tmp_path / "b")
    part = tmp_path / "t" / "00001.train.tokens"
    content = bytearray(part.read_bytes())
    content[7] ^= 1
    part.write_bytes(content)
    verify = ["prepare", "--out", str(tmp_path / "t"), "--verify"]
    assert main(verify) == 2
    assert "00001.train.tokens is not as it was prepared (SHA-256)" in capsys.readouterr().err
    part.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"00001\.train\.tokens .* it has \S+ bytes, not"):
        Prepared.open(tmp_path / "t")
    part.unlink()
    with pytest.raises(UserError, match="it has no file"):
        Prepared.open(tmp_path / "t")


def test_a_byte_that_differs_is_noticed_before_training_from_it(corpus, tmp_path):
    folder, data = corpus
    shutil.copytree(folder / "tokens", tmp_path / "t")
    part = tmp_path / "t" / "00001.train.tokens"
    content = bytearray(part.read_bytes())
    content[2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.train\.tokens is not as it was prepared"):
        replace(data, prepared=str(tmp_path / "t")).load(tmp_path / "assets")


def test_a_damaged_note_costs_its_part_and_damaged_settings_are_said(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHARACTERS", 1000)
    folder, data = corpus
    shutil.copytree(folder / "tokens", tmp_path / "t")
    note = tmp_path / "t" / "00001.note.json"
    for content in ("{", "{}", "[]", note.read_text()[:50], '{"texts_sha256": 1}'):
        note.write_text(content)
        data.prepare(tmp_path / "t")
        assert note.read_bytes() == (folder / "tokens" / note.name).read_bytes()
    whole = json.loads(note.read_text())
    note.write_text(json.dumps(whole | {"parts": 1}))
    data.prepare(tmp_path / "t")
    assert json.loads(note.read_text()) == whole
    for content in ("{", "[]", "1"):
        (tmp_path / "t" / "settings.json").write_text(content)
        with pytest.raises(UserError, match=r"cannot read .*settings\.json: delete"):
            data.prepare(tmp_path / "t")


def test_a_pipe_is_no_file_of_texts(tmp_path):
    """Reading it might never end."""
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="is no plain file"):
        [*stream_documents(tmp_path / "a.jsonl", "text")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 1}\n', "rows from 1 on: column 'text' holds a value of type int"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"\xff\xfe", mtime=0), "is UTF-16, not UTF-8"),
        ("a.parquet", b"no table", "as Parquet"),
        ("a.pdf", b"", "holds no file of texts: .txt, .jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        [*stream_documents(tmp_path, "text")]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A run on texts with labels, and the same on what was prepared of them."""
    folder = tmp_path_factory.mktemp("labelled")
    plain = small_runs.text_run(folder, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "CHARACTERS", 300)
        plain.data.prepare(folder / "tokens")
    data = replace(plain.data, prepared=str(folder / "tokens"))
    return folder, plain, replace(plain, data=data)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_texts_with_labels_give_the_batches_that_they_give_from_memory(labelled, tmp_path, keep):
    _, plain, files = labelled
    theirs, ours = (
        replace(config.data, keep=keep, max_length=3, balanced=True).load(tmp_path / name)
        for config, name in ((plain, "memory"), (files, "files"))
    )
    assert ours.info == theirs.info
    sources = ours.train(8, 1), theirs.train(8, 1)
    assert len(sources[0]) == len(sources[1])
    pairs = [(sources[0][step], sources[1][step]) for step in range(2 * len(sources[0]))]
    for split in ("validation", "test"):
        pairs += zip(ours.evaluation(split, 4), theirs.evaluation(split, 4), strict=True)
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ngrams_of_files_are_counted_as_those_in_memory(labelled, tmp_path):
    _, *configs = labelled
    found = [
        log_count_ratios(*config.data.load(tmp_path / f"{n}").labelled_tokens(), 2)
        for n, config in enumerate(configs)
    ]
    for memory, files in zip(*found, strict=True):
        np.testing.assert_array_equal(files, memory)
    assert np.count_nonzero(found[0][0])


def test_a_classifier_trains_and_is_judged_alike(labelled, tmp_path):
    _, plain, files = labelled
    results = [small_runs.fit(c, tmp_path / n) for n, c in (("memory", plain), ("files", files))]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["validation"] == results[1]["validation"]
    assert "linear" not in results[1]["baselines"]
    _, found = load(tmp_path / "files").examine("validation")
    assert found["confusion"]["labels"] == ["bad", "good"]


def test_labels_that_cannot_be_prepared_are_said(labelled, tmp_path):
    folder, plain, files = labelled
    rows = pd.read_csv(plain.data.path)
    rows.assign(label="strange").to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match="label 'strange' of the test split is in no training row"):
        replace(plain.data, test_path=str(tmp_path / "test.csv")).prepare(tmp_path / "a")
    with pytest.raises(UserError, match=r"data\.train-rows and data\.prepared"):
        replace(files.data, train_rows=9).load(tmp_path / "assets")
    # What the tokens were not prepared with is refused, not passed over.
    for settings, said in (
        ({"weight_column": "w"}, r"prepared with --data\.weight-column none, not w"),
        ({"split_seed": 1}, r"prepared with --data\.split-seed 0, not 1"),
    ):
        with pytest.raises(UserError, match=said):
            replace(files.data, **settings).load(tmp_path / "assets")
    with pytest.raises(UserError, match="files of tokens hold no weights"):
        replace(plain.data, weight_column="w").prepare(tmp_path / "weights")
    with pytest.raises(UserError, match="not with tags"):
        TagTable(plain.data.path, label_column="label").prepare(tmp_path / "b")
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    documents = LanguageTable(plain.data.path, vocabulary_size=20, **shares)
    documents.prepare(tmp_path / "c")
    with pytest.raises(UserError, match="documents without labels"):
        replace(files.data, prepared=str(tmp_path / "c")).load(tmp_path / "assets")
    part = folder / "tokens" / "00001.train.rows"
    content = part.read_bytes()
    part.write_bytes(content[:4] + b"x" + content[5:])
    with pytest.raises(UserError, match=r"00001\.train\.rows is not as it was prepared"):
        Prepared.open(folder / "tokens").verify()
    part.write_bytes(content)
    Prepared.open(folder / "tokens").verify()


def test_from_the_command_line_and_resumed_in_the_middle_of_an_epoch(corpus, tmp_path, capsys):
    folder, data = corpus
    config = small_runs.language_run(tmp_path, steps=6)
    config = replace(config, data=replace(data, prepared=str(folder / "tokens")))
    whole = small_runs.fit(config, tmp_path / "whole")
    half = replace(config, train=replace(config.train, steps=3, schedule_steps=10))
    small_runs.fit(half, tmp_path / "halves")
    halves = small_runs.fit(config, tmp_path / "halves")
    assert halves["sessions"] == 2 and halves["params_sha256"] == whole["params_sha256"]
    assert halves["data_sha256"]
    assert load(tmp_path / "whole").evaluate("validation")["examples"] > 100
    assert main(["prepare", "--config", "stocks", "--out", str(tmp_path / "no")]) == 2
    assert "Configs that do: text_lm, imdb_lm" in capsys.readouterr().err
    flags = ["--data.path", data.path, "--data.vocabulary-size", "60"]
    assert main(["prepare", "--config", "text_lm", *flags, "--out", str(tmp_path / "cli")]) == 0
    ours, theirs = (Prepared.open(f).stream("train") for f in (tmp_path / "cli", folder / "tokens"))
    np.testing.assert_array_equal(ours.read(0, len(ours)), theirs.read(0, len(theirs)))
    assert main(["prepare", "--out", str(tmp_path / "cli"), "--verify"]) == 0
