# SPDX-License-Identifier: Apache-2.0
"""Values that no training can use, files that are something else, settings beyond all bounds: each
is refused, with the column and row, the file, or the flag."""

import gzip
import json
import os
import random
import warnings
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest

from flax_lstm import (
    Classification,
    Config,
    Forecasting,
    LanguageModel,
    MeshConfig,
    RecurrentModel,
    SegmentModel,
    SequenceRegression,
    TextModel,
    TrainConfig,
    UserError,
    load_config,
)
from flax_lstm.commands.tables import WRITERS, check_output, write_table
from flax_lstm.data import (
    AddingProblem,
    LanguageTable,
    PanelTable,
    Sequences,
    SeriesTable,
    TextTable,
)
from flax_lstm.data.documents import stream_documents
from flax_lstm.data.fingerprint import content_sha256
from flax_lstm.data.measures import FARTHEST, parse
from flax_lstm.data.tables import read_table, sort_labels
from flax_lstm.machine import distributed, memory
from flax_lstm.tasks.base import beside
from flax_lstm.training import room
from flax_lstm.training.assembly import assemble

HOURS = pd.date_range("2024-01-01", periods=100, freq="h").astype(str)
WAVE = 5 + np.sin(np.arange(100) * np.pi / 12).round(4)
SERIES = pd.DataFrame({"when": HOURS, "load": WAVE, "plan": WAVE[::-1]})
SETTINGS = {"lookback": 8, "horizon": 2, "season": 4}


def with_value(frame, row, column, value):
    frame = frame.astype({column: object})
    frame.loc[row, column] = value
    return frame


def loaded(frame, folder, **settings):
    return SeriesTable(**{**SETTINGS, **settings}).holding(frame).load(folder)


# Numbers


FAR = {
    "beyond float64 (JSON)": (3, float("inf"), r"'load' is infinite in row 4"),
    "near its end": (3, 1.8e307, r"1\.8e\+307 in row 4: too large"),
    "far, in training": (3, 1e300, r"1e\+300 in row 4: too large"),
    "far, in the test rows": (97, 1e300, r"1e\+300 in row 98: too large"),
    "fits float32, its square does not": (
        97,
        1e25,
        r"'load' holds 1e\+25 in row 98, .* deviations",
    ),
    "negative": (90, -1e22, r"'load' holds -1e\+22 in row 91"),
    "an integer of 400 digits": (3, 10**400, r"'load' is infinite in row 4"),
    "a complex number": (3, 1 + 2j, r"'load' holds what is no number: \(1\+2j\) \(row 4\)"),
    "true": (3, True, r"'load' holds what is no number: True \(row 4\)"),
    "a list": (3, [1.0], r"'load' holds \[1\.0\] in row 4; a single value"),
    "bytes": (3, b"5", r"'load' holds b'5' in row 4"),
}


@pytest.mark.parametrize("case", FAR)
def test_a_number_that_no_figure_could_hold_is_told_by_column_and_row(tmp_path, case):
    row, value, message = FAR[case]
    with pytest.raises(UserError, match=message):
        loaded(with_value(SERIES, row, "load", value), tmp_path, targets=("load",))


def test_the_farthest_value_that_is_taken_gives_finite_figures(tmp_path):
    """The square of the error, summed over a million values, is finite in float32."""
    frame = with_value(SERIES, 97, "load", WAVE.mean() + 0.9 * FARTHEST * WAVE[:70].std())
    values = loaded(frame, tmp_path, targets=("load",)).buffer.values_RD
    assert np.isfinite(np.float32(1e6) * np.square(values)).all()


