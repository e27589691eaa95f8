# SPDX-License-Identifier: Apache-2.0
"""The IMDB reviews: found, downloaded, prepared; nothing here leaves this computer."""

import hashlib
import http.server
import io
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import small_runs

from flax_lstm.data import download as downloading
from flax_lstm.data import imdb
from flax_lstm.data.download import RemoteFile, download
from flax_lstm.data.fingerprint import content_sha256
from flax_lstm.data.imdb import Imdb
from flax_lstm.data.language import ImdbLanguage
from flax_lstm.data.vocabulary import UNKNOWN, Vocabulary
from flax_lstm.errors import UserError

WAYS_OUT = [
    "TFDS_DATA_DIR",
    "--data.archive",
    "quickstart",
    "rotten_tomatoes",
    "stocks",
    "electricity",
    "adding_problem",
]


def make_archive(path: Path) -> RemoteFile:
    """Reviews in the layout of the published archive; returns what identifies it."""
    texts = {
        # the last is a copy of a test review, of which the real ones have 123
        "train/pos": [f"film {i} is<br /><br />a joy" for i in range(40)]
        + ["play 4 secretword is a joy"],
        "train/neg": [f"film {i} is a bore" for i in range(40)],
        "test/pos": [f"play {i} secretword is a joy" for i in range(6)],
        "test/neg": [f"play {i} secretword is a bore" for i in range(6)],
        "train/unsup": [f"song {i} rareword" for i in range(10)] + ["play 3 secretword is a joy"],
    }
    with tarfile.open(path, "w:gz") as tar:
        for folder, reviews in texts.items():
            for number, review in enumerate(reviews):
                info = tarfile.TarInfo(f"aclImdb/{folder}/{number}_7.txt")
                info.size = len(review)
                tar.addfile(info, io.BytesIO(review.encode()))
    return remote("http://unused", path.read_bytes())


def test_a_run_knows_the_reviews_by_their_content_alone(tmp_path):
    """Not by the names of versions and times that lie beside them."""
    data = Imdb(data_dir=str(tmp_path))
    assert content_sha256(data.files()) is None
    folder = tmp_path / "imdb_reviews" / "plain_text" / "1.0.0"
    folder.mkdir(parents=True)
    records = folder / "imdb_reviews-train.array_record-00000-of-00001"
    records.write_bytes(b"a fine film")
    before = content_sha256(data.files())
    (folder / "dataset_info.json").write_text("{}")
    assert content_sha256(data.files()) == before is not None
    records.write_bytes(b"a fine firm")
    assert content_sha256(ImdbLanguage(data_dir=str(tmp_path)).files()) != before


