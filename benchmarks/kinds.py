# SPDX-License-Identifier: Apache-2.0
"""The defaults on kinds of series that differ: do they ever lose to the naive forecasts?

    python benchmarks/kinds.py [KIND ...] [--draw 0] [--folder runs/kinds] [--flags='FLAGS']

Draws the tables, trains `panel_table` on each panel and `series_table` on each series, and prints
the error of the model and of the baselines: MASE on validation and on the test. FLAGS are passed
on to the training, such as '--model.window standard'. Settings are to be chosen with one draw, and
tried with another.

Axes: T time.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

Values = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def wave(rng: np.random.Generator, t_T: np.ndarray, season: int) -> np.ndarray:
    """A season of random shape, of unit deviation."""
    shape = rng.normal(size=season) if season < 20 else np.cumsum(rng.normal(size=season))
    shape = shape - np.linspace(shape[0], shape[-1], season)
    return ((shape - shape.mean()) / shape.std())[t_T % season]


def weekly(rng: np.random.Generator, t_T: np.ndarray) -> np.ndarray:
    """A year's shape under a level that wanders."""
    level = np.cumsum(rng.normal(0, 0.15, len(t_T)))
    return np.asarray(10 + wave(rng, t_T, 52) + level + rng.normal(0, 0.4, len(t_T)))


def retail(rng: np.random.Generator, t_T: np.ndarray) -> np.ndarray:
    """Counts, most of them 0 where little is sold, with a shape of the week."""
    rate = rng.lognormal(-0.5, 1.0) * np.exp(0.5 * wave(rng, t_T, 7))
    return rng.negative_binomial(2, 2 / (2 + rate)).astype(float)


def monthly(rng: np.random.Generator, t_T: np.ndarray) -> np.ndarray:
    """Growth with a shape of the year."""
    growth = np.exp(rng.uniform(-0.003, 0.008) * t_T)
    return np.asarray(growth * (8 + wave(rng, t_T, 12) + rng.normal(0, 0.4, len(t_T))))


def walk(rng: np.random.Generator, t_T: np.ndarray) -> np.ndarray:
    """As an exchange rate: nothing beats the last value."""
    return np.asarray(np.exp(np.cumsum(rng.normal(0, 0.006, len(t_T)))))


def hourly(rng: np.random.Generator, t_T: np.ndarray) -> np.ndarray:
    """Two seasons, of the day and of the week."""
    noise = np.zeros(len(t_T))
    for n, shock in enumerate(rng.normal(0, 0.3, len(t_T))):
        noise[n] = 0.7 * noise[n - 1] + shock
    return np.asarray(20 + 3 * wave(rng, t_T, 24) + 2 * wave(rng, t_T // 24, 7) + noise)


def daily(rng: np.random.Generator, t_T: np.ndarray) -> np.ndarray:
    """A shape of the week, a trend and a level that wanders."""
    level = rng.uniform(-0.01, 0.01) * t_T + np.cumsum(rng.normal(0, 0.1, len(t_T)))
    return 10 + rng.uniform(0.3, 2) * wave(rng, t_T, 7) + level + rng.normal(0, 0.5, len(t_T))


class Kind(NamedTuple):
    """Tables of one kind."""

    values: Values
    frequency: str
    series: int  # 1: a table for `series_table`
    rows: tuple[int, int]  # of a series, from and to


KINDS: Mapping[str, Kind] = {
    "weekly": Kind(weekly, "W", 50, (150, 300)),
    "retail": Kind(retail, "D", 60, (240, 400)),
    "monthly": Kind(monthly, "MS", 100, (60, 120)),
    "walk": Kind(walk, "B", 60, (240, 360)),
    "hourly": Kind(hourly, "h", 20, (900, 1100)),
    "daily": Kind(daily, "D", 60, (240, 360)),
    "one-retail": Kind(retail, "D", 1, (700, 700)),
    "one-monthly": Kind(monthly, "MS", 1, (144, 144)),
    "one-walk": Kind(walk, "B", 1, (1000, 1000)),
    "one-hourly": Kind(hourly, "h", 1, (2000, 2000)),
    "one-weekly": Kind(weekly, "W", 1, (300, 300)),
}


def table(kind: Kind, draw: int) -> pd.DataFrame:
    """Series of different lengths and scales that end at the same time."""
    rng, parts = np.random.default_rng(draw), []
    for number in range(kind.series):
        rows = int(rng.integers(kind.rows[0], kind.rows[1] + 1))
        times = pd.date_range(end="2024-06-30", periods=rows, freq=kind.frequency)
        scale = 1.0 if kind.values is retail else 10.0 ** rng.uniform(-1, 3)
        values = scale * kind.values(rng, np.arange(rows))
        parts.append(pd.DataFrame({"unique_id": f"s{number}", "ds": times, "y": values}))
    return pd.concat(parts, ignore_index=True)


def trained(name: str, draw: int, folder: Path, flags: list[str]) -> dict[str, dict]:
    """Figures by split: of the model and of the baselines."""
    kind, place = KINDS[name], folder / f"{name}-{draw}"
    frame, path = table(kind, draw), folder / f"{name}-{draw}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    one = kind.series == 1
    (frame.drop(columns="unique_id") if one else frame).to_parquet(path, index=False)
    common = ["--data.path", str(path), "--workdir", str(place), "--no-report", *flags]
    command = [sys.executable, "-m", "flax_lstm", "train", *common]
    subprocess.run(
        [*command, "--config", "series_table" if one else "panel_table"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    result = json.loads((place / "result.json").read_text())
    return {
        "validation": {"model": result["validation"], "steps": result["best_step"]},
        "test": {"model": result["test"], **result["baselines"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kinds"))
    parser.add_argument("--flags", default="")
    args = parser.parse_args()
    for name in args.kinds:
        found = trained(name, args.draw, args.folder, shlex.split(args.flags))
        errors = {rule: value["mase"] for rule, value in found["test"].items()}
        shown = "  ".join(f"{rule} {error:.3f}" for rule, error in errors.items())
        print(f"{name:12} {shown}  (best step {found['validation']['steps']})", flush=True)


if __name__ == "__main__":
    main()