@pytest.mark.parametrize("column, role", [("plan", "future"), ("plan", "inputs")])
def test_covariates_are_held_to_the_same(tmp_path, column, role):
    for row, value, message in (
        (97, 1e300, "too large"),
        (97, 1e25, "row 98, .* deviations"),
        (3, float("inf"), "infinite in row 4"),
    ):
        frame = with_value(SERIES, row, column, value)
        with pytest.raises(UserError, match=f"{column}.*{message}"):
            loaded(frame, tmp_path, targets=("load",), **{role: (column,)})
    tiny = SERIES.assign(plan=WAVE * 1e-200)
    with pytest.raises(UserError, match=r"'plan' varies by .* only"):
        loaded(tiny, tmp_path, targets=("load",), **{role: (column,)})


def panel(**columns):
    frame = pd.concat([SERIES.assign(unique_id=name) for name in "ab"], ignore_index=True)
    return frame.rename(columns={"when": "ds", "load": "y"}).assign(**columns)


def test_a_panel_and_its_static_columns_are_held_to_the_same(tmp_path):
    data = PanelTable(**SETTINGS, static=("size",))
    sizes = np.repeat([1.0, 2.0], 100)
    with pytest.raises(UserError, match=r"'size' holds 1e\+300 in row 101"):
        data.holding(panel(size=np.repeat([1.0, 1e300], 100))).load(tmp_path)
    with pytest.raises(UserError, match=r"'y' holds 1e\+25 in row 198, .* deviations"):
        data.holding(with_value(panel(size=sizes), 197, "y", 1e25)).load(tmp_path)
    # One series far larger than another is no mistake.
    scales = np.repeat([1.0, 1e12], 100)
    dataset = data.holding(panel(size=sizes, y=np.tile(WAVE, 2) * scales)).load(tmp_path / "b")
    assert np.isfinite(dataset.buffer.values_RD).all()
    assert np.isfinite(dataset.buffer.units_P4C["test"]).all()


def test_a_spread_in_training_that_float64_cannot_square_is_none(tmp_path):
    """The deviation of the training rows would be 0, and what is divided by it not a number."""
    tiny = np.where(np.arange(100) < 80, np.arange(100) * 1e-200, WAVE)
    info = loaded(SERIES.assign(load=tiny), tmp_path, targets=("load",)).info
    assert info.std == (1.0,)


def test_predictions_refuse_what_training_refuses(tmp_path):
    info = loaded(SERIES, tmp_path, targets=("load",), inputs=("plan",)).info
    for column, value, message in (
        ("load", 1e308, "too large"),
        ("plan", 1e25, "the input: column 'plan' holds 1e\\+25 in row 98"),
    ):
        with pytest.raises(UserError, match=message):
            info.ahead(with_value(SERIES, 97, column, value))


@pytest.mark.parametrize(
    "words, message",
    [
        (["1,234.5", "2,345.5"], "text, numbers with marks between thousands.*thousands=','"),
        (["1.234,5", "2.345,5"], "text, numbers with a decimal comma.*decimal=','"),
        (["5,1", "6,2"], "text, numbers with a comma.*decimal=','"),
        (["1 234", "2 345"], "text, numbers with marks between thousands"),
        (["12 %", "13 %"], "per cent"),
        (["$5", "$6"], "currency"),
    ],
)
def test_numbers_written_for_people_are_told_with_how_to_read_them(tmp_path, words, message):
    frame = SERIES.assign(load=words * 50)
    for settings in ({}, {"targets": ("load",)}, {"targets": ("plan",), "future": ("load",)}):
        with pytest.raises(UserError, match=f"'load'.*{message}"):
            loaded(frame, tmp_path, **settings)


def test_columns_of_every_type_are_numbers_or_not():
    """Against what Python makes of each."""
    for values in (
        pd.Series([1, 2], dtype="uint8"),
        pd.Series([1.5, None], dtype="Float32"),
        pd.Series(pd.arrays.SparseArray([0.0, 1.5])),
        pd.Series(["1", " 2.5 "], dtype=object),
        pd.Series(pd.Categorical(["3", "4"])),
        pd.Series([10**30, 1], dtype=object),
    ):
        wanted = [np.nan if pd.isna(v) else float(v) for v in values]
        found, wrong = parse(values)
        np.testing.assert_array_equal(found, wanted)
        assert not wrong.any()
    for values in (
        pd.Series([True, False]),
        pd.Series([1j, 2]),
        pd.to_timedelta(pd.Series([1, 2]), unit="s"),
        pd.Series([{"a": 1}, [2]]),
    ):
        assert parse(values)[1].all()


