# SPDX-License-Identifier: Apache-2.0
"""Documents for language modelling by truncated back-propagation through time.

Axes: B lanes (rows of a batch), T tokens of a window.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from flax_lstm.data.base import Batch, BatchSource
from flax_lstm.data.corpus import LONGEST, Corpus, VocabularyInfo, check_sizes
from flax_lstm.data.documents import is_plain_text, stream_documents
from flax_lstm.data.imdb import ImdbDocuments, ImdbSource
from flax_lstm.data.memory import InMemory, in_memory
from flax_lstm.data.order import permutation
from flax_lstm.data.prepared import PieceBatches, Prepared
from flax_lstm.data.sources import DocumentSource, Texts, check_shares
from flax_lstm.data.tables import read_table, text_values
from flax_lstm.data.vocabulary import END, Vocabulary
from flax_lstm.errors import require


@dataclasses.dataclass(frozen=True)
class LanguageInfo(VocabularyInfo):
    """What a language model needs to know about the data."""

    token_counts: tuple[int, ...]  # how often each id is a target in one epoch of training
    sequence_length: int
    backwards: bool = False  # texts are read from their end to their beginning

    def order(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens of a text in the order in which they are read, and back."""
        return tokens[::-1] if self.backwards else tokens

    def sample(self, batch_size: int) -> Batch:
        return Lanes(np.zeros(2, np.int32), batch_size, self.sequence_length)[0]


class Lanes:
    """A stream of tokens read in B parallel lanes, T tokens a step; every token but the first is a
    target once.

    Lane b reads the b-th of B equal parts. Steps beyond the end of a lane have weight 0.
    """

    def __init__(self, stream: np.ndarray, batch_size: int, sequence_length: int):
        self._stream, self._batch_size, self._sequence_length = stream, batch_size, sequence_length
        self._lane = -(
            -(len(stream) - 1) // batch_size
        )  # tokens of a lane; the last ones may have fewer

    def __len__(self) -> int:
        return -(-self._lane // self._sequence_length)

    def __getitem__(self, step: int) -> Batch:
        within_T = step * self._sequence_length + np.arange(self._sequence_length)
        at_BT = np.arange(self._batch_size)[:, None] * self._lane + within_T
        valid_BT = (within_T < self._lane) & (at_BT < len(self._stream) - 1)
        at_BT = np.where(valid_BT, at_BT, 0)
        return Batch(
            inputs=self._stream[at_BT] * valid_BT,
            targets=self._stream[at_BT + 1] * valid_BT,
            lengths=valid_BT.sum(axis=1).astype(np.int32),
            weights=valid_BT.astype(np.float32),
            reset=np.full(self._batch_size, step == 0),
        )


class LanguageBatches:
    """Training batches: each epoch reads the documents in an order of its own, a function of (seed,
    epoch)."""

    def __init__(
        self, documents: Sequence[np.ndarray], batch_size: int, sequence_length: int, seed: int
    ):
        self._documents, self._seed = documents, seed
        self._length = len(Lanes(_stream(documents), batch_size, sequence_length))

        @functools.lru_cache(maxsize=1)  # of some 100 MB; steps come in order
        def lanes(epoch: int) -> Lanes:
            order = permutation(len(documents), seed, epoch)
            return Lanes(_stream([documents[i] for i in order]), batch_size, sequence_length)

        self._lanes = lanes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, self._length)
        return self._lanes(epoch)[position]


def _stream(documents: Sequence[np.ndarray]) -> np.ndarray:
    """A separator, then all documents, each with the separator that ends it."""
    return np.concatenate([np.array([END], np.int32), *documents])


class LanguageDataset:
    """Encoded documents of "train", "validation" and "test", each closed by the separator. An
    example is a token."""

    def __init__(self, info: LanguageInfo, splits: Mapping[str, Sequence[np.ndarray]]):
        self.info = info
        self._splits = splits

    def size(self, split: str) -> int:
        """Tokens that are targets."""
        return sum(len(document) for document in self._splits[split])

    def train(self, batch_size: int, seed: int) -> BatchSource:
        return LanguageBatches(self._splits["train"], batch_size, self.info.sequence_length, seed)

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Consecutive windows; every token is a target once, and only the first batch resets the
        state."""
        lanes = Lanes(_stream(self._splits[split]), batch_size, self.info.sequence_length)
        return (lanes[step] for step in range(len(lanes)))


class PreparedDataset:
    """The same from files of tokens. Training has its own order (see `PieceBatches`); what is
    judged are the very documents that would be without them."""

    def __init__(self, info: LanguageInfo, prepared: Prepared, settings: "LanguageData"):
        self.info, self._prepared, self._settings = info, prepared, settings

    def size(self, split: str) -> int:
        """Tokens that are targets."""
        if split == "train":
            return len(self._prepared.stream(split)) - 1
        return sum(stop - start for start, stop in self._judged(split))

    def train(self, batch_size: int, seed: int) -> BatchSource:
        stream = self._prepared.stream("train")
        return PieceBatches(stream, batch_size, self.info.sequence_length, seed)

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Consecutive windows of the documents that are judged."""
        stream = self._prepared.stream(split)
        documents = [stream.read(start, stop) for start, stop in self._judged(split)]
        lanes = Lanes(_stream(documents), batch_size, self.info.sequence_length)
        return (lanes[step] for step in range(len(lanes)))

    def _judged(self, split: str) -> list[tuple[int, int]]:
        """From where to where in the stream they go."""
        ends = [1, *self._prepared.stream(split).ends()]
        chosen = judged(np.diff(ends).tolist(), self._settings)
        return [(ends[i], ends[i + 1]) for i in chosen]


