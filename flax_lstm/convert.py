# SPDX-License-Identifier: Apache-2.0
"""Weights of PyTorch, Keras and Flax, to and from the parameters of a `Stack`.

Axes: D input features, J hidden units of the previous step, H hidden units, G gates.

Our side is always the `params` of a `Stack` of `RNN`s and `Bidirectional`s, one layer or many:

    {"layers_0": {"cell": {"input": [D, G, H], "recurrent": [J, G, H], "bias": [G, H]}},
     "layers_1": {"forward": {"cell": {...}}, "backward": {"cell": {...}}}}

A GRU's cell also has "recurrent_bias" [H], its candidate's. Arrays are NumPy's (what
`numpy.asarray` takes is read), copied, in the dtype they had; none of the other libraries is
imported. Which cell it is shows in the shapes: 4 gates are an LSTM, 3 a GRU, 1 a simple recurrent
network.

| library | LSTM gates | GRU gates | biases | state of an LSTM |
| --- | --- | --- | --- | --- |
| flax_lstm | i, f, g, o | r, z, n | one; a second for the GRU's candidate | (c, h) |
| PyTorch | i, f, g, o | r, z, n | two everywhere, added up | (h, c) |
| Keras | i, f, c, o | z, r, h | one; GRU: two, added up but for the candidate's | [h, c] |
| Flax Linen | a kernel a gate | a kernel a gate | one; a second for the GRU's candidate | (c, h) |

Weights say nothing of a layer's activations: these must be sigmoid and tanh, the default
everywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flax_lstm.errors import UserError, listing

Array = np.ndarray
Tree = dict[str, Any]

GATES = {
    4: "ifgo",
    3: "rzn",
    1: ("",),
}  # our order, by number; also the second half of Flax's names
KERAS_GRU = [1, 0, 2]  # z, r, h <-> r, z, n


class _Direction(NamedTuple):
    """One direction of one layer, gates in our order, with both biases whole: what all libraries
    have in common."""

    input_DGH: Array
    recurrent_JGH: Array
    input_bias_GH: Array
    recurrent_bias_GH: Array
    projection_HP: Array | None = None  # of PyTorch's LSTM with proj_size

    def to_cell(self) -> Tree:
        """Our parameters: biases are added up, except where the reset gate stands between them."""
        bias_GH, recurrent_bias_GH = self.input_bias_GH, self.recurrent_bias_GH
        cell = {
            "input": self.input_DGH,
            "recurrent": self.recurrent_JGH,
            "bias": bias_GH + recurrent_bias_GH,
        }
        if len(bias_GH) == 3:
            cell["bias"][2] = bias_GH[2]
            cell["recurrent_bias"] = recurrent_bias_GH[2]
        if self.projection_HP is not None:
            cell["projection_weight"] = self.projection_HP
        return {name: np.array(array, order="C") for name, array in cell.items()}

    @classmethod
    def from_cell(cls, cell: Mapping[str, Any]) -> "_Direction":
        if not {"input", "recurrent", "bias"} <= set(cell):
            raise UserError(
                "Only the cells of flax_lstm can be converted; this one has the weights "
                f"{listing(cell)}."
            )
        bias_GH = np.array(cell["bias"])
        recurrent_bias_GH = np.zeros_like(bias_GH)
        if "recurrent_bias" in cell:
            recurrent_bias_GH[2] = np.asarray(cell["recurrent_bias"])
        projection = cell.get("projection_weight")
        return cls(
            np.array(cell["input"]),
            np.array(cell["recurrent"]),
            bias_GH,
            recurrent_bias_GH,
            None if projection is None else np.array(projection),
        )

    def plain(self, library: str) -> "_Direction":
        """Itself, where it has nothing that the library's layers lack."""
        if self.projection_HP is not None:
            raise UserError(f"{library} has no LSTM with a projection; PyTorch has one.")
        return self


Layer = Sequence[_Direction]  # one, or forward and backward


def _to_stack(layers: Iterable[Layer]) -> Tree:
    def tree(layer: Layer) -> Tree:
        cells = [{"cell": direction.to_cell()} for direction in layer]
        return (
            cells[0] if len(cells) == 1 else dict(zip(("forward", "backward"), cells, strict=True))
        )

    return {f"layers_{n}": tree(layer) for n, layer in enumerate(layers)}


def _from_stack(params: Mapping[str, Any]) -> list[Layer]:
    names = [f"layers_{n}" for n in range(len(params))]
    if not names or set(names) != set(params):
        raise UserError(
            "Expected the params of a Stack, layers_0, layers_1, ...; found "
            f"{listing(params) or 'none'}."
        )
    layers: list[Layer] = []
    for name in names:
        tree = params[name]
        parts = (
            [tree]
            if "cell" in tree
            else [tree[side] for side in ("forward", "backward") if side in tree]
        )
        if not parts:
            raise UserError(
                f"{name} is neither an RNN nor a Bidirectional; it has {listing(tree)}."
            )
        layers.append([_Direction.from_cell(part["cell"]) for part in parts])
    return layers