def remote(url: str, content: bytes) -> RemoteFile:
    return RemoteFile(url, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder in which the small archive was prepared."""
    folder = tmp_path_factory.mktemp("tfds")
    archive = folder / "own.tar.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imdb, "ARCHIVE", make_archive(archive))
        imdb.prepare(folder, str(archive))
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `cuts` are the bytes after which one connection after the other breaks."""

    content = b""
    ranges = True
    cuts: tuple[int, ...] = ()
    requests: list[str | None]

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/archive.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.requests.append(wanted)
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-"))
            if wanted and self.server.ranges
            else 0
        )
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.server.cuts
        end = (
            cuts[len(self.server.requests) - 1]
            if len(self.server.requests) <= len(cuts)
            else len(body)
        )
        self.wfile.write(body[:end])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.content = np.random.default_rng(0).bytes(200_000)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_whole(server, tmp_path):
    download(remote(server.url(), server.content), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == server.content
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_download_goes_on_after_cuts(server, tmp_path):
    server.cuts = (70_000, 50_000)
    download(remote(server.url(), server.content), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == server.content
    assert server.requests == [None, "bytes=70000-", "bytes=120000-"]


def test_download_goes_on_where_another_program_was_killed(server, tmp_path):
    (tmp_path / "a.part").write_bytes(server.content[:150_000])
    download(remote(server.url(), server.content), tmp_path / "a")
    assert server.requests == ["bytes=150000-"]
    assert (tmp_path / "a").read_bytes() == server.content


def test_download_from_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.part").write_bytes(b"x" * 1000)
    download(remote(server.url(), server.content), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == server.content


def test_download_that_brings_nothing_ends_and_keeps_what_is_there(server, tmp_path):
    server.cuts = (70_000, 0)
    with pytest.raises((OSError, downloading.http.client.HTTPException)):
        download(remote(server.url(), server.content), tmp_path / "a")
    assert (tmp_path / "a.part").read_bytes() == server.content[:70_000]
    assert len(server.requests) == 2


def test_spoilt_download_is_named_and_kept_aside(server, tmp_path):
    expected = remote(server.url(), server.content)
    server.content = server.content[:-1] + b"!"
    with pytest.raises(UserError, match="SHA-256") as error:
        download(expected, tmp_path / "a")
    assert str(tmp_path / "a.spoilt") in str(error.value)
    assert (tmp_path / "a.spoilt").read_bytes() == server.content
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_spoilt_archive_of_the_user_is_named_and_left(tmp_path, monkeypatch):
    archive = tmp_path / "own.tar.gz"
    monkeypatch.setattr(imdb, "ARCHIVE", make_archive(archive))
    content = archive.read_bytes()
    archive.write_bytes(content[:-20] + b"!" + content[-19:])
    with pytest.raises(UserError, match=r"own\.tar\.gz is not the file"):
        Imdb(data_dir=str(tmp_path), archive=str(archive)).load(tmp_path / "assets")
    assert archive.stat().st_size == len(content)
    archive.write_bytes(content[:-1])
    with pytest.raises(UserError, match="bytes instead of"):
        Imdb(data_dir=str(tmp_path), archive=str(archive)).load(tmp_path / "assets")
    with pytest.raises(UserError, match="does not exist"):
        Imdb(data_dir=str(tmp_path), archive=str(tmp_path / "none.tar.gz")).load(
            tmp_path / "assets"
        )


def test_without_network_the_ways_out_are_named(server, tmp_path, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    monkeypatch.setattr(imdb, "ARCHIVE", RemoteFile(f"http://127.0.0.1:{port}/x", 10, "0"))
    with pytest.raises(UserError) as error:
        Imdb(data_dir=str(tmp_path)).load(tmp_path / "assets")
    assert all(way in str(error.value) for way in [*WAYS_OUT, str(tmp_path)])


def test_a_silent_name_server_does_not_hold_it_up(tmp_path, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(downloading, "TIMEOUT", -0.4)
    monkeypatch.setattr(downloading.urllib.request, "urlopen", lambda *_, **__: held.wait(30))
    with pytest.raises(TimeoutError):
        download(RemoteFile("http://example.invalid", 10, "0"), tmp_path / "a")
    held.set()


def test_download_and_prepare(server, tmp_path, monkeypatch, capfd):
    archive = tmp_path / "served.tar.gz"
    identity = make_archive(archive)
    server.content = archive.read_bytes()
    monkeypatch.setattr(imdb, "ARCHIVE", identity._replace(url=server.url()))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    data = Imdb(validation_fraction=0.2)
    dataset = data.load(tmp_path / "assets")
    assert len(server.requests) == 1
    assert dataset.info.labels == ("neg", "pos")
    assert dataset.size("train") + dataset.size("validation") == 80 and dataset.size("test") == 12
    data.load(tmp_path / "assets")
    assert len(server.requests) == 1  # prepared once
    assert capfd.readouterr().out == ""  # stdout belongs to results
    assert "tensorflow" not in sys.modules


def test_reviews(prepared):
    files = Imdb(data_dir=str(prepared)).source
    train = files.reviews("train")
    assert sorted(zip(train.texts, train.labels, strict=True)) == sorted(
        [(f"film {i} is  a joy", "pos") for i in range(40)]
        + [(f"film {i} is a bore", "neg") for i in range(40)]
        + [("play 4 secretword is a joy", "pos")]
    )
    assert len(files.reviews("unsupervised").texts) == 11


def test_splits_are_disjoint_and_of_train_alone(prepared):
    splits = Imdb(data_dir=str(prepared)).source.splits()
    train, validation, test = (set(splits[name].texts) for name in ("train", "validation", "test"))
    assert (
        len(train) + len(validation) == 80
        and not train & validation
        and not (train | validation) & test
    )
    assert 0 < len(validation) < 20
    assert (
        Imdb(data_dir=str(prepared), split_seed=1).source.splits()["validation"].texts
        != splits["validation"].texts
    )


def test_language_model_never_sees_test_or_validation_text(prepared, tmp_path):
    data = ImdbLanguage(data_dir=str(prepared), sequence_length=7)
    documents = {name: rows.texts for name, rows in data.source.splits().items()}
    assert not set(documents["train"]) & {*documents["validation"], *documents["test"]}
    assert (
        documents["validation"] == Imdb(data_dir=str(prepared)).source.splits()["validation"].texts
    )
    assert sum("song" in text for text in documents["train"]) == 10
    vocabulary = data.load(tmp_path).info.vocabulary
    assert vocabulary.encode(["secretword"])[0].tolist() == [1]
    assert vocabulary.encode(["rareword"])[0].tolist() != [1]
    labelled = ImdbLanguage(data_dir=str(prepared), unsupervised=False).source.splits()["train"]
    assert not any("song" in text for text in labelled.texts)


def test_no_test_review_reaches_training_or_vocabulary(prepared, tmp_path, monkeypatch):
    """By the hash of every text that a vocabulary or a classifier is trained on; and every word
    that is trained on is one of the vocabulary's."""

    def digests(texts):
        return {hashlib.sha256(text.encode()).hexdigest() for text in texts}

    given = []
    train = Vocabulary.train_cached.__func__
    monkeypatch.setattr(
        Vocabulary,
        "train_cached",
        classmethod(lambda cls, texts, *rest: given.extend(texts) or train(cls, texts, *rest)),
    )
    forbidden = digests(Imdb(data_dir=str(prepared)).source.reviews("test").texts)
    assert len(forbidden) == 12
    for data, assets in (
        (Imdb(data_dir=str(prepared)), tmp_path / "classifier"),
        (ImdbLanguage(data_dir=str(prepared), sequence_length=7), tmp_path / "language"),
    ):
        given.clear()
        dataset = data.load(assets)
        assert given and not digests(given) & forbidden
        # Of a row with a test review's own word, that word would be unknown to the vocabulary.
        source = dataset.train(4, seed=0)
        ids = np.concatenate([source[step].inputs.ravel() for step in range(len(source))])
        assert len(ids) > 100 and UNKNOWN not in ids
    classifier = Imdb(data_dir=str(prepared)).load(tmp_path / "classifier")
    for split in ("train", "validation"):
        assert not digests(classifier.read(split).texts) & forbidden
    assert digests(classifier.read("test").texts) == forbidden


def test_classifier_takes_over_the_vocabulary_of_a_language_model(prepared, tmp_path):
    language = ImdbLanguage(data_dir=str(prepared)).load(tmp_path / "language").info
    (tmp_path / "assets").mkdir()
    shutil.copy(tmp_path / "language" / "vocabulary.json", tmp_path / "assets")
    info = Imdb(data_dir=str(prepared)).load(tmp_path / "assets").info
    assert info.vocabulary.decode(range(info.vocabulary_size)) == language.vocabulary.decode(
        range(language.vocabulary_size)
    )


def test_prepared_in_a_format_that_needs_tensorflow(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "tfds")
    info = tmp_path / "tfds" / imdb.FOLDER / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="tfrecord"):
        Imdb(data_dir=str(tmp_path / "tfds")).source.splits()


def test_spoilt_records_are_a_user_error(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "tfds")
    record = next((tmp_path / "tfds" / imdb.FOLDER).glob("*train*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read the train reviews"):
        Imdb(data_dir=str(tmp_path / "tfds")).source.splits()


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Imdb(data_dir="x", archive="y.tar.gz").absolute() == Imdb(
        data_dir=str(tmp_path / "x"), archive=str(tmp_path / "y.tar.gz")
    )
    assert Imdb().absolute() == Imdb()


@pytest.mark.slow
def test_the_real_reviews(tmp_path):
    small_runs.real_reviews()
    dataset = Imdb().load(tmp_path)
    assert (
        dataset.size("train") + dataset.size("validation") == 25_000 - 123
        and dataset.size("test") == 25_000
    )
    labels = np.concatenate(
        [batch.targets[batch.weights > 0] for batch in dataset.evaluation("test", 256)]
    )
    assert np.bincount(labels).tolist() == [12_500, 12_500]
