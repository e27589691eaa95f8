# SPDX-License-Identifier: Apache-2.0
"""Tables that could end in NaN, zeros or nonsense: each is read right, or refused with a reason."""

import numpy as np
import pandas as pd
import pytest

from flax_lstm.data import PanelTable, SeriesTable
from flax_lstm.data.grid import Frequency
from flax_lstm.errors import UserError
from flax_lstm.tasks.forecasting import Forecasting

ROWS = 400
HOURS = pd.date_range("2024-03-01", periods=ROWS, freq="h")
WAVE = 5 + np.sin(np.arange(ROWS) * np.pi / 12)


def hourly(values: object = WAVE, times: object = HOURS) -> pd.DataFrame:
    return pd.DataFrame({"t": times, "x": values})


def at(row: int, value: object) -> np.ndarray:
    values = WAVE.astype(object)
    values[row] = value
    return values


LOCAL = pd.date_range("2024-10-20", periods=ROWS, freq="h", tz="Europe/Berlin").tz_localize(None)
SPRING = pd.date_range("2024-03-20", periods=ROWS, freq="h", tz="Europe/Berlin")
SUMMER = pd.date_range("2024-03-20", periods=ROWS, freq="h")  # 2:30 on 31 March was nowhere
MONTHS = pd.date_range("1990-01-31", periods=ROWS, freq="ME")
WORKDAYS = pd.bdate_range("2015-01-01", periods=ROWS + 10)
UNEVEN = HOURS[0] + pd.to_timedelta(np.sort(np.random.default_rng(0).uniform(0, ROWS, ROWS)), "h")
SOME = np.random.default_rng(0).random(ROWS) < 0.51

REFUSED = {
    "1e308": (hourly(at(3, 1e308)), {}, r"1e\+308 in row 4: too large"),
    "minus 1e200": (hourly(at(3, -1e200)), {}, "too large"),
    "a spread of 1e-200": (hourly(WAVE * 1e-200), {}, "write it in a smaller unit"),
    "a missing hour": (hourly().drop(index=9), {}, "1 time stamps .* in 1 hole"),
    "90 missing hours": (hourly().drop(index=range(9, 99)), {}, "the longest 90 long"),
    "a row off the grid": (
        hourly(times=HOURS.where(HOURS[50] != HOURS, HOURS[50] + pd.Timedelta("7min"))),
        {},
        "uneven times: 1 of 400 rows lie off the grid",
    ),
    "clocks going back": (hourly(times=LOCAL), {}, "--data.time-zone"),
    "a zone that is none": (hourly(), {"time_zone": "Mars/Olympus"}, "no local times of"),
    "51 % missing": (hourly(np.where(SOME, np.nan, WAVE)), {}, "absent values, column 'x' in"),
    "a number with a comma": (hourly(at(3, "5,1")), {}, "holds what is no number"),
    "one row": (hourly()[:1], {}, "."),
    "ten rows": (hourly()[:10], {"lookback": 24}, "too few for data.lookback 24"),
    "an hour that was not": (hourly(times=SUMMER), {"time_zone": "Europe/Berlin"}, "nonexistent"),
    "times with and without a zone": (
        hourly(times=[f"{t}{'Z' if n % 2 else ''}" for n, t in enumerate(HOURS)]),
        {},
        "mixes times with and without a zone",
    ),
    "a row without time": (
        hourly(times=HOURS.astype(str).where(HOURS[5] != HOURS, "")),
        {},
        "row 6",
    ),
    "numbers for times": (
        hourly(times=1_700_000_000 + np.arange(ROWS)),
        {},
        "no time in ISO 8601; whole numbers are no times. Where they count steps .* unit='s'",
    ),
    "a time that is none, before what could be years": (
        hourly(1900 + np.arange(ROWS) % 50, HOURS.astype(str).where(HOURS[3] != HOURS, "soon")),
        {},
        "column 't' holds 'soon' in row 4, no time in ISO 8601; write times as",
    ),
    "times of long ago": (hourly(times=1000 + np.arange(ROWS)), {}, "column 't' has a time before"),
    "the hour that clocks skip": (
        hourly(times=SPRING.tz_localize(None)),
        {},
        r"1 time stamps .* after 2024-03-31 01:00:00 .* --data.time-zone Europe/Berlin; else",
    ),
    "the latest first": (hourly()[::-1], {}, "one row per time is needed, sorted$"),
    "times at random": (hourly(times=UNEVEN), {}, "uneven times"),
    "a month's end missing": (
        hourly(times=MONTHS).drop(index=50),
        {},
        "one row every ME are missing",
    ),
    "the middle of months": (
        hourly(times=MONTHS + pd.Timedelta(days=14)),
        {},
        "a row on day 14 of every month: write",
    ),
    "29 February missing": (
        hourly(times=pd.date_range("2023-12-01", periods=ROWS + 1).delete(90)),
        {},
        "1 time stamps .* after 2024-02-28",
    ),
    "two weeks without business": (
        hourly(times=WORKDAYS.delete(range(50, 60))),
        {},
        "10 time stamps .* one row every business day",
    ),
    "another frequency from the middle on": (
        hourly(times=[*HOURS[:200], *pd.date_range(HOURS[200], periods=200, freq="2h")]),
        {},
        "199 time stamps",
    ),
    "no row": (hourly()[:0], {}, "no rows"),
    "nothing measured": (hourly(np.full(ROWS, np.nan)), {"missing": "mask"}, "no numeric column"),
    "nothing measured to train on": (
        hourly(np.where(np.arange(ROWS) < 290, np.nan, WAVE)),
        {"missing": "mask"},
        "no value in the training split: x",
    ),
    "nothing measured to test on": (
        hourly(np.where(np.arange(ROWS) > 300, np.nan, WAVE)),
        {"missing": "mask"},
        "the test split of .* has no target that was measured",
    ),
    "a plan with a hole": (
        hourly().assign(plan=at(7, np.nan)),
        {"targets": ("x",), "future": ("plan",)},
        "no value at 2024-03-01 07:00",
    ),
    "a target that is a plan": (hourly(), {"targets": ("x",), "future": ("x",)}, "named twice"),
    "the same hour twice": (pd.concat([hourly()[:9], hourly()[8:]]), {}, "repeats the time of"),
}

