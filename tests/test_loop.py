# SPDX-License-Identifier: Apache-2.0
"""`fit` from its beginning to `result.json`, and the files it leaves."""

import hashlib
import json
import math
import os
import resource
import signal
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
import small_runs
from small_runs import fit

from flax_lstm import UserError, load
from flax_lstm.machine.sharding import put_batch
from flax_lstm.runs.journal import MetricsLog
from flax_lstm.runs.report import beaten, params_sha256
from flax_lstm.training.checkpoint import initial_params
from flax_lstm.training.loop import batches
from flax_lstm.training.progress import Best
from flax_lstm.training.signals import Signals


@pytest.fixture(autouse=True)
def quick(quick_compile):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose validation figure is best in the middle, for its learning rate is far too high,
    and its result."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = small_runs.adding_run(
        learning_rate=0.3, schedule="constant", eval_every=1, warmup_steps=0
    )
    config = replace(config, seed=1)
    return config, workdir, fit(config, workdir)


def unchanged(workdir):
    return {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and "tensorboard" not in str(path)
    }


def test_result_has_what_is_promised(finished):
    _, workdir, result = finished
    assert json.loads((workdir / "result.json").read_text(), parse_constant=pytest.fail) == result
    assert {name: type(value) for name, value in result.items()} == {
        **dict.fromkeys(("task", "name", "params_sha256", "device", "backend"), str),
        **dict.fromkeys(("steps", "best_step", "parameters", "sessions", "seed"), int),
        **dict.fromkeys(("cores", "processes"), int),
        "data_sha256": type(None),  # they are generated
        **dict.fromkeys(("validation", "test", "baselines", "versions"), dict),
        "wall_seconds": float,
        "stopped_early": bool,
    }
    expected = ("SequenceRegression", "adding", 10, 1, 1)
    assert tuple(result[k] for k in ("task", "name", "steps", "sessions", "seed")) == expected
    assert result["backend"] in ("cpu", "fused")  # with a compiler, and without
    assert list(result["baselines"]) == ["mean"]
    for figures in (result["validation"], result["test"], *result["baselines"].values()):
        assert figures.keys() == {"loss", "mse", "mae"} and all(
            math.isfinite(value) for value in figures.values()
        )
    assert {"python", "jax", "flax", "optax"} <= result["versions"].keys()
    assert (
        result["parameters"] == 4 * 4 * (2 + 4 + 1) + 4 + 1
    )  # LSTM of 4 units over 2 features, and its head
    assert not list(workdir.glob("*.part"))


def test_figures_come_from_the_best_checkpoint(finished):
    _, workdir, result = finished
    validation = {
        row["step"]: row["mse"] for row in small_runs.rows(workdir) if row["split"] == "validation"
    }
    assert sorted(validation) == list(range(1, 11))
    assert result["best_step"] == min(validation, key=validation.get) < 10
    assert result["validation"]["mse"] == pytest.approx(validation[result["best_step"]], rel=1e-6)
    (test,) = (row for row in small_runs.rows(workdir) if row["split"] == "test")
    assert test["step"] == result["best_step"] and test["mse"] == result["test"]["mse"]
    run = load(workdir)
    assert run.step("best") == result["best_step"] and run.step("latest") == 10
    assert run.evaluate("test")["mse"] == pytest.approx(result["test"]["mse"], rel=1e-6)
    assert run.evaluate("test", "latest")["mse"] != pytest.approx(result["test"]["mse"], rel=1e-3)
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert kept == [result["best_step"], 9, 10]


def test_params_sha256_by_its_definition(finished):
    config, workdir, result = finished
    arrays, _ = small_runs.saved(config, workdir, 10)  # of the last step, not the best
    digest = hashlib.sha256()
    params = {
        name.removeprefix(".params['").removesuffix("']").replace("']['", "/"): array
        for name, array in arrays.items()
        if name.startswith(".params")
    }
    assert "recurrent/layers_0/cell/input" in params and len(params) == 5
    for name in sorted(params):
        array = params[name]
        digest.update(name.encode() + str(array.dtype).encode() + str(array.shape).encode())
        digest.update(array.astype("<f4").tobytes(order="C"))
    assert digest.hexdigest() == result["params_sha256"]


