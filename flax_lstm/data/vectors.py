# SPDX-License-Identifier: Apache-2.0
"""Word vectors from a file, for the words of a vocabulary.

The text format of word2vec, fastText (`.vec`) and GloVe (`.txt`), either also as `.gz`: a word and
its numbers in each line, separated by spaces. A first line of two whole numbers (words and
numbers a word) is passed over.

Axes: N words found, E numbers a word.
"""

import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_lstm.data.tables import plain_file
from flax_lstm.data.vocabulary import Vocabulary
from flax_lstm.errors import UserError, require

log = logging.getLogger(__name__)


class WordVectors(NamedTuple):
    """What a file knows of a vocabulary."""

    path: Path
    ids_N: np.ndarray  # int32, places in the vocabulary
    vectors_NE: np.ndarray  # float32


def read_vectors(path: Path, vocabulary: Vocabulary) -> WordVectors:
    """The vectors of the words that the vocabulary has; of words that are written in several ways
    (The, the) the first in the file, for these files begin with the frequent ones. Other lines are
    passed over without a look at their numbers. A line at a time: files of any size.

    Raises UserError for a file that is missing, spoilt, or of another form, with the line.
    """
    found: dict[int, np.ndarray] = {}
    width = 0
    for number, line in _lines(path):
        head, _, tail = line.rstrip().partition(" ")
        if number == 1 and head.isdigit() and tail.isdigit():
            continue
        width = width or line.rstrip().count(" ")
        require(width > 0, f"{path}, line {number} is no word with numbers behind it, by spaces")
        # Some words of some files hold spaces themselves.
        word, *values = line.rstrip().rsplit(" ", width)
        id = vocabulary.id_of(word)
        if id is None or id in found:
            continue
        found[id] = _numbers(values, width, path, number)
    require(width > 0, f"{path} is empty")
    require(bool(found), f"{path} has none of the {vocabulary.size:,} words of the vocabulary")
    log.info(
        "%s: vectors of %s numbers for %s of the %s words",
        *(path, width, f"{len(found):,}", f"{vocabulary.size:,}"),
    )
    return WordVectors(path, np.array([*found], np.int32), np.stack([*found.values()]))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1."""
    plain_file(path)
    try:
        opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                # The published files hold words that are cut within a character.
                yield number, line.decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.vectors: cannot read {path}: {error}") from None


def _numbers(values: list[str], width: int, path: Path, number: int) -> np.ndarray:
    try:
        vector_E = np.array(values, np.float32)
        assert len(vector_E) == width and np.isfinite(vector_E).all()
    except (ValueError, AssertionError):
        raise UserError(
            f"data.vectors: {path}, line {number} does not end in {width} finite numbers as the "
            "first line does"
        ) from None
    return vector_E
