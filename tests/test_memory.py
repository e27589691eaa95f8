# SPDX-License-Identifier: Apache-2.0
"""Runs on data that a program has in memory: a DataFrame, or arrays."""

from dataclasses import dataclass, replace

import grain
import numpy as np
import pandas as pd
import pyarrow
import pytest
import small_runs

from flax_lstm import (
    Classification,
    Config,
    LanguageModel,
    LanguageModeling,
    RecurrentModel,
    SequenceRegression,
    TextModel,
    UserError,
    fit,
    load,
)
from flax_lstm.data import LanguageTable, Sequences, TextTable
from flax_lstm.data.memory import as_frame, fingerprint
from flax_lstm.runs.saved_config import read_config

pytestmark = pytest.mark.usefixtures("quick_compile")

FEW = replace(small_runs.TEN_STEPS, steps=4, eval_every=4, checkpoint_every=4, log_every=2)


def texts() -> pd.DataFrame:
    labels = ["good" if n % 2 else "bad" for n in range(80)]
    words = [f"{'fine' if n % 2 else 'dull'} film number {n}" for n in range(80)]
    return pd.DataFrame({"text": words, "label": labels})


def text_config(**data) -> Config:
    settings = TextTable(vocabulary_size=40, max_length=8, test_fraction=0.2, **data)
    model = TextModel(hidden_size=4, embed_size=4)
    return Config("frame", settings, Classification(), model, FEW, small_runs.ONE_DEVICE)


def test_a_frame_stands_in_for_its_file(tmp_path):
    """The same rows in memory and in a file give the same weights to the last bit."""
    frame = texts()
    frame.to_csv(tmp_path / "texts.csv", index=False)
    filed = fit(text_config(path=str(tmp_path / "texts.csv")), tmp_path / "file", plots=False)
    given = fit(text_config(), tmp_path / "memory", data=frame, plots=False)
    assert given["params_sha256"] == filed["params_sha256"] and given["test"] == filed["test"]
    saved = read_config(tmp_path / "memory" / "config.py")
    assert saved.data.path == f"memory:{fingerprint(frame)}"
    run = load(tmp_path / "memory")
    assert "frame, TextTable, Classification, TextModel" in repr(run)
    assert run.evaluate("test", data=frame)["loss"] == pytest.approx(given["test"]["loss"])
    with pytest.raises(UserError, match=r"given in memory .*: give them again"):
        run.evaluate("test")
    with pytest.raises(UserError, match="these are other data than the run was begun with"):
        run.evaluate("test", data=frame[::-1])
    with pytest.raises(UserError, match=r"data\.path: 'memory:"):
        fit(text_config(), tmp_path / "memory", data=frame.head(79))
    again = fit(text_config(), tmp_path / "memory", data=frame)
    assert again["params_sha256"] == given["params_sha256"]
    one = run.predict("a fine film")
    several = run.predict(pd.Series(["a fine film", "dull"]))
    assert len(one) == 1 and len(several) == len(run.predict(["x", "y"])) == 2
    np.testing.assert_allclose(one["probability"][0], several["probability"][0], rtol=1e-6)


def test_a_run_on_a_frame_is_resumed_with_it(tmp_path):
    frame = texts()
    whole = fit(text_config(), tmp_path / "whole", data=frame, plots=False)
    config = text_config()
    short = replace(config, train=replace(FEW, steps=2, schedule_steps=10))
    long = replace(config, train=replace(FEW, schedule_steps=10))
    fit(short, tmp_path / "parts", data=frame, plots=False)
    resumed = fit(long, tmp_path / "parts", data=frame, plots=False)
    assert resumed["sessions"] == 2 and resumed["params_sha256"] == whole["params_sha256"]


def test_documents_in_memory(tmp_path):
    settings = LanguageTable(vocabulary_size=40, sequence_length=5, validation_fraction=0.2)
    model = LanguageModel(hidden_size=4, embed_size=4)
    config = Config("lm", settings, LanguageModeling(), model, FEW, small_runs.ONE_DEVICE)
    result = fit(config, tmp_path / "lm", data=texts()[["text"]], plots=False)
    assert result["steps"] == 4


def waves(count: int = 60) -> tuple[list[np.ndarray], list[str]]:
    """Slow and fast waves of several lengths."""
    generator = np.random.default_rng(0)
    x, y = [], []
    for n in range(count):
        t = np.arange(generator.integers(4, 13))
        turn = t * (0.5 if n % 2 else 2.5)
        x.append(np.stack([np.sin(turn), 100 + 5 * np.cos(turn)], axis=1))
        y.append("slow" if n % 2 else "fast")
    return x, y


def sequence_config(task, **data) -> Config:
    model = RecurrentModel(hidden_size=4)
    return Config("waves", Sequences(**data), task, model, FEW, small_runs.ONE_DEVICE)