READ = {
    "a constant": (hourly(np.full(ROWS, 7.0)), {}),
    "tiny numbers": (hourly(WAVE * 1e-30), {}),
    "large numbers": (hourly(WAVE * 1e30), {}),
    "a large level": (hourly(WAVE + 1e12), {}),
    "51 % missing, masked": (hourly(np.where(SOME, np.nan, WAVE)), {"missing": "mask"}),
    "51 % missing, filled": (hourly(np.where(SOME, np.nan, WAVE)), {"missing": "interpolate"}),
    "clocks going back, in their zone": (hourly(times=LOCAL), {"time_zone": "Europe/Berlin"}),
    "clocks going forward, with offsets": (hourly(times=SPRING.map(lambda t: t.isoformat())), {}),
    "month ends": (hourly(times=pd.date_range("1990-01-31", periods=ROWS, freq="ME")), {}),
    "weeks": (hourly(times=pd.date_range("1990-01-07", periods=ROWS, freq="W")), {}),
    "quarters": (hourly(times=pd.date_range("1950-01-01", periods=ROWS, freq="QS")), {}),
    "every 15 minutes": (
        hourly(times=pd.date_range("2024-01-01", periods=ROWS, freq="15min")),
        {"season": 4, "lookback": 16, "horizon": 4},
    ),
    "holidays of business days": (
        hourly(times=WORKDAYS.delete([*range(50, 55), *range(90, 95)])),
        {},
    ),
    "a leap day": (hourly(times=pd.date_range("2023-12-01", periods=ROWS)), {}),
    "every 250 milliseconds": (hourly(times=pd.date_range("2024", periods=ROWS, freq="250ms")), {}),
    "more hours missing than there": (
        hourly()[SOME | (np.arange(ROWS) < 60)].reset_index(drop=True),
        {"missing": "mask"},
    ),
    "a missing hour, dropped": (hourly().drop(index=9), {"missing": "drop"}),
}


def load(tmp_path, frame, settings):
    frame.to_csv(tmp_path / "t.csv", index=False)
    return SeriesTable(path=str(tmp_path / "t.csv"), **settings).load(tmp_path / "assets")


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_a_reason(tmp_path, name):
    frame, settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        load(tmp_path, frame, settings)


@pytest.mark.parametrize("name", READ)
def test_is_read_right(tmp_path, name):
    frame, settings = READ[name]
    dataset = load(tmp_path, frame, settings)
    info, buffer = dataset.info, dataset.buffer
    assert np.isfinite(buffer.values_RD).all() and np.isfinite(buffer.units_P4C["test"]).all()
    assert min(info.std) > 0 and min(info.naive_scale) > 0
    rows = buffer.position_U[1:] - buffer.position_U[:-1]
    if settings.get("missing") != "drop" and "holidays" not in name:
        assert (rows == 1).all()  # a grid without holes, whatever the clocks did
    known = buffer.observed_RC[:, 0]
    back = dataset.unscale(buffer.values_RD)[known, 0]
    written = pd.to_numeric(frame["x"], errors="coerce").dropna().to_numpy()
    np.testing.assert_allclose(back, written, rtol=1e-5)
    batch = next(dataset.evaluation("test", 8))
    assert all(np.isfinite(x).all() for x in (batch.inputs, batch.targets, batch.units))


