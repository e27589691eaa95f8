# SPDX-License-Identifier: Apache-2.0
"""Windows, scaler, calendar and errors of flax_lstm/data/series.py and timetable.py."""

import ast
import gzip
import itertools
import logging
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import flax_lstm.data.series as series_module
from flax_lstm.data.covariates import calendar
from flax_lstm.data.order import EpochOrder, in_order
from flax_lstm.data.panel import PanelTable
from flax_lstm.data.series import SeriesDataset, SeriesTable
from flax_lstm.data.timetable import EMBEDDED, embedded
from flax_lstm.errors import UserError
from flax_lstm.tasks.forecasting import Forecasting


def hourly(rows: int, **columns: object) -> pd.DataFrame:
    return pd.DataFrame(
        {"time": pd.date_range("2024-02-27", periods=rows, freq="h").astype(str), **columns}
    )


def write(folder: Path, frame: pd.DataFrame, name: str = "series.csv") -> str:
    frame.to_csv(folder / name, index=False)
    return str(folder / name)


@pytest.fixture
def table(tmp_path: Path) -> SeriesTable:
    """100 rows whose value names the row: a is the row, b = 1000 - row, c = row squared."""
    row = np.arange(100)
    path = write(tmp_path, hourly(100, a=row, b=1000 - row, c=row**2))
    return SeriesTable(path=path, lookback=5, horizon=3, season=4, split=(60, 15, 20))


def load(table: SeriesTable, folder: Path) -> SeriesDataset:
    return table.load(folder / "assets")


def original(dataset: SeriesDataset, values: np.ndarray) -> np.ndarray:
    """Scaled targets or inputs back in the units of the file, whole numbers here."""
    info = dataset.info
    d = values.shape[-1]
    return np.rint(values * np.array(info.std[:d]) + np.array(info.mean[:d])).astype(int)


def warned(caplog) -> bool:
    return any(record.levelno >= logging.WARNING for record in caplog.records)


def leaves(batch) -> list[np.ndarray]:
    """The arrays of a batch, what is known included."""
    parts = [*batch[:4], *(batch.covariates or ()), batch.units]
    return [part for part in parts if part is not None]


def every(dataset: SeriesDataset, split: str, batch_size: int = 7):
    """All batches of a split, joined, without the rows of weight 0."""
    batches = list(dataset.evaluation(split, batch_size))
    keep = np.concatenate([b.weights.any(axis=(1, 2)) for b in batches])
    return [np.concatenate(part)[keep] for part in zip(*(b[:4] for b in batches), strict=True)]


def test_windows_by_hand(table, tmp_path):
    dataset = load(replace(table, targets=("b", "a"), inputs=("c",)), tmp_path)
    firsts = {
        "train": range(5, 58),
        "validation": range(60, 73),
        "test": range(75, 93),
    }  # first forecast row
    for split, rows in firsts.items():
        inputs, targets, lengths, _ = every(dataset, split)
        assert len(inputs) == dataset.size(split) == len(rows)
        assert (lengths == 5).all() and inputs.dtype == targets.dtype == np.float32
        for i, first in enumerate(rows):
            past, future = np.arange(first - 5, first), np.arange(first, first + 3)
            assert (original(dataset, inputs[i]) == np.stack([1000 - past, past, past**2], 1)).all()
            assert (original(dataset, targets[i]) == np.stack([1000 - future, future], 1)).all()


def test_counts_of_the_ett_protocol(tmp_path):
    rows = 17_420
    path = write(tmp_path, hourly(rows, **{f"v{i}": np.sin(np.arange(rows) + i) for i in range(7)}))
    table = SeriesTable(path=path, lookback=96, horizon=96, split=(8640, 2880, 2880))
    dataset = load(table, tmp_path)
    assert [dataset.size(s) for s in ("train", "validation", "test")] == [8449, 2785, 2785]
    batch = next(dataset.evaluation("test", 4))
    assert batch.inputs.shape == (4, 96, 7) and batch.targets.shape == (4, 96, 7)
    assert batch.covariates is not None and batch.covariates.future.shape == (4, 192, 4)