def test_sequences_of_numbers_from_memory_and_from_files_are_the_same(tmp_path):
    x, y = waves()
    longest = max(map(len, x))
    padded = np.stack([np.pad(one, ((0, longest - len(one)), (0, 0))) for one in x])
    np.savez(tmp_path / "waves.npz", x=padded, y=np.array(y), lengths=[len(one) for one in x])
    rows = [{"x": one.tolist(), "y": label} for one, label in zip(x, y, strict=True)]
    pd.DataFrame(rows).to_parquet(tmp_path / "waves.parquet")
    given = fit(sequence_config(Classification()), tmp_path / "memory", data=(x, y), plots=False)
    hashes = {given["params_sha256"]}
    for name in ("waves.npz", "waves.parquet"):
        config = sequence_config(Classification(), path=str(tmp_path / name))
        hashes.add(fit(config, tmp_path / f"run-{name}", plots=False)["params_sha256"])
    assert len(hashes) == 1
    run = load(tmp_path / "memory")
    assert run.info.labels == ("fast", "slow") and run.info.features == 2
    predicted = run.predict(x[:3])
    assert len(predicted) == 3 and predicted["probability"].between(0, 1).all()
    with pytest.raises(UserError, match="3 features a step; the model was trained on 2"):
        run.predict([np.zeros((4, 3))])


def test_scaling_is_that_of_the_training_sequences(tmp_path):
    x, y = waves()
    dataset = Sequences().holding((x, y)).load(tmp_path)
    steps = np.concatenate(
        [
            row[:n]
            for batch in dataset.evaluation("train", 8)
            for row, n in zip(batch.inputs, batch.lengths, strict=True)
        ]
    )
    np.testing.assert_allclose(steps.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(steps.std(axis=0), 1, rtol=1e-5)
    sizes = [dataset.size(split) for split in ("train", "validation", "test")]
    assert sum(sizes) == 60 and sizes == [48, 6, 6]


def test_numbers_as_targets_are_regression(tmp_path):
    x, _ = waves()
    y = np.array([one[:, 0].sum() for one in x])
    config = sequence_config(SequenceRegression())
    result = fit(config, tmp_path / "sums", data=(x, y), plots=False)
    assert set(result["test"]) == {"loss", "mse", "mae"} and "mean" in result["baselines"]
    assert "predicted" in load(tmp_path / "sums").predict(x[:2])
    with pytest.raises(
        UserError, match="Classification needs data with labels; Sequences has none"
    ):
        fit(sequence_config(Classification()), tmp_path / "no", data=(x, y))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((one for one in [[1.0]]), ["a"], "no generator: a run that resumes"),
        ([[1.0, 2.0], ["a", "b"]], ["a", "b"], "sequence 2 is no array of numbers"),
        ([[[1.0, 2.0]], [[1.0]]], ["a", "b"], r"sequence 2 has shape \(1, 1\); \[T, 2\]"),
        ([[1.0, float("nan")]], ["a"], "sequence 1 holds values that are not finite"),
        ([[1e308]], ["a"], "sequence 1 holds values that are not finite, or beyond 1e30"),
        ([[1.0], [2.0]], ["a"], "2 sequences and 1 targets"),
        ([[], []], ["a", "b"], "there is no sequence with a step"),
        ([[1.0]] * 20, ["a"] * 20, "at least 2 different ones"),
        ([[1.0]] * 2, ["a", "b"], "too few for three splits"),
    ],
)
def test_sequences_that_cannot_be_used_are_refused(x, y, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Sequences().holding((x, y)).load(tmp_path)


def test_pickles_are_not_read(tmp_path):
    ragged = np.array([np.zeros(2), np.zeros(3)], dtype=object)
    np.savez(tmp_path / "pickle.npz", x=ragged, y=np.zeros(2))
    with pytest.raises(UserError, match="plain arrays"):
        Sequences(path=str(tmp_path / "pickle.npz")).load(tmp_path / "assets")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({"a": n} for n in range(3)), "not a generator: a run .* Collect"),
        (grain.MapDataset.range(3), "not a RangeMapDataset: a run .* Collect"),
        ([1, 2], "must be a pandas DataFrame, not a list"),
        (pd.DataFrame(), "has no rows"),
    ],
)
def test_what_is_no_table_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        TextTable().holding(given)


def test_an_index_of_times_is_a_column():
    times = pd.date_range("2024-01-01", periods=3, freq="h")
    assert list(as_frame(pd.DataFrame({"load": [1, 2, 3]}, index=times))) == ["time", "load"]
    named = pd.DataFrame({"load": [1, 2, 3]}, index=times.rename("when"))
    assert list(as_frame(named)) == ["when", "load"]
    pd.testing.assert_frame_equal(
        as_frame(pyarrow.table({"a": [1, 2]})), pd.DataFrame({"a": [1, 2]})
    )