def test_a_time_that_is_far_away_does_not_fill_the_memory(tmp_path):
    seconds = pd.date_range("2024-01-01", periods=100, freq="s").astype(str).to_numpy(object)
    early = np.concatenate([["1700-01-01 00:00:00"], seconds[1:]])
    with pytest.raises(UserError, match=r"from 1700.* is a time wrong"):
        loaded(SERIES.assign(when=early), tmp_path, missing="mask", targets=("load",))
    for time in ("9999-12-31", "0001-01-01"):
        frame = with_value(SERIES, 99 if time > "2" else 0, "when", time)
        with pytest.raises(UserError, match="a time before 1677 or after 2262 in row"):
            loaded(frame, tmp_path)


def test_sequences_are_held_to_the_same(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 5, 2))
    y = ["up", "down"] * 20
    far = x.copy()
    far[:, 2, 1] = np.where(np.arange(40) == 7, 1e29, far[:, 2, 1])
    for seed in range(3):  # it lands in another split, and may have a part in the deviation
        data = Sequences(split_seed=seed).holding((far, y))
        try:
            found = [*data.load(tmp_path / str(seed)).evaluation("test", 8)]
        except UserError as error:
            assert "column '2' holds 1e+29 in row 3" in str(error)
        else:
            assert np.isfinite(np.square(found[0].inputs)).all()
    tiny = Sequences().holding((x * 1e-200, y)).load(tmp_path / "tiny")
    assert tiny.info.std == (1.0, 1.0)
    for odd in ([[10**400]], [["2024-01-01"]], [[1j]], [[b"1"]], np.array([["2024"]], "M8[D]")):
        with pytest.raises(UserError, match="sequence 1 is no array of numbers"):
            Sequences().holding((odd, ["up"]))


# Files


