# SPDX-License-Identifier: Apache-2.0
"""Asks PyTorch, Keras and Flax what their recurrent layers compute, and writes it to
`tests/fixtures/*.npz`.

    python tools/make_fixtures.py            # writes
    python tools/make_fixtures.py --check    # compares with what is there, writes nothing; exit
    code 1 on a difference

Needs `torch`, `keras`, `jax` and `flax`; the tests need none of the first two. Everything is
computed in float64 (by
Keras in float32: on JAX and PyTorch it turns the result of every operation on float64 into
float32), from random weights (biases too), for two layers, rows of different lengths and random
initial states. Each file holds:

    library, versions, cell            who computed it, and "lstm", "gru" or "rnn"
    bidirectional, layers              the shape of the stack
    weights/NAME                       as the library names and orders them
    x, lengths, y                      inputs [B, T, D], valid steps [B] and outputs, zeroed beyond
    them initial/LAYER/DIRECTION/PART       states before the first step, [B, H]; PART is h, or c of
    an LSTM final/...                          states after each row's last valid step cotangent/y,
    cotangent/final/...   random numbers U; the gradients are those of sum(U * (y, final))
    gradient/weights/NAME, gradient/x, gradient/initial/...
"""

import os

os.environ.update(KERAS_BACKEND="jax", JAX_ENABLE_X64="1", JAX_PLATFORMS="cpu")

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
BATCH, TIME, FEATURES, HIDDEN, LAYERS = 4, 6, 3, 4, 2
LENGTHS = np.array([6, 3, 1, 5])

Arrays = dict[str, np.ndarray]


class Draw:
    """Random arrays; the same for the same name of a case on every machine."""

    def __init__(self, case: str, dtype: Any = np.float64) -> None:
        self.rng, self.dtype = np.random.default_rng(list(case.encode())), dtype

    def __call__(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(self.dtype)

    def states(self, parts: str, directions: int, layers: int) -> Arrays:
        shape = (BATCH, HIDDEN)
        return {
            f"{n}/{d}/{p}": self(*shape)
            for n in range(layers)
            for d in range(directions)
            for p in parts
        }


def parts_of(cell: str) -> str:
    return "hc" if cell == "lstm" else "h"


def named(prefix: str, arrays: dict[str, Any]) -> Arrays:
    return {f"{prefix}/{name}": np.asarray(array) for name, array in arrays.items()}


def from_torch(
    case: str, cell: str, bidirectional: bool, layers: int = LAYERS, bias: bool = True
) -> Arrays:
    """`torch.nn.LSTM`, `GRU` or `RNN` over a packed sequence."""
    draw, directions = Draw(case), 1 + bidirectional
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell]
    options = {
        "bias": bias,
        "batch_first": True,
        "bidirectional": bidirectional,
        "dtype": torch.float64,
    }
    module = kind(FEATURES, HIDDEN, layers, **options)
    weights = {name: 0.5 * draw(*w.shape) for name, w in module.named_parameters()}
    module.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    x = torch.tensor(draw(BATCH, TIME, FEATURES), requires_grad=True)
    begin = draw.states(parts_of(cell), directions, layers)

    def stacked(part: str) -> torch.Tensor:  # PyTorch's index: layer, then direction
        states = [s for name, s in begin.items() if name.endswith(part)]
        return torch.tensor(np.stack(states), requires_grad=True)

    state = {part: stacked(part) for part in parts_of(cell)}
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, LENGTHS, batch_first=True, enforce_sorted=False
    )
    y, final = module(packed, (state["h"], state["c"]) if cell == "lstm" else state["h"])
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    final = dict(zip("hc", final, strict=True)) if cell == "lstm" else {"h": final}

    def unstacked(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        index = [(f"{n}/{d}", n * directions + d) for n in range(layers) for d in range(directions)]
        return {f"{name}/{part}": stack[i] for part, stack in states.items() for name, i in index}

    cotangent = {
        "y": draw(*y.shape),
        **named("final", draw.states(parts_of(cell), directions, layers)),
    }
    loss = (y * torch.tensor(cotangent["y"])).sum()
    for name, end in unstacked(final).items():
        loss = loss + (end * torch.tensor(cotangent[f"final/{name}"])).sum()
    loss.backward()
    return {
        **named("weights", weights),
        "x": x.detach().numpy(),
        "y": y.detach().numpy(),
        **named("initial", begin),
        **named("final", {name: end.detach() for name, end in unstacked(final).items()}),
        **named("cotangent", cotangent),
        **named(
            "gradient/weights", {name: w.grad.numpy() for name, w in module.named_parameters()}
        ),
        "gradient/x": x.grad.numpy(),
        **named("gradient/initial", unstacked({part: s.grad for part, s in state.items()})),
    }


Run = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]  # (weights, x, initial) -> (y, final)


