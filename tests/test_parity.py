# SPDX-License-Identifier: Apache-2.0
"""Outputs, final states and gradients equal PyTorch's, Keras' and Flax's, from their weights.

The fixtures are made by `tools/make_fixtures.py` and say in its docstring what they hold. The live
tests at the end run where the library is installed.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_lstm import convert
from flax_lstm.nn.cells import CELLS, LSTMState
from flax_lstm.nn.layers import RNN, Bidirectional, Stack
from flax_lstm.nn.variants import ProjectedLSTMCell

pytestmark = pytest.mark.usefixtures("quick_compile")

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.npz"))
T, B, D, H = 6, 4, 3, 4
LENGTHS = np.array([6, 3, 1, 5])


def stack_of(cell: str, layers: int, bidirectional: bool, dtype: Any, hidden: int = H) -> Stack:
    def rnn() -> RNN:
        return RNN(CELLS[cell](hidden, param_dtype=dtype), backend="scan")

    return Stack([Bidirectional(rnn(), rnn()) if bidirectional else rnn() for _ in range(layers)])


class Case:
    """A fixture, read."""

    def __init__(self, path: Path, dtype: Any) -> None:
        arrays = dict(np.load(path))
        self.library, self.cell = str(arrays["library"]), str(arrays["cell"])
        self.layers, self.directions = int(arrays["layers"]), 1 + int(arrays["bidirectional"])
        self.arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in arrays.items()}

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def params(self, prefix: str, gradient: bool = False) -> Any:
        """Weights or their gradients in our tree. Where a library adds up two biases, both have the
        gradient of the sum, and one of them is ours."""
        weights = self.under(prefix)
        if self.library == "torch":
            if gradient:
                for name, g in weights.items():
                    if name.startswith("bias_hh"):
                        g[: 2 * H if self.cell == "gru" else None] = 0
            return convert.from_torch(weights)
        if self.library == "keras":
            layers = [
                [weights[f"{n}/{i}"] for i in range(3 * self.directions)]
                for n in range(self.layers)
            ]
            if gradient and self.cell == "gru":
                for layer in layers:
                    for bias in layer[2::3]:
                        bias[1, : 2 * H] = 0
            return convert.from_keras(layers)
        layers = [{} for _ in range(self.layers)]
        for name, array in weights.items():
            n, *path, last = name.split("/")
            node = layers[int(n)]
            for key in path:
                node = node.setdefault(key, {})
            node[last] = array
        return convert.from_flax(layers)

    def states(self, prefix: str) -> Any:
        parts = self.under(prefix)

        def one(n: int, d: int) -> Any:
            h = parts[f"{n}/{d}/h"]
            return LSTMState(parts[f"{n}/{d}/c"], h) if self.cell == "lstm" else h

        both = [tuple(one(n, d) for d in range(self.directions)) for n in range(self.layers)]
        return tuple(pair if len(pair) == 2 else pair[0] for pair in both)


def assert_close(ours: Any, theirs: Any, **tolerance: float) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def check(case: Case, dtype: Any, **tolerance: float) -> None:
    stack = stack_of(case.cell, case.layers, case.directions == 2, dtype)
    params = case.params("weights/")
    x, lengths = case.arrays["x"], case.arrays["lengths"]

    @jax.jit
    def run(cotangent: Any, *primal: Any) -> Any:
        out, pull = jax.vjp(
            lambda p, x, initial: stack.apply({"params": p}, x, lengths, initial), *primal
        )
        return out, pull(cotangent)

    cotangent = case.states("cotangent/final/"), case.arrays["cotangent/y"]
    (final, y), gradients = run(cotangent, params, x, case.states("initial/"))
    assert y.dtype == dtype
    assert_close(y, case.arrays["y"], **tolerance)
    assert_close(final, case.states("final/"), **tolerance)
    theirs = (
        case.params("gradient/weights/", gradient=True),
        case.arrays["gradient/x"],
        case.states("gradient/initial/"),
    )
    if case.library == "torch" and "weights/bias_ih_l0" not in case.arrays:
        for cell in (*gradients[0]["layers_0"].values(), *theirs[0]["layers_0"].values()):
            del cell["bias"]  # their module has none
            cell.pop("recurrent_bias", None)
    assert_close(gradients, theirs, **tolerance)


def those(*names: str) -> Any:
    paths = [path for path in FIXTURES if path.stem.startswith(names)]
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@those("torch", "flax")
def test_equal_in_float64(path: Path, x64: None) -> None:
    check(Case(path, np.float64), jnp.float64, rtol=1e-10, atol=1e-12)


@those("keras", "torch_lstm_bidirectional", "torch_gru_bidirectional", "torch_rnn_bidirectional")
def test_near_in_float32(path: Path) -> None:
    check(Case(path, np.float32), jnp.float32, rtol=1e-4, atol=1e-5)


def test_every_library_has_fixtures() -> None:
    names = {path.stem for path in FIXTURES}
    shapes = [f"{cell}{shape}" for cell in CELLS for shape in ("", "_bidirectional")]
    assert {
        f"{library}_{shape}" for library in ("torch", "keras", "flax") for shape in shapes
    } <= names


# Live: theirs -> ours and ours -> theirs compute the same.


def ours(cell: str, params: Any, layers: int, bidirectional: bool) -> np.ndarray:
    stack = stack_of(cell, layers, bidirectional, jnp.float32)
    return np.asarray(
        jax.jit(lambda params: stack.apply({"params": params}, inputs, LENGTHS)[1])(params)
    )


def random_params(cell: str, layers: int, bidirectional: bool) -> Any:
    stack = stack_of(cell, layers, bidirectional, jnp.float32)
    shapes = jax.eval_shape(stack.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), shapes)


inputs = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
valid = (np.arange(T) < LENGTHS[:, None])[..., None]
each_case = pytest.mark.parametrize("bidirectional", [False, True])
each_cell = pytest.mark.parametrize("cell", CELLS)


@each_cell
@each_case
def test_live_torch(cell: str, bidirectional: bool) -> None:
    torch = pytest.importorskip("torch")
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell]
    module = kind(D, H, 2, batch_first=True, bidirectional=bidirectional)

    def theirs() -> np.ndarray:
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            torch.tensor(inputs), LENGTHS, batch_first=True, enforce_sorted=False
        )
        return (
            torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], batch_first=True)[0]
            .detach()
            .numpy()
        )

    params = convert.from_torch(module.state_dict())
    np.testing.assert_allclose(ours(cell, params, 2, bidirectional), theirs(), atol=1e-6)

    params = random_params(cell, 2, bidirectional)
    module.load_state_dict({name: torch.tensor(w) for name, w in convert.to_torch(params).items()})
    np.testing.assert_allclose(ours(cell, params, 2, bidirectional), theirs(), atol=1e-5)


@each_case
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_live_torch_with_a_projection(bidirectional: bool) -> None:
    """Outputs, final states and the gradient of the projection."""
    torch = pytest.importorskip("torch")
    module = torch.nn.LSTM(
        D, H, num_layers=2, proj_size=2, batch_first=True, bidirectional=bidirectional
    )
    x, (h, c) = module(torch.tensor(inputs))
    torch.sin(x).sum().backward()

    def rnn() -> RNN:
        return RNN(ProjectedLSTMCell(H, projection=2))

    stack = Stack([Bidirectional(rnn(), rnn()) if bidirectional else rnn() for _ in range(2)])

    def loss(params: Any) -> Any:
        final, y_BTH = stack.apply({"params": params}, inputs)
        return jnp.sum(jnp.sin(y_BTH)), (final, y_BTH)

    params = convert.from_torch(module.named_parameters())
    gradient, (final, y_BTH) = jax.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(y_BTH, x.detach().numpy(), atol=1e-6)
    parts = final if not bidirectional else [part for pair in final for part in pair]
    for n, part in enumerate(parts):
        np.testing.assert_allclose(part.h_BH, h[n].detach().numpy(), atol=1e-6)
        np.testing.assert_allclose(part.c_BH, c[n].detach().numpy(), atol=1e-6)
    theirs = module.weight_hr_l0.grad.numpy().T
    layer = gradient["layers_0"]["forward"] if bidirectional else gradient["layers_0"]
    np.testing.assert_allclose(layer["cell"]["projection_weight"], theirs, atol=1e-5)


@each_cell
def test_live_torch_parameters_in_bfloat16(cell: str) -> None:
    """From `named_parameters()` of a whole model: these require gradients."""
    torch = pytest.importorskip("torch")
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell]
    model = torch.nn.ModuleDict({"encoder": kind(D, H), "head": torch.nn.Linear(H, 2)})
    found = convert.from_torch(model.to(torch.bfloat16).named_parameters(), prefix="encoder.")
    again = convert.from_torch(model.to(torch.float32).state_dict(), prefix="encoder.")
    for name in ("input", "recurrent"):
        weights = found["layers_0"]["cell"][name]
        assert weights.dtype == jnp.bfloat16
        np.testing.assert_array_equal(weights.astype(np.float32), again["layers_0"]["cell"][name])


@each_cell
@each_case
@pytest.mark.filterwarnings("ignore")
def test_live_keras(cell: str, bidirectional: bool) -> None:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    kind = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}[cell]

    with jax.numpy_rank_promotion("allow"):
        layers = [kind(H, return_sequences=True) for _ in range(2)]
        layers = (
            [keras.layers.Bidirectional(layer) for layer in layers] if bidirectional else layers
        )

        def theirs() -> np.ndarray:
            x = inputs
            for layer in layers:
                x = layer(x, mask=valid[..., 0])
            return np.where(valid, np.asarray(x), 0)

        theirs()  # builds the layers
        params = convert.from_keras([layer.get_weights() for layer in layers])
        np.testing.assert_allclose(ours(cell, params, 2, bidirectional), theirs(), atol=1e-6)

        params = random_params(cell, 2, bidirectional)
        for layer, weights in zip(layers, convert.to_keras(params), strict=True):
            layer.set_weights(weights)
        np.testing.assert_allclose(ours(cell, params, 2, bidirectional), theirs(), atol=1e-5)


@pytest.mark.parametrize(
    "cell, kind",
    [
        ("lstm", nn.LSTMCell),
        ("lstm", nn.OptimizedLSTMCell),
        ("gru", nn.GRUCell),
        ("rnn", nn.SimpleCell),
    ],
)
@each_case
def test_live_flax(cell: str, kind: Any, bidirectional: bool) -> None:
    layer: Any = nn.RNN(kind(H))
    if bidirectional:
        layer = nn.Bidirectional(layer, nn.RNN(kind(H)))

    @jax.jit
    def theirs(params: Any) -> Any:
        return jnp.where(valid, layer.apply({"params": params}, inputs, seq_lengths=LENGTHS), 0)

    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), shapes)
    expected = ours(cell, convert.from_flax(params), 1, bidirectional)
    np.testing.assert_allclose(expected, theirs(params), atol=1e-5)

    params = random_params(cell, 1, bidirectional)
    expected = ours(cell, params, 1, bidirectional)
    np.testing.assert_allclose(expected, theirs(convert.to_flax(params)[0]), atol=1e-5)
