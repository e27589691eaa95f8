# SPDX-License-Identifier: Apache-2.0
"""A stream in pieces, with the state carried over, gives what it gives in one; what cannot, refuses
a state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm import ArgumentError
from flax_lstm.nn.cells import GRUCell, LSTMCell
from flax_lstm.nn.layers import RNN, Bidirectional, Stack
from flax_lstm.nn.models import SequenceModel, max_pool

B, T, D, H = 4, 6, 2, 3
LENGTHS = np.array([6, 3, 0, 2])


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(list(shape)).normal(size=shape), jnp.float32)


def forward(cell: Any = GRUCell) -> RNN:
    return RNN(cell(H))


@pytest.mark.parametrize("cell", [LSTMCell, GRUCell])
def test_rows_that_ended_in_an_earlier_piece_keep_their_last_output(cell: Any) -> None:
    model, x_BTD = SequenceModel(Stack([forward(cell), forward(cell)]), outputs=2), random(B, T, D)
    variables = model.init(jax.random.key(0), x_BTD)
    end, whole = model.apply(variables, x_BTD, LENGTHS)
    state, piece = None, None
    for start in range(0, T, 2):
        left = np.clip(LENGTHS - start, 0, 2)
        state, piece = model.apply(variables, x_BTD[:, start : start + 2], left, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), (state, piece), (end, whole)
    )
    assert np.abs(whole[1] - whole[2]).max() > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        SequenceModel(Bidirectional(forward(), forward()), outputs=2),
        SequenceModel(Stack([Bidirectional(forward(), forward())]), outputs=2, pool=None),
        SequenceModel(Stack([forward()]), outputs=2, pool=max_pool),
        SequenceModel(Stack([forward()], residual=True), outputs=2),
    ],
    ids=["bidirectional", "bidirectional, every step", "max", "residual"],
)
def test_what_cannot_be_streamed_refuses_a_state(model: SequenceModel) -> None:
    x_BTD = random(B, T, D)
    (state, _), variables = model.init_with_output(jax.random.key(0), x_BTD)
    with pytest.raises(ArgumentError, match="None begins anew"):
        model.apply(variables, x_BTD, LENGTHS, state)
