# SPDX-License-Identifier: Apache-2.0
"""Which words a classifier's answer rests on.

A contribution is in units of log-probability of the class asked about: positive where the word
speaks for it.

Axes: B rows, T tokens, E features of an embedding, K classes, S steps of an integral.
"""

import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_lstm.tasks.examination import log_softmax

Array = jax.Array
STEPS = 32  # of the integral


class Explanation(NamedTuple):
    """An answer and its grounds."""

    label: str  # the class that is explained
    probability: float
    words: list[str]
    contributions: list[float]  # of each word

    def as_html(self) -> str:
        """A paragraph with words on green where they speak for the class, on red where against
        it."""
        most = max((abs(c) for c in self.contributions), default=0.0) or 1.0
        spans = []
        for word, contribution in zip(self.words, self.contributions, strict=True):
            hue = "0,160,0" if contribution > 0 else "220,0,0"
            style = f"background:rgba({hue},{abs(contribution) / most:.2f})"
            title = f"{contribution:+.3f}"
            spans.append(f'<span style="{style}" title="{title}">{html.escape(word)}</span>')
        head = f"<p><b>{html.escape(self.label)}</b> {self.probability:.3f}</p>"
        return f"{head}\n<p>{' '.join(spans)}</p>\n"


def leave_one_out(
    logits_of: Callable[[Sequence[np.ndarray]], np.ndarray], ids_T: np.ndarray, k: int
) -> np.ndarray:
    """[T]: by how much the log-probability of class k falls when a word is left out (Li et al.
    2016). logits_of: [B, K] for B texts of any lengths."""
    without = [np.delete(ids_T, t) for t in range(len(ids_T))]
    log_BK = log_softmax(logits_of([ids_T, *without]))
    return np.asarray(log_BK[0, k] - log_BK[1:, k])


def integrated_gradients(module: nn.Module, params: Any, ids_T: np.ndarray, k: int) -> np.ndarray:
    """[T]: the gradient of the log-probability of class k in each embedding, integrated on the
    straight way from zeros to the embedding and multiplied by it, by the midpoint rule
    (Sundararajan et al. 2017). The contributions add up to the difference between the text and one
    whose embeddings are zeros, to the error of the rule."""

    def log_probability(scaled_TE: Array) -> Array:
        def replace(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            is_embedding = (
                isinstance(context.module, nn.Embed) and context.method_name == "__call__"
            )
            return scaled_TE[None] if is_embedding else call(*args, **kwargs)

        with nn.intercept_methods(replace):
            result: Any = module.apply({"params": params}, jnp.asarray(ids_T[None]))
        return jax.nn.log_softmax(result[1][0])[k]

    table = params["embed"]["embedding"]
    x_TE = jnp.asarray(table)[ids_T]
    shares_S = (jnp.arange(STEPS) + 0.5) / STEPS
    gradient = jax.jit(jax.grad(log_probability))
    mean_TE = sum(gradient(share * x_TE) for share in shares_S) / STEPS
    return np.asarray(jnp.sum(mean_TE * x_TE, axis=-1), np.float64)