def differentiated(
    draw: Draw, cell: str, bidirectional: bool, run: Run, shapes: dict[str, Any]
) -> Arrays:
    """A case of a library that computes with JAX: `run` and its gradients by `jax.vjp`."""
    directions = 1 + bidirectional
    weights = {name: 0.5 * draw(*shape) for name, shape in shapes.items()}
    x = draw(BATCH, TIME, FEATURES)
    begin = draw.states(parts_of(cell), directions, LAYERS)
    valid = (np.arange(TIME) < LENGTHS[:, None])[..., None]

    def masked(weights: Any, x: jax.Array, begin: Any) -> tuple[jax.Array, Any]:
        y, final = run(weights, x, begin)
        return jnp.where(valid, y, 0), final

    (y, final), pull = jax.vjp(jax.jit(masked), weights, x, begin)
    cotangent = draw(*y.shape), draw.states(parts_of(cell), directions, LAYERS)
    gradient = dict(zip(("weights", "x", "initial"), pull(cotangent), strict=True))
    return {
        **named("weights", weights),
        "x": x,
        "y": np.asarray(y),
        **named("initial", begin),
        **named("final", final),
        "cotangent/y": cotangent[0],
        **named("cotangent/final", cotangent[1]),
        **named("gradient/weights", gradient["weights"]),
        "gradient/x": np.asarray(gradient["x"]),
        **named("gradient/initial", gradient["initial"]),
    }


def from_keras(case: str, cell: str, bidirectional: bool) -> Arrays:
    """Keras' `LSTM`, `GRU` or `SimpleRNN` under a mask; the weights are named LAYER/INDEX as in
    `get_weights()`."""
    kind = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}[cell]
    layers, shapes, parts, directions = [], {}, parts_of(cell), 1 + bidirectional
    for n in range(LAYERS):
        layer = kind(HIDDEN, return_sequences=True, return_state=True)
        if bidirectional:
            layer = keras.layers.Bidirectional(layer)
        layer.build((BATCH, TIME, FEATURES if n == 0 else HIDDEN * directions))
        layers.append(layer)
        shapes.update({f"{n}/{i}": w.shape for i, w in enumerate(layer.get_weights())})
    mask = jnp.arange(TIME) < LENGTHS[:, None]

    def run(weights: Any, x: jax.Array, begin: Any) -> tuple[jax.Array, Any]:
        final = {}
        for n, layer in enumerate(layers):
            trainable = [weights[f"{n}/{i}"] for i in range(len(layer.weights))]
            names = [f"{n}/{d}/{p}" for d in range(directions) for p in parts]  # h before c
            states = [begin[name] for name in names]
            rest = [v.value for v in layer.non_trainable_variables]
            (x, *ends), _ = layer.stateless_call(
                trainable, rest, x, mask=mask, initial_state=states
            )
            final.update(zip(names, ends, strict=True))
        return x, final

    return differentiated(Draw(case, np.float32), cell, bidirectional, run, shapes)


