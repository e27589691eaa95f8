# SPDX-License-Identifier: Apache-2.0
"""Calls with arrays that do not fit, drawn at random: of the layers, and of the C++ kernel itself.

`python tests/wrong_calls.py COUNT [--asan]` runs the kernel's, under AddressSanitizer where its
library is preloaded; test_wrong_calls.py uses both.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.recurrence import int8, native

B, T, D, H = 3, 4, 2, 5
SANITIZED = [
    "-O1",
    "-fsanitize=address",
    "-fno-omit-frame-pointer",
    "-g",
]  # added to the build by --asan


def other_shape(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape like this one, but not it: another size, an axis less or more, two in each other's
    place."""
    while True:
        new = list(shape)
        match rng.integers(4):
            case 0:
                new[rng.integers(len(new))] = int(rng.integers(0, 9))
            case 1:
                del new[rng.integers(len(new))]
            case 2:
                new.insert(int(rng.integers(len(new) + 1)), int(rng.integers(0, 4)))
            case 3:
                new = list(rng.permutation(new))
        if tuple(map(int, new)) != shape:
            return tuple(map(int, new))


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return np.asarray(rng.normal(size=shape) * 2).astype(dtype)


def wrong_call(rng: np.random.Generator, name: str) -> tuple[dict[str, Any], str]:
    """Arguments of a layer over inputs [B, T, D], one of which is wrong, and which."""
    leaves = 2 if name == "lstm" else 1
    state: Any = tuple(draw(rng, (B, H)) for _ in range(leaves))
    call: dict[str, Any] = {
        "x_BTD": draw(rng, (B, T, D)),
        "lengths_B": rng.integers(0, T + 1, B),
        "state": state if leaves == 2 else state[0],
        "reset_BT": rng.random((B, T)) < 0.3,
    }
    wrong = str(rng.choice(["x_BTD", "lengths_B", "state", "reset_BT"]))
    odd = [call["x_BTD"].astype(complex), "abc", object(), {"h": 1.0}, np.float32(1), [["a"]]]
    if wrong == "state":
        bad = other_shape(rng, (B, H))
        while bad == (1, H):  # taken for every row
            bad = other_shape(rng, (B, H))
        candidates = [
            (*state[:-1], draw(rng, bad)) if leaves == 2 else draw(rng, bad),
            (*state, state[0]),
            (*state[:-1], draw(rng, (B, H), bool)) if leaves == 2 else draw(rng, (B, H), bool),
            state[0] if leaves == 2 else (state[0], state[0]),
            *odd,
        ]
    elif wrong == "lengths_B":
        full = np.full(B, T)
        shape = other_shape(rng, (B,))
        candidates = [np.ones(shape, int), full * 1.0, full > 0, np.ones((B, T), int), T, *odd]
    else:
        shape = call[wrong].shape
        candidates = [draw(rng, other_shape(rng, shape)), *odd]
    call[wrong] = candidates[int(rng.integers(len(candidates)))]
    return call, wrong


ARGUMENTS = {  # of the kernel's calls, each with its shape
    "forward": "x input recurrent bias recurrent_bias c0 h0 mask lengths reset",
    "backward": "x input recurrent c0 h0 mask lengths reset y gates kept dy dc dh dkept",
    "words": "words table recurrent recurrent_bias c0 h0 lengths",
    "bytes": "words table panels scales recurrent_bias c0 h0 lengths",
    "add_up": "rows_found sums",
    "take": "embedding words",
    "update_table": "embedding embedding embedding rows_found sums numbers",
}
RESULTS = {
    "forward": "y c h gates kept",
    "backward": "x input recurrent bias recurrent_bias c0 h0 mask",
    "words": "y c h",
    "bytes": "y c h",
    "add_up": "rows_found sums",
    "take": "looked_up",
    "update_table": "embedding embedding embedding",
}


