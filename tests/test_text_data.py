# SPDX-License-Identifier: Apache-2.0
"""Texts with labels: batches, splits, files, and what is said of files that are wrong."""

import dataclasses
import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flax_lstm.data.buckets import BucketedBatches, Rows, choose_boundaries, pad
from flax_lstm.data.sources import Texts, split_by_hash
from flax_lstm.data.text import TextInfo, TextTable
from flax_lstm.errors import UserError


def rows_of(lengths) -> Rows:
    """Row i holds the id i + 1, as often as its length says; its label is i."""
    return Rows(
        [np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)],
        np.arange(len(lengths), dtype=np.int32),
    )


def labels_of(batches) -> list[int]:
    return np.concatenate([batch.targets[batch.weights > 0] for batch in batches]).tolist()


LENGTHS = np.random.default_rng(0).integers(0, 60, 103)


@pytest.fixture
def source() -> BucketedBatches:
    return BucketedBatches(rows_of(LENGTHS), (16, 40, 64), 4, seed=3)


def test_each_row_once_an_epoch(source):
    assert len(source) == 26
    for epoch in (0, 1):
        batches = [source[step] for step in range(26 * epoch, 26 * (epoch + 1))]
        assert sorted(labels_of(batches)) == list(range(103))
        assert all(batch.inputs.shape[0] == 4 for batch in batches)
        assert sum(batch.weights.sum() for batch in batches) == 103


def test_epochs_and_seeds_differ_and_repeat(source):
    def order(source, epoch):
        return labels_of([source[26 * epoch + i] for i in range(26)])

    first, second = order(source, 0), order(source, 1)
    assert first != second
    assert order(source, 0) == first  # back again
    assert order(BucketedBatches(rows_of(LENGTHS), (16, 40, 64), 4, seed=3), 1) == second
    assert order(BucketedBatches(rows_of(LENGTHS), (16, 40, 64), 4, seed=4), 0) != first


def test_rows_and_padding_of_a_batch(source):
    for step in range(26):
        batch = source[step]
        assert batch.inputs.dtype == batch.targets.dtype == batch.lengths.dtype == np.int32
        assert batch.inputs.shape[1] == next(b for b in (16, 40, 64) if b >= batch.lengths.max())
        for ids, length, label, weight in zip(
            batch.inputs, batch.lengths, batch.targets, batch.weights, strict=True
        ):
            assert weight in (0, 1) and length == (LENGTHS[label] if weight else 0)
            assert (ids[:length] == label + 1).all() and (ids[length:] == 0).all()


def test_batches_hold_rows_of_similar_length(source):
    spread = np.mean([np.ptp(source[step].lengths[source[step].weights > 0]) for step in range(26)])
    assert spread < 4  # 103 rows of 0 to 59 tokens, 4 a batch
    assert (
        np.ptp([source[step].lengths.max() for step in range(6)]) > 25
    )  # but batches come in no order of length


