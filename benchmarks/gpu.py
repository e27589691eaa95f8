# SPDX-License-Identifier: Apache-2.0
"""The recurrent layers on a GPU in one command of less than ten minutes: whether every backend
gives what the scan gives, and how long it takes beside PyTorch's cuDNN, Flax and Keras.

    pip install -e '.[cuda]' torch keras        # a library that is missing is reported
    python benchmarks/gpu.py --json gpu.json > gpu.md

Parity: outputs, final states and all gradients, of LSTM and GRU, in float32, TF32 and bfloat16,
with rows of different lengths (one of them empty), read backward, in both directions, with resets;
the relative distance from the scan in float32 on the CPU. Times: outputs alone, and with the
gradients of inputs and weights, in turns, of `cudnn`, `fused`, `scan` and the others. Ends with
status 1 where a backend is further from the scan than its numbers allow. It runs on any device of
JAX, where the times say something of that device.

Axes: B batch, T time, D input features, H hidden units.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory, too
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_lstm import RNN, Bidirectional, GRUCell, LSTMCell
from flax_lstm.errors import UserError
from flax_lstm.nn.recurrence import BACKENDS

THREADS = min(12, os.cpu_count() or 1)  # that compile
CELLS: dict[str, Any] = {"lstm": LSTMCell, "gru": GRUCell}
BACKEND_NAMES = (*BACKENDS, "scan")


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lengths": {"lengths": True},
    "backward": {"lengths": True, "reverse": True},
    "both directions": {"lengths": True, "both": True},
    "resets": {"lengths": True, "resets": True},
}


class Numbers(NamedTuple):
    """What is multiplied: the dtype of the layers, JAX's precision of products, the relative
    distance from float32 that is allowed (some times what the format can tell apart), and what is
    compared: a slip in the mathematics shows in float32, where every case is."""

    dtype: Any
    precision: str
    allowed: float
    cases: tuple[str, ...] = ("both directions", "resets")


NUMBERS = {
    "float32": Numbers(jnp.float32, "highest", 2e-5, tuple(CASES)),
    "TF32": Numbers(jnp.float32, "default", 8 * 2**-10),
    "bfloat16": Numbers(jnp.bfloat16, "default", 4 * 2**-7),
}


class Shape(NamedTuple):
    batch: int
    time: int
    hidden: int  # and input features

    @classmethod
    def of(cls, text: str) -> "Shape":
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"B{self.batch} T{self.time} H{self.hidden}"


# That of published figures first: whatever the time allows, it is there.
GRID = [Shape(16, 1024, 768)]
GRID += [Shape(*s) for s in itertools.product((16, 128), (256,), (256, 768))]


# --- parity


def layer(cell: str, backend: Any, dtype: Any, hidden: int, both: bool) -> nn.Module:
    def one() -> RNN:
        return RNN(CELLS[cell](hidden, dtype=dtype), backend=backend)

    return Bidirectional(one(), one()) if both else one()


def everything(module: nn.Module, case: dict[str, Any], shape: Shape, numbers: Numbers) -> Any:
    """Outputs, final state and gradients, in float64."""
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(shape.batch, shape.time, shape.hidden)), jnp.float32)
    options: dict[str, Any] = {}
    if case.get("lengths"):
        options["lengths_B"] = jnp.asarray(
            rng.permutation(np.linspace(0, shape.time, shape.batch)).astype(int)
        )
    if case.get("resets"):
        options["reset_BT"] = jnp.asarray(rng.random((shape.batch, shape.time)) < 0.1)
    if case.get("reverse"):
        options["reverse"] = True
    variables = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) / np.sqrt(shape.hidden), jnp.float32),
        jax.eval_shape(lambda: module.init(jax.random.key(0), x_BTD)),
    )

    def loss(variables: Any, x_BTD: Any) -> Any:
        state, y = module.apply(variables, x_BTD, **options)
        leaves = [y, *jax.tree.leaves(state)]
        waves = [
            leaf.astype(jnp.float32)
            * jnp.cos(jax.lax.broadcasted_iota(float, leaf.shape, leaf.ndim - 1))
            for leaf in leaves
        ]
        return sum(jnp.sum(wave) for wave in waves), leaves

    with jax.default_matmul_precision(numbers.precision):
        (_, leaves), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            variables, x_BTD
        )
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((leaves, gradients))]


def distance(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest relative distance of one of the arrays."""
    return max(
        float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        for a, b in zip(found, expected, strict=True)
    )