DAYS = 60


def panel(starts: tuple[str, ...] = ("2024-01-01",) * 3, freq: str = "D") -> pd.DataFrame:
    """Series of 60 steps and very different scales."""
    parts = []
    for n, start in enumerate(starts):
        noise = np.random.default_rng(n).normal(0, 0.1, DAYS)
        values = 10.0**n * (5 + np.sin(np.arange(DAYS) * 2 * np.pi / 7) + noise)
        times = pd.date_range(start, periods=DAYS, freq=freq)
        parts.append(pd.DataFrame({"unique_id": f"s{n}", "ds": times, "y": values}))
    return pd.concat(parts, ignore_index=True)


PLAIN = panel()
STEP, SECOND = PLAIN.groupby("unique_id").cumcount(), PLAIN["unique_id"] == "s1"
KEPT = np.random.default_rng(1).random(len(PLAIN)) < 0.49

REFUSED_PANELS = {
    "a day twice": (pd.concat([PLAIN, PLAIN[:1]]), {}, "rows 1 and 181 are both of series 's0'"),
    "one row each": (PLAIN[STEP == 0], {}, "no series is longer than the horizon"),
    "an hourly series among daily ones": (
        pd.concat([PLAIN, panel(("2024-01-01",), "h").assign(unique_id="h")]),
        {},
        "series 'h' has a row every 0 days 01:00:00; the longest series has one every 1 days",
    ),
    "a weekly series among daily ones, holes filled": (
        pd.concat([PLAIN, panel(("2024-01-07",), "W").assign(unique_id="w")]),
        {"missing": "mask"},
        "series 'w' has a row every 7 days",
    ),
    "ends and beginnings of months": (
        pd.concat([panel(freq="ME"), panel(("2024-01-01",), "MS").assign(unique_id="z")]),
        {"lookback": 12, "horizon": 3},
        "series 'z': uneven times",
    ),
    "a hole in one": (PLAIN.drop(index=70), {}, "series 's1': 1 time stamps"),
    "a series without values": (
        PLAIN.assign(y=PLAIN["y"].where(~SECOND)),
        {"missing": "mask"},
        "series 's1': no target has any value",
    ),
    "what a series is changes": (
        PLAIN.assign(region=np.where(STEP > 30, "a", "b")),
        {"static": ("region",)},
        "changes within the series 's0'",
    ),
    "a size that one lacks": (
        PLAIN.assign(size=np.where(SECOND, np.nan, 1.0)),
        {"static": ("size",)},
        "no number for the series s1",
    ),
    "days as they are written in Germany": (
        PLAIN.assign(ds=PLAIN["ds"].dt.strftime("%d.%m.%Y")),
        {},
        "no time in ISO 8601",
    ),
}

READ_PANELS = {
    "rows in any order": (PLAIN.sample(frac=1, random_state=0), {}, 180),
    "series that begin and end apart": (panel(("2024-01-01", "2019-05-05", "2030-02-02")), {}, 180),
    "numbers for names": (PLAIN.assign(unique_id=PLAIN["unique_id"].str[1:].astype(int)), {}, 180),
    "one of a single row": (PLAIN[~SECOND | (STEP == 0)], {}, 120),
    "more days missing than there": (PLAIN[KEPT], {"missing": "mask"}, int(KEPT.sum())),
    "a constant one": (PLAIN.assign(y=PLAIN["y"].where(~SECOND, 3.0)), {}, 180),
    "all constant": (PLAIN.assign(y=3.0), {}, 180),
    "nothing, and then a million": (PLAIN.assign(y=np.where(STEP == 59, 1e6, 0.0)), {}, 180),
    "a region that one lacks": (
        PLAIN.assign(region=np.where(SECOND, None, "north")),
        {"static": ("region",)},
        180,
    ),
    "local days over a change of clocks": (
        PLAIN.assign(ds=PLAIN["ds"].dt.tz_localize("Europe/Berlin") + pd.Timedelta(0)),
        {},
        180,
    ),
    "weeks of Sundays and of Mondays": (
        pd.concat([panel(freq="W-SUN"), panel(("2024-01-01",), "W-MON").assign(unique_id="m")]),
        {"lookback": 12, "horizon": 3},
        240,
    ),
    "weeks of Sundays and of Mondays, some missing": (
        pd.concat(
            [
                panel(freq="W-SUN").drop(index=30),
                panel(("2024-01-01",), "W-MON").assign(unique_id="m").drop(index=[20, 21]),
            ]
        ),
        {"lookback": 12, "horizon": 3, "missing": "mask"},
        237,
    ),
}


