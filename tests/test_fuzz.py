# SPDX-License-Identifier: Apache-2.0
"""Thousands of bad inputs: each ends in a result, or in a few lines and status 2. Never a
traceback, a hang, a number that is none, or half a file.

Each property is tried on a few inputs in every run of the tests, always the same, and on thousands
where `slow` tests run; a failure prints the input, or the line `@reproduce_failure` that makes it
again.
"""

import gzip
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from commands import Outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nasty import BYTES, CELLS, OBJECTS, WORDS, within
from small_runs import remembered

from flax_lstm import Classification, Forecasting, UserError, load_config
from flax_lstm import __main__ as command_line
from flax_lstm.commands.tables import WRITERS, write_table
from flax_lstm.commands.train import Options
from flax_lstm.data import LanguageTable, PanelTable, Sequences, SeriesTable, TextTable
from flax_lstm.data.base import Batch
from flax_lstm.data.tables import read_table
from flax_lstm.training import loop

SECONDS = 60  # for one input
CASES = [3, pytest.param(2500, marks=pytest.mark.slow)]


def tried(examples: int, test: Callable[..., None], *given_by: Any) -> None:
    """The property on so many inputs; the same each time where they are few."""
    quick = examples < 100
    chosen = settings(
        max_examples=examples,
        derandomize=quick,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(*given_by)(test))()


def judged(attempt: Callable[[], Any]) -> Any:
    """What comes of an attempt; None where it was refused in a few lines."""
    try:
        with within(SECONDS):
            return attempt()
    except UserError as error:
        said = str(error)
        assert len(said) > 10 and said.count("\n") < 20, said
        assert "Traceback" not in said
        return None


# Tables to spoil


HOURS = pd.date_range("2024-01-01", periods=60, freq="h").astype(str)
WAVE = 5 + np.sin(np.arange(60) * np.pi / 12).round(4)
SERIES = pd.DataFrame({"when": HOURS, "load": WAVE, "plan": WAVE[::-1]})
PANEL = pd.DataFrame(
    {
        "unique_id": np.repeat(["a", "b"], 60),
        "ds": np.tile(HOURS, 2),
        "y": np.tile(WAVE, 2),
        "size": np.repeat([1.0, 2.0], 60),
    }
)
TEXTS = pd.DataFrame(
    {"text": [f"a fine film, number {n}" for n in range(60)], "label": ["good", "bad"] * 30}
)
LISTS = pd.DataFrame(
    {"x": [[[float(n), 1.0], [2.0, n / 7]] for n in range(30)], "y": ["up", "down"] * 15}
)
KINDS: dict[str, tuple[pd.DataFrame, Any]] = {
    "series": (
        SERIES,
        SeriesTable(lookback=8, horizon=2, season=4, future=("plan",), targets=("load",)),
    ),
    "series, found out": (SERIES, SeriesTable(missing="mask")),
    "panel": (PANEL, PanelTable(lookback=8, horizon=2, season=4, static=("size",))),
    "texts": (TEXTS, TextTable(vocabulary_size=50)),
    "documents": (TEXTS, LanguageTable(vocabulary_size=50, sequence_length=8)),
    "sequences": (LISTS, Sequences()),
}


def finite(tree: Any) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree) if x.dtype.kind == "f")


def require_sound(data: Any, assets: Path) -> None:
    """Reads the data: all that a model would see is finite."""
    dataset = data.load(assets)
    for split in ("train", "validation", "test"):
        assert all(finite(batch) for batch in dataset.evaluation(split, 16))
    assert finite(dataset.train(8, 0)[0])
    assert not [path for path in assets.rglob("*") if path.name.startswith(".")]


# Files


def written(kind: str, suffix: str) -> bytes:
    frame = KINDS[kind][0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{suffix}"
        if suffix == ".npz":
            np.savez(path, x=np.array(frame["x"].tolist()), y=frame["y"].to_numpy(str))
        else:
            write_table(frame, path)
        return path.read_bytes()


SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz")
place = st.floats(0, 1)
changes = st.one_of(
    st.tuples(st.just("cut"), place),
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("insert"), place, st.sampled_from(BYTES)),
    st.tuples(st.just("drop"), place, st.integers(1, 40)),
    st.tuples(st.just("repeat"), place, st.integers(1, 400)),
)