def test_shares_cover_every_row(table, tmp_path):
    dataset = load(replace(table, split=(0.6, 0.15, 0.25)), tmp_path)
    assert [dataset.size(s) for s in ("train", "validation", "test")] == [
        60 - 8 + 1,
        15 - 3 + 1,
        25 - 3 + 1,
    ]
    assert dataset.times("test")[-1][-1] == np.datetime64("2024-02-27") + np.timedelta64(99, "h")


def test_each_window_once_an_epoch(table, tmp_path):
    dataset = load(table, tmp_path)
    source = dataset.train(8, seed=3)
    assert len(source) == math.ceil(53 / 8)
    epochs = []
    for epoch in range(2):
        batches = [source[epoch * len(source) + i] for i in range(len(source))]
        assert all(b.inputs.shape == (8, 5, 3) for b in batches)
        seen = np.concatenate(
            [original(dataset, b.targets)[b.weights.any(axis=(1, 2)), 0, 0] for b in batches]
        )
        assert sorted(seen) == list(range(5, 58))
        epochs.append(seen.tolist())
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    values = 3 * 3  # of a window, all measured
    assert source[3].weights.sum() == 8 * values
    assert source[6].weights.sum() == (53 - 6 * 8) * values
    other = dataset.train(8, seed=4)
    assert (source[0].targets != other[0].targets).any()
    again = dataset.train(8, seed=3)
    assert all((a == b).all() for a, b in zip(source[11][:4], again[11][:4], strict=True))


def test_order_is_safe_across_threads():
    order, wrong = EpochOrder(1000, 7, seed=1), []
    expected = [order[step].tolist() for step in range(600)]

    def read():
        wrong.extend(step for step in range(600) if order[step].tolist() != expected[step])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [rows.tolist() for rows in in_order(5, 3)] == [[0, 1, 2], [3, 4, -1]]


def test_training_knows_nothing_of_what_follows(table, tmp_path):
    before = load(table, tmp_path / "before")
    frame = pd.read_csv(table.path)
    frame.loc[60:, ["a", "b", "c"]] = 12345
    after = load(replace(table, path=write(tmp_path, frame, "after.csv")), tmp_path / "after")
    assert before.info == after.info
    for step in range(len(before.train(8, 0))):
        for a, b in zip(
            leaves(before.train(8, 0)[step]), leaves(after.train(8, 0)[step]), strict=True
        ):
            assert (a == b).all()
    inputs, targets, *_ = every(before, "train")
    rows = np.arange(60.0)
    assert before.info.mean[0] == rows.mean() and before.info.std[0] == pytest.approx(rows.std())
    assert before.info.naive_scale[0] == pytest.approx(4 / rows.std())
    assert original(before, targets).max() <= 59**2 and original(before, inputs)[..., 0].max() == 56


def test_forecast_steps_are_not_in_the_inputs(table, tmp_path):
    """Whatever the forecast rows hold, the inputs and covariates stay the same."""
    dataset = load(table, tmp_path)
    first = next(dataset.evaluation("test", 1))
    frame = pd.read_csv(table.path)
    frame.loc[75:77, ["a", "b", "c"]] += 500
    changed = next(
        load(replace(table, path=write(tmp_path, frame, "x.csv")), tmp_path / "x").evaluation(
            "test", 1
        )
    )
    assert (first.targets != changed.targets).all()
    assert (first.inputs == changed.inputs).all()
    assert (first.covariates.future == changed.covariates.future).all()