def test_every_damage_to_a_compressed_file_is_told(tmp_path):
    content = gzip.compress(SERIES.to_csv(index=False).encode())
    chance, path = random.Random(0), tmp_path / "t.csv.gz"
    for _ in range(60):
        at = chance.randrange(len(content))
        kinds = (
            content[:at],
            content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            content[:at] + bytes(9) + content[at + 9 :],
        )
        path.write_bytes(chance.choice(kinds))
        try:
            frame = read_table(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # a bit of the name or the time in its head
            pd.testing.assert_frame_equal(frame, SERIES.astype(str), check_dtype=False)


@pytest.mark.parametrize("byte", [b"\0", b"a", b"\n", b"1,2\n"])
def test_what_inflates_without_end_is_refused_before_it_fills_the_memory(tmp_path, byte):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(10 * gzip.compress(byte * (30_000_000 // len(byte))))
    with pytest.raises(UserError, match=r"inflates from .* no table does"):
        read_table(path)


def test_a_file_too_large_for_the_memory_is_refused(tmp_path, monkeypatch):
    SERIES.to_csv(tmp_path / "t.csv", index=False)
    SERIES.to_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr(memory, "free_memory", lambda: 5e3)
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(UserError, match=r"too (large|many).*5 kB of memory are free"):
            read_table(tmp_path / name)


OTHERS = {
    "UTF-16": (".csv", "when,load\n1,2\n".encode("utf-16"), "is UTF-16, not UTF-8"),
    "UTF-16, big": (".jsonl", b"\xfe\xff" + '{"a": 1}'.encode("utf-16-be"), "is UTF-16"),
    "UTF-32": (".csv", "when,load\n1,2\n".encode("utf-32"), "is UTF-32"),
    "Parquet": (".csv", b"PAR1\x15\x04", "a Parquet file: its name should end in .parquet"),
    "gzip": (".csv", gzip.compress(b"a,b\n1,2\n", mtime=0), "its name should end in .gz"),
    "a spreadsheet": (".csv", b"PK\x03\x04....", "a zip archive"),
    "no gzip": (".csv.gz", b"a,b\n1,2\n", "as gzip: Not a gzipped file"),
    "semicolons": (".csv", b"when;load\n1;2\n", "one column, 'when;load'"),
    "commas": (".tsv", b"when,load\n1,2\n", "one column, 'when,load'"),
    "names twice": (".csv", b"a,a\n1,2\n", "more than one column named a"),
    "names twice, JSON": (
        ".jsonl",
        b'{"a": 1, "a": 2}\n',
        "line 1 is not JSON: 'a' is there twice",
    ),
    "an array": (".jsonl", b'[{"a": 1}]\n', "line 1 is not a JSON object"),
    "over several lines": (".jsonl", b'{\n "a": 1\n}\n', "JSON lines have an object in each line"),
    "deep": (".jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1 is not JSON"),
    "a number of 5,000 digits": (".jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
    "empty": (".csv", b"", "is empty"),
    "empty Parquet": (".parquet", b"", "cannot read .* as Parquet"),
    "empty gzip": (".csv.gz", b"", "is empty"),
    "only a mark": (".csv", b"\xef\xbb\xbf", "is empty"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_that_are_something_else(tmp_path, case):
    suffix, content, message = OTHERS[case]
    (tmp_path / f"t{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / f"t{suffix}")


def test_a_spoilt_text_in_parquet_is_told(tmp_path):
    """Whatever byte of it, and pandas would give it out as a text that nothing can read."""
    path = tmp_path / "t.parquet"
    SERIES.to_parquet(path, compression=None)
    content = path.read_bytes()
    at = content.index(b"2024-01-02 03") + 10
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    for read in (read_table, lambda p: list(stream_documents(p, "when"))):
        with pytest.raises(UserError, match=r"cannot read .* as Parquet: .*UTF"):
            read(path)


def test_paths_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path, message in (
        (tmp_path / "pipe.csv", "is no plain file"),
        (tmp_path, "is a folder"),
        (tmp_path / ("x" * 300 + ".csv"), "cannot look at .*File name too long"),
        ("~nobody-of-this-name/t.csv", "a user who is not known here"),
        ("/dev/null", "is no plain file"),
    ):
        for data in (SeriesTable(), PanelTable(), TextTable(), LanguageTable(), Sequences()):
            if not (path == tmp_path and isinstance(data, TextTable | LanguageTable)):
                with pytest.raises(UserError, match=message):
                    replace(data, path=str(path)).absolute().load(tmp_path / "assets")
    SERIES.to_csv(tmp_path / "mark.csv", index=False, encoding="utf-8-sig")
    assert list(read_table(tmp_path / "mark.csv").columns) == list(SERIES.columns)


def test_a_folder_in_the_place_of_a_file_is_not_read_through(tmp_path):
    """All of a disk would be hashed before it is told that a file is needed."""
    for path in (tmp_path / "good" / "1.txt", tmp_path / "good" / "deep" / "er" / "2.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("a film")
    (tmp_path / "other").write_text("of somebody")
    for data, texts in (
        (SeriesTable(), 0),
        (Sequences(), 0),
        (TextTable(), 1),
        (LanguageTable(), 6),
    ):
        found = replace(data, path=str(tmp_path))
        alone = [path for pattern in found.below for path in tmp_path.glob(pattern)]
        assert len(alone) == texts
        assert (content_sha256(found.files(), found.below) is None) == (texts == 0)


def test_half_a_character_becomes_a_question_mark(tmp_path):
    """No file in UTF-8 can hold it; the label is written into one."""
    rows = [{"text": "a \ud83d film", "label": label} for label in ("good\ud800", "bad") * 30]
    rows = [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(rows)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = TextTable(path=str(path), vocabulary_size=50).load(tmp_path / "assets")
    assert dataset.info.labels == ("bad", "good?")
    held = TextTable(vocabulary_size=50).holding(pd.DataFrame(rows, dtype=object))
    assert held.load(tmp_path / "held").info.labels == ("bad", "good?")
    ids = pd.Series(["a\ud800"] * 100 + ["b"] * 100, dtype=object)
    names = panel().assign(unique_id=ids)
    dataset = PanelTable(**SETTINGS).holding(names).load(tmp_path / "panel")
    assert [*dataset.buffer.ids] == ["a?", "b"]
    sequences = Sequences().holding(([[1.0]] * 40, ["up\ud800", "down"] * 20))
    assert sequences.load(tmp_path / "sequences").info.labels == ("down", "up?")
    music = "a \U0001f3b5 film"  # a pair of them is a character
    path.write_text(json.dumps({"text": music, "label": "x"}))
    assert read_table(path)["text"][0] == music


def test_labels_and_weights_that_are_none(tmp_path):
    frame = pd.DataFrame({"text": [f"film {n}" for n in range(60)], "label": ["a", "b"] * 30})
    with pytest.raises(UserError, match="several values in row 4, not a label"):
        TextTable().holding(with_value(frame, 3, "label", ["a"])).load(tmp_path)
    for weight in (1e300, 1e-300, -1, float("nan"), "much"):
        heavy = with_value(frame.assign(weight=1.0), 3, "weight", weight)
        with pytest.raises(UserError, match=r"'weight'.*row.* 4"):
            TextTable(weight_column="weight").holding(heavy).load(tmp_path)
    assert sort_labels(["nan", "10", "9"]) == ["10", "9", "nan"]
    assert sort_labels(["10", "9"]) == ["9", "10"]


# Predictions


def test_the_users_columns_are_kept_whatever_they_are_called():
    frame = pd.DataFrame({"predicted": [1], "predicted_input": [2], "other": [3]})
    result = beside(frame, {"predicted": ["x"]})
    assert result.to_dict("records") == [
        {"predicted_input_input": 1, "predicted_input": 2, "other": 3, "predicted": "x"}
    ]


def test_answers_beside_columns_of_their_own_names(tmp_path):
    x = [np.full((3, 1), n) for n in range(40)]
    frame = pd.DataFrame({"x": x, "predicted": range(40), "probability": ["mine"] * 40})
    for y, task, width in (
        (["up", "down"] * 20, Classification(), 2),
        (np.arange(40) / 7, SequenceRegression(), 1),
    ):
        data = Sequences().holding((x, y))
        info = data.load(tmp_path / str(width)).info
        zeros = lambda batch: np.zeros((len(batch.lengths), width), np.float32)  # noqa: B023, E731
        result = task.predict(data.table(frame), info, zeros, 8)
        assert result.columns.is_unique and list(result["predicted_input"]) == list(range(40))
        own = "probability_input" if width == 2 else "probability"
        assert list(result[own]) == ["mine"] * 40


def test_the_name_of_a_series_is_kept_beside_its_forecasts(tmp_path):
    frame = panel().rename(columns={"unique_id": "channel"}).drop(columns="plan")
    data = PanelTable(id_column="channel", **SETTINGS).holding(frame)
    info = data.load(tmp_path).info
    zeros = lambda batch: np.zeros((*batch.targets.shape, 1), np.float32)  # noqa: E731
    result = Forecasting().predict(frame, info, zeros, 8)
    assert list(result["channel_input"]) == ["a"] * 2 + ["b"] * 2
    assert list(result["channel"]) == ["y"] * 4


ODD = {
    "mixed": [1, "a", None],
    "30 digits": [10**30, 1, 2],
    "bytes": [b"\xff\xfe", b"a", b""],
    "half a character": ["\ud800", "a", "b"],
    "objects": [object()] * 3,
    "functions": [print] * 3,
    "complex": [1j, 2, 3],
    "periods": [*pd.period_range("2024", periods=3)],
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_a_format_cannot_hold_leaves_no_file(tmp_path, suffix):
    for values in ODD.values():
        for name in ("out", "ü" * 123, "x" * (255 - len(suffix))):
            path = tmp_path / f"{name}{suffix}"
            try:
                write_table(pd.DataFrame({"c": pd.Series(values, dtype=object)}), path)
            except UserError as error:
                assert str(path) in str(error) and list(tmp_path.iterdir()) == []
            else:
                assert [p.name for p in tmp_path.iterdir()] == [path.name]
                path.unlink()


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "in.csv").write_text("a\n1\n")
    (tmp_path / "same.csv").hardlink_to(tmp_path / "in.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "in.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name, message in (
        ("in.csv", "this is the input"),
        ("same.csv", "this is the input"),
        ("link.csv", "this is the input"),
        ("pipe.csv", "no plain file"),
        ("folder.csv", "this is a folder"),
        ("none/out.csv", "the folder .* does not exist"),
        ("out.xlsx", "the extension must be one of"),
        ("out", "the extension must be one of"),
        ("x" * 300 + ".csv", "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(tmp_path / name, overwrite=True, source=tmp_path / "in.csv")
    check_output(tmp_path / "OUT.CSV", overwrite=False)


# Settings


HUGE = 10**23
TOO_MUCH = {
    "train.steps": lambda v: TrainConfig(steps=v),
    "train.batch-size": lambda v: TrainConfig(batch_size=v),
    "train.warmup-steps": lambda v: TrainConfig(warmup_steps=v),
    "train.unfreeze-every": lambda v: TrainConfig(unfreeze_every=v),
    "mesh.data": lambda v: MeshConfig(data=v),
    "seed": lambda v: replace(load_config("adding_problem"), seed=v),
    "model.num-layers": lambda v: RecurrentModel(num_layers=v),
    "model.hidden-size": lambda v: RecurrentModel(hidden_size=(8, v)),
    "model.dense": lambda v: TextModel(dense=v),
    "model.embed-size": lambda v: LanguageModel(embed_size=v),
    "model.segment": lambda v: SegmentModel(segment=v),
    "data.lookback": lambda v: SeriesTable(lookback=v),
    "data.horizon": lambda v: PanelTable(horizon=v),
    "data.test": lambda v: PanelTable(test=v),
    "data.max-length": lambda v: TextTable(max_length=v),
    "data.vocabulary-size": lambda v: TextTable(vocabulary_size=v),
    "data.split-seed": lambda v: Sequences(split_seed=v),
    "data.sequence-length": lambda v: LanguageTable(sequence_length=v),
    "data.length": lambda v: AddingProblem(length=v),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_settings_have_bounds(name):
    for value in (HUGE, -5, float("nan")):
        with pytest.raises(UserError, match=name):
            TOO_MUCH[name](value)


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), -1.0, 0.0, 1e300])
def test_fractions_and_rates_are_finite(odd):
    for make in (
        lambda: SeriesTable(split=(odd, 0.1, 0.2)),
        lambda: SeriesTable(split=(0.7, 0.1, odd)),
        lambda: TextTable(validation_fraction=odd),
        lambda: TextTable(test_fraction=odd),
        lambda: Sequences(test_fraction=odd),
        lambda: TrainConfig(learning_rate=odd),
        lambda: TrainConfig(epsilon=odd),
        lambda: TrainConfig(ema=odd or -1),
        lambda: TrainConfig(clip=odd or -1),
        lambda: RecurrentModel(dropout=odd or -1),
        lambda: Forecasting(quantiles=(odd,)),
        lambda: Classification(label_smoothing=odd or -1),
    ):
        with pytest.raises(UserError):
            make()


def test_seeds_that_jax_would_take_for_one_another_are_refused():
    with pytest.raises(UserError, match="seed 4294967296: must be at most 4,294,967,295"):
        replace(load_config("adding_problem"), seed=2**32)


def test_names_of_runs_are_names_of_folders():
    for name in ("", ".", "..", "a/b", "/a", "a\0b"):
        with pytest.raises(UserError, match="name"):
            replace(load_config("adding_problem"), name=name)


def test_divisors_are_found_without_counting_to_the_batch_size():
    with pytest.raises(UserError, match=r"these do: 1, 2, 4, 8, .*more"):
        TrainConfig(batch_size=2**30, accumulate=3)


# Memory


def adding(**settings) -> Config:
    config = load_config("adding_problem")
    train = replace(config.train, batch_size=settings.pop("batch_size", 32))
    data = AddingProblem(length=settings.pop("length", 20), examples=64)
    return replace(config, data=data, train=train, model=RecurrentModel(**settings))


def check(config):
    info = config.data.outline()
    room.check_room(config, info, assemble(config, info).steps)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_allocated():
    check(adding(hidden_size=4))
    with pytest.raises(UserError, match=r"at least [\d,.]+ TB .* for [\d,]+ parameters"):
        check(adding(hidden_size=2**19))
    with pytest.raises(UserError, match=r"train.batch-size 2,147,483,640: a batch of so many rows"):
        check(adding(batch_size=2**31 - 8))
    with pytest.raises(UserError, match=r"data.length 2,147,483,647: 2,000 sequences"):
        AddingProblem(length=2**31 - 1).load(None)


def test_what_a_batch_keeps_for_its_gradient_is_counted(monkeypatch):
    """What the forward pass keeps is at least its states, and no more than twice what XLA takes."""
    config = adding(hidden_size=64, batch_size=256, length=100)
    info = config.data.outline()
    steps = assemble(config, info).steps
    kept = room.kept_bytes(config, info, steps.abstract, room.sample_of(info, 256))
    states = 256 * 100 * 64 * 4
    assert kept >= 2 * states  # of an LSTM, c and h
    batch = room.sample_of(info, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = steps.train.lower(steps.abstract, batch).compile().memory_analysis()
    assert kept <= 2 * taken.temp_size_in_bytes * room.room()[1]
    monkeypatch.setattr(room, "free_memory", lambda: int(kept))
    with pytest.raises(UserError, match="what a batch of 256 keeps for its gradients"):
        room.check_room(config, info, steps)


def test_processes_of_a_run_share_the_memory_of_their_machine(monkeypatch):
    """What is enough for one is not for the four of this machine, of eight in all."""
    config = adding(hidden_size=64)
    info = config.data.outline()
    steps = assemble(config, info).steps
    needed = 2 * room.shard_bytes(steps.abstract)  # more than the state and one gradient
    devices = len(jax.local_devices())
    monkeypatch.setattr(room, "free_memory", lambda: int(devices * needed))
    room.check_room(config, info, steps)
    machines = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.uint32)
    monkeypatch.setattr(distributed, "process_count", lambda: 8)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda own: own + machines
    )
    assert room.room()[1] == 4 * devices
    with pytest.raises(UserError, match="training needs at least"):
        room.check_room(config, info, steps)


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "5000000", "memory.current": "3000000", "memory.stat": "inactive_file 99\n"},
        {
            "memory.limit_in_bytes": "5000000",
            "memory.usage_in_bytes": "3000000",
            "memory.stat": "cache 1\ntotal_inactive_file 99\n",
        },
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_groups", lambda: [tmp_path, tmp_path / "none"])
    assert memory.free_memory() == 2_000_099
    (tmp_path / next(iter(files))).write_text("max")
    assert memory.free_memory() > 2_000_099
