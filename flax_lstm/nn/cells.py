# SPDX-License-Identifier: Apache-2.0
"""The recurrences: pure equations, and Flax modules that own their weights.

Axes: B batch, T time, D input features, H hidden units, J hidden units of the previous step (same
size as H), G gates. Gates have an axis of their own, so that hidden units can be sharded without
cutting a gate in two.

A cell is used in two halves. `project` multiplies the inputs of all steps by the input weights, one
large matmul outside the time loop; `step` does what depends on the previous state. `RNN` in
`layers.py` puts them together; a cell can also be called step by step, `state, h_BH = cell(state,
x_BD)`, and scanned by `flax.linen.RNN`, for it is a `RNNCellBase`.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.errors import ArgumentError, listing
from flax_lstm.machine.sharding import named

Array = jax.Array
Activation = Callable[[Array], Array]


class LSTMState(NamedTuple):
    """The memory of an LSTM: cell state c and hidden state h (which is also the output)."""

    c_BH: Array
    h_BH: Array


class Weights(NamedTuple):
    """The weights of one direction of one layer. `recurrent_bias` is for the GRU's candidate
    alone, `own` is whatever a cell has besides (a tree)."""

    input_DGH: Array
    recurrent_JGH: Any
    bias_GH: Array
    recurrent_bias_H: Any = None
    own: Any = None


class Product:
    """Stands for `Weights.recurrent_JGH` where the product with it has been computed already. The
    equations of a cell, run with it, are what it does after the product: so they are written once,
    as in a textbook, and `fused` differentiates that part alone in its loop. `asked` are the h and
    the mask of each call."""

    def __init__(self, rh_BGH: Array) -> None:
        self.rh_BGH = rh_BGH
        self.asked: list[tuple[Any, Any]] = []

    def of(self, h_BJ: Any, mask_BJ: Any) -> Array:
        self.asked.append((h_BJ, mask_BJ))
        return self.rh_BGH


def recurrent_matmul(h_BJ: Array, recurrent_JGH: Any, mask_BJ: Array | None) -> Array:
    """`h @ recurrent`, gates kept apart; the mask is recurrent dropout, [B, J] for all gates or
    [B, G, J] with one for each. Multiplies in the dtype of the weights and adds up in that of the
    state."""
    if isinstance(recurrent_JGH, Product):
        return recurrent_JGH.of(h_BJ, mask_BJ)
    h_in = masked(h_BJ, mask_BJ).astype(recurrent_JGH.dtype)
    return matmul(h_in, recurrent_JGH, h_BJ.dtype, h_in.ndim > h_BJ.ndim)


def masked(h_BJ: Array, mask_BJ: Array | None) -> Array:
    """h as it enters the product: [B, J], or [B, G, J] under a mask for each gate."""
    if mask_BJ is None:
        return h_BJ
    return (h_BJ[..., None, :] if mask_BJ.ndim > h_BJ.ndim else h_BJ) * mask_BJ


def matmul(h_in: Array, recurrent_JGH: Array, dtype: Any, per_gate: bool) -> Array:
    """The product of `masked` h, [B, G, H] in this dtype."""
    axes = "...gj,jgh->...gh" if per_gate else "...j,jgh->...gh"
    return jnp.einsum(axes, h_in, recurrent_JGH, preferred_element_type=dtype)


def input_matmul(x: Array, input_DGH: Array, dtype: Any) -> Array:
    """Wx [..., G, H] for inputs [..., D], or [..., G * D] with those of each gate side by side
    (under dropout masks of their own)."""
    features, gates, _ = input_DGH.shape
    if x.shape[-1] == features:
        return jnp.einsum("...d,dgh->...gh", x, input_DGH, preferred_element_type=dtype)
    x_GD = x.reshape(*x.shape[:-1], gates, features)
    return jnp.einsum("...gd,dgh->...gh", x_GD, input_DGH, preferred_element_type=dtype)


def lstm_step(
    weights: Weights,
    state: LSTMState,
    x_BGH: Array,
    mask_BJ: Array | None = None,
    gate_fn: Activation = nn.sigmoid,
    activation_fn: Activation = jnp.tanh,
) -> LSTMState:
    """One step of the LSTM without peepholes; gates in the order i, f, g, o.

        i, f, o = sigmoid(Wx + Rh + b)     input, forget and output gate
        g       = tanh(Wx + Rh + b)        candidate
        c'      = f c + i g
        h'      = o tanh(c')

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers, Schmidhuber & Cummins 2000. `x_BGH`
    is Wx + b.
    """
    z_BGH = x_BGH + recurrent_matmul(state.h_BH, weights.recurrent_JGH, mask_BJ)
    i, f, g, o = (z_BGH[..., gate, :] for gate in range(4))
    c = gate_fn(f) * state.c_BH + gate_fn(i) * activation_fn(g)
    return LSTMState(c, gate_fn(o) * activation_fn(c))


def gru_step(
    weights: Weights,
    h_BH: Array,
    x_BGH: Array,
    mask_BJ: Array | None = None,
    gate_fn: Activation = nn.sigmoid,
    activation_fn: Activation = jnp.tanh,
) -> Array:
    """One step of the GRU that resets after the matmul; gates in the order r, z, n.

        r, z = sigmoid(Wx + Rh + b)             reset and update gate
        n    = tanh(Wx + b + r (Rh + b_r))      candidate
        h'   = (1 - z) n + z h

    Cho et al. 2014 in the variant of cuDNN, PyTorch and Keras (`reset_after=True`). `x_BGH` is Wx +
    b.
    """
    rh_BGH = recurrent_matmul(h_BH, weights.recurrent_JGH, mask_BJ)
    bias = jnp.expand_dims(weights.recurrent_bias_H, tuple(range(h_BH.ndim - 1)))
    r = gate_fn(x_BGH[..., 0, :] + rh_BGH[..., 0, :])
    z = gate_fn(x_BGH[..., 1, :] + rh_BGH[..., 1, :])
    n = activation_fn(x_BGH[..., 2, :] + r * (rh_BGH[..., 2, :] + bias))
    return (1 - z) * n + z * h_BH


def rnn_step(
    weights: Weights,
    h_BH: Array,
    x_BGH: Array,
    mask_BJ: Array | None = None,
    activation_fn: Activation = jnp.tanh,
) -> Array:
    """One step of the simple recurrent network of Elman 1990: h' = tanh(Wx + Rh + b), with one
    "gate"."""
    rh_BGH = recurrent_matmul(h_BH, weights.recurrent_JGH, mask_BJ)
    return activation_fn(x_BGH[..., 0, :] + rh_BGH[..., 0, :])


def draw_orthogonal(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """In float32 at least: there is no factorisation into Q and R in bfloat16."""
    return nn.initializers.orthogonal()(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(
        dtype
    )


def orthogonal(key: Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """An orthogonal matrix (Saxe, McClelland & Ganguli 2014) over all gates: [J, G * H] with
    orthonormal rows, as Keras begins; docs/results.md says why it was taken. `orthogonal_per_gate`
    is the other way."""
    return draw_orthogonal(key, (shape[0], shape[1] * shape[2]), dtype).reshape(shape)


def orthogonal_per_gate(key: Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """An orthogonal matrix [J, H] for each gate, drawn independently, as Flax begins."""
    rows, gates, columns = shape
    return jnp.stack(
        [draw_orthogonal(k, (rows, columns), dtype) for k in jax.random.split(key, gates)], axis=1
    )


def forget_bias_one(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Zero, but 1 for the forget gate, so that memory lasts from the first step (Jozefowicz et al.
    2015)."""
    return jnp.zeros(shape, dtype).at[1].set(1)


