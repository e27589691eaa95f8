# SPDX-License-Identifier: Apache-2.0
"""A bag of words beside every text classifier: what does not beat it was not worth training.

TF-IDF of words and pairs of neighbours with logistic regression, by scikit-learn (the extra
`text`), fitted on the training split alone.
"""

import logging
import warnings
from collections.abc import Sequence

import numpy as np

log = logging.getLogger(__name__)
MANY = 5_000  # texts from which words have to occur in at least three of them


def linear_log_probabilities(
    texts: Sequence[str], labels: Sequence[str], names: Sequence[str], new: Sequence[str]
) -> np.ndarray | None:
    """Log-probabilities [len(new), len(names)] of a linear model fitted on `texts` and their
    `labels`. None, with a line that says why, without scikit-learn or where no text has a word."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        log.info("no linear baseline without scikit-learn: pip install 'flax-lstm[text]'")
        return None
    log.info("fitting a linear model to %s texts (task.linear False: none)", f"{len(texts):,}")
    least = 3 if len(texts) >= MANY else 1
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=least, ngram_range=(1, 2))
    try:
        words = vectorizer.fit_transform(texts)
    except ValueError as error:
        log.info("no linear baseline: %s", error)
        return None
    model = LogisticRegression(C=10, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stopping a little early is no news here
        model.fit(words, labels)
    order = [model.classes_.tolist().index(name) for name in names]
    return np.asarray(model.predict_log_proba(vectorizer.transform(new)))[:, order]