def test_params_sha256_sees_names_shapes_and_values():
    tree = {"b": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "a": np.ones(2, np.float32)}
    same = {"a": tree["a"], "b": {"w": np.asfortranarray(tree["b"]["w"])}}
    assert params_sha256(tree) == params_sha256(same)
    others = (
        {**tree, "b": {"v": tree["b"]["w"]}},
        {**tree, "b": {"w": tree["b"]["w"].reshape(3, 2)}},
        {**tree, "b": {"w": tree["b"]["w"] + 1}},
        {**tree, "a": np.ones(2, np.float64)},
    )
    assert len({params_sha256(other) for other in (tree, *others)}) == 5


def test_rows_of_the_log(finished):
    _, workdir, _ = finished
    log = small_runs.rows(workdir)
    train = [row for row in log if row["split"] == "train"]
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10]
    keys = {"step", "split", "loss", "seconds", "learning_rate", "grad_norm", "examples_per_second"}
    assert all(row.keys() == keys for row in train)
    assert all(
        row.keys() == {"step", "split", "loss", "seconds", "mse", "mae"}
        for row in log
        if row not in train
    )
    assert [row["seconds"] for row in log] == sorted(row["seconds"] for row in log)
    assert len({(row["step"], row["split"]) for row in log}) == len(log)
    assert any((workdir / "tensorboard").iterdir())


def test_the_same_command_on_a_finished_run_trains_nothing(finished, capsys):
    config, workdir, result = finished
    before = unchanged(workdir)
    around = {"assemble": lambda *_: pytest.fail("a finished run was trained")}
    assert fit(config, workdir, around) == result
    said = capsys.readouterr().err
    assert (
        "this run is finished" in said and "mean" in said and f"{result['test']['mse']:.4g}" in said
    )
    assert unchanged(workdir) == before


def test_more_steps_go_on_after_a_finished_run(tmp_path):
    first = fit(small_runs.adding_run(schedule="constant"), tmp_path)
    longer = fit(small_runs.adding_run(schedule="constant", steps=12), tmp_path)
    assert (
        longer["steps"] == 12
        and longer["sessions"] == 2
        and longer["wall_seconds"] >= first["wall_seconds"] / 2
    )
    assert json.loads((tmp_path / "result.10.json").read_text()) == first
    assert json.loads((tmp_path / "result.json").read_text()) == longer
    assert [row["step"] for row in small_runs.rows(tmp_path) if row["split"] == "train"] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    with pytest.raises(UserError, match="longer, not shorter"):
        fit(small_runs.adding_run(schedule="constant"), tmp_path)


def test_patience_ends_a_run_and_it_stays_ended(finished, tmp_path):
    config, _, _ = finished
    patient = replace(config, train=replace(config.train, patience=2))
    stopped = fit(patient, tmp_path)
    assert stopped["stopped_early"] and stopped["steps"] < 10
    validation = {
        row["step"]: row["mse"] for row in small_runs.rows(tmp_path) if row["split"] == "validation"
    }
    assert stopped["best_step"] == min(validation, key=validation.get) == stopped["steps"] - 2
    assert fit(patient, tmp_path) == stopped


def test_what_is_not_finite_ends_the_run_and_is_never_saved(tmp_path):
    taken = []

    def put(batch, mesh):
        taken.append(1)
        nan = np.float32("nan" if len(taken) == 4 else 1)
        return put_batch(batch._replace(inputs=batch.inputs * nan), mesh)

    config = small_runs.adding_run(checkpoint_every=1)
    with pytest.raises(UserError, match=r"the loss is nan.* at step 4: try a lower"):
        fit(config, tmp_path, {"put_batch": put})
    # Step 4 began with the state of step 3, which is therefore not kept.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    arrays, _ = small_runs.saved(config, tmp_path, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert fit(config, tmp_path)["steps"] == 10  # once the cause is gone, it goes on