# Glorot & Bengio 2010 over the matrix [D, G * H] of all gates.
input_initializer = nn.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2)
)


class Cell(nn.RNNCellBase):
    """What the three cells share. A subclass says `gates` and `equations`, and how it begins
    (`initial_state`).

    features: hidden units H.
    dtype: what the matmuls are done in and the outputs are returned in; None: that of the inputs
    and weights together.
    param_dtype: what the weights are kept in.
    recurrent_initializer: of the recurrent weights [J, G, H]; `orthogonal_per_gate` is another.
    activation_fn: of the candidate and of an LSTM's output, tanh; `gate_fn` of an LSTM's and GRU's
        gates is the sigmoid. The faster backends but `fused` know these two alone.

    The state is at least float32 whatever `dtype` is; float64 stays float64.
    """

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    recurrent_initializer: Any = orthogonal
    activation_fn: Activation = jnp.tanh

    gates = 1
    bias_initializer: ClassVar[Any] = staticmethod(nn.initializers.zeros)

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Any:
        """The next state; a method, or a static method."""
        raise NotImplementedError

    @nn.compact
    def weights(self, input_size: int) -> Weights:
        """The cell's weights for inputs of `input_size` features, as they are kept: in
        `param_dtype`."""
        gates, hidden, dtype = self.gates, self.features, self.param_dtype
        return Weights(
            self.param(
                "input",
                named(input_initializer, None, None, "hidden"),
                (input_size, gates, hidden),
                dtype,
            ),
            self.param(
                "recurrent",
                named(self.recurrent_initializer, None, None, "hidden"),
                (self.outputs, gates, hidden),
                dtype,
            ),
            self.param(
                "bias", named(self.bias_initializer, None, "hidden"), (gates, hidden), dtype
            ),
            self.recurrent_bias(),
            self.own_weights(),
        )

    @property
    def outputs(self) -> int:
        """Features of the output, which the recurrent weights read: J."""
        return self.features

    def recurrent_bias(self) -> Array | None:
        return None

    def own_weights(self) -> Any:
        """Whatever weights a cell has besides, a tree of arrays [..., H]; asked for once, within
        `weights`."""
        return None

    @nn.nowrap
    def compute_dtype(self, x: Array) -> jnp.dtype:
        return jnp.dtype(self.dtype or jnp.promote_types(x.dtype, self.param_dtype))

    @nn.nowrap
    def state_dtype(self, x: Array) -> jnp.dtype:
        return jnp.promote_types(self.compute_dtype(x), jnp.float32)

    def project(self, weights: Weights, x: Array) -> Array:
        """Wx + b for inputs [..., D] (or one for each gate, see `input_matmul`) -> [..., G, H]. The
        bias is added in the dtype of the state,
        in which its gradient then adds up over all rows and steps."""
        dtype, wide = self.compute_dtype(x), self.state_dtype(x)
        x = input_matmul(x.astype(dtype), weights.input_DGH.astype(dtype), dtype)
        return (x.astype(wide) + jnp.broadcast_to(weights.bias_GH.astype(wide), x.shape)).astype(
            dtype
        )

    def step(self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None) -> Any:
        """The next state, from the projected input of one step."""
        return self.equations(weights, state, x_BGH, mask_BJ)

    def output(self, state: Any) -> Array:
        """The hidden state [B, H] in a state."""
        return state

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> Any:
        """The state of zeros before the first step."""
        return jnp.zeros((batch, self.features), dtype)

    def cast(self, weights: Weights, x: Array) -> Weights:
        """The weights in the dtype of the matmuls."""
        return jax.tree.map(lambda w: w.astype(self.compute_dtype(x)), weights)

    # What `flax.linen.RNN` and others ask of a cell.
    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """The carry after one step, and its output: for inputs [..., D] with any number of batch
        axes. The carry has the structure of a state, or is a plain tuple (or list) of its arrays
        [..., H]; it comes back as it was given."""
        weights = self.cast(self.weights(inputs.shape[-1]), inputs)
        *batch, features = inputs.shape
        x_BGH = self.project(weights, inputs.reshape(math.prod(batch), features))
        state = self.step(weights, self.merge_batch(carry, inputs), x_BGH)
        y = self.output(state).astype(self.compute_dtype(inputs))
        leaves, y = jax.tree.map(
            lambda a: a.reshape(*batch, *a.shape[1:]), (jax.tree.leaves(state), y)
        )
        return jax.tree.unflatten(jax.tree.structure(carry), leaves), y

    @nn.nowrap
    def merge_batch(self, carry: Any, inputs: Array) -> Any:
        """The state in a carry whose leaves have the batch axes of the inputs, with one batch axis
        in their place."""
        expected = jax.eval_shape(lambda: self.initial_state(math.prod(inputs.shape[:-1])))
        shapes = [(*inputs.shape[:-1], *leaf.shape[1:]) for leaf in jax.tree.leaves(expected)]
        leaves = jax.tree.leaves(carry)
        found = [jnp.shape(leaf) for leaf in leaves]
        if found != shapes:
            raise ArgumentError(
                f"The carry of {type(self).__name__}({self.features}) for inputs of shape "
                f"{inputs.shape} is {listing(shapes)}; here it is {listing(found) or 'empty'}."
            )
        return jax.tree.map(
            lambda e, leaf: jnp.reshape(leaf, e.shape),
            expected,
            jax.tree.unflatten(jax.tree.structure(expected), leaves),
        )

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """The state of zeros before inputs of this shape [..., D], with the same batch axes; `rng`
        is not used."""
        *batch, _ = input_shape
        dtype = jnp.promote_types(self.dtype or self.param_dtype, jnp.float32)
        state = self.initial_state(math.prod(batch), dtype)
        return jax.tree.map(lambda s: s.reshape(*batch, *s.shape[1:]), state)

    @property
    def num_feature_axes(self) -> int:
        return 1