def parity(shape: Shape) -> list[dict[str, Any]]:
    """A row for each cell, case, format and backend. They compile beside each other."""

    def references(asked: tuple[str, str]) -> Any:
        cell, case = asked
        settings = CASES[case]
        scan = layer(cell, "scan", jnp.float32, shape.hidden, settings.get("both", False))
        with jax.default_device(jax.devices("cpu")[0]):
            return everything(scan, settings, shape, NUMBERS["float32"])

    def compare(asked: tuple[str, str, str, str]) -> dict[str, Any]:
        cell, case, name, backend = asked
        settings, numbers = CASES[case], NUMBERS[name]
        row = {"cell": cell, "case": case, "numbers": name, "backend": backend}
        module = layer(cell, backend, numbers.dtype, shape.hidden, settings.get("both", False))
        try:
            found = everything(module, settings, shape, numbers)
        except UserError as error:
            return row | {"status": "unsupported", "reason": str(error)}
        far = distance(found, expected[cell, case])
        status = "ok" if far <= numbers.allowed else "wrong"
        return row | {"status": status, "distance": far, "allowed": numbers.allowed}

    with ThreadPoolExecutor(THREADS) as pool:
        cases = list(itertools.product(CELLS, CASES))
        expected = dict(zip(cases, pool.map(references, cases), strict=True))
        asked = [
            (cell, case, name, backend)
            for (cell, case), (name, numbers) in itertools.product(cases, NUMBERS.items())
            if case in numbers.cases
            for backend in BACKEND_NAMES
        ]
        return list(pool.map(compare, asked))


# --- times: each gives, for a cell, a shape and a format, the two functions that are timed


def jax_functions(apply: Callable[..., Any], variables: Any, x: Any, precision: str) -> Any:
    def loss(variables: Any, x: Any) -> Any:
        return jnp.mean(jnp.square(apply(variables, x).astype(jnp.float32)))

    forward, backward = jax.jit(apply), jax.jit(jax.grad(loss, (0, 1)))

    def call(function: Any) -> Callable[[], Any]:
        def run() -> None:
            with jax.default_matmul_precision(precision):
                jax.block_until_ready(function(variables, x))

        return run

    return call(forward), call(backward)


def inputs(shape: Shape, dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (shape.batch, shape.time, shape.hidden), dtype)


def ours(backend: str) -> Callable[..., Any]:
    def make(cell: str, shape: Shape, numbers: Numbers) -> Any:
        module, x_BTD = (
            layer(cell, backend, numbers.dtype, shape.hidden, False),
            inputs(shape, numbers.dtype),
        )
        variables = module.init(jax.random.key(1), x_BTD)
        return jax_functions(
            lambda v, x: module.apply(v, x)[1], variables, x_BTD, numbers.precision
        )

    return make


def flax(cell: str, shape: Shape, numbers: Numbers) -> Any:
    kind = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[cell]
    module, x_BTD = nn.RNN(kind(shape.hidden, dtype=numbers.dtype)), inputs(shape, numbers.dtype)
    variables = module.init(jax.random.key(1), x_BTD)
    return jax_functions(module.apply, variables, x_BTD, numbers.precision)


def keras(cell: str, shape: Shape, numbers: Numbers) -> Any:
    import keras as library

    kind = {"lstm": library.layers.LSTM, "gru": library.layers.GRU}[cell]
    policy = "float32" if numbers.dtype == jnp.float32 else "mixed_bfloat16"
    module, x_BTD = (
        kind(shape.hidden, return_sequences=True, dtype=policy),
        inputs(shape, numbers.dtype),
    )
    module.build(x_BTD.shape)
    weights, rest = (
        [v.value for v in vs] for vs in (module.trainable_variables, module.non_trainable_variables)
    )
    return jax_functions(
        lambda w, x: module.stateless_call(w, rest, x)[0], weights, x_BTD, numbers.precision
    )


def torch(cell: str, shape: Shape, numbers: Numbers) -> Any:
    import torch as library

    device = "cuda" if library.cuda.is_available() else "cpu"
    exact, half = numbers.precision == "highest", numbers.dtype != jnp.float32
    kind = {"lstm": library.nn.LSTM, "gru": library.nn.GRU}[cell]
    dtype = library.bfloat16 if half else library.float32
    module = kind(shape.hidden, shape.hidden, device=device, dtype=dtype)
    x_TBD = library.randn(
        shape.time, shape.batch, shape.hidden, device=device, dtype=dtype, requires_grad=True
    )

    def wait() -> None:
        library.backends.cudnn.allow_tf32 = library.backends.cuda.matmul.allow_tf32 = not exact
        if device == "cuda":
            library.cuda.synchronize()

    def forward() -> None:
        wait()
        with library.inference_mode():
            module(x_TBD)
        wait()

    def backward() -> None:
        wait()
        module.zero_grad()
        module(x_TBD)[0].float().square().mean().backward()
        wait()

    return forward, backward


MAKERS = {
    **{f"ours-{name}": ours(name) for name in BACKEND_NAMES},
    "flax": flax,
    "torch": torch,
    "keras": keras,
}


