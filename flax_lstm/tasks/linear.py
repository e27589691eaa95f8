# SPDX-License-Identifier: Apache-2.0
"""A bag of words beside every text classifier: what does not beat it was not worth training.

TF-IDF of words and pairs of neighbours with logistic regression, by scikit-learn (the extra
`text`), fitted on the training split alone; of tags one such model each.

Axes: N rows, K labels or tags, M new rows.
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.data.base import Batch
from flax_lstm.data.sources import Texts
from flax_lstm.data.text import PreparedTexts, TextDataset

log = logging.getLogger(__name__)
MANY = 5_000  # texts from which words have to occur in at least three of them
MOST_TAGS = 200  # each is a model of its own

Fit = Callable[[Texts, Texts], np.ndarray | None]  # outputs for the second, fitted on the first


def linear_rival(
    task: Any, dataset: Any, split: str, folder: Path, fit: Fit
) -> dict[str, dict[str, float]]:
    """The figures of `linear` as the task measures them, kept in a folder; nothing where the data
    are no texts, or the task asks for none."""
    kept = folder / f"linear.{split}.json"
    if kept.exists():
        return {"linear": json.loads(kept.read_text())}
    if not (task.linear and isinstance(dataset, TextDataset)):
        return {}
    if isinstance(dataset, PreparedTexts):
        log.info("no linear baseline: the texts are in files of tokens")
        return {}
    new, info = dataset.read(split), dataset.info
    outputs_MK = fit(dataset.read("train"), new)
    if outputs_MK is None:
        return {}
    targets = jnp.asarray(info.targets(split, new.labels))
    rows = Batch(None, targets, None, jnp.ones(len(targets), jnp.float32))
    sums = task.measure(jnp.asarray(outputs_MK, jnp.float32), rows, info)
    figures = task.figures(jax.tree.map(np.asarray, sums), info)
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(figures))
    return {"linear": figures}


def linear_log_probabilities(
    texts: Sequence[str], labels: Sequence[str], names: Sequence[str], new: Sequence[str]
) -> np.ndarray | None:
    """Log-probabilities [M, K] of a linear model fitted on `texts` and their `labels`. None, with a
    line that says why, without scikit-learn or where no text has a word."""
    if (words := _words(texts, new)) is None:
        return None
    model = _regression(words[0], labels)
    order = [model.classes_.tolist().index(name) for name in names]
    return np.asarray(model.predict_log_proba(words[1]))[:, order]


def linear_logits(
    texts: Sequence[str], has_NK: np.ndarray, new: Sequence[str]
) -> np.ndarray | None:
    """Logits [M, K] of a linear model for each tag, fitted on `texts` and what they have; of a tag
    that all have, that of its share. None, with a line that says why, as above, and for many
    tags."""
    count = has_NK.shape[1]
    if count > MOST_TAGS:
        log.info("no linear baseline: of at most %s tags, and there are %s", MOST_TAGS, count)
        return None
    if (words := _words(texts, new)) is None:
        return None
    logits_MK = np.full((len(new), count), np.log(2 * len(texts) + 1))
    for k, has_N in enumerate(has_NK.T > 0.5):
        if not has_N.all():
            logits_MK[:, k] = _regression(words[0], has_N).decision_function(words[1])
    return logits_MK


def _words(texts: Sequence[str], new: Sequence[str]) -> tuple[Any, Any] | None:
    """The features of both. None, with a line, without scikit-learn or without words."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression  # noqa: F401
    except ImportError:
        log.info("no linear baseline without scikit-learn: pip install 'flax-lstm[text]'")
        return None
    log.info("fitting a linear model to %s texts (task.linear False: none)", f"{len(texts):,}")
    least = 3 if len(texts) >= MANY else 1
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=least, ngram_range=(1, 2))
    try:
        return vectorizer.fit_transform(texts), vectorizer.transform(new)
    except ValueError as error:
        log.info("no linear baseline: %s", error)
        return None


def _regression(words: Any, labels: Sequence[str] | np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=10, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stopping a little early is no news here
        return model.fit(words, labels)
