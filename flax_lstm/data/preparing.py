# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm prepare`: documents of any size to files of tokens, once; see `prepared.py` for their
form.

The documents are taken in parts of some megabytes. Of each the texts are encoded (on all cores, by
`tokenizers`), written, and closed by a note with hashes of the texts and of the tokens; a part with
its note is passed over when the command is given again.
"""

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_lstm.data.prepared import INDEX, SPLITS, VOCABULARY, Part, Prepared, rows_file, sha256
from flax_lstm.data.tables import sort_labels
from flax_lstm.data.vocabulary import END, TokenizerKind, Vocabulary
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.files import write_atomically
from flax_lstm.machine.lock import locked

log = logging.getLogger(__name__)
CHARACTERS = 1 << 24  # of a part
NOTE = ".note.json"


class Document(NamedTuple):
    """A text, its split, and its label where it has one."""

    split: str
    text: str
    label: str | None = None


Documents = Callable[[], Iterable[Document]]  # the same on every call


class Recipe(NamedTuple):
    """What tokens depend on, besides the documents."""

    vocabulary_size: int
    tokenizer: TokenizerKind
    settings: Mapping[str, Any]  # of the data, as they are kept in the index


def prepare(documents: Documents, recipe: Recipe, folder: Path) -> Prepared:
    """Writes the folder, or what is missing in it. Raises UserError for a folder that holds
    something else, or was begun with other settings, and where the disk is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", f"{folder}"):
            _begin(folder, recipe)
            vocabulary = _vocabulary(folder, documents, recipe)
            notes = [_part(folder, n, texts, vocabulary) for n, texts in _parts(documents())]
            _finish(folder, notes, vocabulary, recipe)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; the same command again "
            "goes on where it was"
        ) from None
    return Prepared.open(folder)