class Clock(NamedTuple):
    ends: float  # of time.monotonic

    def left(self) -> bool:
        return time.monotonic() < self.ends


def timed(
    cell: str, shape: Shape, name: str, clock: Clock, repeats: int, only: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each implementation; they compile beside each other, and then their turns
    alternate. What is begun after the time is up is left out, and says so."""
    numbers = NUMBERS[name]

    def row(who: str) -> dict[str, Any]:
        return {"implementation": who, "cell": cell, "shape": str(shape), "numbers": name}

    def ready(who: str) -> Any:
        """Its two functions, each called once, or the row that says why there are none."""
        try:
            pair = MAKERS[who](cell, shape, numbers)
            for function in pair:
                function()
            return pair
        except UserError as error:
            return row(who) | {"status": "unsupported", "reason": str(error)}
        except Exception as error:  # whatever a library says; the others go on
            status = "missing" if isinstance(error, ImportError) else "failed"
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            return row(who) | {"status": status, "reason": reason}

    if not clock.left():
        for who in only:
            yield row(who) | {"status": "left out", "reason": "the time was up"}
        return
    with ThreadPoolExecutor(THREADS) as pool:
        made = dict(zip(only, pool.map(ready, only), strict=True))
    yield from (found for found in made.values() if isinstance(found, dict))
    functions = {who: found for who, found in made.items() if not isinstance(found, dict)}
    seconds: dict[str, list[list[float]]] = {who: [[], []] for who in functions}
    for _ in range(repeats):
        for who, pair in functions.items():
            for times, function in zip(seconds[who], pair, strict=True):
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
    for who, (forward, both) in seconds.items():
        figures = {
            "forward_ms": 1e3 * statistics.median(forward),
            "both_ms": 1e3 * statistics.median(both),
        }
        yield row(who) | {"status": "ok", **figures}


# --- report


def parity_table(rows: list[dict[str, Any]]) -> str:
    """The largest distance over all cases of a cell."""
    lines = [
        "| cell | numbers | backend | cases | largest distance | allowed | |",
        "| --- " * 7 + "|",
    ]
    for cell, name, backend in itertools.product(CELLS, NUMBERS, BACKEND_NAMES):
        mine = [r for r in rows if (r["cell"], r["numbers"], r["backend"]) == (cell, name, backend)]
        run = [r for r in mine if r["status"] != "unsupported"]
        if run:
            far = max(r["distance"] for r in run)
            wrong = ", ".join(r["case"] for r in run if r["status"] == "wrong")
            end = f"{far:.1e} | {run[0]['allowed']:.1e} | {'WRONG: ' + wrong if wrong else 'ok'}"
            lines.append(f"| {cell} | {name} | {backend} | {len(run)} | {end} |")
    reasons = {(r["backend"], r["reason"]) for r in rows if r["status"] == "unsupported"}
    return "\n".join(
        [*lines, "", *(f"- {backend}: {reason}" for backend, reason in sorted(reasons))]
    )


def times_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | cell | numbers | implementation | forward, ms | with gradients, ms |",
        "| --- " * 6 + "|",
    ]
    for r in rows:
        if r["status"] == "ok":
            figures = f"{r['forward_ms']:.3g} | {r['both_ms']:.3g}"
            who = f"{r['shape']} | {r['cell']} | {r['numbers']} | {r['implementation']}"
            lines.append(f"| {who} | {figures} |")
    others = {(r["implementation"], r["status"], r["reason"]) for r in rows if r["status"] != "ok"}
    return "\n".join(
        [*lines, "", *(f"- {who}: {status}: {why}" for who, status, why in sorted(others))]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", type=Shape.of, default=GRID, help="as 16x1024x768: B, T, H"
    )
    parser.add_argument(
        "--parity", type=Shape.of, default=Shape(9, 40, 64), help="the size that is compared"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns of each implementation")
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=list(NUMBERS))
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--no-parity", action="store_true", help="times alone")
    parser.add_argument("--no-times", action="store_true", help="parity alone")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after them")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    began, clock = time.monotonic(), Clock(time.monotonic() + 60 * options.minutes)
    compared = [] if options.no_parity else parity(options.parity)
    print(f"parity: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    sizes = [] if options.no_times else options.sizes
    for shape, cell, name in itertools.product(sizes, CELLS, options.numbers):
        rows += timed(cell, shape, name, clock, options.repeats, options.only)
        print(
            f"{shape} {cell} {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
        )
    device = jax.devices()[0]
    about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    about |= {"date": time.strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - began)}
    if options.json:
        options.json.write_text(
            json.dumps({**about, "parity": compared, "times": rows}, indent=1) + "\n"
        )
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(parity_table(compared), times_table(rows), sep="\n\n")
    return int(any(row["status"] == "wrong" for row in compared))


if __name__ == "__main__":
    sys.exit(main())