def test_memory_is_given_back_after_whatever_was_compiled(tmp_path):
    done, trimmed = [], []

    def put(batch, mesh):
        done.append(batch)
        length = 7 if len(done) in (3, 4) else 8
        lengths = np.minimum(batch.lengths, length)
        return put_batch(batch._replace(inputs=batch.inputs[:, :length], lengths=lengths), mesh)

    around = {"put_batch": put, "trim_malloc": lambda: trimmed.append(len(done))}
    config = small_runs.adding_run(schedule="constant", eval_every=6)
    fit(config, tmp_path, around)
    # After the first step, the first with shorter inputs, and both evaluations.
    assert trimmed == [1, 3, 6, 10]


def test_default_work_directory_and_its_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(small_runs.adding_run())
    assert (tmp_path / "runs" / "adding" / "result.json").is_file()


def test_batches_are_those_of_the_steps_in_their_order():
    source = [f"batch {step}" for step in range(30)]
    assert list(batches(source, 5, 20)) == source[5:20]
    assert list(batches(source, 5, 5)) == []


def test_best_keeps_the_earliest_of_equals_and_counts_what_is_stale():
    best = Best()
    for step, value in enumerate([3.0, 2.0, 2.5, 2.0, 4.0, 5.0], 1):
        best = best.after(value, step, maximise=False)
    assert best == Best(2.0, 2, stale=4)
    assert Best(2.0, 1).after(3.0, 2, maximise=True) == Best(3.0, 2)
    assert Best(2.0, 1, 3).after(2.0, 2, maximise=True) == Best(2.0, 1, 4)
    assert Best(2.0, 1, 3).after(1.0, 2, maximise=True) == Best(2.0, 1, 4)


def test_without_test_that_split_is_never_read(tmp_path, monkeypatch, capsys):
    config = small_runs.adding_run()
    load_data = type(config.data).load

    def guarded(*arguments):
        dataset = load_data(*arguments)
        evaluation = dataset.evaluation

        def only_validation(split, batch_size):
            assert split == "validation"
            return evaluation(split, batch_size)

        monkeypatch.setattr(dataset, "evaluation", only_validation)
        return dataset

    monkeypatch.setattr(type(config.data), "load", guarded)
    result = fit(config, tmp_path, test=False)
    assert result["test"] is None and math.isfinite(result["validation"]["mse"])
    assert {row["split"] for row in small_runs.rows(tmp_path)} == {"train", "validation"}
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "adding: validation, best step" in said
        and f"{result['baselines']['mean']['mse']:.4g}" in said
    )


@pytest.mark.parametrize("plots", [True, False])
def test_plots_are_drawn_unless_they_are_not_wanted(tmp_path, monkeypatch, plots):
    drawn = []
    around = {"plot_curves": lambda rows, path: drawn.append(path.name)}
    config = small_runs.adding_run()
    monkeypatch.setattr(type(config.task), "illustrate", lambda *_: drawn.append("illustrated"))
    fit(config, tmp_path, around, plots=plots)
    assert drawn == (["curves.png", "illustrated"] if plots else [])


def test_a_second_signal_acts_at_once(capfd, request):
    earlier = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, earlier))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert "once more: at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was held back")
    with Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._note
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signals_are_left_alone_in_a_thread():
    seen = []

    def work():
        with Signals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


def test_log_sets_aside_what_is_beyond_or_torn(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    log.rewind(3)
    assert not log.path.exists()
    for step in (1, 2, 3):
        log.append(step, "train", {"loss": float("nan") if step == 2 else 0.5}, 1.23456)
    log.append(2, "test", {"loss": 1.0}, 2.0)
    log.append(2, "test", {"loss": 9.0}, 2.0)  # the test row of a step is written once
    assert log.rows()[1] == {"step": 2, "split": "train", "loss": None, "seconds": 1.235}
    assert [row["loss"] for row in log.rows() if row["split"] == "test"] == [1.0]
    with log.path.open("a") as file:
        file.write('{"step": 2, "sp')
    log.rewind(2)
    assert [(row["step"], row["split"]) for row in log.rows()] == [
        (1, "train"),
        (2, "train"),
        (2, "test"),
    ]
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(discarded[0])["step"], discarded[1]] == [3, '{"step": 2, "sp']
    log.rewind(1)
    assert (
        len((tmp_path / "metrics.discarded.jsonl").read_text().splitlines()) == 4
    )  # added to, not replaced