def test_read_from_many_threads(source):
    expected = [source[step].targets.tolist() for step in range(60)]
    fresh = BucketedBatches(rows_of(LENGTHS), (16, 40, 64), 4, seed=3)
    found: dict[int, list[int]] = {}

    def read(steps):
        for step in steps:
            found[step] = fresh[step].targets.tolist()

    threads = [threading.Thread(target=read, args=(range(n, 60, 4),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[step] for step in range(60)] == expected


def cells(lengths, boundaries) -> int:
    return sum(next(b for b in boundaries if b >= n) for n in lengths)


@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
def test_boundaries_pad_least(buckets):
    lengths = np.random.default_rng(buckets).gamma(2.0, 12.0, 200).clip(0, 75).astype(int)
    chosen = choose_boundaries(lengths, 75, buckets)
    every = [[*subset, 80] for subset in itertools.combinations(range(8, 80, 8), buckets - 1)]
    assert chosen[-1] == 80 and len(chosen) <= buckets and all(b % 8 == 0 for b in chosen)
    assert cells(lengths, chosen) == min(cells(lengths, subset) for subset in every)


def test_boundaries_of_odd_cases():
    assert choose_boundaries([3, 4], 5) == (8,)
    assert choose_boundaries([0, 0], 1) == (8,)
    assert choose_boundaries([8] * 9 + [16], 24, 2) == (8, 24)
    assert choose_boundaries([9] * 5, 16)[-1] == 16
    assert len(choose_boundaries(range(100_000), 100_000)) <= 8
    assert (
        choose_boundaries([10, 10], 10**6)[-1] >= 10**6
    )  # texts longer than those of training fit


def test_no_tokens_at_all():
    batch = pad(rows_of([0, 0]), (8, 16), 3)
    assert (
        batch.inputs.shape == (3, 8)
        and batch.lengths.tolist() == [0, 0, 0]
        and batch.weights.tolist() == [1, 1, 0]
    )


# ---------------------------------------------------------------- tables


def table(n=200, labels=("good", "bad")) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [
                f"text {i} is {labels[i % len(labels)]}" + " very" * (i % 30) for i in range(n)
            ],
            "label": [labels[i % len(labels)] for i in range(n)],
        }
    )


def write(frame: pd.DataFrame, path: Path) -> str:
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".parquet":
            frame.to_parquet(path)
        case _:
            frame.to_json(path, orient="records", lines=True)
    return str(path)


def load(tmp_path, **settings):
    return TextTable(**settings).load(tmp_path / "assets")


def read_back(dataset, split) -> list[tuple[str, str]]:
    """Texts and labels of a split, as the model sees them."""
    info = dataset.info
    return sorted(
        (info.vocabulary.decode(ids[:length]), info.labels[label])
        for batch in dataset.evaluation(split, 7)
        for ids, length, label, weight in zip(
            batch.inputs, batch.lengths, batch.targets, batch.weights, strict=True
        )
        if weight
    )


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_kind_of_table_reads_the_same(tmp_path, kind):
    frame = table()
    frame.loc[0, "text"] = 'a "quoted", text\twith\ttabs\nand lines'
    dataset = load(tmp_path, path=write(frame, tmp_path / f"t{kind}"))
    assert dataset.info.labels == ("bad", "good")
    splits = {name: read_back(dataset, name) for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {
        n: dataset.size(n) for n in splits
    }
    assert sum(dataset.size(name) for name in splits) == 200 and all(splits.values())
    train = {text for text, _ in splits["train"]}
    assert not train & {text for name in ("validation", "test") for text, _ in splits[name]}
    assert all(
        ("good" in text.split()) == (label == "good")
        for text, label in splits["train"]
        if "quoted" not in text
    )
    assert dataset.info.class_counts == tuple(
        Counter(label for _, label in splits["train"])[n] for n in ("bad", "good")
    )


def test_folders(tmp_path):
    for split, count in (("train", 60), ("test", 10)):
        for number, row in enumerate(table(count).itertuples()):
            path = tmp_path / "data" / split / row.label / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(row.text)
    dataset = load(tmp_path, path=str(tmp_path / "data"))
    assert dataset.size("test") == 10 and dataset.size("train") + dataset.size("validation") == 60
    assert {label for _, label in read_back(dataset, "train")} == {"good", "bad"}
    single = TextTable(str(tmp_path / "data" / "train")).load(tmp_path / "other")
    assert sum(single.size(name) for name in ("train", "validation", "test")) == 60
    with pytest.raises(UserError, match=r"no LABEL/\*.txt files"):
        load(tmp_path, path=str(tmp_path / "data" / "train" / "good"))


def test_a_test_file_is_the_test_split(tmp_path):
    train, test = (
        write(table(100), tmp_path / "a.csv"),
        write(table(13).iloc[3:], tmp_path / "b.jsonl"),
    )
    dataset = load(tmp_path, path=train, test_path=test, validation_fraction=0.3)
    assert dataset.size("test") == 10
    assert (
        dataset.size("train") + dataset.size("validation") == 100
        and dataset.size("validation") > 15
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0], ("0", "1")),
        (["b", "a", "C", "d"], ("C", "a", "b", "d")),
    ],
)
@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_labels_of_any_kind(tmp_path, labels, names, kind):
    assert (
        load(tmp_path, path=write(table(400, labels), tmp_path / f"t{kind}")).info.labels == names
    )