def changed(content: bytes, kind: str, where: float, what: Any = None) -> bytes:
    at = int(where * len(content))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes(b ^ 1 << what for b in content[at : at + 1]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + what + content[at:]
    if kind == "drop":
        return content[:at] + content[at + what :]
    return content[: at + what] + content[at:]


@pytest.mark.parametrize("examples", CASES)
def test_spoilt_files_are_read_right_or_refused(tmp_path, examples):
    whole: dict[tuple[str, str], bytes] = {}

    def property(kind: str, suffix: str, spoilt: list[Any], inner: bool) -> None:
        suffix = ".npz" if kind == "sequences" and suffix in (".csv", ".tsv", ".csv.gz") else suffix
        plain = suffix.removesuffix(".gz")
        if (kind, plain) not in whole:
            whole[kind, plain] = written(kind, plain)
        content, packed = whole[kind, plain], plain != suffix
        if packed and not inner:
            content = gzip.compress(content)
        for change in spoilt:
            content = changed(content, *change)
        if packed and inner:
            content = gzip.compress(content)
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        path = folder / f"t{suffix}"
        path.write_bytes(content)
        data = replace(KINDS[kind][1], path=str(path))
        judged(lambda: require_sound(data, folder / "assets"))
        judged(lambda: data.read(path) if hasattr(type(data), "read") else None)
        shutil.rmtree(folder)

    many = st.lists(changes, min_size=1, max_size=3)
    kinds, suffixes = st.sampled_from([*KINDS]), st.sampled_from(SUFFIXES)
    tried(examples, property, kinds, suffixes, many, st.booleans())


# Cells


@pytest.mark.parametrize("examples", CASES)
def test_spoilt_cells_are_read_right_or_refused(tmp_path, examples):
    """In memory, so that every type is tried, and as a file of texts."""

    def property(kind: str, spoilt: list[tuple[float, float, Any]], file: bool) -> None:
        frame, data = KINDS[kind]
        frame = frame.astype(object)
        for row, column, value in spoilt:
            at = min(int(row * len(frame)), len(frame) - 1)
            column = min(int(column * frame.shape[1]), frame.shape[1] - 1)
            values = frame.iloc[:, column].tolist()
            values[at] = value
            frame[frame.columns[column]] = pd.Series(values, dtype=object)
        folder = Path(tempfile.mkdtemp(dir=tmp_path))

        def attempt() -> None:
            held = data
            if file:
                path = folder / "t.csv"
                frame.to_csv(path, index=False, errors="replace")
                held = replace(data, path=str(path))
            else:
                held = data.holding(frame)
            require_sound(held, folder / "assets")

        judged(attempt)
        shutil.rmtree(folder)

    cells = st.tuples(place, place, st.sampled_from([*CELLS, *OBJECTS]))
    many = st.lists(cells, min_size=1, max_size=3)
    tried(examples, property, st.sampled_from([*KINDS]), many, st.booleans())


# Predictions


@pytest.fixture(scope="module")
def infos(tmp_path_factory):
    """What training keeps of the data of each kind."""
    found = {}
    for kind, (frame, data) in KINDS.items():
        if kind not in ("documents", "series, found out"):
            assets = tmp_path_factory.mktemp("assets")
            held = data.holding(frame)
            held.load(assets)
            found[kind] = (held, held.restore(assets))
    return found


def answers(info: Any, task: Any) -> Callable[[Batch], np.ndarray]:
    """A model that answers zeros."""
    if isinstance(task, Forecasting):
        return lambda batch: np.zeros((*batch.targets.shape, len(task.levels) or 1), np.float32)
    return lambda batch: np.zeros((len(batch.lengths), len(info.labels)), np.float32)


def whole(value: Any) -> Any:
    """What a file in UTF-8 can hold of it."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


NAMES = (
    *("predicted", "predicted_input", "probability", "probability_good", "probability_up", "time"),
    *("forecast", "channel", "horizon", "q0.1", "x" * 300, "ünï", "a\nb", "a,b", 'a"b', "text "),
)


@pytest.mark.parametrize("examples", CASES)
def test_predictions_keep_the_users_columns_or_are_refused(infos, tmp_path, examples):
    def property(kind: str, names: list[str], values: list[Any], suffix: str, stem: str) -> None:
        data, info = infos[kind]
        frame = KINDS[kind][0].copy()
        for name, value in zip(names, values, strict=False):
            if name not in frame.columns:
                frame[name] = pd.Series([value] * (len(frame) - 1) + ["x"], dtype=object)
        forecasts = kind in ("series", "panel")
        task: Any = Forecasting(objective="quantile") if forecasts else Classification()
        result = judged(
            lambda: task.predict(data.table(frame), info, answers(info, task), batch_size=16)
        )
        if result is None:
            return
        assert result.columns.is_unique
        if not forecasts:
            own = result.iloc[:, : frame.shape[1]]
            for before, after in zip(frame.items(), own.items(), strict=True):
                assert after[0].startswith(str(before[0]))
                given = (whole(value) for value in before[1])
                assert all(a is b or a == b for a, b in zip(given, after[1], strict=True))
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        path = folder / f"{stem}{suffix}"
        done = judged(lambda: write_table(result, path) or True)
        assert [p.name for p in folder.iterdir()] == ([path.name] if done else [])
        if done and suffix != ".parquet":
            judged(lambda: read_table(path))
        shutil.rmtree(folder)

    tried(
        examples,
        property,
        st.sampled_from(["series", "panel", "texts", "sequences"]),
        st.lists(st.sampled_from(NAMES), max_size=3, unique=True),
        st.lists(st.sampled_from([*OBJECTS, *CELLS]), min_size=3, max_size=3),
        st.sampled_from([*WRITERS]),
        st.sampled_from(["out", "x" * 250, "ü" * 120, "a b", "-"]),
    )


# Flags


CONFIGS = ("series_table", "panel_table", "text_table", "text_lm", "sequence_table")


def leaves(kind: Any, prefix: str = "") -> list[str]:
    """The flags of a section, with a value each that one word is enough for."""
    found = []
    for f in fields(kind):
        value = getattr(kind, f.name)
        name = f"{prefix}{f.name.replace('_', '-')}"
        found += leaves(value, f"{name}.") if is_dataclass(value) else [name]
    return found


def flags(config: str) -> list[str]:
    found = leaves(load_config(config))
    skipped = ("local-processes", "coordinator", "num-processes", "process-id", "workdir", "config")
    own = [f.name.replace("_", "-") for f in fields(Options)]
    return [*found, *(name for name in own if name not in skipped)]


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """Commands that train, up to the first step."""
    paths = {}
    for config, kind in zip(
        CONFIGS, ("series", "panel", "texts", "documents", "sequences"), strict=True
    ):
        paths[config] = tmp_path / f"{config}.jsonl"
        write_table(KINDS[kind][0], paths[config])

    def begin(self: Any, params: Any) -> None:
        raise SystemExit(0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.Session, "begin", begin)
    monkeypatch.setattr(loop, "Surroundings", partial(loop.Surroundings, assemble=remembered))
    return paths


def ends_well(capsys: Any, *arguments: str) -> Outcome:
    """Runs a command; its status is 0, or it is 2 after a screen that says why."""
    capsys.readouterr()
    with within(SECONDS):
        status = command_line.main([*arguments])
    outcome = Outcome(status, *capsys.readouterr())
    said = outcome.err or outcome.out
    assert status in (0, 2), (arguments, said)
    assert "Traceback" not in said, (arguments, said)
    if status == 2:
        assert 10 < len(said) < 9000 and said.count("\n") < 60, (arguments, said)
    return outcome


KEEP = ("--no-tuned-malloc", "--no-compilation-cache", "--mesh.data", "1")


def try_flag(capsys: Any, paths: dict[str, Path], config: str, flag: str, word: str) -> int:
    shutil.rmtree("run", ignore_errors=True)
    given = ["--data.path", str(paths[config]), "--workdir", "run", *KEEP]
    if config == "panel_table":
        given += ["--data.lookback", "8", "--data.horizon", "2", "--data.season", "4"]
    return ends_well(capsys, "train", "--config", config, *given, f"--{flag}={word}").code


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_flag_takes_any_word_or_refuses_it(rehearsed, capsys, few):
    """Of every kind of data, task and model."""
    every = [(config, flag, word) for config in CONFIGS for flag in flags(config) for word in WORDS]
    assert try_flag(capsys, rehearsed, "series_table", "seed", "1") == 0
    for case in random.Random(0).sample(every, 10 if few else 2500):
        try_flag(capsys, rehearsed, *case)
