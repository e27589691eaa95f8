# SPDX-License-Identifier: Apache-2.0
"""Tables that could end in NaN, zeros or nonsense: each is read right, or refused with a reason."""

import numpy as np
import pandas as pd
import pytest

from flax_lstm.data import SeriesTable
from flax_lstm.data.grid import Frequency
from flax_lstm.errors import UserError

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
    if settings.get("missing") != "drop":
        assert (rows == 1).all()  # a grid without holes, whatever the clocks did
    known = buffer.observed_RC[:, 0]
    back = dataset.unscale(buffer.values_RD)[known, 0]
    written = pd.to_numeric(frame["x"], errors="coerce").dropna().to_numpy()
    np.testing.assert_allclose(back, written, rtol=1e-5)
    batch = next(dataset.evaluation("test", 8))
    assert all(np.isfinite(x).all() for x in (batch.inputs, batch.targets, batch.units))


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
        assert load(folder, hourly(times=times), {}).info.season == season
    assert Frequency("15min", 900.0).defaults == (96, 672, 96)
    # Too short for two seasons of 52 weeks: none is taken.
    (tmp_path / "short").mkdir()
    weeks = pd.date_range("2022-01-02", periods=120, freq="W")
    assert load(tmp_path / "short", hourly(WAVE[:120], weeks), {}).info.season == 1
