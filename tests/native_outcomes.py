# SPDX-License-Identifier: Apache-2.0
"""python native_outcomes.py FILE: keeps there what `auto` gives, of a process that has chosen an
instruction set, and prints which backend that was.

Axes: B batch, T time, D input features, H hidden units.
"""

import functools
import logging
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm import RNN, GRUCell, LSTMCell, SimpleRNNCell
from flax_lstm.nn.recurrence import resolve

X_BTD = jax.random.normal(jax.random.key(0), (5, 9, 6))
LENGTHS = jnp.array([9, 0, 1, 5, 9])
# Whatever a vector's size, one of them ends in a panel of each width that products know.
UNITS = {LSTMCell: 27, GRUCell: 19, SimpleRNNCell: 13}


def outcome(kind: Any, dtype: str, backend: str) -> Any:
    """Of ragged rows: a value of all states and outputs, its gradients for weights and inputs."""
    layer = RNN(kind(UNITS[kind], dtype=dtype), backend=backend)

    def loss(variables: Any, x_BTD: jax.Array) -> jax.Array:
        state, y_BTH = layer.apply(variables, x_BTD, LENGTHS)
        value = jnp.sum(jnp.sin(y_BTH.astype(jnp.float32)))
        return value + sum(jnp.sum(s**2) for s in jax.tree.leaves(state))

    @jax.jit
    def everything() -> Any:
        variables = layer.init(jax.random.key(1), X_BTD)
        return jax.value_and_grad(loss, (0, 1))(variables, X_BTD)

    return everything()


@functools.cache
def outcomes(backend: str, dtype: str) -> dict[str, np.ndarray]:
    """Those of every cell, as float64."""
    found = {}
    for kind in UNITS:
        leaves = jax.tree.leaves(outcome(kind, dtype, backend))
        found |= {f"{kind.__name__}{n}": np.float64(leaf) for n, leaf in enumerate(leaves)}
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    print(resolve("auto", LSTMCell(19), X_BTD, None).__name__.split(".")[-1])
    exact, rough = outcomes("auto", "float32"), outcomes("auto", "bfloat16")
    np.savez(sys.argv[1], **exact, **{f"rough {name}": array for name, array in rough.items()})