def test_more_rows_move_none_and_copies_stay_together(tmp_path):
    texts = Texts([f"t{i % 70}" for i in range(140)], ["x"] * 140)
    shares = {"test": 0.2, "validation": 0.2}
    before = split_by_hash(texts, shares, 0)
    assert all(set(Counter(rows.texts).values()) == {2} for rows in before.values())
    more = split_by_hash(Texts(["new", *texts.texts], ["x"] * 141), shares, 0)
    assert all(set(before[name].texts) <= set(more[name].texts) for name in before)
    assert split_by_hash(texts, shares, 1) != before
    large = split_by_hash(Texts([str(i) for i in range(10_000)], [""] * 10_000), shares, 0)
    assert all(abs(len(large[name].texts) - 2000) < 150 for name in shares)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_longer_texts_are_cut(tmp_path, keep):
    frame = table()
    frame["text"] = [f"start{i % 2} " + "middle " * (i % 40) + "finish" for i in range(200)]
    dataset = load(tmp_path, path=write(frame, tmp_path / "t.csv"), max_length=11, keep=keep)
    texts = [text.split() for text, _ in read_back(dataset, "train")]
    assert max(map(len, texts)) == 11 and dataset.info.boundaries[-1] == 16
    assert all(
        (words[0].startswith("start") if keep == "first" else words[-1] == "finish")
        for words in texts
    )


def test_the_vocabulary_is_of_the_training_rows(tmp_path):
    path = write(table(), tmp_path / "t.csv")
    dataset = load(tmp_path, path=path)
    numbers = {
        split: {text.split()[1] for text, _ in read_back(dataset, split)}
        for split in ("train", "test")
    }
    assert numbers["test"] == {"<unk>"} and "<unk>" not in numbers["train"]


def test_evaluation_has_every_row_once_in_one_order(tmp_path):
    dataset = load(tmp_path, path=write(table(), tmp_path / "t.csv"))
    batches = list(dataset.evaluation("train", 7))
    assert sum(batch.weights.sum() for batch in batches) == dataset.size("train")
    lengths = np.concatenate([batch.lengths[batch.weights > 0] for batch in batches])
    assert (np.diff(lengths) >= 0).all()
    for one, two in zip(batches, dataset.evaluation("train", 7), strict=True):
        assert (one.inputs == two.inputs).all() and one.inputs.shape[0] == 7


def test_new_texts_in_their_order(tmp_path):
    data = TextTable(write(table(), tmp_path / "t.csv"))
    data.load(tmp_path / "assets")
    info = data.restore(tmp_path / "assets")
    texts = ["text is good very", "", "very very very", "unheard", "is"]
    batches = list(info.batches(texts, 2))
    found = [
        info.vocabulary.decode(ids[:n])
        for b in batches
        for ids, n, w in zip(b.inputs, b.lengths, b.weights, strict=True)
        if w
    ]
    assert found == ["text is good very", "", "very very very", "<unk>", "is"]
    assert [b.weights.tolist() for b in batches] == [[1, 1], [1, 1], [1, 0]]
    assert all((b.targets == 0).all() for b in batches)
    assert info.sample(3).inputs.shape[0] == 3