class LSTMCell(Cell):
    """Long short-term memory; see `lstm_step`. The forget gate's bias begins at 1.

    When to prefer it: the default for long texts and long memory; four matmuls a step.
    """

    gate_fn: Activation = nn.sigmoid

    gates = 4
    bias_initializer: ClassVar[Any] = staticmethod(forget_bias_one)

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Any:
        return lstm_step(weights, state, x_BGH, mask_BJ, self.gate_fn, self.activation_fn)

    def output(self, state: LSTMState) -> Array:
        return state.h_BH

    def initial_state(self, batch: int, dtype: Any = jnp.float32) -> LSTMState:
        return LSTMState(*(jnp.zeros((batch, self.features), dtype) for _ in range(2)))


class GRUCell(Cell):
    """Gated recurrent unit; see `gru_step`. Three matmuls a step: a quarter fewer weights than an
    LSTM of its width."""

    gate_fn: Activation = nn.sigmoid

    gates = 3

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Any:
        return gru_step(weights, state, x_BGH, mask_BJ, self.gate_fn, self.activation_fn)

    def recurrent_bias(self) -> Array:
        zeros = named(nn.initializers.zeros, "hidden")
        return self.param("recurrent_bias", zeros, (self.features,), self.param_dtype)


class SimpleRNNCell(Cell):
    """The simple recurrent network; see `rnn_step`. It forgets after some tens of steps: a baseline
    to compare with."""

    def equations(
        self, weights: Weights, state: Any, x_BGH: Array, mask_BJ: Array | None = None
    ) -> Any:
        return rnn_step(weights, state, x_BGH, mask_BJ, self.activation_fn)


def not_textbook(cell: Any) -> str | None:
    """None where a cell is one of the three themselves with sigmoid and tanh, the equations for
    which kernels are written; else what it is. A subclass may have equations of its own."""
    if type(cell) not in CELLS.values():
        return f"{type(cell).__name__} is none of {listing(c.__name__ for c in CELLS.values())}"
    if cell.activation_fn is not jnp.tanh or getattr(cell, "gate_fn", nn.sigmoid) is not nn.sigmoid:
        return f"this {type(cell).__name__} has other activations than sigmoid and tanh"
    return None


# The textbook's. `variants.py` has more.
CELLS: dict[str, type[Cell]] = {"lstm": LSTMCell, "gru": GRUCell, "rnn": SimpleRNNCell}
