# SPDX-License-Identifier: Apache-2.0
"""From text to token ids and back: a thin, fixed recipe around Hugging Face `tokenizers`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flax_lstm.data.cache import fingerprint, remember
from flax_lstm.errors import UserError
from flax_lstm.machine.files import write_atomically

PAD, UNKNOWN, END = 0, 1, 2  # ids that every vocabulary has; END also separates documents
SPECIAL_TOKENS = ["<pad>", "<unk>", "<eos>"]
# Characters from which a corpus is worth a file in the cache folder: seconds of work
LARGE = 5_000_000

TokenizerKind = Literal["word", "bpe"]


class Vocabulary:
    """Lower-cased words, or byte pairs, as int32 ids. Ids 0, 1, 2 are padding, unknown, and end of
    text.

    `word` cuts at white space and around punctuation ("don't." becomes don ' t .) and maps rare
    words to <unk>: the usual choice for classification. `bpe` learns byte pairs (Sennrich et al.
    2016, over bytes as in GPT-2): nothing is unknown, at the price of longer sequences and ids 3 to
    258 spent on single bytes.
    """

    def __init__(self, tokenizer: Tokenizer):
        # A "<pad>" that someone wrote in a text is four characters, not id 0
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], size: int, kind: TokenizerKind = "word") -> "Vocabulary":
        """The `size` most frequent tokens of `texts`, special ones included. The same texts give
        the same ids."""
        if kind == "word":
            tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer: trainers.Trainer = trainers.WordLevelTrainer(
                vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False
            )
        else:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=size,
                special_tokens=SPECIAL_TOKENS,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.train_from_iterator((_valid(text) for text in texts), trainer)
        return cls(tokenizer)

    @classmethod
    def train_cached(
        cls, texts: Sequence[str], size: int, kind: TokenizerKind = "word"
    ) -> "Vocabulary":
        """`train`, which the next program finds in the cache folder if the texts are many."""
        if sum(map(len, texts)) < LARGE:
            return cls.train(texts, size, kind)

        def arrays() -> dict[str, np.ndarray]:
            return {
                "json": np.frombuffer(
                    cls.train(texts, size, kind)._tokenizer.to_str().encode(), np.uint8
                )
            }

        saved = remember(fingerprint([tokenizers.__version__, f"{size} {kind}", *texts]), arrays)
        return cls(Tokenizer.from_str(saved["json"].tobytes().decode()))

    @classmethod
    def of(cls, words: Sequence[str]) -> "Vocabulary":
        """Of words that an embedding was trained with elsewhere: ids 3, 4, ... in their order.
        Raises UserError for what are no words, and for one that comes twice, however it is
        written."""
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise UserError("words: a list of words in the order of their ids, such as ['a', 'b']")
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        written = [tokenizer.normalizer.normalize_str(_valid(word)) for word in words]
        ids: dict[str, int] = {}
        for word in (*SPECIAL_TOKENS, *written):
            if word in ids:
                raise UserError(
                    f"a vocabulary has each word once, in lower case: {word!r} is twice"
                )
            ids[word] = len(ids)
        tokenizer.model = models.WordLevel(ids, unk_token="<unk>")
        return cls(tokenizer)

    @classmethod
    def blank(cls, size: int) -> "Vocabulary":
        """One of that size without real words."""
        words = [*SPECIAL_TOKENS, *map(str, range(size - len(SPECIAL_TOKENS)))]
        return cls(
            Tokenizer(
                models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
            )
        )

    def __eq__(self, other: object) -> bool:
        """Whether all texts have the same ids by both."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._tokenizer.to_str() == other._tokenizer.to_str()

    def __hash__(self) -> int:
        return hash(self._tokenizer.to_str())

    @property
    def size(self) -> int:
        """Number of ids; at most the size asked for."""
        return self._tokenizer.get_vocab_size()

    def id_of(self, word: str) -> int | None:
        """The id of a word, however it is written; None where it is unknown, or several tokens."""
        word = self._tokenizer.normalizer.normalize_str(_valid(word))
        return self._tokenizer.token_to_id(word)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids per text, of its natural length (0 for a text without tokens)."""
        ids: list[np.ndarray] = []
        for start in range(
            0, len(texts), 1024
        ):  # in chunks: the library's encodings are far larger than the ids
            chunk = [_valid(text) for text in texts[start : start + 1024]]
            ids += [
                np.asarray(encoding.ids, np.int32)
                for encoding in self._tokenizer.encode_batch_fast(chunk)
            ]
        return ids

    def encode_cached(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for a whole corpus, which the next program finds in the cache folder if it is
        large."""
        if sum(map(len, texts)) < LARGE:
            return self.encode(texts)

        def arrays() -> dict[str, np.ndarray]:
            ids = self.encode(texts)
            return {"ids": np.concatenate(ids), "lengths": np.array([len(row) for row in ids])}

        saved = remember(
            fingerprint([tokenizers.__version__, self._tokenizer.to_str(), *texts]), arrays
        )
        return np.split(saved["ids"], np.cumsum(saved["lengths"])[:-1])

    def written(self, text: str) -> list[str]:
        """The part of a text that each of its ids stands for, as it is written there. Of byte pairs
        that share a character the first has it, the others nothing."""
        text, end, parts = _valid(text), 0, []
        for start, stop in self._tokenizer.encode(text).offsets:
            parts.append(text[max(start, end) : stop])
            end = max(end, stop)
        return parts

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: words separated by one space, byte pairs joined as they were."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Writes the JSON format of `tokenizers`, whole or not at all; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self._tokenizer.to_str())

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Reads what `save` wrote. Raises UserError if the file is missing or spoilt."""
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"cannot read the vocabulary {path}: {error}") from None


def _valid(text: str) -> str:
    """Lone surrogates (from JSON escapes or a broken argv) have no UTF-8: they become a question
    mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