def test_what_was_fitted_is_read_again(tmp_path):
    first = load(tmp_path, path=write(table(), tmp_path / "t.csv"))
    write(table(300), tmp_path / "t.csv")  # more rows since
    again = load(tmp_path, path=str(tmp_path / "t.csv"))
    assert again.size("train") > first.size("train")
    one, two = first.info, again.info
    assert (one.labels, one.class_counts, one.boundaries) == (
        two.labels,
        two.class_counts,
        two.boundaries,
    )
    assert one.vocabulary_size == two.vocabulary_size
    (tmp_path / "assets" / "info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read what training saved"):
        TextInfo.load(tmp_path / "assets")


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = TextTable("a.csv", test_path="b.csv").absolute()
    assert (data.path, data.test_path) == (str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert TextTable("a.csv").absolute().test_path == ""


def test_tables_for_predictions_need_only_the_text(tmp_path):
    data = TextTable(text_column="review")
    frame = pd.DataFrame({"id": [7, 8], "review": ["x", "y"]})
    read = data.read(write(frame, tmp_path / "new.jsonl"))
    assert read.columns.tolist() == ["id", "review"] and read["review"].tolist() == ["x", "y"]
    with pytest.raises(UserError, match=r"no column 'review'.*Columns: id, text"):
        data.read(write(frame.rename(columns={"review": "text"}), tmp_path / "other.csv"))


def test_new_texts_of_any_form_are_a_table():
    """A dictionary of columns is one; its keys are no texts."""
    data, columns = TextTable(), {"id": [7, 8], "text": ["x", "y"]}
    arrow = pytest.importorskip("pyarrow").table(columns)
    for inputs in (columns, arrow, pd.DataFrame(columns)):
        pd.testing.assert_frame_equal(data.table(inputs), pd.DataFrame(columns))
    with pytest.raises(UserError, match="no column 'text'"):
        data.table({"body": ["x"]})


# ---------------------------------------------------------------- what is said of wrong files

GOOD = b"text,label\n" + b"".join(b"text %d,%s\n" % (i, [b"a", b"b"][i % 2]) for i in range(60))


@pytest.mark.parametrize(
    ("name", "content", "settings", "said"),
    [
        ("t.csv", None, {}, r"t\.csv does not exist"),
        ("t.csv", b"", {}, r"t\.csv is empty"),
        ("t.csv", b"text,label\n", {}, "has no rows"),
        ("t.jsonl", b"\n\n", {}, "has no rows"),
        ("t.xlsx", b"x", {}, r"unknown kind of file '\.xlsx'; known extensions: \.csv"),
        ("t.csv", GOOD.replace(b"text 7", b"te\0xt 7"), {}, "NUL byte in line 9"),
        ("t.csv", GOOD.decode().encode("utf-16"), {}, "is UTF-16, not UTF-8"),
        ("t.csv", GOOD.replace(b"text 7", b"te\xe9t 7"), {}, "byte 0xe9 in line 9"),
        (
            "t.csv",
            GOOD,
            {"text_column": "txet"},
            r"no column 'txet' .*Did you mean text\? Columns: text, label",
        ),
        ("t.csv", GOOD, {"label_column": "class"}, r"no column 'class' \(--data\.label-column\)"),
        ("t.csv", GOOD.replace(b"text 7,b", b",b"), {}, "'text' is empty in 1 row.*: 8 "),
        ("t.csv", GOOD.replace(b"text 7,b", b"text 7,"), {}, "'label' is empty in 1 row.*: 8 "),
        ("t.csv", GOOD.replace(b",b", b",a"), {}, "every training row has the label 'a'"),
        (
            "t.csv",
            GOOD.replace(b"text 7,", b"text, 7,"),
            {},
            "line 9: 3 values under 2 column names",
        ),
        (
            "t.csv",
            GOOD.replace(b"text 7,b", b"text 7"),
            {},
            "line 9: 1 values under 2 column names",
        ),
        ("t.csv", GOOD.replace(b"text 7", b'"text" 7'), {}, "line 9: .* expected after"),
        ("t.csv", GOOD.replace(b"text 7", b'"text 7'), {}, "unexpected end of data"),
        ("t.csv", GOOD.replace(b"text,label", b"text,text"), {}, "more than one column named text"),
        ("t.csv", b"text,label\nx,a\ny,b\n", {}, "no row for the split .*give more rows"),
        ("t.jsonl", b'{"text": "x", "label": 1}\n{"text": \n', {}, r"line 2 is not JSON"),
        ("t.jsonl", b'{"text": "x", "label": 1}\n[1]\n', {}, r"line 2 is not a JSON object"),
        (
            "t.jsonl",
            b'{"text": "x", "label": 1}\n{"text": "y"}\n',
            {},
            r"'label' is empty in 1 row.*: 2 ",
        ),
        ("t.jsonl", b'{"text": 5, "label": 1}\n', {}, r"value of type int in row 1, not text"),
        ("t.parquet", b"PAR1 not", {}, "cannot read .* as Parquet"),
        ("t.csv", GOOD, {"test_path": "none.csv"}, r"none\.csv does not exist"),
        ("t.csv", GOOD, {"path": ""}, r"data\.path is not given"),
    ],
)
def test_wrong_files(tmp_path, monkeypatch, name, content, settings, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(tmp_path, **{"path": name, **settings})


def test_byte_order_mark_and_long_texts_are_fine(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + GOOD + b"long " * 50_000 + b",a\r\n")
    dataset = load(tmp_path, path=str(tmp_path / "t.csv"))
    assert sum(dataset.size(name) for name in ("train", "validation", "test")) == 61


def test_a_label_that_training_never_saw_is_named(tmp_path):
    train, test = (
        write(table(100), tmp_path / "a.csv"),
        write(table(10, ("good", "baad")), tmp_path / "b.csv"),
    )
    with pytest.raises(
        UserError,
        match=r"label 'baad' of 5 row\(s\) of the test split.*Did you mean bad\?.*bad, good",
    ):
        load(tmp_path, path=train, test_path=test)


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"test_fraction": -0.1},
        {"max_length": 0},
        {"validation_fraction": 0.5, "test_fraction": 0.5},
        {"vocabulary_size": 3},
        {"validation_fraction": float("nan")},
        {"vocabulary_size": 200, "tokenizer": "bpe"},
    ],
)
def test_settings_out_of_range_name_their_field(settings):
    with pytest.raises(UserError, match=next(iter(settings)).replace("_", "-")):
        TextTable(**settings)


