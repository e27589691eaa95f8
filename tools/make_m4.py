# SPDX-License-Identifier: Apache-2.0
"""Makes one long table of the M4 competition's two files of a frequency.

    python tools/make_m4.py Hourly-train.csv Hourly-test.csv m4_hourly.parquet

The files are in the folder Dataset of the repository Mcompetitions/M4-methods. They hold no times:
every series is made to end at the same hour, 2020-01-01.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd


def series(path: Path) -> dict[str, np.ndarray]:
    """The values of each series of a file whose rows are an id and values, padded on the right."""
    frame = pd.read_csv(path, index_col=0)
    return {str(name): row.dropna().to_numpy(np.float64) for name, row in frame.iterrows()}


def long_table(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per series and hour: unique_id, ds, y."""
    whole = {name: np.concatenate([values, test[name]]) for name, values in train.items()}
    end = pd.Timestamp("2020-01-01")
    return pd.DataFrame(
        {
            "unique_id": np.repeat(list(whole), [len(y) for y in whole.values()]),
            "ds": np.concatenate(
                [pd.date_range(end=end, periods=len(y), freq="h") for y in whole.values()]
            ),
            "y": np.concatenate(list(whole.values())),
        }
    )


if __name__ == "__main__":
    train, test, output = (Path(name) for name in sys.argv[1:])
    table = long_table(series(train), series(test))
    table.to_parquet(output, index=False)
    print(f"{table['unique_id'].nunique()} series, {len(table)} rows in {output}")