def load_panel(tmp_path, frame, settings):
    frame.to_parquet(tmp_path / "p.parquet", index=False)
    sizes = {"lookback": 14, "horizon": 7, **settings}
    return PanelTable(path=str(tmp_path / "p.parquet"), **sizes).load(tmp_path / "assets")


@pytest.mark.parametrize("name", REFUSED_PANELS)
def test_a_panel_is_refused_with_a_reason(tmp_path, name):
    frame, settings, message = REFUSED_PANELS[name]
    with pytest.raises(UserError, match=message):
        load_panel(tmp_path, frame, settings)


@pytest.mark.parametrize("name", READ_PANELS)
def test_a_panel_is_read_right(tmp_path, name):
    frame, settings, measured = READ_PANELS[name]
    dataset = load_panel(tmp_path, frame, settings)
    buffer = dataset.buffer
    assert buffer.observed_RC.sum() == measured
    found = dataset.measured()[buffer.observed_RC]
    written = frame.groupby("unique_id").filter(lambda rows: len(rows) > 7)["y"]
    np.testing.assert_allclose(np.sort(found), np.sort(written), rtol=1e-4, atol=1e-4)
    for split in ("train", "validation", "test"):
        for batch in dataset.evaluation(split, 64):
            parts = (batch.inputs, batch.targets, batch.units, batch.covariates.future)
            assert all(np.isfinite(x).all() for x in parts if x is not None)
    ahead = dataset.info.ahead(frame[frame.groupby("unique_id")["y"].transform("size") > 7])
    for n, times in enumerate(ahead.times("test")):
        own = frame[frame["unique_id"].astype(str) == ahead.buffer.ids[n]]["ds"].max()
        steps = np.diff(np.concatenate([[own.tz_localize(None).to_datetime64()], times]))
        assert (steps == steps[0]).all() and steps[0] > np.timedelta64(0)


def forecast(tmp_path, frame, cutoffs=(), **settings):
    """The times of a forecast of nothing."""
    info = load(tmp_path, frame, settings).info
    nothing = lambda batch: np.zeros((*batch.targets.shape, 1))  # noqa: E731
    return Forecasting().forecast(frame, info, nothing, 16, cutoffs)["time"]


def test_every_hour_is_forecast_as_clocks_go_back(tmp_path):
    """Local ones repeat: the hour from 2 to 3 comes twice."""
    hours = pd.date_range(end="2024-10-26 20:00", periods=ROWS, freq="h", tz="Europe/Berlin")
    frame = hourly(times=hours.tz_localize(None))
    found = forecast(tmp_path, frame, lookback=48, horizon=12, time_zone="Europe/Berlin")
    expected = pd.date_range(hours[-1], periods=13, freq="h")[1:]
    assert pd.DatetimeIndex(found).equals(expected) and found.dt.hour.tolist().count(2) == 2


def test_a_cutoff_after_the_end_is_said(tmp_path, caplog):
    forecast(tmp_path, hourly(), ["2024-03-10", str(HOURS[-1])], lookback=24, horizon=12)
    assert "forecast from an earlier end" not in caplog.text
    forecast(tmp_path, hourly(), ["2024-05-01"], lookback=24, horizon=12)
    assert (
        "--cutoffs 2024-05-01: forecast from an earlier end of their own: the input" in caplog.text
    )


def test_a_mark_of_absence_is_noticed(tmp_path, caplog):
    load(tmp_path, hourly(at(3, -9e20)), {})
    assert "is it a mark of something absent?" in caplog.text


def test_defaults_follow_from_the_frequency(tmp_path):
    info = load(tmp_path, hourly(), {}).info
    assert (info.season, info.lookback, info.horizon) == (24, 120, 24) or info.lookback <= 168
    for step, season in (("D", 7), ("B", 5), ("W", 52), ("MS", 12), ("h", 24)):
        folder = tmp_path / step
        folder.mkdir()
        times = pd.date_range("1990-01-01", periods=ROWS, freq=step)
        wave = np.sin(np.arange(ROWS) * 2 * np.pi / season)
        assert load(folder, hourly(wave, times), {}).info.season == season
    assert Frequency("15min", 900.0).defaults == (96, 672, 96)
    # Too short for two seasons of 52 weeks: none is taken.
    (tmp_path / "short").mkdir()
    weeks = pd.date_range("2022-01-02", periods=120, freq="W")
    assert load(tmp_path / "short", hourly(WAVE[:120], weeks), {}).info.season == 1