def test_saved_info_is_plain_json(tmp_path):
    load(tmp_path, path=write(table(), tmp_path / "t.csv"))
    saved = json.loads((tmp_path / "assets" / "info.json").read_text())
    assert saved["labels"] == ["bad", "good"] and saved["text_column"] == "text"


def table_of(tmp_path, **columns) -> str:
    path = tmp_path / "rows.jsonl"
    pd.DataFrame(columns).to_json(path, orient="records", lines=True)
    return str(path)


def test_several_text_columns_are_joined(tmp_path):
    path = table_of(
        tmp_path,
        title=["a", None, "c"] * 20,
        body=["x", "y", ""] * 20,
        label=["u", "v", "v"] * 20,
        number=[1, 2, 3] * 20,
    )
    data = TextTable(path, text_column="title+body", validation_fraction=0.3, test_fraction=0.3)
    texts = data._texts(Path(path)).texts
    assert texts == ["a\nx", "y", "c"] * 20
    new = data.read(path)
    assert data.table(["whole"])["title+body"].tolist() == ["whole"] and len(new) == 60
    for column, said in (
        ("title+number", "type int in row 1"),
        ("title+author", r"no column 'title\+author'"),
    ):
        with pytest.raises(UserError, match=said):
            dataclasses.replace(data, text_column=column)._texts(Path(path))