def test_calendar_belongs_to_its_times(table, tmp_path):
    dataset = load(table, tmp_path)
    assert dataset.info.cycles == ("day",) and dataset.info.covariates == 2
    batch = dataset.train(8, 0)[1]
    whole = pd.date_range("2024-02-27", periods=100, freq="h")
    all_RK = calendar(whole, ("day", "week", "year"))
    for row, values in zip(
        batch.covariates.future, original(dataset, batch.inputs)[:, 0, 0], strict=True
    ):
        times = whole[values : values + 8]
        hour, weekday, day = times.hour, times.day_of_week, times.day_of_year
        turns = [
            hour / 24,
            (weekday + hour / 24) / 7,
            (day - 1 + hour / 24) / 366,
        ]  # 2024 is a leap year
        expected = [f(2 * np.pi * np.asarray(t)) for t in turns for f in (np.sin, np.cos)]
        np.testing.assert_allclose(row, np.stack(expected[:2], 1), atol=1e-6)
        np.testing.assert_allclose(all_RK[values : values + 8], np.stack(expected, 1), atol=1e-6)
    times = dataset.times("validation")
    assert times.shape == (13, 3) and times[0][0] == np.datetime64("2024-02-27") + np.timedelta64(
        60, "h"
    )
    assert times[1][2] == np.datetime64("2024-02-27") + np.timedelta64(63, "h")


@pytest.mark.parametrize(
    ("step", "rows", "name", "cycles"),
    [
        ("15min", 270, "15min", ()),
        ("15min", 280, "15min", ("day",)),  # 70 % of the rows are two days and more
        ("h", 500, "h", ("day", "week")),
        ("D", 40, "D", ("week",)),
        ("D", 1050, "D", ("week", "year")),
        ("B", 760, "B", ("week", "year")),
        ("W", 140, "W-SUN", ()),
        ("W", 160, "W-SUN", ("year",)),
        ("MS", 40, "MS", ("year",)),
        ("YS", 40, "YS-JAN", ()),
    ],
)
def test_frequencies(tmp_path, step, rows, name, cycles):
    """Only what comes round twice in the training rows is told of the calendar."""
    frame = pd.DataFrame(
        {"t": pd.date_range("2000-01-01", periods=rows, freq=step), "x": np.arange(float(rows))}
    )
    table = SeriesTable(path=write(tmp_path, frame), lookback=4, horizon=3, season=2)
    dataset = load(table, tmp_path)
    assert (dataset.info.frequency, dataset.info.cycles) == (name, cycles)
    batch, future = dataset.info.window(table.read(table.path))
    expected = pd.date_range(frame["t"].iloc[-1], periods=4, freq=step)[1:]
    assert future.tolist() == expected.tolist()
    assert (
        (batch.covariates.future is None)
        == (not cycles)
        == (next(dataset.evaluation("test", 1)).covariates.future is None)
    )
    assert (
        next(
            load(replace(table, calendar=False), tmp_path / "b").evaluation("test", 1)
        ).covariates.future
        is None
    )


def test_trading_days_and_uneven_times(tmp_path, caplog):
    days = pd.bdate_range("2024-01-01", periods=60).delete([7, 20, 33])  # holidays
    frame = pd.DataFrame({"day": days, "x": np.arange(57.0)})
    table = SeriesTable(path=write(tmp_path, frame), lookback=4, horizon=3, season=1)
    info = load(table, tmp_path).info
    _, future = info.window(table.read(table.path)[:55])
    assert info.frequency == "B" and future.day_of_week.tolist() == [3, 4, 0] and not warned(caplog)
    frame["day"] = [*pd.date_range("2024-01-01", periods=56, freq="D"), pd.Timestamp("2024-03-01")]
    uneven = replace(table, path=write(tmp_path, frame, "uneven.csv"))
    with pytest.raises(UserError, match=r"4 time stamps .* every day are missing, in 1 hole"):
        load(uneven, tmp_path / "holes")
    info = load(replace(uneven, missing="drop"), tmp_path / "uneven").info
    assert [str(day.date()) for day in info.window(frame)[1]] == [
        "2024-03-02",
        "2024-03-03",
        "2024-03-04",
    ]


