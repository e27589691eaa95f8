# SPDX-License-Identifier: Apache-2.0
"""Converting weights and back gives the same weights, and what cannot be converted is refused. That
the converted weights compute the same is `test_parity.py`."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from flax_lstm import convert
from flax_lstm.errors import UserError

D, H = 3, 4
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def random_cell(cell: str, rng: np.random.Generator, inputs: int, dtype: Any) -> Any:
    gates = GATES[cell]
    shapes = {"input": (inputs, gates, H), "recurrent": (H, gates, H), "bias": (gates, H)}
    if cell == "gru":
        shapes["recurrent_bias"] = (H,)
    return {"cell": {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}}


def random_params(cell: str, bidirectional: bool, layers: int = 2, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    params = {}
    for n in range(layers):
        inputs = D if n == 0 else H * (1 + bidirectional)
        sides = {side: random_cell(cell, rng, inputs, dtype) for side in ("forward", "backward")}
        params[f"layers_{n}"] = sides if bidirectional else sides["forward"]
    return params


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("library", ["torch", "keras", "flax"])
def test_there_and_back(library: str, cell: str, bidirectional: bool, dtype: Any) -> None:
    params = random_params(cell, bidirectional, dtype=dtype)
    there, back = getattr(convert, f"to_{library}"), getattr(convert, f"from_{library}")
    assert_same(back(there(params)), params)


def test_eleven_layers_keep_their_order() -> None:
    params = random_params("lstm", False, layers=11)
    assert_same(convert.from_torch(convert.to_torch(params)), params)
    assert_same(convert.from_keras(convert.to_keras(params)), params)


def test_torch_names_and_shapes() -> None:
    weights = convert.to_torch(random_params("gru", True))
    assert {name: w.shape for name, w in weights.items() if name.endswith("l1_reverse")} == {
        "weight_ih_l1_reverse": (3 * H, 2 * H),
        "weight_hh_l1_reverse": (3 * H, H),
        "bias_ih_l1_reverse": (3 * H,),
        "bias_hh_l1_reverse": (3 * H,),
    }
    assert len(weights) == 2 * 2 * 4


def test_torch_biases_are_added_but_for_the_candidate() -> None:
    weights = {
        "weight_ih_l0": np.zeros((3 * H, D)),
        "weight_hh_l0": np.zeros((3 * H, H)),
        "bias_ih_l0": np.repeat([1.0, 2, 3], H),
        "bias_hh_l0": np.repeat([10.0, 20, 30], H),
    }
    cell = convert.from_torch(weights)["layers_0"]["cell"]
    np.testing.assert_array_equal(cell["bias"], np.repeat([[11], [22], [3]], H, axis=1))
    np.testing.assert_array_equal(cell["recurrent_bias"], np.full(H, 30))


def test_without_bias() -> None:
    weights = {
        name: w
        for name, w in convert.to_torch(random_params("gru", False)).items()
        if "bias" not in name
    }
    cell = convert.from_torch(weights)["layers_1"]["cell"]
    assert (
        not cell["bias"].any()
        and not cell["recurrent_bias"].any()
        and cell["recurrent_bias"].shape == (H,)
    )

    kernels = [
        [w for w in layer if w.shape[0] != 2]
        for layer in convert.to_keras(random_params("gru", True))
    ]
    assert [len(layer) for layer in kernels] == [4, 4]
    cell = convert.from_keras(kernels)["layers_1"]["backward"]["cell"]
    assert not cell["bias"].any() and cell["bias"].shape == (3, H)


def test_keras_gates_come_in_its_order() -> None:
    """Its GRU's z, r, h to our r, z, n; its LSTM's i, f, c, o are ours."""
    blocks = [np.full((D, H), g) for g in range(4)], [np.full((H, H), g) for g in range(4)]
    kernel, recurrent = (np.concatenate(b[:3], axis=1) for b in blocks)
    bias = np.repeat([[0, 1, 2], [0, 0, 5]], H, axis=1)
    cell = convert.from_keras([kernel, recurrent, bias])["layers_0"]["cell"]
    for name in ("input", "recurrent"):
        np.testing.assert_array_equal(cell[name][0, :, 0], [1, 0, 2])
    np.testing.assert_array_equal(cell["bias"][:, 0], [1, 0, 2])
    np.testing.assert_array_equal(cell["recurrent_bias"], np.full(H, 5))
    kernel, recurrent = (np.concatenate(b, axis=1) for b in blocks)
    cell = convert.from_keras([kernel, recurrent, np.zeros(4 * H)])["layers_0"]["cell"]
    np.testing.assert_array_equal(cell["input"][0, :, 0], [0, 1, 2, 3])


def test_one_layer_alone_is_a_stack_of_one() -> None:
    params = random_params("lstm", True, layers=1)
    assert_same(convert.from_keras(convert.to_keras(params)[0]), params)
    assert_same(convert.from_flax(convert.to_flax(params)[0]), params)
    bare = convert.to_flax(random_params("lstm", False, layers=1))[0]
    assert_same(convert.from_flax(bare["cell"]), convert.from_flax(bare))


def test_no_memory_is_shared() -> None:
    weights = convert.to_torch(random_params("rnn", False))
    params = convert.from_torch(weights)
    back = convert.to_torch(params)
    for leaf in jax.tree.leaves(params):
        assert not any(np.shares_memory(leaf, w) for w in (*weights.values(), *back.values()))


def test_a_layer_of_a_whole_torch_model_is_found_by_its_prefix() -> None:
    first, second = random_params("lstm", True), random_params("gru", False)
    model = {
        **convert.to_torch(first, prefix="encoder.lstm."),
        **convert.to_torch(second, prefix="decoder.gru."),
        "head.weight": np.zeros((2, H)),
    }
    assert_same(convert.from_torch(model, prefix="encoder.lstm."), first)
    assert_same(convert.from_torch(iter(model.items()), prefix="decoder.gru."), second)


class Tensor:
    """What a tensor of PyTorch does: one that requires a gradient, or is of bfloat16, is no array
    to NumPy."""

    def __init__(self, array: np.ndarray, attached: bool = True) -> None:
        self.array, self.attached = array, attached
        self.dtype = f"torch.{array.dtype}"

    def detach(self) -> "Tensor":
        return Tensor(self.array, attached=False)

    def cpu(self) -> "Tensor":
        return self

    def float(self) -> "Tensor":
        return Tensor(self.array.astype(np.float32), self.attached)

    def numpy(self) -> np.ndarray:
        assert not self.attached and self.array.dtype != ml_dtypes.bfloat16
        return self.array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_parameters_that_require_gradients_and_bfloat16(dtype: Any) -> None:
    """The tensors are a stand-in; `test_parity.py` has PyTorch's own, where it is installed."""
    params = random_params("lstm", False, dtype=dtype)
    named_parameters = [(name, Tensor(w)) for name, w in convert.to_torch(params).items()]
    assert_same(convert.from_torch(named_parameters), params)