def from_flax(case: str, cell: str, bidirectional: bool) -> Arrays:
    """Flax's `nn.RNN` of `OptimizedLSTMCell`, `GRUCell` or `SimpleCell`; the weights are named
    LAYER/PATH."""
    kind = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}[cell]
    parts, directions, shapes = parts_of(cell)[::-1], 1 + bidirectional, {}  # c before h
    layer = nn.RNN(kind(HIDDEN, param_dtype=jnp.float64), return_carry=True)
    if bidirectional:
        layer = nn.Bidirectional(
            layer, nn.RNN(kind(HIDDEN, param_dtype=jnp.float64)), return_carry=True
        )
    for n in range(LAYERS):
        x = jnp.zeros((BATCH, TIME, FEATURES if n == 0 else HIDDEN * directions))
        tree = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        shapes.update(
            {
                f"{n}/" + "/".join(k.key for k in path): w.shape
                for path, w in jax.tree.leaves_with_path(tree)
            }
        )

    def run(weights: Any, x: jax.Array, begin: Any) -> tuple[jax.Array, Any]:
        final = {}
        for n in range(LAYERS):
            params: dict[str, Any] = {}
            for name, w in weights.items():
                first, *path, last = name.split("/")
                if first == str(n):
                    node = params
                    for key in path:
                        node = node.setdefault(key, {})
                    node[last] = w
            names = [[f"{n}/{d}/{p}" for p in parts] for d in range(directions)]
            states = [
                tuple(begin[name] for name in group) if len(group) > 1 else begin[group[0]]
                for group in names
            ]
            state = tuple(states) if bidirectional else states[0]
            state, x = layer.apply(
                {"params": params}, x, initial_carry=state, seq_lengths=jnp.asarray(LENGTHS)
            )
            final.update(
                zip(
                    [name for group in names for name in group], jax.tree.leaves(state), strict=True
                )
            )
        return x, final

    return differentiated(Draw(case), cell, bidirectional, run, shapes)


def cases() -> Iterator[tuple[str, Arrays]]:
    makers = {"torch": from_torch, "keras": from_keras, "flax": from_flax}
    packages = {"torch": ["torch"], "keras": ["keras", "jax"], "flax": ["flax", "jax"]}

    def complete(
        library: str, cell: str, bidirectional: bool, layers: int, arrays: Arrays
    ) -> Arrays:
        versions = " ".join(
            f"{package} {importlib.metadata.version(package)}" for package in packages[library]
        )
        about = {"library": library, "versions": versions, "cell": cell, "lengths": LENGTHS}
        about |= {"bidirectional": bidirectional, "layers": layers}
        return {**{name: np.asarray(value) for name, value in about.items()}, **arrays}

    for library, make in makers.items():
        for cell in ("lstm", "gru", "rnn"):
            for bidirectional in (False, True):
                case = f"{library}_{cell}" + "_bidirectional" * bidirectional
                yield (
                    case,
                    complete(library, cell, bidirectional, LAYERS, make(case, cell, bidirectional)),
                )
    for cell in ("lstm", "gru"):
        case = f"torch_{cell}_no_bias"
        yield (
            case,
            complete("torch", cell, False, 1, from_torch(case, cell, False, layers=1, bias=False)),
        )


def differences(old: Arrays, new: Arrays) -> list[str]:
    def same(a: np.ndarray, b: np.ndarray) -> bool:
        if b.dtype.kind != "f":
            return np.array_equal(a, b)
        tolerance = 1000 * np.finfo(b.dtype).eps
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and np.allclose(a, b, rtol=tolerance, atol=tolerance)
        )

    return [
        name
        for name in new
        if name != "versions" and (name not in old or not same(old[name], new[name]))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    check = parser.parse_args().check
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed, size = False, 0
    for case, arrays in cases():
        path = FOLDER / f"{case}.npz"
        if check:
            wrong = (
                differences(dict(np.load(path)), arrays)
                if path.exists()
                else ["the file is missing"]
            )
            failed |= bool(wrong)
            print(f"{case}: " + ("differs: " + ", ".join(wrong) if wrong else "same"))
        else:
            np.savez_compressed(path, **arrays)
            size += path.stat().st_size
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")
    if not check:
        print(f"{size / 1024:.0f} kB in total")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