def test_window_for_new_rows(table, tmp_path):
    dataset = load(replace(table, targets=("a",), inputs=("c",)), tmp_path)
    frame = table.read(table.path).sample(
        frac=1.0, axis=1, random_state=0
    )  # other order of columns
    batch, future = dataset.info.window(frame[:78])
    expected = list(dataset.evaluation("test", 1))[3]
    assert (batch.inputs == expected.inputs).all() and (
        batch.covariates.future == expected.covariates.future
    ).all()
    assert batch.targets.shape == (1, 3, 1) and (batch.weights == 0).all()
    assert (future == dataset.times("test")[3]).all()
    np.testing.assert_allclose(dataset.unscale(expected.targets), [[[78], [79], [80]]], rtol=1e-6)
    with pytest.raises(UserError, match="the input has 4 rows; the model looks back on 5"):
        dataset.info.window(frame[:4])
    with pytest.raises(UserError, match="the input has no column 'c'"):
        dataset.info.window(frame[["time", "a"]])
    with pytest.raises(
        UserError,
        match="row every 0 days 02:00:00; the model was trained on one every 0 days 01:00",
    ):
        dataset.info.window(frame[::2])


def test_sample_has_the_form_of_training(table, tmp_path):
    dataset = load(replace(table, targets=("a", "b"), inputs=("c",)), tmp_path)
    found, expected = leaves(dataset.info.sample(8)), leaves(dataset.train(8, 0)[0])
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in expected]
    assert (
        load(replace(table, calendar=False), tmp_path / "plain").info.sample(8).covariates.future
        is None
    )


def test_restore_and_absolute(table, tmp_path, monkeypatch):
    dataset = load(table, tmp_path)
    assert table.restore(tmp_path / "assets") == dataset.info
    frame = pd.read_csv(table.path)
    frame["a"] *= 3
    changed = load(replace(table, path=write(tmp_path, frame, "changed.csv")), tmp_path)
    assert changed.info == dataset.info  # the saved scaler, not a new one
    monkeypatch.chdir(tmp_path)
    relative = replace(table, path="series.csv")
    assert (
        relative.absolute().path == str(tmp_path / "series.csv")
        and relative.absolute().read(relative.path) is not None
    )
    assert SeriesTable(path="stocks").absolute() == SeriesTable(path="stocks")
    with pytest.raises(UserError, match=r"info\.json, the scaler of a series run"):
        table.restore(tmp_path / "nothing")