def projected() -> Any:
    """Two layers of H units with 2 outputs."""
    rng = np.random.default_rng(0)
    sizes = {"input": (4, H), "recurrent": (2, 4, H), "bias": (4, H), "projection_weight": (H, 2)}
    return {
        f"layers_{n}": {
            "cell": {
                name: rng.normal(size=(inputs, *size) if name == "input" else size)
                for name, size in sizes.items()
            }
        }
        for n, inputs in enumerate((D, 2))
    }


def test_an_lstm_with_a_projection_goes_to_torch_and_back() -> None:
    weights = convert.to_torch(projected())
    shapes = {name: w.shape for name, w in weights.items() if name.endswith("l1")}
    assert shapes == {
        "weight_ih_l1": (4 * H, 2),
        "weight_hh_l1": (4 * H, 2),
        "weight_hr_l1": (2, H),
        "bias_ih_l1": (4 * H,),
        "bias_hh_l1": (4 * H,),
    }
    assert_same(convert.from_torch(weights), projected())


def torch_weights(**changes: Any) -> Any:
    return convert.to_torch(random_params("lstm", False)) | changes


@pytest.mark.parametrize(
    "refused, says",
    [
        (lambda: convert.to_keras(projected()), "Keras has no LSTM with a projection"),
        (lambda: convert.to_flax(projected()), "Flax has no LSTM with a projection"),
        (
            lambda: convert.from_torch({f"lstm.{k}": w for k, w in torch_weights().items()}),
            r"under these prefixes: 'lstm\.'; pass one as prefix",
        ),
        (
            lambda: convert.from_torch({f"a.{k}": w for k, w in torch_weights().items()}, "b."),
            r"there are none under 'b\.'.*'a\.'",
        ),
        (lambda: convert.from_torch(torch_weights(), "b."), "prefixes: ''"),
        (lambda: convert.from_torch(torch_weights(**{"head.weight": np.zeros(1)})), "head.weight"),
        (lambda: convert.from_torch({}), "there are none"),
        (lambda: convert.from_torch(torch_weights(weight_hh_l0=np.zeros((2 * H, H)))), "4 x 4"),
        (
            lambda: convert.from_keras(
                [np.zeros((D, 3 * H)), np.zeros((H, 3 * H)), np.zeros(3 * H)]
            ),
            "reset_after",
        ),
        (lambda: convert.from_keras([[np.zeros((D, H))]]), "2, 3, 4 or 6"),
        (lambda: convert.from_keras([[np.zeros((3, 3, D, H)), np.zeros((3, 3, H, H))]]), "matrix"),
        (lambda: convert.from_flax({"if": {}, "in": {}, "hf": {}, "hn": {}}), "if, in, hf, hn"),
        (lambda: convert.to_torch({"cell": {}}), "layers_0"),
        (lambda: convert.to_torch({}), "none"),
        (lambda: convert.to_keras({"layers_0": {"kernel": np.zeros(1)}}), "layers_0 is neither"),
        (lambda: convert.to_flax({"layers_0": {"cell": {"ii": {}}}}), "cells of flax_lstm"),
        (
            lambda: convert.to_torch(
                {**random_params("gru", False), "layers_1": random_params("lstm", True)["layers_1"]}
            ),
            "PyTorch module has one",
        ),
    ],
)
def test_refused_with_a_reason(refused: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        refused()
