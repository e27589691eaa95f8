# SPDX-License-Identifier: Apache-2.0
"""What data sets of texts have in common: a vocabulary, and tokens prepared in files."""

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from flax_lstm.data.base import Data
from flax_lstm.data.fingerprint import file_sha256
from flax_lstm.data.memory import absolute_path
from flax_lstm.data.prepared import INDEX, Prepared
from flax_lstm.data.preparing import Recipe, prepare
from flax_lstm.data.sources import TextSource, check_fraction
from flax_lstm.data.vocabulary import TokenizerKind, Vocabulary
from flax_lstm.errors import UserError, listing, require, within
from flax_lstm.machine.files import expanded, write_atomically

MOST_WORDS = 4_000_000  # of a vocabulary
LONGEST = 10_000_000  # tokens, of a text
VOCABULARY = "vocabulary.json"  # in the folder of what is fitted


@dataclasses.dataclass(frozen=True)
class VocabularyInfo:
    """What is kept of texts for predictions: a folder with vocabulary.json, and the other fields in
    info.json."""

    vocabulary: Vocabulary

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary.size

    def save(self, assets: Path) -> None:
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "vocabulary"
        }
        self.vocabulary.save(assets / VOCABULARY)
        write_atomically(
            assets / "info.json", json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
        )

    @classmethod
    def load(cls, assets: Path) -> Self:
        """Reads what `save` wrote. Raises UserError if it is missing or spoilt."""
        try:
            saved = json.loads((assets / "info.json").read_text(encoding="utf-8"))
            fields: Any = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in saved.items()
            }
            return cls(vocabulary=Vocabulary.load(assets / VOCABULARY), **fields)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read what training saved of its data, {assets / 'info.json'}: {error}"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Data):
    """The settings that every data set of texts has."""

    vocabulary_size: int = 20_000  # most frequent training tokens kept, special ones included
    # Word: lower-cased words and punctuation; bpe: byte pairs, nothing unknown
    tokenizer: TokenizerKind = "word"
    validation_fraction: float = 0.1  # share of the training rows held out to choose the best step
    split_seed: int = 0  # another value draws another split; the seed of the model does not move it
    # Folder that flax-lstm prepare wrote: its tokens are read, in the place of the texts
    prepared: str = ""

    # Settings that the tokens do not depend on
    free: ClassVar[tuple[str, ...]] = ("prepared",)
    paths: ClassVar[tuple[str, ...]] = ("prepared",)  # settings that name files and folders

    def __post_init__(self) -> None:
        least = 4 if self.tokenizer == "word" else 260
        require(
            least <= self.vocabulary_size <= MOST_WORDS,
            f"data.vocabulary-size is {self.vocabulary_size}: give at least {least}, and at most "
            f"{MOST_WORDS:,}",
        )
        within("data.split-seed", self.split_seed, 0, 2**63 - 1)
        check_fraction("validation-fraction", self.validation_fraction)

    def absolute(self) -> Self:
        found: Any = {name: absolute_path(getattr(self, name)) for name in self.paths}
        return dataclasses.replace(self, **found)

    def files(self) -> list[Path]:
        """The index of what was prepared says by hashes what the tokens are."""
        named = [expanded(self.prepared) / INDEX] if self.prepared else super().files()
        return [*named, *self.source.files()]

    @property
    @abstractmethod
    def source(self) -> TextSource:
        """Where the texts come from."""

    def prepare(self, folder: Path) -> None:
        """Encodes all texts into files, to be trained from with `prepared` (see
        `flax_lstm.data.prepared`); what is there already is kept."""
        settings = {
            f.name: getattr(self.absolute(), f.name)
            for f in dataclasses.fields(self)
            if f.name not in self.free
        }
        recipe = Recipe(self.vocabulary_size, self.tokenizer, settings)
        prepare(self.source.stream, recipe, folder)

    def open_prepared(self, assets: Path) -> Prepared:
        """What was prepared, whose vocabulary is in `assets` from then on. Raises UserError where
        the settings, or the vocabulary there, are others, and where a byte is not as it was."""
        found = Prepared.open(expanded(self.prepared))
        found.verify(file_sha256)
        for field in dataclasses.fields(self):
            name, now = field.name, getattr(self, field.name)
            if name in self.free or name in self.paths or name not in found.settings:
                continue
            then, flag = found.settings[name], f"--data.{name.replace('_', '-')}"
            # What was not asked for here is as it was there.
            silent = now == field.default and name not in ("vocabulary_size", "tokenizer")
            before = "none" if then == "" else then
            require(
                silent or then == now,
                f"{found.folder} was prepared with {flag} {before}, not {now}",
            )
        vocabulary = found.vocabulary()
        if not (assets / VOCABULARY).exists():
            vocabulary.save(assets / VOCABULARY)
        require(
            Vocabulary.load(assets / VOCABULARY) == vocabulary,
            f"{found.folder} was prepared with another vocabulary than that of {assets}",
        )
        return found

    def vocabulary(self, assets: Path, texts: Sequence[str]) -> Vocabulary:
        """The one saved in `assets` if there is one (say of a language model), else trained on
        `texts` and saved."""
        path = assets / VOCABULARY
        if not path.exists():
            Vocabulary.train_cached(texts, self.vocabulary_size, self.tokenizer).save(path)
        return Vocabulary.load(path)

    def inherit(self, theirs: Path, ours: Path) -> None:
        """Takes over the vocabulary, whatever its size: weights know words by their ids."""
        self._begin_with(Vocabulary.load(theirs / VOCABULARY), ours, f"that of {theirs.parent}")

    def adopt(self, words: Sequence[str], ours: Path) -> None:
        """Takes over the words of an embedding that was trained elsewhere."""
        require(self.tokenizer == "word", "words: with --data.tokenizer word, for these are no bpe")
        self._begin_with(Vocabulary.of(words), ours, "the words given")

    def _begin_with(self, vocabulary: Vocabulary, ours: Path, said: str) -> None:
        if not (ours / VOCABULARY).exists():
            vocabulary.save(ours / VOCABULARY)
        require(
            Vocabulary.load(ours / VOCABULARY) == vocabulary,
            f"{ours.parent} was begun with another vocabulary than {said}: name a new folder, "
            "--workdir DIR",
        )


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises UserError for an empty split."""
    empty = [name for name, size in sizes.items() if not size]
    found = ", ".join(f"{name} {size}" for name, size in sizes.items())
    require(
        not empty,
        f"no row for the split {listing(empty)} ({found}): give more rows or a larger share of "
        "them",
    )