def test_kinds_of_file(table, tmp_path):
    expected = load(table, tmp_path)
    frame = pd.read_csv(table.path, parse_dates=["time"])
    frame.to_csv(tmp_path / "s.tsv", sep="\t", index=False)
    frame.astype({"time": str}).to_json(tmp_path / "s.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "s.parquet")
    frame.set_index("time").to_parquet(tmp_path / "indexed.parquet")
    (tmp_path / "s.csv.gz").write_bytes(gzip.compress((tmp_path / "series.csv").read_bytes()))
    for name in ("s.tsv", "s.jsonl", "s.parquet", "indexed.parquet", "s.csv.gz"):
        dataset = load(replace(table, path=str(tmp_path / name)), tmp_path / name.replace(".", "_"))
        assert dataset.info == expected.info
        assert (
            next(dataset.evaluation("test", 9)).targets
            == next(expected.evaluation("test", 9)).targets
        ).all()


@pytest.mark.parametrize(
    ("missing", "values", "rows"),
    [
        ("interpolate", {10: 10, 11: 11, 0: 2, 1: 2, 2: 2}, 100),
        ("forward_fill", {9: 9, 10: 9, 11: 9, 12: 12, 13: 13}, 100),
        ("drop", {10: 12, 11: 13, 12: 14}, 98),
    ],
)
def test_absent_values(table, tmp_path, caplog, missing, values, rows):
    frame = pd.read_csv(table.path).astype({"a": object})
    frame.loc[[10, 11], "a"] = ["", "NaN"]
    if missing == "interpolate":
        frame.loc[[0, 1], "a"] = ""
    broken = replace(table, path=write(tmp_path, frame, "gaps.csv"), targets=("a",))
    with pytest.raises(
        UserError, match=r"absent values, column 'a' in \d row\(s\): .*11, 12; choose data.missing"
    ):
        load(broken, tmp_path)
    caplog.set_level(logging.WARNING)
    dataset = load(replace(broken, missing=missing), tmp_path)
    assert f"data.missing: {missing}" in caplog.text
    inputs, *_ = every(dataset, "train")
    found = original(dataset, inputs[:, 0])
    assert {row: int(found[row, 0]) for row in values} == values
    assert len(dataset.buffer.times) == rows
    scored = sum(batch.weights.sum() for batch in dataset.evaluation("train", 8))
    invented = set() if missing == "drop" else {int(v) for v in frame.index[frame["a"] == ""]}
    invented |= {11} if missing != "drop" else set()
    firsts = range(5, 58)
    assert scored == sum(row not in invented for f in firsts for row in range(f, f + 3))


def test_a_gap_at_the_start_is_filled_from_the_first_value(tmp_path):
    path = write(tmp_path, hourly(30, a=[np.nan, *range(7, 36)]))
    table = SeriesTable(path=path, lookback=2, horizon=2, season=2, missing="forward_fill")
    dataset = load(table, tmp_path)
    assert original(dataset, dataset.batch("train", np.array([0])).inputs).ravel().tolist() == [
        7,
        7,
    ]


def test_constant_channel(tmp_path, caplog):
    path = write(tmp_path, hourly(30, a=np.arange(30), flat=[0.1] * 30))
    info = load(SeriesTable(path=path, lookback=2, horizon=2, season=2), tmp_path).info
    assert (
        info.std[1] == 1
        and info.naive_scale[1] == 1
        and "constant in the training split" in caplog.text
    )


def test_a_season_that_repeats_but_for_rounding_scales_nothing(tmp_path):
    path = write(tmp_path, hourly(48, a=1e3 + np.sin(np.arange(48) * np.pi / 3)))
    info = load(SeriesTable(path=path, lookback=2, horizon=2, season=6), tmp_path).info
    assert info.naive_scale == (1.0,)


def test_text_columns_are_left_out_aloud(tmp_path, caplog):
    path = write(tmp_path, hourly(30, a=np.arange(30), place=["x"] * 30))
    assert load(SeriesTable(path=path, lookback=2, horizon=2, season=2), tmp_path).info.targets == (
        "a",
    )
    assert "left out: place" in caplog.text


START = "time,a\n2024-01-01 00:00,1\n2024-01-01 01:00,2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("time,a\n", "has no rows"),
        (
            START + "2024-01-01 02:00,x7\n2024-01-01 03:00,4,5\n",
            r"line 5: 3 values under 2 column names",
        ),
        (START + "2024-01-01 02:00,x7\n", r"column 'a' holds what is no number: 'x7' \(row 3\)"),
        (START + "2024-01-01 02:00,1e999\n", "column 'a' is infinite in row 3"),
        (
            START + "2024-01-01 00:30,3\n",
            r"row 3 \(2024-01-01 00:30:00\) is earlier than the time of row 2",
        ),
        (
            START + "2024-01-01 01:00,3\n",
            r"row 3 \(2024-01-01 01:00:00\) repeats the time of row 2",
        ),
        (
            START + "02.01.2024,3\n",
            r"'02.01.2024' in row 3, no time in ISO 8601; write times as .*--data.time-column",
        ),
        (START + ",3\n", "'' in row 3, no time in ISO 8601"),
        ("n,a\n0,1\n2,2\n", "column 'n' holds '0' in row 1, no time"),
        ("n,a\n1717200000,1\n1717203600,2\n", "column 'n' holds '1717200000' in row 1, no time"),
        (
            "time,a\n2024-03-31T00:00+01:00,1\n2024-03-31T03:00+02:00,2\n",
            "data.split asks for 4 rows",  # offsets that differ are read in UTC
        ),
        (
            "time,a\n2024-01-01,x\n2024-01-02,y\n",
            "no numeric column to forecast besides 'time'; columns: time, a",
        ),
        ("time,\0a\n", "NUL byte in line 1"),
        (b"time,a\n2024-01-01,\xe9\n", "not UTF-8: byte 0xe9 in line 2"),
    ],
)
def test_errors_of_the_file(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = SeriesTable(path=str(path), lookback=1, horizon=1, season=1, split=(2, 1, 1))
    with pytest.raises(UserError, match=message):
        load(table, tmp_path)
    compressed = tmp_path / "bad.csv.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        load(replace(table, path=str(compressed)), tmp_path)
    assert "/tmp" not in str(error.value).replace(str(tmp_path), "")


def test_errors_of_the_path(tmp_path):
    def message(name: str) -> str:
        with pytest.raises(UserError) as error:
            load(SeriesTable(path=name), tmp_path)
        return str(error.value)

    assert "is a folder" in message(str(tmp_path))
    assert "does not exist, nor is it an embedded series (electricity, stocks)" in message(
        "electrisity"
    )
    (tmp_path / "a.xlsx").touch()
    assert "known extensions: .csv" in message(str(tmp_path / "a.xlsx"))
    (tmp_path / "a.csv.gz").write_bytes(b"time,a\n")
    assert "as gzip" in message(str(tmp_path / "a.csv.gz"))
    (tmp_path / "a.parquet").write_bytes(b"PAR")
    assert "as Parquet" in message(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("aa",)}, "has no column 'aa'. Did you mean a\\? Columns: time, a, b, c"),
        ({"inputs": ("d",)}, "has no column 'd'"),
        ({"time_column": "date"}, "has no column 'date'"),
        ({"targets": ("a", "a")}, "named twice"),
        ({"targets": ("a",), "inputs": ("time",)}, "named twice"),
        ({"time_column": "c"}, "column 'c' holds"),
        (
            {"lookback": 58},
            r"training split .* has 60 rows, too few for data.lookback 58 \+ "
            r"data.horizon 3 = 61; .* 60",
        ),
        (
            {"horizon": 16},
            "validation split .* has 15 rows, too few for data.horizon 16; the longest that fits "
            "is 15",
        ),
        ({"split": (60.0, 20.0, 30.0)}, "asks for 110 rows; .* has 100"),
        ({"season": 60}, "data.season 60: must be below the 60 rows"),
    ],
)
def test_errors_of_the_settings(table, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(replace(table, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lookback": -1}, "data.lookback -1: must be at least 1 and at most"),
        ({"horizon": -1}, "data.horizon -1"),
        ({"season": -1}, "data.season -1"),
        ({"split": (0.7, 0.2, 0.2)}, "shares that sum to at most 1"),
        ({"split": (0.7, 0.3, 0.0)}, "all three must be positive"),
        ({"split": (100.5, 10, 10)}, "whole numbers of rows"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        SeriesTable(**changes)


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("electricity", 26_304, 1), ("stocks", 3_270, 3)]
)
def test_embedded_series(tmp_path, caplog, name, rows, columns):
    dataset = SeriesTable(path=name, season=1).load(tmp_path)
    assert (
        len(dataset.buffer.times) == rows
        and len(dataset.info.targets) == columns
        and not warned(caplog)
    )
    assert (
        np.isfinite(dataset.buffer.values_RD).all()
        and dataset.info.frequency == {1: "h", 3: "B"}[columns]
    )
    assert embedded() == ["electricity", "stocks"]
    assert f"## {name}.csv.gz" in (EMBEDDED / "SOURCES.md").read_text()


@pytest.mark.parametrize("module", ["series", "timetable", "order", "synthetic"])
def test_data_does_not_import_jax(module):
    source = Path(series_module.__file__).with_name(f"{module}.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }
    assert "numpy" in imported and not imported & {"jax", "flax", "optax"}


def test_holidays_are_known_in_advance(tmp_path):
    pytest.importorskip("holidays")
    times = pd.date_range("2023-11-01", periods=120, freq="D")
    frame = pd.DataFrame({"time": times, "y": np.arange(120.0) % 7})
    frame.to_csv(tmp_path / "days.csv", index=False)
    settings = {"lookback": 14, "horizon": 7, "season": 7, "calendar": False}
    table = SeriesTable(path=str(tmp_path / "days.csv"), holidays="DE", **settings)
    dataset = table.load(tmp_path / "assets")
    assert dataset.info.covariates == 1
    marked = times[dataset.buffer.calendar_UK[:, 0] > 0]
    assert [str(day.date()) for day in marked] == ["2023-12-25", "2023-12-26", "2024-01-01"]
    # Those of the days to forecast are known as well.
    ahead = dataset.info.ahead(frame[times < "2023-12-20"])
    known = ahead.batch("test", np.array([0])).covariates.future[0, -7:, 0]
    assert known.tolist() == [0, 0, 0, 0, 0, 1, 1]  # 20 to 26 December
    bavaria = replace(table, holidays="DE-BY").load(tmp_path / "bavaria")
    marked = times[bavaria.buffer.calendar_UK[:, 0] > 0]
    assert {"2023-11-01", "2024-01-06"} <= {str(day.date()) for day in marked}


def test_a_country_that_is_none_is_said(tmp_path):
    pytest.importorskip("holidays")
    hours = pd.DataFrame({"t": pd.date_range("2024-01-01", periods=200, freq="h"), "y": 1.0})
    hours.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match=r"data\.holidays XX: no such country; known: .*DE"):
        SeriesTable(path=str(tmp_path / "t.csv"), holidays="XX").load(tmp_path / "assets")
    with pytest.raises(UserError, match=r"data\.holidays DE-XX: no such part of DE; known: .*BY"):
        SeriesTable(path=str(tmp_path / "t.csv"), holidays="DE-XX").load(tmp_path / "other")


def test_a_season_is_what_changes_repeat_by_the_autocorrelation_of_pandas(monkeypatch):
    rng = np.random.default_rng(0)
    series = [np.cumsum(rng.normal(size=n)) + 2 * np.sin(np.arange(n)) for n in (200, 350)]
    series[0][50] = np.nan
    found = [pd.Series(np.diff(x)).autocorr(7) for x in series]
    pairs = [200 - 1 - 7 - 4, 350 - 1 - 7]  # two changes are not known, each in two pairs
    for off, expected in ((-0.02, True), (0.02, False)):
        share = float(np.average(found, weights=pairs)) + off
        monkeypatch.setattr(series_module, "REPEATS", share)
        assert series_module.repeats([x[:, None] for x in series], 7) is expected


@pytest.mark.parametrize(("strength", "season"), [(0.0, 1), (2.0, 7)])
def test_the_season_of_a_frequency_is_taken_only_where_it_repeats(tmp_path, strength, season):
    rng, rows = np.random.default_rng(0), 400
    days = pd.date_range("2024-01-01", periods=rows, freq="D")
    level = np.cumsum(rng.normal(size=rows))
    frame = pd.DataFrame({"time": days, "y": level + strength * (np.arange(rows) % 7 > 4)})
    frame.to_csv(tmp_path / "days.csv", index=False)
    table = SeriesTable(path=str(tmp_path / "days.csv"))
    assert table.load(tmp_path / "found").info.season == season
    assert replace(table, season=7).load(tmp_path / "given").info.season == 7


@pytest.mark.parametrize("values", [[3.0] * 50, [np.nan] * 50, [1.0], []])
def test_where_no_change_is_known_the_natural_season_stays(values):
    assert series_module.repeats([np.array(values)[:, None]], 7)


STEPS = np.arange(1, 161)


@pytest.mark.parametrize("panel", [False, True])
def test_steps_that_are_counted_are_as_good_as_times(tmp_path, panel):
    """Whole numbers and the season give the windows that hours do, without a calendar; what is
    forecast is told in whole numbers."""
    values = np.sin(STEPS * np.pi / 6) + 0.01 * STEPS
    hours = pd.date_range("2024-01-01", periods=len(STEPS), freq="h")
    found = []
    for name, times in (("counts", STEPS), ("hours", hours)):
        frame = pd.DataFrame({"ds": times, "y": values})
        common = {"season": 12, "lookback": 24, "horizon": 6, "calendar": name == "counts"}
        settings = SeriesTable(**common)
        if panel:
            frame, settings = frame.assign(unique_id="a"), PanelTable(**common)
        settings = settings.holding(frame)
        dataset = settings.load(tmp_path / name)
        assert settings.restore(tmp_path / name) == dataset.info
        found.append((dataset, frame))
    (counted, frame), (timed, _) = found
    for split in ("train", "validation", "test"):
        assert counted.size(split) == timed.size(split)
        ends = np.array([0, counted.size(split) - 1])
        one, other = (x.batch(split, ends) for x in (counted, timed))
        np.testing.assert_array_equal(one.inputs, other.inputs)
        phase = one.covariates.phase - other.covariates.phase
        assert len(set(phase % 12)) == 1 and one.covariates.future is None
    task = Forecasting()
    forward = lambda batch: batch.targets[..., None] + 1.0  # noqa: E731
    predicted = task.forecast(frame, counted.info, forward, 8)
    assert predicted["time"].tolist() == [161, 162, 163, 164, 165, 166]
    earlier = task.forecast(frame, counted.info, forward, 8, cutoffs=["100"])
    assert earlier["cutoff"].tolist() == [100] * 6 and earlier["time"].tolist()[0] == 101
    with pytest.raises(UserError, match="--cutoffs 0: the input begins at 1;"):
        task.forecast(frame, counted.info, forward, 8, cutoffs=["0"])
    with pytest.raises(UserError, match="'ds' counts steps, and holds 'soon' in row 1"):
        task.forecast(frame, counted.info, forward, 8, cutoffs=["soon"])


def test_which_whole_numbers_count_steps(tmp_path):
    number = itertools.count()

    def load(times, **settings):
        frame = pd.DataFrame({"ds": times, "y": np.sin(np.arange(len(times)))})
        return SeriesTable(**settings).holding(frame).load(tmp_path / f"{next(number)}")

    info = load(STEPS, season=1).info
    assert (info.counted, info.frequency, info.lookback, info.horizon) == (True, "step", 48, 16)
    assert load([str(n) for n in STEPS], season=7).info.season == 7
    years = load(1850 + STEPS, season=1).info  # as ever
    assert not years.counted and years.frequency.startswith("Y")
    holes = np.delete(STEPS, [40, 41])
    with pytest.raises(UserError, match=r"2 time stamps .* every step .*2 long after 40 "):
        load(holes, season=1)
    assert load(holes, season=1, missing="mask").buffer.times.size == len(STEPS)
    for times, settings, said in (
        (STEPS, {}, "count steps .* --data.season 24, or 1 for none"),
        (STEPS**2, {"season": 1}, "no time in ISO 8601"),
        (STEPS, {"season": 1, "holidays": "DE"}, "data.holidays says nothing: it needs dates"),
        (STEPS, {"season": 1, "time_zone": "UTC"}, "data.time-zone says nothing"),
    ):
        with pytest.raises(UserError, match=said):
            load(times, **settings)