def test_rows_that_find_no_room_come_later_and_whole(tmp_path):
    """A limit on the size of files stands for a full disk; the half of a row is taken back."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, "train", {"loss": 1.0}, 0.0)
    before = log.path.read_bytes()
    held = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, held[1][1]))
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match="too large"):
                log.append(step, "train", {"loss": 1.0}, 0.0)
            assert log.path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, held[1])
        signal.signal(signal.SIGXFSZ, held[0])
    log.append(4, "train", {"loss": 1.0}, 0.0)
    assert [row["step"] for row in small_runs.rows(tmp_path)] == [1, 2, 3, 4]


def test_a_row_that_lost_its_line_end_is_kept_whole(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, "train", {"loss": 1.0}, 0.0)
    log.path.write_text(log.path.read_text().removesuffix("\n"))
    log.rewind(1)
    log.append(2, "train", {"loss": 1.0}, 0.0)
    assert [row["step"] for row in log.rows()] == [1, 2]
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


def test_given_parameters_begin_a_run_where_they_fit(tmp_path, capsys):
    """By path and shape; the others as ever, and averages begin as the parameters do."""
    config = small_runs.adding_run(ema=0.9, steps=1)
    parts = small_runs.remembered(config, config.data.restore(tmp_path))
    ever, given = parts.steps.init(), parts.steps.init().params
    given = jax.tree.map(lambda x: np.full(x.shape, 0.25, np.float64), given)
    given["head"] = {"kernel": np.zeros((4, 7)), "scale": np.zeros(2)}
    state, told = initial_params(ever, given)
    cell = state.params["recurrent"]["layers_0"]["cell"]
    assert all((x == 0.25).all() and x.dtype == np.float32 for x in jax.tree.leaves(cell))
    jax.tree.map(np.testing.assert_array_equal, state.params["head"], ever.params["head"])
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert "3 of the model's 5 arrays begin as given" in told
    assert "head/kernel (4, 1): begins as ever" in told and "head/scale (2,): not used" in told
    result = fit(config, tmp_path / "run", params=given)
    assert "3 of the model's 5 arrays begin as given" in capsys.readouterr().err
    assert result["params_sha256"] != fit(config, tmp_path / "other")["params_sha256"]
    with pytest.raises(UserError, match="none fits"):
        fit(config, tmp_path / "none", params={"head": {"kernel": np.zeros(3)}})


def test_a_forecaster_that_loses_to_a_rule_is_told_what_to_try():
    result = {
        "task": "Forecasting",
        "test": {"mase": 1.2},
        "validation": {"mase": 0.5},
        "baselines": {"last_value": {"mase": 3.0}, "seasonal_naive": {"mase": 1.1}},
    }
    assert beaten(result).startswith("seasonal_naive is as good or better: mase 1.1 against 1.2.")
    assert "--model.window seasonal" in beaten(result)
    assert beaten({**result, "test": {"mase": 1.0}}) == ""
    assert beaten({**result, "test": None}) == ""  # validation it is
    assert beaten({**result, "task": "Classification"}) == ""  # its figures have no mase


def test_a_language_model_that_loses_to_the_counts_of_words_is_told_what_to_try():
    worse, words = {"perplexity": 92.0}, {"unigram": {"perplexity": 87.0}}
    language = {"task": "LanguageModeling", "test": worse, "validation": worse, "baselines": words}
    assert beaten(language).startswith("unigram is as good or better: perplexity 87 against 92.")


def test_a_classifier_that_loses_to_the_linear_model_is_told_what_to_try():
    rows = {"majority": {"accuracy": 0.5}, "linear": {"accuracy": 0.9}}
    figures = {"accuracy": 0.88}
    result = {"task": "Classification", "test": None, "validation": figures, "baselines": rows}
    assert beaten(result).startswith("linear is as good or better: accuracy 0.9 against 0.88.")
    assert "--model.ngrams 3" in beaten(result)
    assert beaten({**result, "test": {"accuracy": 0.91}}) == ""
    alone = beaten(
        {**result, "test": {"accuracy": 0.4}, "baselines": {"majority": {"accuracy": 0.5}}}
    )
    assert alone.startswith("majority is as good") and "f1 and auc" in alone