def _begin(folder: Path, recipe: Recipe) -> None:
    """Says whose folder it is, or compares."""
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(recipe.settings))
    if not path.exists():
        ours = ("lock", f"{path.name}.part")  # of one that was killed
        strange = [file.name for file in folder.iterdir() if file.name not in ours]
        require(not strange, f"{folder} holds other files ({listing(strange)}): name a new folder")
        write_atomically(path, json.dumps(wanted))
    found = saved(path)
    require(found is not None, f"cannot read {path}: delete {folder} and prepare again")
    assert found is not None
    differ = [
        f"{name} {found.get(name)!r} there, {value!r} now"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    require(
        not differ,
        f"{folder} was begun with other settings ({'; '.join(differ)}): name a new folder",
    )


def _vocabulary(folder: Path, documents: Documents, recipe: Recipe) -> Vocabulary:
    path = folder / VOCABULARY
    if not path.exists():
        log.info("reading the training documents for the vocabulary")
        train = (document.text for document in documents() if document.split == "train")
        Vocabulary.train(train, recipe.vocabulary_size, recipe.tokenizer).save(path)
    return Vocabulary.load(path)


def _parts(documents: Iterable[Document]) -> Iterator[tuple[int, list[Document]]]:
    """The documents in parts, numbered."""
    numbers, part, characters = itertools.count(), [], 0
    for document in documents:
        part.append(document)
        characters += len(document.text)
        if characters >= CHARACTERS:
            yield next(numbers), part
            part, characters = [], 0
    if part:
        yield next(numbers), part


class Note(NamedTuple):
    """What is kept of a part beside its tokens."""

    texts_sha256: str
    parts: dict[str, Part]
    token_counts: list[list[int]]  # (id, how often it is in the training split)
    labels: dict[str, list[str]]  # of the documents of each split, where they have some


def _part(folder: Path, number: int, documents: list[Document], vocabulary: Vocabulary) -> Note:
    """Encodes and writes a part, unless that was done."""
    texts_sha256 = _sha256(documents)
    path = folder / f"{number:05}{NOTE}"
    found = saved(path) or {}
    if found.get("texts_sha256") == texts_sha256:
        # Of a note that is damaged there is nothing to keep: its part is written again.
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            parts = {split: Part(*row) for split, row in found["parts"].items()}
            return Note(texts_sha256, parts, found["token_counts"], found["labels"])
    dtype, parts = np.dtype(f"<u{bytes_a_token(vocabulary)}"), {}
    counts_V = np.zeros(vocabulary.size, np.int64)
    labels = {
        split: [d.label for d in documents if d.split == split and d.label is not None]
        for split in SPLITS
    }
    for split in SPLITS:
        ids = vocabulary.encode([d.text for d in documents if d.split == split])
        stream = np.concatenate([np.append(row, END) for row in ids] or [np.zeros(0)])
        data = stream.astype(dtype).tobytes()
        name = f"{number:05}.{split}.tokens"
        write_atomically(folder / name, data)
        parts[split] = Part(name, len(stream), hashlib.sha256(data).hexdigest(), len(ids))
        lengths = np.array([len(row) + 1 for row in ids], "<i4")
        write_atomically(rows_file(folder / name), lengths.tobytes())
        if split == "train":
            counts_V += np.bincount(stream.astype(np.int64), minlength=vocabulary.size)
    some = [[int(i), int(counts_V[i])] for i in np.flatnonzero(counts_V)]
    note = Note(texts_sha256, parts, some, labels)
    write_atomically(path, json.dumps(note._asdict()))
    log.info("part %s: %s tokens", number, f"{sum(part.tokens for part in parts.values()):,}")
    return note


def saved(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none, or another thing."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _sha256(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for split, text, label in documents:
        digest.update(f"{split}\0{text}\0{label}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def bytes_a_token(vocabulary: Vocabulary) -> int:
    return 2 if vocabulary.size <= 1 << 16 else 4


def _label_rows(folder: Path, notes: list[Note]) -> list[str]:
    """Puts the place of each document's label beside its length, now that all labels are known;
    returns them. Raises UserError for a label that no training document has."""
    names = sort_labels({name for note in notes for name in note.labels["train"]})
    places = {name: place for place, name in enumerate(names)}
    for note in notes:
        for split, part in note.parts.items():
            found = note.labels[split]
            strange = next((name for name in found if name not in places), None)
            require(
                strange is None,
                f"label {strange!r} of the {split} split is in no training row. Trained labels: "
                f"{listing(names)}",
            )
            if found:
                path = rows_file(folder / part.name)
                lengths = np.fromfile(path, "<i4").reshape(part.documents, -1)[:, 0]
                rows = np.stack([lengths, [places[name] for name in found]], axis=1)
                write_atomically(path, rows.astype("<i4").tobytes())
    return names


def _finish(folder: Path, notes: list[Note], vocabulary: Vocabulary, recipe: Recipe) -> None:
    """Writes the index: from then on the folder can be trained from."""
    counts_V = np.zeros(vocabulary.size, np.int64)
    for note in notes:
        ids, counts = np.array(note.token_counts, np.int64).reshape(-1, 2).T
        counts_V[ids] += counts
    labels = _label_rows(folder, notes)
    parts = {
        split: [
            part._replace(rows_sha256=sha256(rows_file(folder / part.name)))
            for note in notes
            if (part := note.parts[split]).tokens
        ]
        for split in SPLITS
    }
    empty = [split for split in SPLITS if not parts[split]]
    require(not empty, f"no document for the split {', '.join(empty)}: give more documents")
    index = {
        "settings": recipe.settings,
        "bytes_a_token": bytes_a_token(vocabulary),
        "token_counts": counts_V.tolist(),
        "parts": parts,
        "labels": labels,
    }
    write_atomically(folder / INDEX, json.dumps(index))
    total = {split: sum(part.tokens for part in parts[split]) for split in SPLITS}
    log.info("%s: %s tokens", folder, ", ".join(f"{s} {n:,}" for s, n in total.items()))