def test_a_config_that_could_not_be_loaded_again_is_refused_before_training(tmp_path):
    @dataclass(frozen=True)
    class Local(TextTable):
        pass

    config = replace(text_config(), data=Local())
    with pytest.raises(UserError, match="Local is defined within a function"):
        fit(config, tmp_path / "local", data=texts())
    odd = replace(text_config(), name=np.float64(3.0))
    with pytest.raises(UserError, match=r"the value cannot be saved|not a config"):
        fit(odd, tmp_path / "odd", data=texts())
    assert not (tmp_path / "odd").exists() and not (tmp_path / "local").exists()


def test_a_config_is_readable_when_printed():
    shown = str(text_config())
    assert shown.startswith("Config(name='frame',\n") and max(map(len, shown.splitlines())) <= 100


def steps_to_tell_apart() -> tuple[list[np.ndarray], list[list[str]]]:
    """Every step says by its sign what it is."""
    generator = np.random.default_rng(1)
    x = [generator.normal(size=(generator.integers(3, 9), 1)) for _ in range(60)]
    return x, [["up" if value > 0 else "down" for value in one[:, 0]] for one in x]


def test_a_label_for_every_step(tmp_path):
    x, y = steps_to_tell_apart()
    config = sequence_config(Classification(), per_step=True)
    train = replace(FEW, steps=80, learning_rate=0.05, schedule="constant")
    train = replace(train, eval_every=80, checkpoint_every=80, log_every=80)
    result = fit(replace(config, train=train), tmp_path / "run", data=(x, y), plots=False)
    assert result["test"]["accuracy"] > 0.95 > result["baselines"]["majority"]["accuracy"]
    predicted = load(tmp_path / "run").predict(x[:5])
    assert [len(labels) for labels in predicted["predicted"]] == [len(one) for one in x[:5]]
    assert np.mean(np.concatenate(y[:5]) == np.concatenate(predicted["predicted"].tolist())) > 0.9


def test_a_number_for_every_step_is_judged_step_by_step(tmp_path):
    """The baseline's error by hand: every step counts once, padding never."""
    x, _ = steps_to_tell_apart()
    y = [2 * one[:, 0] for one in x]
    config = sequence_config(SequenceRegression(), per_step=True)
    result = fit(config, tmp_path / "run", data=(x, y), plots=False)
    data = Sequences(per_step=True).holding((x, y)).load(tmp_path / "other")
    steps = {
        split: np.concatenate(
            [
                target[:length, 0]
                for batch in data.evaluation(split, 8)
                for target, length in zip(batch.targets, batch.lengths, strict=True)
            ]
        )
        for split in ("train", "test")
    }
    expected = np.mean((steps["test"] - steps["train"].mean()) ** 2)
    assert result["baselines"]["mean"]["mse"] == pytest.approx(expected, rel=1e-5)


def test_a_step_without_a_target_is_refused():
    with pytest.raises(UserError, match=r"sequence 1 has 2 steps and 1 target"):
        Sequences(per_step=True).holding(([[1.0, 2.0]], [["a"]]))


X = [[1.0, 2.0]] * 20


@pytest.mark.parametrize(
    ("settings", "x", "y", "message"),
    [
        ({"target": "numbers"}, X, ["a"] * 20, "not all numbers"),
        ({"target": "numbers"}, X, [1.0] * 19 + ["b"], "not all numbers"),
        ({}, X, [1.0] * 19 + [float("inf")], r"not finite, or beyond 1e\+15"),
        ({}, X, [1.0] * 19 + [1e300], r"not finite, or beyond 1e\+15"),
        ({}, X, [1.0] * 19 + [float("nan")], r"not finite, or beyond 1e\+15"),
        ({}, 5, [1], "sequences are a list or an array"),
    ],
)
@pytest.mark.parametrize("seed", range(3))  # the odd one lands in another split
def test_targets_that_cannot_be_used_are_refused(settings, x, y, message, seed, tmp_path):
    with pytest.raises(UserError, match=message):
        Sequences(split_seed=seed, **settings).holding((x, y)).load(tmp_path)


def test_ragged_numbers_as_targets_are_refused():
    with pytest.raises(UserError, match="targets of several lengths"):
        Sequences(target="numbers").holding((X, [[1.0], [1.0, 2.0]] * 10))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(UserError, match="cannot read"):
        Sequences(path=str(tmp_path / "x.npz")).load(tmp_path)


@pytest.mark.parametrize("inputs", [5, None])
def test_what_is_no_text_is_refused(inputs):
    with pytest.raises(UserError, match="predict takes a text, several, or a table"):
        TextTable().table(inputs)
    with pytest.raises(UserError, match="no text"):
        TextTable().table([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            pd.DataFrame([["a", "b"]], columns=["text", "text"]),
            "more than one column is named text",
        ),
        ({"text": ["a", "b"], "label": ["x"]}, "no table can be made"),
    ],
)
def test_columns_that_make_no_table_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        TextTable().holding(given)


def test_a_fingerprint_is_of_values_and_not_of_their_addresses():
    one = np.array([str(n) + "x" for n in range(3)], dtype=object)
    other = np.array([f"{n}x" for n in range(3)], dtype=object)
    assert fingerprint([one]) == fingerprint([other]) != fingerprint([one[::-1]])
