# SPDX-License-Identifier: Apache-2.0
"""Any number of tags for a text: tables, figures against scikit-learn, and a run.

Axes: N rows, B batch, K tags.
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.special
import small_runs

from flax_lstm import Tagging, UserError, load
from flax_lstm.__main__ import main
from flax_lstm.data import TagTable
from flax_lstm.data.base import Batch
from flax_lstm.data.text import TagInfo
from flax_lstm.tasks.examination import TagAnswers, examine_tags

pytestmark = pytest.mark.usefixtures("quick_compile")

TAGS = ["comedy", "drama", "war"]


def table(n: int = 90) -> pd.DataFrame:
    """Texts that name some of their tags."""
    generator = np.random.default_rng(0)
    has_NK = generator.random((n, 3)) < 0.5
    tags = [[tag for tag, has in zip(TAGS, row, strict=True) if has] for row in has_NK]
    texts = [f"number {i} {' '.join(row)} film" for i, row in enumerate(tags)]
    return pd.DataFrame({"text": texts, "tags": tags})


def test_every_kind_of_table_gives_the_same_targets(tmp_path):
    """Lists, as values or written out, and text with a separator; a row without tags has none."""
    frame = table()
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "t.parquet")
    for name, separator in (("t.csv", "|"), ("semicolon.csv", ";")):
        joined = frame.assign(tags=frame.tags.map(separator.join))
        joined.to_csv(tmp_path / name, index=False)
    found = []
    # As pandas writes the lists of a JSON-lines file, and the arrays of a Parquet file
    frame.to_csv(tmp_path / "lists.csv", index=False)
    frame.assign(tags=frame.tags.map(json.dumps)).to_csv(tmp_path / "json.csv", index=False)
    pd.read_parquet(tmp_path / "t.parquet").to_csv(tmp_path / "arrays.csv", index=False)
    written = ("lists.csv", "json.csv", "arrays.csv")
    for name in ("t.jsonl", "t.parquet", "t.csv", "semicolon.csv", *written):
        data = TagTable(str(tmp_path / name), tag_separator=";" if "semi" in name else "|")
        dataset = data.load(tmp_path / name.replace(".", "_"))
        assert dataset.info.tags == tuple(TAGS)
        (batch,) = dataset.evaluation("train", 128)
        texts = dataset.read("train").texts
        for place, row in enumerate(dataset.order("train")):
            has = [tag in texts[row].split() for tag in TAGS]
            assert batch.targets[place].tolist() == has and batch.weights[place] == 1
        size = dataset.size("train")
        np.testing.assert_allclose(
            dataset.info.tag_shares, batch.targets[:size].mean(axis=0), rtol=1e-6
        )
        found.append(batch.targets)
    assert all((targets == found[0]).all() for targets in found)
    assert found[0].dtype == np.float32 and not found[0][:size].any(axis=1).all()


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "holds 3 in row 2, neither a list of tags"), ({"a": 1}, "in row 2, neither a list")],
)
def test_values_that_are_no_tags_are_said(tmp_path, value, said):
    rows = [{"text": "a", "tags": ["x"]}, {"text": "b", "tags": value}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=said):
        TagTable(str(path)).load(tmp_path / "assets")


def test_what_cannot_be_trained_is_said(tmp_path):
    frame = table(40)
    none = frame.assign(tags=[[]] * 40)
    none.to_json(tmp_path / "none.jsonl", orient="records", lines=True)
    with pytest.raises(UserError, match="no training row has a tag"):
        TagTable(str(tmp_path / "none.jsonl")).load(tmp_path / "a")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    new = frame.assign(tags=[["dramma"]] * 40)
    new.to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    data = TagTable(str(tmp_path / "t.jsonl"), test_path=str(tmp_path / "new.jsonl"))
    with pytest.raises(UserError, match=r"tag 'dramma' of 40 row.* Did you mean drama\?"):
        data.load(tmp_path / "b")
    with pytest.raises(UserError, match="no column 'genres'"):
        replace(data, label_column="genres").load(tmp_path / "c")
    with pytest.raises(UserError, match=r"data\.balanced"):
        TagTable(str(tmp_path / "t.jsonl"), balanced=True)


def test_figures_are_those_of_scikit_learn():
    """Added over two batches; the last row weighs nothing."""
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    logits_NK = generator.normal(size=(40, 3)).astype(np.float32)
    has_NK = (generator.random((40, 3)) < 0.4).astype(np.float32)
    weights_N = np.ones(40, np.float32)
    weights_N[-1] = 0
    task = Tagging()
    info: TagInfo = object.__new__(TagInfo)
    parts = [
        task.measure(jax.numpy.asarray(logits_NK[rows]), batch, info)
        for rows in (slice(20), slice(20, 40))
        for batch in [Batch(None, has_NK[rows], None, weights_N[rows])]
    ]
    found = task.figures(jax.tree.map(lambda a, b: np.asarray(a + b), *parts), info)
    actual, given = has_NK[:-1], logits_NK[:-1] >= 0
    shares = 1 / (1 + np.exp(-logits_NK[:-1].astype(np.float64)))
    expected = {
        "loss": metrics.log_loss(actual.ravel(), shares.ravel()),
        "accuracy": metrics.accuracy_score(actual, given),
        "f1": metrics.f1_score(actual, given, average="macro"),
        "f1_micro": metrics.f1_score(actual, given, average="micro"),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_each_tag_is_judged_as_scikit_learn_does():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(3)
    logits_NK, has_NK = generator.normal(size=(50, 3)), generator.random((50, 3)) < 0.4
    has_NK[:, 2] = False  # a tag that no row has
    texts = [f"text {n}" for n in range(50)]
    found = examine_tags(TagAnswers(logits_NK, has_NK, np.arange(50), texts), list("abc"), 2.0)
    given_NK = logits_NK >= 0
    expected = metrics.precision_recall_fscore_support(has_NK, given_NK, zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "examples"), expected, strict=True):
        told = [np.nan if row[name] is None else row[name] for row in found["classes"]]
        np.testing.assert_allclose(told, np.where(np.isnan(values), told, values), rtol=1e-12)
    assert [row["recall"] is None for row in found["classes"]] == [False, False, True]
    share_NK = 1 / (1 + np.exp(-logits_NK / 2))
    loss = metrics.log_loss(has_NK.ravel(), share_NK.ravel())
    assert found["calibration"]["loss_calibrated"] == pytest.approx(loss, rel=1e-9)
    assert sum(b["examples"] for b in found["calibration"]["bins"]) == has_NK.size
    right_N = (given_NK == has_NK).all(axis=1)
    rows = [(g["examples"], g["accuracy"]) for g in found["lengths"]]
    assert sum(n * a for n, a in rows) == pytest.approx(right_N.sum())
    wrong = np.where(given_NK == has_NK, -np.inf, np.abs(logits_NK)).max(axis=1)
    assert [e["text"] for e in found["errors"][:3]] == [texts[n] for n in np.argsort(-wrong)[:3]]
    worst = int(np.argmax(wrong))
    there = ", ".join(np.array(list("abc"))[has_NK[worst]]) or "no tag"
    assert found["errors"][0]["label"] == there
    assert found["errors"][0]["probability"] == pytest.approx(1 / (1 + np.exp(-wrong.max())))


def test_a_run_learns_its_tags_and_answers(tmp_path, capsys, caplog):
    frame = table()
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    base = small_runs.text_run(
        tmp_path, steps=60, learning_rate=0.05, eval_every=60, warmup_steps=0
    )
    path = str(tmp_path / "t.jsonl")
    data = TagTable(path, vocabulary_size=30, max_length=8, tag_separator=";")
    model = replace(base.model, hidden_size=8, embed_size=8, pooling="max", head_dropout=0.0)
    train = replace(base.train, checkpoint_every=60, schedule_steps=60, warmup_steps=0, ema=0.0)
    config = replace(base, data=data, task=Tagging(), model=model, train=train)
    result = small_runs.fit(config, tmp_path / "run")
    assert result["test"]["f1"] > result["baselines"]["shares"]["f1"] + 0.2
    run = load(tmp_path / "run")
    answer = run.predict(frame.assign(predicted="mine"))
    assert [*answer] == ["text", "tags", "predicted_input", "predicted"] + [
        f"probability_{tag}" for tag in TAGS
    ]
    for row in answer.itertuples():
        given = [tag for tag in TAGS if getattr(row, f"probability_{tag}") >= 0.5]
        assert row.predicted == ";".join(given)
    # What it answers can be learnt from as it is, and a text without words is named.
    new = answer[["text", "predicted"]].assign(text="new " + answer.text)
    new.to_csv(tmp_path / "answered.csv", index=False)
    more = replace(data, more_path=str(tmp_path / "answered.csv")).load(tmp_path / "more")
    assert more.info.tags == tuple(TAGS) and more.size("train") > 90
    with caplog.at_level("WARNING"):
        run.predict(["a war film", ""])
    assert "nothing to read in 1 row(s), 2" in caplog.text
    told = run.evaluate(file=tmp_path / "t.jsonl")
    assert told["examples"] == 90 and told["f1"] > 0.6
    again = run.predict(frame.assign(predicted="mine", predicted_input="theirs"))
    assert again.columns.is_unique and {"mine", "theirs"} <= {*again.iloc[0].astype(str)}
    assert main(["predict", str(tmp_path / "run"), "--text", "a war film"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [*said["probabilities"]] == TAGS and {*said["tags"]} <= {*TAGS}
    assert main(["evaluate", str(tmp_path / "run"), "--split", "test"]) == 0
    said = capsys.readouterr().out
    assert "by tag" in said and all(tag in said for tag in TAGS) and "temperature" in said
    assert (tmp_path / "run" / "evaluation" / "test.png").stat().st_size > 1_000


def test_each_tag_has_a_linear_model_beside_it(tmp_path):
    """As scikit-learn's one against the rest; a tag that all training rows have is given to all."""
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    frame = table()
    frame["tags"] = [[*tags, "all"] for tags in frame.tags]
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    dataset = TagTable(str(tmp_path / "t.jsonl"), test_fraction=0.4).load(tmp_path / "assets")
    found = Tagging().rivals(dataset, "test", tmp_path)["linear"]
    train, test = dataset.read("train"), dataset.read("test")
    assert dataset.info.tags[0] == "all"
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    model = make_pipeline(words, OneVsRestClassifier(LogisticRegression(C=10, max_iter=1000)))
    model.fit(train.texts, dataset.info.targets("train", train.labels)[:, 1:])
    given = np.insert(model.predict(test.texts), 0, 1, axis=1)
    has = dataset.info.targets("test", test.labels)
    assert found["f1"] == pytest.approx(f1_score(has, given, average="macro"))
    assert found["accuracy"] == pytest.approx(accuracy_score(has, given))
    assert Tagging(linear=False).rivals(dataset, "validation", tmp_path) == {}


def test_several_models_give_tags_by_their_mean_probability():
    logits = np.array([[[0.5, -800.0]], [[-3.0, 800.0]]])
    pooled = Tagging().pooled([*logits])
    mean = scipy.special.expit(logits).mean(axis=0)
    np.testing.assert_allclose(scipy.special.expit(pooled), mean, rtol=1e-12)
