# SPDX-License-Identifier: Apache-2.0
"""What is said of a classifier's answers, against scikit-learn, SciPy and by hand; the linear model
beside it; and the commands that show it."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_runs

from flax_lstm import UserError, fit, load
from flax_lstm.__main__ import main
from flax_lstm.commands import evaluate
from flax_lstm.tasks import linear
from flax_lstm.tasks.examination import (
    Answers,
    calibration_error,
    examine,
    fit_temperature,
    log_softmax,
    reliability,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
LABELS = ("bad", "good", "ugly")


@pytest.fixture(scope="module")
def answers() -> Answers:
    generator = np.random.default_rng(0)
    actual = generator.integers(0, 3, 400)
    logits = generator.normal(size=(400, 3)) + 1.5 * np.eye(3)[actual]
    texts = [f"text {n}" for n in range(400)]
    return Answers(logits, actual, generator.integers(0, 50, 400), texts)


def test_classes_and_confusion_are_scikit_learns(answers):
    metrics = pytest.importorskip("sklearn.metrics")
    found = examine(answers, LABELS, None)
    predicted = answers.logits_NK.argmax(1)
    table = metrics.confusion_matrix(answers.actual_N, predicted)
    assert found["confusion"] == {"labels": [*LABELS], "actual_by_predicted": table.tolist()}
    expected = metrics.precision_recall_fscore_support(answers.actual_N, predicted)
    ours = [[row[k] for row in found["classes"]] for k in ("precision", "recall", "f1", "examples")]
    np.testing.assert_allclose(ours, expected)
    json.dumps(found, allow_nan=False)


def test_the_temperature_is_where_the_loss_is_least(answers):
    optimize = pytest.importorskip("scipy.optimize")
    hot = 3 * answers.logits_NK  # three times too sure

    def loss(temperature):
        rows = np.arange(len(hot))
        return -log_softmax(hot / temperature)[rows, answers.actual_N].mean()

    best = optimize.minimize_scalar(loss, bounds=(0.1, 20), options={"xatol": 1e-6})
    assert fit_temperature(hot, answers.actual_N) == pytest.approx(best.x, rel=1e-4)
    found = examine(answers._replace(logits_NK=hot), LABELS, float(best.x))["calibration"]
    assert found["ece_calibrated"] < found["ece"]
    assert found["loss_calibrated"] == pytest.approx(loss(best.x))
    always_right = fit_temperature(np.eye(3), np.arange(3))  # no end to it: the bound
    assert always_right == pytest.approx(0.01)


def test_calibration_error_by_hand():
    """Three at .9 of which two are right, one at .55 that is right."""
    bins = reliability(np.array([0.9, 0.9, 0.9, 0.55]), np.array([True, True, False, True]))
    assert [b["examples"] for b in bins] == [1, 3]
    expected = (3 * abs(0.9 - 2 / 3) + abs(0.55 - 1)) / 4
    assert calibration_error(bins) == pytest.approx(expected)


def test_worst_errors_and_lengths(answers):
    found = examine(answers, LABELS, None)
    sure = np.exp(log_softmax(answers.logits_NK).max(1))
    right = answers.logits_NK.argmax(1) == answers.actual_N
    worst = max(np.flatnonzero(~right), key=lambda n: sure[n])
    first = found["errors"][0]
    assert first["text"] == f"text {worst}" and first["probability"] == pytest.approx(sure[worst])
    assert first["label"] == LABELS[answers.actual_N[worst]] != first["predicted"]
    groups = found["lengths"]
    assert sum(group["examples"] for group in groups) == 400
    assert all(a["longest"] < b["shortest"] for a, b in itertools.pairwise(groups))
    for group in groups:
        inside = (answers.tokens_N >= group["shortest"]) & (answers.tokens_N <= group["longest"])
        assert group["accuracy"] == pytest.approx(right[inside].mean())


def test_a_class_that_never_occurs_has_no_recall():
    few = Answers(np.eye(3)[[0, 0]], np.array([0, 1]), np.array([1, 2]), ["a", "b"])
    rows = examine(few, LABELS, 1.0)["classes"]
    assert rows[2] == {
        "label": "ugly",
        "examples": 0,
        "precision": None,
        "recall": None,
        "f1": None,
    }
    assert rows[1]["recall"] == 0 and rows[1]["precision"] is None


def test_labels_and_texts_are_shown_as_they_are(capsys):
    """Nothing in them is taken for markup."""
    odd = Answers(np.eye(2)[[0, 1, 1]], np.array([0, 1, 0]), np.ones(3, int), ["a", "b", "[/c]"])
    evaluate.show(examine(odd, ("[/x]", ":smile:"), None))
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("[/x]", ":smile:", "[/c]"))


def test_the_linear_model_sees_training_texts_alone():
    pytest.importorskip("sklearn")
    train = ["a fine film", "a dull film", "fine acting", "dull acting"]
    outputs = linear.linear_log_probabilities(
        train, ["pos", "neg", "pos", "neg"], ["neg", "pos"], ["fine unheard words", "dull"]
    )
    assert outputs.shape == (2, 2) and (outputs.argmax(1) == [1, 0]).all()
    np.testing.assert_allclose(np.exp(outputs).sum(1), 1)
    assert linear.linear_log_probabilities(["", ""], ["a", "b"], ["a", "b"], ["x"]) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = small_runs.text_run(folder)
    fit(config, folder / "run", plots=False)
    return folder


def test_the_result_has_the_linear_model_beside_it(folder, caplog, monkeypatch):
    pytest.importorskip("sklearn")
    config, run = small_runs.text_run(folder), load(folder / "run")
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["baselines"]["linear"].keys() == result["test"].keys()
    dataset = run.dataset()
    train, test = dataset.read("train"), dataset.read("test")
    outputs = linear.linear_log_probabilities(
        train.texts, train.labels, run.info.labels, test.texts
    )
    right = np.array(run.info.labels)[outputs.argmax(1)] == test.labels
    assert result["baselines"]["linear"]["accuracy"] == pytest.approx(right.mean())
    places = [run.info.labels.index(label) for label in test.labels]
    loss = -outputs[np.arange(len(places)), places].mean()
    assert result["baselines"]["linear"]["loss"] == pytest.approx(loss, rel=1e-5)

    with monkeypatch.context() as patch:  # kept: not fitted again
        patch.setattr("flax_lstm.tasks.classification.linear_log_probabilities", None)
        again = config.task.rivals(dataset, "test", run.workdir / "evaluation")
    assert again["linear"] == result["baselines"]["linear"]
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with caplog.at_level("INFO"):
        assert config.task.rivals(dataset, "validation", folder / "elsewhere") == {}
    assert "pip install 'flax-lstm[text]'" in caplog.text
    without = replace(config.task, linear=False)
    assert without.rivals(dataset, "validation", folder / "elsewhere") == {}


def test_evaluate_examines_a_split(folder, capsys):
    assert main(["evaluate", str(folder / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    test = json.loads((folder / "run" / "result.json").read_text())["test"]
    assert {name: told[name] for name in test} == pytest.approx(test, rel=1e-6)
    assert told["split"] == "test" and "temperature" in told["calibration"]
    table = np.array(told["confusion"]["actual_by_predicted"])
    assert np.trace(table) / table.sum() == pytest.approx(test["accuracy"])
    run = load(folder / "run")
    read = run.dataset().read("test")
    label_of = dict(zip(read.texts, read.labels, strict=True))
    errors = pd.DataFrame(told["errors"])
    assert len(errors) > 1 and errors["label"].tolist() == [label_of[t] for t in errors["text"]]
    predicted = run.predict(errors[["text"]])
    assert errors["predicted"].tolist() == predicted["predicted"].tolist()
    np.testing.assert_allclose(errors["probability"], predicted["probability"], rtol=1e-5)
    assert errors["probability"].nunique() > 1
    assert (folder / "run" / "evaluation" / "test.png").stat().st_size > 10_000
    assert json.loads((folder / "run" / "evaluation" / "test.json").read_text()) == told
    assert main(["evaluate", str(folder / "run"), "--split", "validation"]) == 0
    shown = capsys.readouterr().out
    assert "calibration error" in shown and "temperature" not in shown  # not on its own examples


def test_evaluate_judges_new_labelled_data(folder, capsys):
    """The test rows written to a file have the figures of the test split, in whatever order."""
    read = load(folder / "run").dataset().read("test")
    table = pd.DataFrame({"label": read.labels[::-1], "text": read.texts[::-1]})
    table.to_csv(folder / "new.csv", index=False)
    command = ["evaluate", str(folder / "run"), "--json", "--input"]
    assert main([*command, str(folder / "new.csv")]) == 0
    told = json.loads(capsys.readouterr().out)
    result = json.loads((folder / "run" / "result.json").read_text())
    assert told["split"] == "input" and told["examples"] == len(table)
    assert {name: told[name] for name in result["test"]} == pytest.approx(result["test"], rel=1e-6)
    table.assign(label="odd").to_csv(folder / "odd.csv", index=False)
    assert main([*command, str(folder / "odd.csv")]) == 2
    assert "label 'odd'" in capsys.readouterr().err
    assert (folder / "run" / "evaluation" / "input.new.json").exists()
    with pytest.raises(UserError, match="new labelled data are judged of texts"):
        small_runs.adding_run().data.labelled(folder / "new.csv", folder)


def test_predict_keeps_the_users_columns(folder, capsys, caplog):
    table = pd.DataFrame(
        {"text": ["a fine", "", "dull b"], "label": ["x", "y", "z"], "n": [1, 2, 3]}
    )
    run = load(folder / "run")
    found = run.predict(table)
    pd.testing.assert_frame_equal(found[["text", "label", "n"]], table, check_dtype=False)
    shares = found[["probability_bad", "probability_good"]].to_numpy()
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares.max(1), found["probability"])
    assert found["predicted"].tolist() == np.array(["bad", "good"])[shares.argmax(1)].tolist()
    assert "nothing to read in 1 row(s), 2" in caplog.text
    holes = run.predict(table.assign(text=["a fine", None, "dull b"]))
    assert holes["probability"].tolist() == found["probability"].tolist()
    table.to_csv(folder / "asked.csv", index=False)  # the empty text is an empty field
    assert run.config.data.read(folder / "asked.csv")["n"].tolist() == ["1", "2", "3"]
    again = run.predict(found)
    assert again["predicted_input"].tolist() == found["predicted"].tolist()
    assert main(["predict", str(folder / "run"), "--text", " "]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out).keys() == {"label", "probability", "probabilities"}
    assert "nothing to read in 1 row(s), 1" in told.err
