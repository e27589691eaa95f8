# SPDX-License-Identifier: Apache-2.0
"""Which word comes next, drawn from what a language model thinks of all of them.

Axes: V words.
"""

from collections.abc import Callable, Sequence

import numpy as np

from flax_lstm.data.vocabulary import END, PAD, UNKNOWN
from flax_lstm.errors import require, within

MOST_TOKENS = 100_000  # of one answer


def choose(
    logits_V: np.ndarray, temperature: float, top_p: float, generator: np.random.Generator
) -> int:
    """A word drawn by softmax(logits / temperature), from the fewest words whose shares reach
    `top_p` together (nucleus sampling, Holtzman et al. 2020); at temperature 0 the likeliest. Never
    padding or the unknown word."""
    logits_V = logits_V.astype(np.float64)
    logits_V[[PAD, UNKNOWN]] = -np.inf
    if temperature == 0:
        return int(logits_V.argmax())
    share_V = np.exp((logits_V - logits_V.max()) / temperature)
    share_V /= share_V.sum()
    order_V = np.argsort(-share_V, kind="stable")
    before_V = np.concatenate([[0.0], np.cumsum(share_V[order_V])[:-1]])
    nucleus = order_V[before_V < top_p]
    return int(generator.choice(nucleus, p=share_V[nucleus] / share_V[nucleus].sum()))


def continue_text(
    advance: Callable[[Sequence[int]], np.ndarray],
    prompt: Sequence[int],
    tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Up to `tokens` ids that follow the prompt's, to the end of the text.

    advance: takes the ids that come next in the text, from its beginning, and gives logits [V] for
    the one that follows them; it keeps the state in between.
    """
    within("--tokens", tokens, 1, MOST_TOKENS)
    within("--seed", seed, 0, 2**63 - 1)
    require(
        temperature == 0 or 1e-6 <= temperature <= 1e6,
        f"--temperature {temperature}: must be 0 (the likeliest), or from 1e-6 to 1e6",
    )
    require(0 < top_p <= 1, f"--top-p {top_p}: must be above 0 and at most 1")
    generator = np.random.default_rng(seed)
    found: list[int] = []
    given = [END, *prompt]  # a text begins where another has ended
    while len(found) < tokens:
        word = choose(advance(given), temperature, top_p, generator)
        if word == END:
            break
        found.append(word)
        given = [word]
    return found