def test_rows_weigh_as_said_and_classes_alike_where_balanced(tmp_path):
    """Weights of training rows have the mean 1; rows for judgement count once each."""
    texts = [f"word{n}" for n in range(90)]
    labels = ["rare" if n % 9 == 0 else "usual" for n in range(90)]
    given = [float(n % 4) for n in range(90)]
    path = table_of(tmp_path, text=texts, label=labels, weight=given)
    weight_of = dict(zip(texts, given, strict=True))
    label_of = dict(zip(texts, labels, strict=True))
    for column, balanced in (("", False), ("weight", False), ("", True), ("weight", True)):
        data = TextTable(path, weight_column=column, balanced=balanced, max_length=4)
        dataset = data.load(tmp_path / f"{column}{balanced}")
        source = dataset.train(8, seed=0)
        found = {}
        for batch in (source[step] for step in range(len(source))):
            rows = zip(batch.inputs, batch.lengths, batch.weights, strict=True)
            found |= {dataset.info.vocabulary.decode(i[:n]): w for i, n, w in rows if n}
        assert set(found) == set(dataset.read("train").texts)
        expected = {t: weight_of[t] if column else 1.0 for t in found}
        if balanced:
            total = dict.fromkeys(label_of.values(), 0.0)
            for text in found:
                total[label_of[text]] += expected[text]
            expected = {t: expected[t] / total[label_of[t]] for t in found}
        mean = np.mean([*expected.values()])
        assert found == pytest.approx({t: w / mean for t, w in expected.items()}, rel=1e-6)
        batches = [*dataset.evaluation("test", 8)]
        assert {*np.concatenate([b.weights[b.lengths > 0] for b in batches])} == {1.0}


def test_rows_of_a_group_go_to_one_split(tmp_path):
    texts = [f"word{n}" for n in range(300)]
    film_of = {text: n % 60 for n, text in enumerate(texts)}
    labels = ["good" if n % 2 else "bad" for n in range(300)]
    path = table_of(tmp_path, text=texts, label=labels, film=[*film_of.values()])
    data = TextTable(path, group_column="film", validation_fraction=0.2, test_fraction=0.2)
    splits = data.source.splits()
    films = {name: {film_of[text] for text in rows.texts} for name, rows in splits.items()}
    assert [len(films[name]) > 2 for name in ("train", "validation", "test")] == [True] * 3
    assert sum(map(len, films.values())) == 60  # none on two sides
    assert sum(len(rows.texts) for rows in splits.values()) == 300
    apart = dataclasses.replace(data, group_column="").source.splits()
    assert {film_of[text] for text in apart["test"].texts} & {
        film_of[text] for text in apart["train"].texts
    }


def test_groups_that_are_none_are_said(tmp_path):
    path = table_of(
        tmp_path, text=["a", "b"], label=["x", "y"], film=["one", "one"], part=[1, None]
    )
    for column, said in (
        ("film", "every row has 'one' in column 'film'"),
        ("part", "column 'part' is empty in 1 row"),
        ("flim", r"no column 'flim' \(--data.group-column\).*film"),
    ):
        with pytest.raises(UserError, match=said):
            TextTable(path, group_column=column)._texts(Path(path))
    (tmp_path / "folder" / "x").mkdir(parents=True)
    for kind in ("weight", "group"):
        data = TextTable(str(tmp_path / "folder"), **{f"{kind}_column": "film"})
        with pytest.raises(UserError, match=f"data.{kind}-column film: .* is a folder"):
            data._texts(tmp_path / "folder")