def shapes(
    name: str, b: int, t: int, d: int, h: int, time_major: bool, projected: bool, per_gate: bool
) -> dict[str, tuple]:
    """Of all arrays of a cell: where inputs were projected before, and with masks for each gate."""
    g = {"lstm": 4, "gru": 3, "rnn": 1}[name]
    over = (t, b) if time_major else (b, t)
    c, none = ((b, h) if name == "lstm" else (0,)), (0,)
    return {
        "x": (*over, g * h if projected else d),
        "input": none if projected else (d, g, h),
        "recurrent": (h, g, h),
        "bias": none if projected else (g, h),
        "recurrent_bias": (h,) if name == "gru" else none,
        **dict.fromkeys(("c0", "c", "dc"), c),
        **dict.fromkeys(("h0", "h", "dh"), (b, h)),
        "mask": (b, g, h) if per_gate else (b, h),
        "lengths": (b,),
        "reset": over,
        **dict.fromkeys(("y", "dy"), (*over, h)),
        "gates": (*over, g, h),
        "kept": (*over, h) if g > 1 else none,
        "dkept": (*over, h),
        "words": over,
        "table": (7, g, h),
        "panels": int8.panels_shape(g, h),
        "scales": (g, h),
        "embedding": (b, d),
        "looked_up": (*over, d),
        "rows_found": (t,),
        "sums": (t, d),
        "numbers": (8,),
    }


def call_kernel(rng: np.random.Generator, wrong: bool) -> str:
    """Calls the kernel with random sizes, and the text of its error. Right calls may have sizes of
    zero; with wrong ones they would not be told, for XLA drops calls whose results are empty."""
    name, which = str(rng.choice(list(CELLS))), str(rng.choice(list(ARGUMENTS)))
    time_major = which in ("forward", "backward") and bool(rng.integers(2))
    b, t, d, h = (int(n) for n in rng.integers(int(wrong), 6, 4))
    kinds = [bool(rng.integers(2)) for _ in range(2)]
    known, others = (
        shapes(name, b, t, d, h, time_major, kinds[0], per_gate)
        for per_gate in (kinds[1], not kinds[1])
    )
    given = [known[word] for word in ARGUMENTS[which].split()]
    found = [known[word] for word in RESULTS[which].split()]
    if wrong:
        place = int(rng.integers(len(given) + len(found)))
        part, n = (given, place) if place < len(given) else (found, place - len(given))
        right = part[n]
        part[n] = other_shape(rng, right)
        tables = [known["table"], *([known["embedding"]] if which == "take" else [])]

        def fine(shape: tuple[int, ...]) -> bool:
            """A table of more words, the other kind of mask, an only result that is empty."""
            more_words = right in tables and shape[1:] == right[1:]
            other_mask = right == known["mask"] and shape == others["mask"]
            return more_words or other_mask or (len(found) == 1 and 0 in found[0])

        while fine(part[n]):
            part[n] = other_shape(rng, right)
    dtypes = {"lengths": np.int32, "reset": bool, "words": np.int32, "panels": np.int8}
    dtypes["rows_found"] = np.int32
    arrays = [
        draw(rng, shape, dtypes.get(word, np.float32))
        for word, shape in zip(ARGUMENTS[which].split(), given, strict=True)
    ]
    results = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if word == "rows_found" else jnp.float32)
        for word, shape in zip(RESULTS[which].split(), found, strict=True)
    ]
    call = jax.ffi.ffi_call(f"flax_lstm_{which}", results)
    try:
        settings: dict[str, Any] = {"reverse": bool(rng.integers(2))}
        settings |= {} if which == "bytes" else {"half": bool(rng.integers(2))}
        if which in ("add_up", "take", "update_table"):
            settings = {"rows": np.int64(b)} if which == "add_up" else {}
        settings |= {"time_major": time_major} if which in ("forward", "backward") else {}
        jax.block_until_ready(call(*arrays, **settings))
    except Exception as error:  # whatever XLA makes of it
        return str(error)
    return ""


def main(count: int, asan: bool) -> None:
    if asan:
        native.FLAGS += SANITIZED
    if not count:  # compiled without the sanitizer's library, under which a compiler takes minutes
        native.build()
        return
    assert native.unavailable() is None, native.unavailable()
    rng = np.random.default_rng(0)
    refused = [call_kernel(rng, wrong=True) for _ in range(count)]
    fine = [call_kernel(rng, wrong=False) for _ in range(count)]
    told = sum("flax_lstm" in text for text in refused)
    print(f"{told} of {count} wrong calls refused, {sum(map(bool, fine))} of {count} right ones")


if __name__ == "__main__":
    main(int(sys.argv[1]), asan="--asan" in sys.argv)