def _count_gates(columns: int, hidden: int) -> int:
    gates, rest = divmod(columns, hidden)
    if rest or gates not in GATES:
        raise UserError(
            f"Recurrent weights of {hidden} hidden units have {columns} columns over all gates; "
            "an LSTM has"
            f" 4 x {hidden}, a GRU 3 x {hidden}, a simple recurrent network {hidden}."
        )
    return gates


def from_torch(state_dict: Mapping[str, Any] | Iterable[tuple[str, Any]], prefix: str = "") -> Tree:
    """Parameters of a `Stack` from the `state_dict()` of a `torch.nn.LSTM`, `GRU` or `RNN`
    (nonlinearity tanh), or of a whole model that holds one.

    state_dict: names and tensors (on any device, bfloat16 too) or arrays; `named_parameters()` will
        do.
    prefix: what the names of that module begin with in the model's, such as "encoder.lstm."; all
        other names are left alone.

    Any number of layers, one direction or two, with or without bias. PyTorch's two biases are added
    up, but the GRU candidate's `bias_hh` becomes our `recurrent_bias`. PyTorch hands over states as
    (h, c), stacked over layers and directions; ours are `LSTMState(c, h)`, a tuple over layers.

    An LSTM with `proj_size` gives the parameters of `ProjectedLSTMCell`.

    Raises `UserError` on names that are not of such a module.

        module = torch.nn.LSTM(8, 64, num_layers=2, batch_first=True)
        params = from_torch(module.state_dict())
        state, y_BTH = Stack([RNN(LSTMCell(64)), RNN(LSTMCell(64))]).apply({"params": params},
        x_BTD)
    """
    everything = dict(state_dict)
    weights = {
        name.removeprefix(prefix): _torch_array(tensor)
        for name, tensor in everything.items()
        if name.startswith(prefix)
    }
    layers: list[Layer] = []
    while f"weight_ih_l{len(layers)}" in weights:
        suffixes = [f"l{len(layers)}", f"l{len(layers)}_reverse"]
        layers.append(
            [_torch_direction(weights, s) for s in suffixes if f"weight_ih_{s}" in weights]
        )
    if weights or not layers:
        first = "weight_ih_l0"
        prefixes = [name.removesuffix(first) for name in everything if name.endswith(first)]
        raise UserError(
            f"Not weights of a torch.nn.LSTM, GRU or RNN: {listing(weights) or 'there are none'}"
            f"{f' under {prefix!r}' if prefix else ''}. "
            + (
                f"There are such under these prefixes: {listing(map(repr, prefixes))}; pass one as "
                "prefix."
                if prefixes and prefix not in prefixes
                else "Pass the state_dict of that module alone, with names like weight_ih_l0, or "
                "its prefix."
            )
        )
    return _to_stack(layers)