def test_more_rows_are_learnt_from_and_judge_nothing(tmp_path):
    """As `predict` writes them; copies of rows that were given are left out."""
    texts = [f"word{n}" for n in range(60)]
    path = table_of(tmp_path, text=texts, label=["x", "y"] * 30)
    alone = load(tmp_path / "alone", path=path)
    new = [f"other{n}" for n in range(40)]
    more = tmp_path / "more.csv"
    answers = {"text": new + texts, "predicted": ["y", "x"] * 50, "probability": [0.9] * 100}
    pd.DataFrame(answers).to_csv(more, index=False)
    joined = load(tmp_path / "joined", path=path, more_path=str(more))
    given = alone.read("train")
    assert joined.read("train").texts == [*given.texts, *new]
    assert joined.read("train").labels == [*given.labels, *["y", "x"] * 20]
    assert len(joined.labelled_tokens()[0]) == joined.size("train") == len(given.texts) + 40
    for split in ("validation", "test"):
        assert joined.read(split) == alone.read(split)
    pd.DataFrame({"text": new, "predicted": ["z"] * 40}).to_csv(more, index=False)
    with pytest.raises(UserError, match=r"z is a label of no training row\. Trained labels: x, y"):
        load(tmp_path / "z", path=path, more_path=str(more))
    for column in ("text", "predicted"):
        pd.DataFrame({column: new}).to_csv(more, index=False)
        with pytest.raises(UserError, match=r"more\.csv has no column"):
            load(tmp_path / column, path=path, more_path=str(more))
    with pytest.raises(UserError, match=r"data\.more-path and data\.prepared"):
        load(tmp_path / "prepared", path=path, more_path=str(more), prepared=str(tmp_path))


@pytest.mark.parametrize("wrong", [-1.0, "much", None])
def test_weights_that_are_none_are_said(tmp_path, wrong):
    path = table_of(tmp_path, text=["a", "b"], label=["x", "y"], weight=[1.0, wrong])
    said = "is empty in 1 row" if wrong is None else "in row 2, not a"
    with pytest.raises(UserError, match=said):
        TextTable(path, weight_column="weight")._texts(Path(path))


def test_fewer_padded_lengths_hold_the_same_rows(tmp_path):
    path = write(table(), tmp_path / "t.csv")
    by = {n: load(tmp_path / str(n), path=path, buckets=n) for n in (1, 2, 8)}
    lengths = {n: dataset.info.boundaries for n, dataset in by.items()}
    assert [len(lengths[n]) for n in (1, 2, 8)] == [1, 2, 6]
    assert len({found[-1] for found in lengths.values()}) == 1
    seen = {n: by[n].train(16, 0)[3] for n in by}
    assert seen[1].inputs.shape[1] > seen[8].inputs.shape[1]
    for batch in seen.values():
        np.testing.assert_array_equal(batch.lengths, seen[8].lengths)
        np.testing.assert_array_equal(batch.inputs.sum(1), seen[8].inputs.sum(1))


@pytest.mark.parametrize("wrong", [0, -1, 65])
def test_padded_lengths_have_limits(wrong):
    with pytest.raises(UserError, match=r"data\.buckets is .*: give 1 to 64"):
        TextTable("t.csv", buckets=wrong)


def test_fewer_training_rows_are_a_part_of_more(tmp_path):
    path = write(table(), tmp_path / "t.csv")
    drawn = {n: load(tmp_path / str(n), path=path, train_rows=n) for n in (0, 20, 60)}
    rows = {n: read_back(dataset, "train") for n, dataset in drawn.items()}
    assert len(rows[20]) == 20 and len(rows[60]) == 60 and len(rows[0]) > 100
    assert {*rows[20]} < {*rows[60]} < {*rows[0]}
    assert drawn[20].info.labels == ("bad", "good") and sum(drawn[20].info.class_counts) == 20
    for split in ("validation", "test"):
        assert drawn[20].read(split) == drawn[0].read(split)
    assert drawn[20].read("train").texts == [
        text for text in drawn[0].read("train").texts if text in drawn[20].read("train").texts
    ]
    with pytest.raises(UserError, match=r"data\.train-rows is 500: there are"):
        load(tmp_path / "500", path=path, train_rows=500)
