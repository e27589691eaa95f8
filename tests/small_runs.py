# SPDX-License-Identifier: Apache-2.0
"""Runs small enough to be trained in a test."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import Mesh

import flax_lstm
from flax_lstm import (
    Classification,
    Config,
    Forecasting,
    LanguageModel,
    LanguageModeling,
    MeshConfig,
    RecurrentForecaster,
    RecurrentModel,
    SequenceRegression,
    TextModel,
    TrainConfig,
)
from flax_lstm.data.base import Batch
from flax_lstm.data.imdb import FOLDER, Imdb
from flax_lstm.data.language import LanguageTable
from flax_lstm.data.series import SeriesTable
from flax_lstm.data.synthetic import AddingProblem
from flax_lstm.data.text import TextTable
from flax_lstm.machine.sharding import put_batch
from flax_lstm.runs.workdir import Workdir
from flax_lstm.training.assembly import Assembly, assemble
from flax_lstm.training.checkpoint import Checkpoints
from flax_lstm.training.loop import Surroundings
from flax_lstm.training.progress import Progress

_assembled: dict[str, Assembly] = {}


def remembered(config: Config, info: Any) -> Assembly:
    """`assemble`, once for all configs that differ in nothing its steps depend on."""
    # The length of the schedule is settled by now.
    train = replace(
        config.train, steps=1, log_every=1, eval_every=1, checkpoint_every=1, patience=0
    )
    key = repr(replace(config, train=train))
    if key not in _assembled:
        _assembled[key] = assemble(config, info)
    return _assembled[key]


def forget() -> None:
    """What `remembered` knows."""
    _assembled.clear()


def fit(
    config: Config, workdir: Path | None = None, around: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """`fit` without what most tests are not about: compiling the same steps again, and drawing.

    around: other surroundings by name.
    """
    surroundings = Surroundings(**{"assemble": remembered, **(around or {})})
    return flax_lstm.fit(config, workdir, around=surroundings, **{"plots": False, **more})


def interrupted(step: int, number: int = signal.SIGTERM) -> dict[str, Any]:
    """Surroundings in which this process gets a signal as the batch of a step is taken."""
    taken = []

    def put(batch: Batch, mesh: Mesh) -> Batch:
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        return put_batch(batch, mesh)

    return {"put_batch": put}


ONE_DEVICE = MeshConfig(data=1)
TEN_STEPS = TrainConfig(
    steps=10,
    batch_size=8,
    learning_rate=0.01,
    schedule="cosine",
    schedule_steps=10,
    warmup_steps=2,
    log_every=2,
    eval_every=5,
    checkpoint_every=3,
)


def adding_run(**train: Any) -> Config:
    """The adding problem: no files, one shape."""
    data = AddingProblem(length=8, examples=40, validation_examples=10, test_examples=10)
    model = RecurrentModel(hidden_size=4)
    return Config(
        "adding", data, SequenceRegression(), model, replace(TEN_STEPS, **train), ONE_DEVICE
    )


def text_run(folder: Path, **train: Any) -> Config:
    """Reviews of a few words; dropout of every kind, averaged weights."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join([*generator.choice(list("abcdefgh"), generator.integers(0, 6)), word]),
            "label": label,
        }
        for label, word in (("good", "fine"), ("bad", "dull"))
        for _ in range(40)
    ]
    path = folder / "texts.csv"
    pd.DataFrame(rows).drop_duplicates().to_csv(path, index=False)
    data = TextTable(
        path=str(path), vocabulary_size=20, max_length=8, validation_fraction=0.2, test_fraction=0.2
    )
    model = TextModel(
        hidden_size=4,
        embed_size=4,
        dropout=0.2,
        recurrent_dropout=0.2,
        embed_dropout=0.1,
        head_dropout=0.2,
        dense=4,
    )
    return Config(
        "texts", data, Classification(), model, replace(TEN_STEPS, ema=0.9, **train), ONE_DEVICE
    )


def series_run(folder: Path, **train: Any) -> Config:
    """Quantile forecasts of two channels."""
    hours = np.arange(90)
    columns = {"a": np.sin(hours * np.pi / 3) + hours / 50, "b": 100 * np.cos(hours * np.pi / 3)}
    times = pd.date_range("2024-01-01", periods=len(hours), freq="h").astype(str)
    path = folder / "series.csv"
    pd.DataFrame({"time": times, **columns}).to_csv(path, index=False)
    data = SeriesTable(path=str(path), lookback=7, horizon=3, season=6)
    model = RecurrentForecaster(cell="gru", hidden_size=4)
    task = Forecasting(objective="quantile")
    return Config("series", data, task, model, replace(TEN_STEPS, **train), ONE_DEVICE)


def language_run(folder: Path, **train: Any) -> Config:
    """A language model that carries its state from batch to batch, in two accumulated parts."""
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(list("abcdef"), 12)) for _ in range(40)]
    path = folder / "documents.csv"
    pd.DataFrame({"text": texts}).to_csv(path, index=False)
    data = LanguageTable(
        path=str(path), vocabulary_size=20, sequence_length=5, validation_fraction=0.2
    )
    model = LanguageModel(hidden_size=4, embed_size=4, tied=True, dropout=0.1)
    settings = replace(TEN_STEPS, **{"accumulate": 2, **train})
    return Config("language", data, LanguageModeling(), model, settings, ONE_DEVICE)


def imdb_run(folder: Path, **train: Any) -> Config:
    """The real reviews, of which a test must make sure with `real_reviews`."""
    data = Imdb(vocabulary_size=1000, max_length=40)
    model = TextModel(hidden_size=8, embed_size=8, dropout=0.2, recurrent_dropout=0.2)
    settings = replace(TEN_STEPS, **{"batch_size": 64, **train})
    return Config("reviews", data, Classification(), model, settings, ONE_DEVICE)


def real_reviews() -> None:
    """Skips a test where they are not prepared."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / FOLDER).exists():
        pytest.skip("imdb_reviews is not prepared in TFDS_DATA_DIR")


def saved(config: Config, workdir: Path, step: int) -> tuple[dict[str, np.ndarray], Progress]:
    """Every array of the checkpoint of a step by its path, and what it says of the run's
    progress."""
    folder = Workdir(workdir)
    abstract = remembered(config, config.data.restore(folder.assets)).steps.abstract
    with Checkpoints(folder.checkpoints) as checkpoints:
        state, progress = checkpoints.restore(step, abstract)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, progress


def rows(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "examples_per_second")}
        for row in rows
    ]
