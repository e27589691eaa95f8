# SPDX-License-Identifier: Apache-2.0
"""Many series in one table: windows, scales, what is known besides, and what is refused."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flax_lstm.data import PanelTable, SeriesTable
from flax_lstm.data.series import SeriesDataset
from flax_lstm.errors import UserError

LENGTHS = {"b": 40, "a": 55, "c": 31}


def panel(lengths: dict[str, int] = LENGTHS, **columns: object) -> pd.DataFrame:
    """Daily series of different lengths that end on the same day; a value names its series (the
    hundreds) and its row."""
    parts = [
        pd.DataFrame(
            {
                "unique_id": name,
                "ds": pd.date_range(end="2024-06-30", periods=rows, freq="D"),
                "y": 1000.0 * (n + 1) + np.arange(rows) ** 2,
                "shop": f"shop {n % 2}",
                "size": float(n),
                "price": np.arange(rows) % 5 + n,
            }
        )
        for n, (name, rows) in enumerate(lengths.items())
    ]
    return pd.concat(parts, ignore_index=True).assign(**columns)


def table(folder: Path, frame: pd.DataFrame, **settings: object) -> PanelTable:
    path = folder / "panel.parquet"
    frame.to_parquet(path, index=False)
    sizes = {"lookback": 8, "horizon": 3, "season": 7, "validation": 3, "calendar": False}
    return PanelTable(path=str(path), **(sizes | settings))


def load(folder: Path, frame: pd.DataFrame, **settings: object) -> SeriesDataset:
    return table(folder, frame, **settings).load(folder / "assets")


def values(dataset: SeriesDataset, split: str, part: str) -> np.ndarray:
    """Inputs or targets of all windows of a split in the units of the file."""
    windows = np.arange(dataset.size(split))
    return dataset.unscale(getattr(dataset.batch(split, windows), part), dataset.series(split))


def test_windows_by_hand(tmp_path):
    frame = panel()
    dataset = load(tmp_path, frame.sample(frac=1, random_state=0), test=4)  # rows in any order
    ids = [str(name) for name in dataset.buffer.ids]
    assert sorted(ids) == ["a", "b", "c"]
    for split in ("train", "validation", "test"):
        expected = []
        for name in ids:
            y = frame.loc[frame.unique_id == name, "y"].to_numpy()
            train, validation = len(y) - 7, len(y) - 4
            firsts = {
                "train": range(8, train - 2),
                "validation": range(train, validation - 2),
                "test": range(validation, len(y) - 2),
            }[split]
            expected += [np.concatenate([y[f - 8 : f], y[f : f + 3]]) for f in firsts]
        assert dataset.size(split) == len(expected)
        found = np.concatenate(
            [values(dataset, split, "inputs"), values(dataset, split, "targets")], axis=1
        )
        np.testing.assert_allclose(found[..., 0], expected, rtol=1e-5)
    assert dataset.observed("test") == 3 * 2 * 3


def test_each_series_is_measured_by_its_own_seasonal_error(tmp_path):
    frame = panel()
    dataset = load(tmp_path, frame)
    for n, name in enumerate(dataset.buffer.ids):
        y = frame.loc[frame.unique_id == name, "y"].to_numpy()
        train, before_test = y[:-6], y[:-3]
        unit = np.abs(train[7:] - train[:-7]).mean()
        assert dataset.scale.std_PD[n, 0] == pytest.approx(unit)
        # MASE's denominator reaches up to the test.
        judged = np.abs(before_test[7:] - before_test[:-7]).mean()
        assert dataset.buffer.units_P4C["test"][n, 2, 0] == pytest.approx(judged / unit, rel=1e-5)
        assert dataset.buffer.units_P4C["validation"][n, 2, 0] == pytest.approx(1)


def test_what_follows_changes_nothing_in_training(tmp_path):
    frame = panel()
    changed = frame.copy()
    last = changed.groupby("unique_id").cumcount(ascending=False) < 6
    changed.loc[last, "y"] += 1e4
    (tmp_path / "b").mkdir()
    before, after = load(tmp_path, frame), load(tmp_path / "b", changed)
    for one, other in zip(before.train(16, 0)[1][:4], after.train(16, 0)[1][:4], strict=True):
        assert (one == other).all()


def test_short_series_are_padded_told_and_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    lengths = {"long": 40, "short": 16, "shorter": 8, "tiny": 3}
    dataset = load(tmp_path, panel(lengths), season=2)
    assert "no more rows than the horizon of 3 are left out: tiny" in caplog.text
    assert "too short to train on and only forecast: shorter" in caplog.text
    assert dataset.info.masked and list(dataset.buffer.ids) == ["long", "short", "shorter"]
    counts = np.bincount(dataset.series("train"), minlength=3)
    # `short` has 10 rows to train on: windows from 3 rows of look-back on instead of 8.
    assert counts.tolist() == [34 - 8 - 3 + 1, 10 - 3 - 3 + 1, 0]
    batch = dataset.batch("test", np.array([2]))
    assert batch.covariates.observed[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert len(np.unique(batch.inputs[0, :4, 0])) == 1 and batch.weights.all()


def test_what_is_known_comes_with_its_window(tmp_path):
    frame = panel()
    dataset = load(tmp_path, frame, static=("shop", "size"), future=("price",), inputs=())
    info = dataset.info
    assert info.categories == (3,) and info.covariates == 1
    windows = np.arange(dataset.size("test"))
    batch, names = dataset.batch("test", windows), dataset.buffer.ids[dataset.series("test")]
    column = info.future[0]
    for row, name in enumerate(names):
        own = frame[frame.unique_id == name]
        expected = (own["price"].to_numpy()[-11:] - column.mean) / column.std
        np.testing.assert_allclose(batch.covariates.future[row, :, 0], expected, rtol=1e-5)
        assert batch.covariates.codes[row, 0] == 1 + int(own["shop"].iloc[0][-1])
    sizes = batch.covariates.static[:, 0] * info.static[1].std + info.static[1].mean
    own_sizes = [frame.loc[frame.unique_id == name, "size"].iloc[0] for name in names]
    np.testing.assert_allclose(sizes, own_sizes, atol=1e-6)
    with pytest.raises(UserError, match=r"'price' of data.static changes within the series"):
        table(tmp_path, frame, static=("price",)).load(tmp_path / "other")


def test_new_series_are_forecast_from_their_own_past(tmp_path):
    dataset = load(tmp_path, panel(), future=("price",))
    new = panel({"new": 20, "other": 30})
    new.loc[new.groupby("unique_id").cumcount(ascending=False) < 3, "y"] = np.nan
    ahead = dataset.info.ahead(new)
    assert list(ahead.buffer.ids) == ["new", "other"] and ahead.size("test") == 2
    last = ahead.times("test")[:, -1].astype("M8[D]")
    assert (last == np.datetime64("2024-06-30")).all()
    inputs = values(ahead, "test", "inputs")[..., 0]
    own = new.loc[new.unique_id == "other", "y"].to_numpy()
    np.testing.assert_allclose(inputs[1], own[-11:-3], rtol=1e-5)
    with pytest.raises(UserError, match=r"a forecast needs 3 more rows, .*: price"):
        dataset.info.ahead(panel({"new": 20}))
    late = new.drop(index=new.index[-3])  # two of the three days to come
    late = pd.concat([late, late[-1:].assign(ds=pd.Timestamp("2024-07-01"))])
    message = "'other' of the input has no value at 2024-06-28 .* in advance: price; a forecast"
    for table_ in (late, new.assign(price=new["price"].where(new.index != new.index[-3]))):
        with pytest.raises(UserError, match=message):
            dataset.info.ahead(table_)
    with pytest.raises(UserError, match=r"'new' .* has 3 rows; .* leave it out, or train with"):
        dataset.info.ahead(new[new.unique_id == "new"][-6:])


def test_a_category_that_training_never_had_is_said(tmp_path, caplog):
    dataset = load(tmp_path, panel(), static=("shop",))
    ahead = dataset.info.ahead(panel().assign(shop="elsewhere"))
    assert "column 'shop' holds what was not there in training" in caplog.text
    assert "elsewhere" in caplog.text
    assert (ahead.batch("test", np.array([0])).covariates.codes == 0).all()


@pytest.mark.parametrize("missing", ["interpolate", "forward_fill", "mask"])
def test_a_look_back_that_ends_in_a_hole_knows_nothing_of_what_follows(tmp_path, missing):
    """It is the one that `predict` sees, of a table that ends there."""
    frame = panel({"b": 60}).assign(price=np.arange(60.0) ** 1.5)
    frame.loc[48:54, "y"], frame.loc[50:57, "price"] = np.nan, np.nan
    dataset = load(tmp_path, frame, missing=missing, inputs=("price",), test=20)
    whole = dataset.batch("test", np.arange(dataset.size("test")))
    for window, first in enumerate(dataset.first_rows("test")):
        ahead = dataset.info.ahead(frame[:first])
        expected = ahead.unscale(ahead.batch("test", np.array([0])).inputs[..., :1])
        found = dataset.unscale(whole.inputs[window, :, :1])
        np.testing.assert_allclose(found, expected[0], rtol=1e-5)


def test_pictures_show_what_was_measured_alone(tmp_path):
    frame = panel()
    series, hole = frame["unique_id"] == "c", frame.index[frame["unique_id"] == "c"][-5]
    frame.loc[hole, "y"] = np.nan
    dataset = load(tmp_path, frame, missing="interpolate")
    last = np.flatnonzero(dataset.buffer.ids[dataset.series("test")] == "c")[-1:]
    expected = frame.loc[series, "y"].to_numpy()[-9:]
    np.testing.assert_allclose(dataset.around("test", last, 6)[0, :, 0], expected, rtol=1e-5)
    assert np.isnan(dataset.around("test", last, 100)[0, 0, 0])  # before the series begins


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: pd.concat([f, f[:1]]), "both of series 'b' at 2024-05-22"),
        (lambda f: f.drop(columns="unique_id"), "no column 'unique_id'"),
        (lambda f: f.assign(unique_id=None), "column 'unique_id' is empty in row 1"),
        (lambda f: f.drop(index=[10, 11]), "series 'b': 2 time stamps .* the longest 2 long"),
        (lambda f: f.assign(y=np.where(f.index == 5, np.nan, f.y)), "series 'b': absent values"),
        (lambda f: f.assign(y=np.where(f.index == 5, 1e308, f.y)), r"1e\+308 in row 6: too large"),
        (lambda f: f.assign(y=f.y * 1e-200), "varies by .* only; write it in a smaller unit"),
        (
            lambda f: f[f.groupby("unique_id").cumcount() < 3],
            "no series is longer than the horizon",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, change(panel()))


def test_a_panel_that_is_not_declared_is_answered_with_how(tmp_path):
    path = tmp_path / "long.csv"
    panel().to_csv(path, index=False)
    series = SeriesTable(path=str(path), time_column="ds", targets=("y",))
    with pytest.raises(UserError, match=r"'unique_id' tells many series apart. .*panel_table"):
        series.load(tmp_path / "assets")
    frame = panel().rename(columns={"unique_id": "shop number", "ds": "day", "y": "sales"})
    frame[["shop number", "day", "sales"]].to_csv(path, index=False)
    message = (
        r"holds no times, and those of 'day' repeat: .* --config panel_table --data.id-column shop "
        r"number --data.time-column day --data.targets sales; for one series name"
    )
    with pytest.raises(UserError, match=message):
        SeriesTable(path=str(path)).load(tmp_path / "assets")
    wide = panel().pivot(index="ds", columns="unique_id", values="y").reset_index()
    with pytest.raises(UserError, match="a column for each series is for --config series_table"):
        load(tmp_path, wide)


def test_a_hole_in_one_series_is_masked_and_never_scored(tmp_path, caplog):
    frame = panel().drop(index=range(25, 30))  # of b
    dataset = load(tmp_path, frame, missing="mask")
    assert "1 series with missing values, such as 'b': 5 time stamps" in caplog.text
    b = int(np.flatnonzero(dataset.buffer.ids == "b")[0])
    rows = slice(dataset.buffer.begins[b], dataset.buffer.begins[b + 1])
    assert np.flatnonzero(~dataset.buffer.observed_RC[rows, 0]).tolist() == list(range(25, 30))
    for batch in dataset.evaluation("train", 16):
        assert (batch.weights <= 1).all() and batch.covariates.observed.shape == (16, 8, 1)
    assert dataset.observed("train") < 3 * dataset.size("train")


def test_constant_series_scale_nothing(tmp_path):
    frame = panel()
    frame.loc[frame.unique_id == "a", "y"] = 7.0
    dataset = load(tmp_path, frame)
    a = int(np.flatnonzero(dataset.buffer.ids == "a")[0])
    assert dataset.scale.std_PD[a, 0] == 1 and np.isfinite(dataset.buffer.values_RD).all()


def test_settings_that_make_no_sense():
    for settings in ({"lookback": -1}, {"test": 2, "horizon": 3}, {"id_column": ""}):
        with pytest.raises(UserError, match=r"data\."):
            PanelTable(**settings)
    assert replace(PanelTable(), path="x.csv").absolute().path == str(Path("x.csv").absolute())


def test_a_last_run_can_train_on_what_validated(tmp_path):
    frame = panel()
    (tmp_path / "all").mkdir()
    apart, whole = load(tmp_path, frame), load(tmp_path / "all", frame, train_on_validation=True)
    assert whole.size("train") == apart.size("train") + 3 * 3  # three more steps of three series
    last = values(whole, "train", "targets").reshape(-1, 3)
    for name in LENGTHS:
        y = frame.loc[frame.unique_id == name, "y"].to_numpy()
        assert np.isclose(last, y[-6:-3], rtol=1e-5).all(axis=1).any()
        assert not np.isclose(last[:, -1], y[-3], rtol=1e-5).any()
    assert whole.size("test") == apart.size("test") and whole.size("validation") == 3


@pytest.mark.parametrize(
    ("frequency", "rows", "expected"),
    [
        ("MS", 60, (12, 24, 7)),
        ("MS", 90, (12, 28, 11)),
        ("W", 225, (52, 104, 13)),
        ("D", 300, (7, 56, 7)),
    ],
)
def test_a_look_back_holds_two_seasons_where_the_rows_allow_it(tmp_path, frequency, rows, expected):
    times = pd.date_range("2000-01-01", periods=rows, freq=frequency)
    wave = np.sin(np.arange(rows) * 2 * np.pi / expected[0])
    frame = pd.DataFrame({"unique_id": "a", "ds": times, "y": wave})
    sizes = {"lookback": 0, "horizon": 0, "season": 0, "validation": 0}
    info = load(tmp_path, frame, **sizes).info
    assert (info.season, info.lookback, info.horizon) == expected


@pytest.mark.parametrize(("rows", "steps"), [(800, 88), (240, 30), (40, 5), (20, 3)])
def test_few_series_are_validated_on_many_origins(tmp_path, rows, steps):
    """2 + 256 / 3 steps, but no more than an eighth of the rows, and a horizon at least."""
    dataset = load(tmp_path, panel(dict.fromkeys("abc", rows)), validation=0)
    assert dataset.size("validation") == 3 * (steps - 3 + 1)
    assert dataset.size("test") == 3


def test_a_short_series_among_long_ones_trains_and_has_a_scale_of_its_own(tmp_path, caplog):
    """Validation takes no more of it than an eighth. One that is too short for that has the scale
    of all that was before its test."""
    frame = panel({"a": 800, "b": 800, "c": 60, "d": 8})
    dataset = load(tmp_path, frame, validation=0)
    sizes = {
        split: np.bincount(dataset.series(split), minlength=4).tolist()
        for split in ("train", "validation", "test")
    }
    # 430 rows are the median, 7 an eighth of 60, 3 a horizon.
    assert sizes["validation"] == [51, 51, 5, 1] and sizes["test"] == [1] * 4
    assert sizes["train"][2] == 60 - 3 - 7 - 8 - 3 + 1 and sizes["train"][3] == 0
    assert "1 series are too short to train on and only forecast: d" in caplog.text
    # The seasonal error of squares over 50 rows; the deviation of the first five, none of a week.
    assert dataset.scale.std_PD[2, 0] == pytest.approx(14 * 21 + 49)
    assert dataset.scale.std_PD[3, 0] == pytest.approx(np.std(np.arange(5) ** 2))
