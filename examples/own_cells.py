# SPDX-License-Identifier: Apache-2.0
"""Three cells of one's own, by their equations alone. `RNN` runs them by the backend `fused`, with
all kinds of dropout, resets and mixed precision.

    from own_cells import PeepholeLSTMCell
    rnn = flax_lstm.RNN(PeepholeLSTMCell(64))

Axes: B batch, G gates, H hidden units, J hidden units of the previous step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.nn.cells import Cell, LSTMCell, LSTMState, Weights, recurrent_matmul

Array = jax.Array


class CoupledLSTMCell(LSTMCell):
    """The input gate is what the forget gate leaves (Greff et al. 2017); gates in the order o, f,
    g, so that the forget gate's bias begins at 1."""

    gates = 3

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> LSTMState:
        z_BGH = x_BGH + recurrent_matmul(state.h_BH, weights.recurrent_JGH, mask_BJ)
        o, f, g = nn.sigmoid(z_BGH[:, 0]), nn.sigmoid(z_BGH[:, 1]), jnp.tanh(z_BGH[:, 2])
        c = f * state.c_BH + (1 - f) * g
        return LSTMState(c, o * jnp.tanh(c))


class PeepholeLSTMCell(LSTMCell):
    """The gates see c, each by a weight a unit (Gers, Schraudolph & Schmidhuber 2002); gates in
    the order i, f, g, o."""

    def own_weights(self) -> Array:
        zeros = nn.initializers.zeros
        weight: Array = self.param("peepholes", zeros, (3, self.features), self.param_dtype)
        return weight

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> LSTMState:
        z_BGH = x_BGH + recurrent_matmul(state.h_BH, weights.recurrent_JGH, mask_BJ)
        to_i, to_f, to_o = (weights.own[n : n + 1] for n in range(3))
        i = nn.sigmoid(z_BGH[:, 0] + to_i * state.c_BH)
        f = nn.sigmoid(z_BGH[:, 1] + to_f * state.c_BH)
        c = f * state.c_BH + i * jnp.tanh(z_BGH[:, 2])
        o = nn.sigmoid(z_BGH[:, 3] + to_o * c)
        return LSTMState(c, o * jnp.tanh(c))


class MinimalGatedCell(Cell):
    """One gate that forgets and resets (Zhou et al. 2016), the reset after the product, as Flax's
    `MGUCell` has it; gates in the order f, n."""

    gates = 2

    def own_weights(self) -> Array:
        zeros = nn.initializers.zeros
        bias: Array = self.param("recurrent_bias", zeros, (self.features,), self.param_dtype)
        return bias

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Array:
        rh_BGH = recurrent_matmul(state, weights.recurrent_JGH, mask_BJ)
        f = nn.sigmoid(x_BGH[:, 0] + rh_BGH[:, 0])
        n = jnp.tanh(x_BGH[:, 1] + f * (rh_BGH[:, 1] + weights.own[None]))
        return (1 - f) * n + f * state
