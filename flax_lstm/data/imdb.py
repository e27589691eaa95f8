# SPDX-License-Identifier: Apache-2.0
"""The Large Movie Review Dataset (Maas et al. 2011, ai.stanford.edu/~amaas/data/sentiment): 25,000
labelled reviews to train on, 25,000 to test on, and 50,000 without labels.

Read by TensorFlow Datasets from what it prepared once as array_record; TensorFlow itself is not
needed.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

from flax_lstm.data.download import RemoteFile, download, verify
from flax_lstm.data.sources import Texts, TextSource, split_by_hash
from flax_lstm.data.text import TextData
from flax_lstm.errors import UserError
from flax_lstm.machine.files import expanded

log = logging.getLogger(__name__)

ARCHIVE = RemoteFile(
    url="http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    size=84_125_825,
    sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
)
LABELS = ["neg", "pos"]
FOLDER = Path("imdb_reviews", "plain_text", "1.0.0")  # within the folder of TensorFlow Datasets


@dataclasses.dataclass(frozen=True)
class ImdbSource(TextSource):
    """The labelled reviews, from where they are found, or put once."""

    data_dir: str  # of TensorFlow Datasets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    archive: str  # to prepare from; empty: it is fetched
    validation_fraction: float
    seed: int

    def folder(self) -> Path:
        """Of TensorFlow Datasets."""
        named = self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        return expanded(named)

    def files(self) -> list[Path]:
        """Of what is prepared, the reviews alone: what else lies there names versions and times."""
        return sorted((self.folder() / FOLDER).glob("*.array_record*"))

    def reviews(self, split: str) -> Texts:
        """The "train", "test" or "unsupervised" reviews; prepares the data first where that is not
        done.

        Raises UserError without data and network, and for a spoilt archive.
        """
        data_dir = self.folder()
        if not _is_prepared(data_dir):
            prepare(data_dir, self.archive)
        import tensorflow_datasets as tfds  # here: it takes a second, and predictions do without

        try:
            source = tfds.data_source(
                "imdb_reviews", split=split, data_dir=data_dir, download=False
            )
            records = source.__getitems__(
                range(len(source))
            )  # all at once is three times as fast as one by one
        except Exception as error:  # of many types
            raise UserError(
                f"cannot read the {split} reviews in {data_dir / FOLDER} "
                f"({type(error).__name__}: {error}); "
                "move that folder away to have them prepared anew"
            ) from None
        texts = [re.sub(r"<br\s*/?>", " ", record["text"].decode("utf-8")) for record in records]
        if split == "unsupervised":
            return Texts.unlabelled(texts)
        return Texts(texts, [LABELS[record["label"]] for record in records])

    def splits(self) -> dict[str, Texts]:
        """Validation is split off by a hash of the texts. The 123 reviews that were published for
        training and are copies of test reviews are left out."""
        test = self.reviews("test")
        known = set(test.texts)
        train = self.reviews("train")
        train = train.take(n for n, text in enumerate(train.texts) if text not in known)
        shares = {"validation": self.validation_fraction}
        return {**split_by_hash(train, shares, self.seed), "test": test}


@dataclasses.dataclass(frozen=True)
class ImdbDocuments(TextSource):
    """The same reviews for language models: those to train on are joined by the reviews without
    labels, and none of them is a copy of a validation or test review."""

    reviews: ImdbSource
    unsupervised: bool  # whether those without labels are read

    def files(self) -> list[Path]:
        return self.reviews.files()

    def splits(self) -> dict[str, Texts]:
        texts = {name: rows.texts for name, rows in self.reviews.splits().items()}
        if self.unsupervised:
            texts["train"] = texts["train"] + self.reviews.reviews("unsupervised").texts
        held_out = {*texts["validation"], *texts["test"]}
        texts["train"] = [text for text in texts["train"] if text not in held_out]
        return {name: Texts.unlabelled(texts[name]) for name in ("train", "validation", "test")}


@dataclasses.dataclass(frozen=True)
class Imdb(TextData):
    """Sentiment of IMDB reviews. No training or validation review is a copy of a test review."""

    free: ClassVar[tuple[str, ...]] = (*TextData.free, "unlabelled")
    paths: ClassVar[tuple[str, ...]] = (*TextData.paths, "data_dir", "archive")

    # Folder of TensorFlow Datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data_dir: str = ""
    archive: str = ""  # a local aclImdb_v1.tar.gz to prepare from instead of downloading it (80 MB)
    # The 50,000 reviews without labels are read for task.virtual: half the rows of a batch
    unlabelled: bool = False
    max_length: int = 200  # tokens kept of a longer review

    classes = tuple(LABELS)

    @property
    def source(self) -> ImdbSource:
        return ImdbSource(self.data_dir, self.archive, self.validation_fraction, self.split_seed)

    @property
    def has_unlabelled(self) -> bool:
        return self.unlabelled

    def texts_without_labels(self) -> list[str]:
        return self.source.reviews("unsupervised").texts


def _is_prepared(data_dir: Path) -> bool:
    info = data_dir / FOLDER / "dataset_info.json"
    if not info.exists():
        return False
    if (form := json.loads(info.read_text(encoding="utf-8")).get("fileFormat")) != "array_record":
        raise UserError(
            f"{info.parent} was prepared as {form}, which cannot be read without TensorFlow; "
            "choose another folder (--data.data-dir or TFDS_DATA_DIR) and it is prepared there "
            "as array_record"
        )
    return True


def prepare(data_dir: Path, archive: str) -> None:
    """Writes the array_record files that `tfds.data_source` reads, from the archive, which is
    downloaded if not given.

    The work happens once: other processes wait for it, and a killed one leaves nothing that looks
    finished.
    """
    downloads = data_dir / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with (downloads / "imdb_reviews.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_prepared(data_dir):
                path = _local(archive) if archive else _downloaded(downloads / "aclImdb_v1.tar.gz")
                log.info("preparing the IMDB reviews in %s (once)", data_dir)
                _write_records(data_dir, path)
    except OSError as error:
        raise UserError(f"cannot prepare the IMDB reviews in {data_dir}: {error}") from None


def _local(archive: str) -> Path:
    path = expanded(archive)
    if not path.is_file():
        raise UserError(f"data.archive: {path} does not exist")
    verify(path, ARCHIVE)
    return path


def _downloaded(path: Path) -> Path:
    if path.exists():
        verify(path, ARCHIVE)
        return path
    try:
        download(ARCHIVE, path)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"the IMDB reviews are not in {path.parent.parent}, and {ARCHIVE.url} cannot be "
            f"downloaded: {error}\n"
            "What can be done:\n"
            "  set TFDS_DATA_DIR (or --data.data-dir) to a folder where imdb_reviews is prepared "
            "as array_record,\n"
            "  give the archive, fetched elsewhere: --data.archive aclImdb_v1.tar.gz, or\n"
            "  train a config that needs no download: quickstart, rotten_tomatoes, stocks, "
            "electricity, adding_problem"
        ) from None
    return path


def _write_records(data_dir: Path, archive: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder("imdb_reviews", data_dir=data_dir, file_format="array_record")
    stock = builder._split_generators
    builder._split_generators = lambda _: stock(
        _Archive(archive)
    )  # the stock one opens the tar with TensorFlow
    with contextlib.redirect_stdout(sys.stderr):  # it greets on stdout, which belongs to results
        builder.download_and_prepare()


class _Archive:
    """The two methods of a download manager that the builder calls."""

    def __init__(self, path: Path):
        self._path = path

    def download(self, url: str) -> Path:
        return self._path

    def iter_archive(self, path: Path) -> Iterator[tuple[str, Any]]:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member)
