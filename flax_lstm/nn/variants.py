# SPDX-License-Identifier: Apache-2.0
"""Cells beside the three of `cells.py`: with layer normalisation, and with a projected output.

They say their equations and their own weights; `fused` runs them, and the scan.

Axes: B batch, D input features, G gates, H hidden units, P projected outputs, J hidden units (or
projected outputs) of the previous step.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.errors import ArgumentError
from flax_lstm.machine.sharding import named
from flax_lstm.nn.cells import (
    CELLS,
    Cell,
    GRUCell,
    LSTMCell,
    LSTMState,
    Weights,
    input_matmul,
    recurrent_matmul,
)

Array = jax.Array
CellName = Literal["lstm", "gru", "rnn", "layernorm_lstm", "layernorm_gru"]


def normalise(x: Array, axes: int) -> Array:
    """Mean 0 and variance 1 over the last axes of each row (Ba, Kiros & Hinton 2016)."""
    last = tuple(range(-axes, 0))
    centred = x - jnp.mean(x, last, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, last, keepdims=True) + 1e-5)


class Gains(NamedTuple):
    """How far each unit varies after it was normalised, and where an LSTM's c is centred."""

    input_GH: Array
    recurrent_GH: Array
    c_H: Any = None
    c_bias_H: Any = None


class LayerNormCell(Cell):
    """What the two share: Wx and Rh are normalised over all gates and units of a row, each with
    gains of its own; their common offset is the bias."""

    def own_weights(self) -> Gains:
        ones = named(nn.initializers.ones, None, "hidden")
        shape, dtype = (self.gates, self.features), self.param_dtype
        return Gains(
            self.param("input_gain", ones, shape, dtype),
            self.param("recurrent_gain", ones, shape, dtype),
        )

    def project(self, weights: Weights, x: Array) -> Array:
        """LN(Wx) + b, for inputs [..., D] -> [..., G, H]."""
        dtype, wide = self.compute_dtype(x), self.state_dtype(x)
        z = input_matmul(x.astype(dtype), weights.input_DGH.astype(dtype), wide)
        gain, bias = (
            jnp.broadcast_to(w.astype(wide), z.shape)
            for w in (weights.own.input_GH, weights.bias_GH)
        )
        return (normalise(z, 2) * gain + bias).astype(dtype)

    def normal_product(self, weights: Weights, h_BJ: Array, mask_BJ: Array | None) -> Array:
        """LN(Rh) [B, G, H]."""
        rh_BGH = recurrent_matmul(h_BJ, weights.recurrent_JGH, mask_BJ)
        return normalise(rh_BGH, 2) * weights.own.recurrent_GH[None]


class LayerNormLSTMCell(LayerNormCell, LSTMCell):
    """An LSTM with layer normalisation; gates in the order i, f, g, o.

        i, f, o = sigmoid(LN(Wx) + LN(Rh) + b)
        g       = tanh(LN(Wx) + LN(Rh) + b)
        c'      = f c + i g
        h'      = o tanh(LN(c'))

    Ba, Kiros & Hinton 2016, equations 20 to 22 of the supplement. When to prefer it: deep or long
    networks whose training is unsteady, and small batches.
    """

    def own_weights(self) -> Gains:
        gains, shape = super().own_weights(), (self.features,)
        ones, zeros = (
            named(initializer, "hidden")
            for initializer in (nn.initializers.ones, nn.initializers.zeros)
        )
        return gains._replace(
            c_H=self.param("c_gain", ones, shape, self.param_dtype),
            c_bias_H=self.param("c_bias", zeros, shape, self.param_dtype),
        )

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> LSTMState:
        z_BGH = x_BGH + self.normal_product(weights, state.h_BH, mask_BJ)
        i, f, g, o = (z_BGH[:, gate] for gate in range(4))
        c = self.gate_fn(f) * state.c_BH + self.gate_fn(i) * self.activation_fn(g)
        shown = normalise(c, 1) * weights.own.c_H[None] + weights.own.c_bias_H[None]
        return LSTMState(c, self.gate_fn(o) * self.activation_fn(shown))


class LayerNormGRUCell(LayerNormCell, GRUCell):
    """A GRU with layer normalisation; gates in the order r, z, n.

        r, z = sigmoid(LN(Wx) + LN(Rh) + b)
        n    = tanh(LN(Wx) + b + r (LN(Rh) + b_r))
        h'   = (1 - z) n + z h

    Ba, Kiros & Hinton 2016, on the GRU that resets after the product.
    """

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Array:
        rh_BGH = self.normal_product(weights, state, mask_BJ)
        r = self.gate_fn(x_BGH[:, 0] + rh_BGH[:, 0])
        z = self.gate_fn(x_BGH[:, 1] + rh_BGH[:, 1])
        n = self.activation_fn(x_BGH[:, 2] + r * (rh_BGH[:, 2] + weights.recurrent_bias_H[None]))
        return (1 - z) * n + z * state


class ProjectedLSTMCell(LSTMCell):
    """An LSTM whose output is projected to fewer numbers than it has units, as `proj_size` of
    `torch.nn.LSTM` does it: h' = (o tanh(c')) W, [B, P]. Sak, Senior & Beaufays 2014.

    When to prefer it: a large memory at the price of a small recurrent matrix.

    projection: outputs P, from 1 to features - 1.
    """

    projection: int = 0

    @property
    def outputs(self) -> int:
        if not 0 < self.projection < self.features:
            raise ArgumentError(
                f"ProjectedLSTMCell({self.features}): projection is {self.projection}; it must "
                "be at least 1 and less than features"
            )
        return self.projection

    def own_weights(self) -> Array:
        initializer = named(nn.initializers.glorot_uniform(), "hidden", None)
        shape = (self.features, self.outputs)
        weight: Array = self.param("projection_weight", initializer, shape, self.param_dtype)
        return weight

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> LSTMState:
        c, h_BH = super().equations(weights, state, x_BGH, mask_BJ)
        projection_HP = weights.own
        h_BP = jnp.matmul(
            h_BH.astype(projection_HP.dtype), projection_HP, preferred_element_type=h_BH.dtype
        )
        return LSTMState(c, h_BP)

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> LSTMState:
        return LSTMState(
            jnp.zeros((batch, self.features), dtype), jnp.zeros((batch, self.outputs), dtype)
        )


BY_NAME: dict[CellName, type[Cell]] = {
    "lstm": LSTMCell,
    "gru": GRUCell,
    "rnn": CELLS["rnn"],
    "layernorm_lstm": LayerNormLSTMCell,
    "layernorm_gru": LayerNormGRUCell,
}