def _torch_array(tensor: Any) -> Array:
    """A tensor of PyTorch, or whatever NumPy reads. NumPy has no bfloat16 of its own, so a tensor
    of these goes by way of float32, which holds them all."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return np.asarray(tensor)


def _torch_direction(weights: dict[str, Any], suffix: str) -> _Direction:
    """Takes one direction out of `weights`: matrices [G * H, D] and [G * H, J], biases [G * H]."""
    weight_ih, weight_hh = (weights.pop(f"weight_{kind}_{suffix}") for kind in ("ih", "hh"))
    weight_hr = weights.pop(f"weight_hr_{suffix}", None)
    hidden = (weight_hh if weight_hr is None else weight_hr).shape[1]
    gates = _count_gates(weight_hh.shape[0], hidden)
    none = np.zeros(gates * hidden, weight_hh.dtype)
    return _Direction(
        weight_ih.reshape(gates, hidden, -1).transpose(2, 0, 1),
        weight_hh.reshape(gates, hidden, -1).transpose(2, 0, 1),
        weights.pop(f"bias_ih_{suffix}", none).reshape(gates, hidden),
        weights.pop(f"bias_hh_{suffix}", none).reshape(gates, hidden),
        None if weight_hr is None else weight_hr.T,
    )


def to_torch(params: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """The `state_dict` (of arrays) of the matching `torch.nn.LSTM`, `GRU` or `RNN`, the inverse of
    `from_torch`; every name begins with `prefix`.

    `bias_hh` is zero but for the GRU's candidate. Raises `UserError` where the layers differ in
    width, cell or number of directions, for a PyTorch module has one of each.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in
        to_torch(params).items()})
    """
    layers = _from_stack(params)
    if len({(len(layer), d.recurrent_JGH.shape) for layer in layers for d in layer}) > 1:
        raise UserError(
            "The layers differ in width, cell or number of directions; a PyTorch module has one "
            "of each."
        )
    weights = {}
    for n, layer in enumerate(layers):
        for d, suffix in zip(layer, ("", "_reverse"), strict=False):
            weights[f"weight_ih_l{n}{suffix}"] = np.concatenate(
                list(d.input_DGH.transpose(1, 2, 0))
            )
            weights[f"weight_hh_l{n}{suffix}"] = np.concatenate(
                list(d.recurrent_JGH.transpose(1, 2, 0))
            )
            weights[f"bias_ih_l{n}{suffix}"] = d.input_bias_GH.reshape(-1)
            weights[f"bias_hh_l{n}{suffix}"] = d.recurrent_bias_GH.reshape(-1)
            if d.projection_HP is not None:
                weights[f"weight_hr_l{n}{suffix}"] = np.ascontiguousarray(d.projection_HP.T)
    return {prefix + name: array for name, array in weights.items()}


def from_keras(layers: Sequence[Any]) -> Tree:
    """Parameters of a `Stack` from Keras layers `LSTM`, `GRU`, `SimpleRNN`, bare or in
    `Bidirectional`.

    layers: `[layer.get_weights() for layer in ...]`, the lowest first; the weights of one layer
    alone will do too. A
        layer's are [kernel, recurrent_kernel, bias], twice that for `Bidirectional` (merge_mode
        "concat"), forward first; without bias where `use_bias=False`.

    Keras' GRU has its gates in the order z, r, h and two biases [2, 3 H]. Only `reset_after=True`
    (its default) is the GRU of this library; `reset_after=False` is refused (it shows in the bias,
    so not where `use_bias=False`). Keras hands over states as [h, c], and where rows are masked
    repeats the last output in place of our zeros.

    Raises `UserError` on other weights.
    """
    if len(layers) and hasattr(layers[0], "shape"):
        layers = [layers]
    return _to_stack(_keras_layer([np.asarray(w) for w in layer]) for layer in layers)


def _keras_layer(weights: list[Array]) -> Layer:
    if len(weights) not in (2, 3, 4, 6):
        raise UserError(
            f"A Keras recurrent layer has 2, 3, 4 or 6 arrays of weights, here are {len(weights)}."
        )
    half = len(weights) // 2
    return [
        _keras_direction(*part)
        for part in ([weights] if len(weights) < 4 else [weights[:half], weights[half:]])
    ]


def _keras_direction(kernel: Array, recurrent: Array, bias: Array | None = None) -> _Direction:
    """Matrices [D, G * H] and [J, G * H]; biases [G * H], or [2, G * H] for a GRU, in Keras' order
    of gates."""
    if kernel.ndim != 2 or recurrent.ndim != 2:
        raise UserError(
            f"A Keras kernel is a matrix; here are shapes {kernel.shape} and {recurrent.shape}."
        )
    hidden = recurrent.shape[0]
    gates = _count_gates(recurrent.shape[1], hidden)
    if bias is None:
        bias = np.zeros((2, gates * hidden), recurrent.dtype)
    elif bias.ndim == 1:
        if gates == 3:
            raise UserError(
                "This Keras GRU has one bias: reset_after=False. Only reset_after=True can be "
                "converted."
            )
        bias = np.stack([bias, np.zeros_like(bias)])
    order = KERAS_GRU if gates == 3 else slice(None)
    return _Direction(
        kernel.reshape(-1, gates, hidden)[:, order],
        recurrent.reshape(-1, gates, hidden)[:, order],
        *bias.reshape(2, gates, hidden)[:, order],
    )


def to_keras(params: Mapping[str, Any]) -> list[list[Array]]:
    """For each layer the list for its `set_weights`, the inverse of `from_keras`.

    The layers have `use_bias=True`. Of a GRU's two biases the second is zero but for the candidate.

        for layer, weights in zip(keras_layers, to_keras(params)):
            layer.set_weights(weights)
    """
    return [
        [array for direction in layer for array in _to_keras_direction(direction)]
        for layer in _from_stack(params)
    ]


def _to_keras_direction(d: _Direction) -> list[Array]:
    d = d.plain("Keras")
    gates, hidden = d.input_bias_GH.shape
    order = KERAS_GRU if gates == 3 else slice(None)
    kernels = [w[:, order].reshape(-1, gates * hidden) for w in (d.input_DGH, d.recurrent_JGH)]
    biases = [b[order].reshape(-1) for b in (d.input_bias_GH, d.recurrent_bias_GH)]
    return [*kernels, np.stack(biases) if gates == 3 else biases[0]]


def from_flax(layers: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tree:
    """Parameters of a `Stack` from those of Flax's `LSTMCell`, `OptimizedLSTMCell`, `GRUCell` or
    `SimpleCell`, of Linen or of NNX (`nnx.to_pure_dict(nnx.state(module, nnx.Param))`).

    layers: the `params` of each layer, the lowest first, or of one alone. A layer is a cell, an
    `nn.RNN` of it, or an
        `nn.Bidirectional` of two.

    Linen keeps a kernel for each gate: `ii, if, ig, io` and `hi, ...` with the LSTM's bias, `ir,
    iz, in` with the GRU's and `hr, hz, hn` with its candidate's, `i` and `h`. NNX, but for its
    `LSTMCell`, has one for all, `dense_i` and `dense_h`. Their states have the order of ours.
    `SimpleCell(residual=True)` cannot be told from its weights and is not the same.

    Raises `UserError` on other cells.
    """
    if isinstance(layers, Mapping):
        layers = [layers]
    return _to_stack(_flax_layer(layer) for layer in layers)


def _flax_layer(tree: Mapping[str, Any]) -> Layer:
    if "forward_rnn" in tree:
        return [_flax_direction(tree[side]["cell"]) for side in ("forward_rnn", "backward_rnn")]
    return [_flax_direction(tree.get("cell", tree))]


def _flax_direction(cell: Mapping[str, Any]) -> _Direction:
    if set(cell) == {"dense_i", "dense_h"}:
        return _nnx_direction(cell["dense_i"], cell["dense_h"])
    cell = {name.rstrip("_"): dense for name, dense in cell.items()}  # NNX has if_ for if
    for gates in GATES.values():
        if set(cell) == {side + gate for side in "ih" for gate in gates}:
            break
    else:
        raise UserError(
            "Not weights of Flax's LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell: "
            f"{listing(cell)}."
        )

    def kernels(side: str) -> Array:
        return np.stack([np.asarray(cell[side + gate]["kernel"]) for gate in gates], axis=1)

    def biases(side: str) -> Array:
        none = np.zeros_like(np.asarray(cell[side + gates[0]]["kernel"])[0])
        return np.stack([np.asarray(cell[side + gate].get("bias", none)) for gate in gates])

    return _Direction(kernels("i"), kernels("h"), biases("i"), biases("h"))


def _nnx_direction(inner: Mapping[str, Any], recurrent: Mapping[str, Any]) -> _Direction:
    """The cells of Flax NNX that have one matrix for all gates, in the order of ours."""
    hidden = np.shape(recurrent["kernel"])[0]
    gates = _count_gates(np.shape(recurrent["kernel"])[1], hidden)
    kernels = [np.asarray(dense["kernel"]) for dense in (inner, recurrent)]
    none = np.zeros(gates * hidden, kernels[1].dtype)
    biases = [np.asarray(dense.get("bias", none)) for dense in (inner, recurrent)]
    return _Direction(
        *(kernel.reshape(-1, gates, hidden) for kernel in kernels),
        *(bias.reshape(gates, hidden) for bias in biases),
    )


def to_flax(params: Mapping[str, Any]) -> list[Tree]:
    """For each layer the `params` of an `nn.RNN` of Flax's cell, or of an `nn.Bidirectional` of
    two: the inverse of `from_flax`. What `OptimizedLSTMCell` has, `LSTMCell` has too.

        _, y_BTH = nn.RNN(nn.OptimizedLSTMCell(64), return_carry=True).apply({"params":
        to_flax(params)[0]}, x_BTD)
    """

    def tree(layer: Layer) -> Tree:
        cells = [{"cell": _to_flax_cell(direction)} for direction in layer]
        return (
            cells[0]
            if len(cells) == 1
            else dict(zip(("forward_rnn", "backward_rnn"), cells, strict=True))
        )

    return [tree(layer) for layer in _from_stack(params)]


def _to_flax_cell(d: _Direction) -> Tree:
    d = d.plain("Flax")
    gates = GATES[len(d.input_bias_GH)]
    sides = {"i": d.input_DGH, "h": d.recurrent_JGH}
    cell: Tree = {
        s + gate: {"kernel": w[:, g]} for s, w in sides.items() for g, gate in enumerate(gates)
    }
    side = "h" if len(gates) == 4 else "i"  # where Flax keeps the bias
    for g, gate in enumerate(gates):
        cell[side + gate]["bias"] = d.input_bias_GH[g]
    if len(gates) == 3:
        cell["hn"]["bias"] = d.recurrent_bias_GH[2]
    return cell