def judged(lengths: Sequence[int], settings: "LanguageData") -> list[int]:
    """As many of the documents of these lengths, drawn at random but steadily, as hold the tokens
    to judge."""
    if not settings.evaluation_tokens:
        return [*range(len(lengths))]
    order = np.random.default_rng(settings.split_seed).permutation(len(lengths))
    before = np.cumsum([0] + [lengths[i] for i in order[:-1]])
    return sorted(order[before < settings.evaluation_tokens].tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageData(Corpus):
    """Language modelling; subclasses say where the documents come from (`source`)."""

    gives: ClassVar[type | None] = LanguageInfo

    sequence_length: int = 100  # tokens of a training step: as far as gradients reach back
    evaluation_tokens: int = 0  # about as many of validation and of test are judged; 0: all
    # Texts are read from their end to their beginning: for a classifier that does so
    # (model.backwards)
    backwards: bool = False

    free: ClassVar[tuple[str, ...]] = (
        *("prepared", "sequence_length", "evaluation_tokens", "backwards"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.sequence_length <= LONGEST,
            f"data.sequence-length is {self.sequence_length}: give at least 1 token, at most "
            f"{LONGEST:,}",
        )
        require(
            0 <= self.evaluation_tokens <= 2**63 - 1,
            f"data.evaluation-tokens is {self.evaluation_tokens}: give 0 (all) or a number",
        )
        require(
            not (self.backwards and self.prepared),
            "data.backwards: tokens in files (data.prepared) are read forwards only; leave one",
        )

    def prepare(self, folder: Path) -> None:
        require(
            not self.backwards, "data.backwards: tokens in files are read forwards only; leave it"
        )
        super().prepare(folder)

    def load(self, assets: Path) -> LanguageDataset | PreparedDataset:
        if self.prepared:
            return self._load_prepared(assets)
        documents = {name: rows.texts for name, rows in self.source.splits().items()}
        check_sizes({name: len(texts) for name, texts in documents.items()})
        vocabulary = self.vocabulary(assets, documents["train"])
        end, turn = np.array([END], np.int32), -1 if self.backwards else 1
        splits = {
            name: [np.concatenate([ids[::turn], end]) for ids in vocabulary.encode_cached(texts)]
            for name, texts in documents.items()
        }
        for name in ("validation", "test"):
            lengths = [len(document) for document in splits[name]]
            splits[name] = [splits[name][i] for i in judged(lengths, self)]
        counts = np.bincount(np.concatenate(splits["train"]), minlength=vocabulary.size)
        counted = tuple(counts.tolist())
        info = LanguageInfo(vocabulary, counted, self.sequence_length, self.backwards)
        info.save(assets)
        return LanguageDataset(info, splits)

    def _load_prepared(self, assets: Path) -> PreparedDataset:
        found = self.open_prepared(assets)
        vocabulary = found.vocabulary()
        info = LanguageInfo(vocabulary, found.token_counts, self.sequence_length)
        info.save(assets)
        return PreparedDataset(info, found, self)

    def outline(self) -> LanguageInfo:
        """The full vocabulary."""
        size = self.vocabulary_size
        return LanguageInfo(Vocabulary.blank(size), (1,) * size, self.sequence_length)

    def restore(self, assets: Path) -> LanguageInfo:
        """What an earlier `load` fitted."""
        return LanguageInfo.load(assets)


@dataclasses.dataclass(frozen=True)
class ImdbLanguage(LanguageData):
    """Language modelling of IMDB reviews, clean of test texts: pretraining for `Imdb` with the same
    split.

    Trains on the training reviews that `Imdb` trains on and the reviews without labels, less those
    that are copies of a validation or test review. The test reviews are only ever evaluated.
    """

    paths: ClassVar[tuple[str, ...]] = (*LanguageData.paths, "data_dir", "archive")

    # Folder of TensorFlow Datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data_dir: str = ""
    archive: str = ""  # a local aclImdb_v1.tar.gz to prepare from instead of downloading it (80 MB)
    unsupervised: bool = True  # read the 50,000 reviews without labels, too

    @property
    def source(self) -> ImdbDocuments:
        reviews = ImdbSource(self.data_dir, self.archive, self.validation_fraction, self.split_seed)
        return ImdbDocuments(reviews, self.unsupervised)


@dataclasses.dataclass(frozen=True)
class LanguageTable(LanguageData, InMemory):
    """Your own documents: the text column of a table, the lines of a .txt file, or all files of
    texts below a folder, which are .txt (one text there), .jsonl and .ndjson, each also as .gz, and
    .parquet."""

    below: ClassVar[tuple[str, ...]] = ("**/*",)
    paths: ClassVar[tuple[str, ...]] = (*LanguageData.paths, "path", "test_path")

    # table (.csv .tsv .jsonl .ndjson .parquet), .txt with a text in each line, folder of files, or
    # folder of train/ and test/ such
    path: str = ""
    # Column of the table with the texts; a name such as title+body joins two columns
    text_column: str = "text"
    test_path: str = ""  # table or folder with the test rows; without it they are split off
    # Share of the rows split off for the test where no test rows are given
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation_fraction, self.test_fraction, "row")

    @property
    def source(self) -> DocumentSource:
        shares = {"test": self.test_fraction, "validation": self.validation_fraction}
        files = self.path, self.test_path
        return DocumentSource(*files, shares, self.split_seed, self._texts, self.text_column)

    def _texts(self, path: Path) -> Texts:
        if path.is_dir() or is_plain_text(path):
            return Texts.unlabelled([*stream_documents(path, self.text_column)])
        frame = self.held() if in_memory(path) else read_table(path)
        return Texts.unlabelled(text_values(frame, self.text_column, path))
