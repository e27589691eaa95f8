# SPDX-License-Identifier: Apache-2.0
"""How long a sentiment model takes to read words, with and without tables, in each of what
`load(..., dtype=)` can read in, beside Flax's `nn.RNN`, and ONNX Runtime's LSTM where that is
installed (`pip install onnx onnxruntime`), in float32 and with its dynamic int8; in turns of random
order.

    python benchmarks/words.py
    python benchmarks/words.py --run runs/imdb_finetune    # and what becomes of a run's answers

200 words, width 128, embeddings of 128, a vocabulary of 20,000. Axes: B rows, T words.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_lstm import TextModel, load
from flax_lstm.nn.words import with_tables

T, H, V = 200, 128, 20_000
READ = {"float32": False, "bfloat16": False, "int8": True}


class Plain(nn.Module):
    """The same model by Flax alone."""

    cell: Any

    @nn.compact
    def __call__(self, words_BT: Any) -> Any:
        y_BTH = nn.RNN(self.cell(H))(nn.Embed(V, H)(words_BT))
        return nn.Dense(2)(y_BTH[:, -1])


def onnx_lstm(words_BT: np.ndarray) -> dict[str, Callable[[], Any]]:
    """An LSTM of the same size by ONNX Runtime, with weights drawn anew; none where that is not
    installed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper, save
        from onnxruntime.quantization import quantize_dynamic
    except ImportError:
        return {}
    rng = np.random.default_rng(0)
    shapes = {"table": (V, H), "W": (1, 4 * H, H), "R": (1, 4 * H, H), "head": (H, 2)}
    weights = [
        numpy_helper.from_array((rng.normal(size=s) / np.sqrt(H)).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "words_TB"], ["x_TBH"]),
            helper.make_node("LSTM", ["x_TBH", "W", "R"], ["", "last_1BH"], hidden_size=H),
            helper.make_node("MatMul", ["last_1BH", "head"], ["logits"]),
        ],
        "lstm",
        [helper.make_tensor_value_info("words_TB", TensorProto.INT32, [T, None])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.onnx") for name in ("float32", "int8")}
        save(model, paths["float32"])
        quantize_dynamic(paths["float32"], paths["int8"], op_types_to_quantize=["LSTM"])
        for name, path in paths.items():
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            calls[f"ONNX Runtime, {name}"] = partial(session.run, None, {"words_TB": words_BT.T})
    return calls


def entrants(cell: str, rows: int) -> dict[str, Callable[[], Any]]:
    words_BT = np.random.default_rng(0).integers(2, V, (rows, T)).astype(np.int32)
    lengths_B = np.full(rows, T, np.int32)
    calls: dict[str, Callable[[], Any]] = {}
    for dtype, eight_bits in READ.items():
        computed = "float32" if eight_bits else dtype
        settings: dict[str, Any] = {"cell": cell, "dtype": computed}
        module = TextModel(hidden_size=H, embed_size=H, **settings).sequence(2, V)
        params = nn.meta.unbox(module.init(jax.random.key(0), words_BT, lengths_B)["params"])
        made = with_tables(module, params, eight_bits)
        assert made is not None, "tables are for the backend cpu"
        ways = {f"tables, {dtype}": made}
        if dtype == "float32":
            ways["without tables"] = (module, params)
        for name, (reader, weights) in ways.items():
            run = jax.jit(lambda p, w, n, m=reader: m.apply({"params": p}, w, n)[1])
            calls[name] = partial(run, weights, words_BT, lengths_B)
    plain = Plain({"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[cell])
    calls["Flax nn.RNN"] = partial(
        jax.jit(plain.apply), plain.init(jax.random.key(0), words_BT), words_BT
    )
    return calls | (onnx_lstm(words_BT) if cell == "lstm" else {})


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    for call in calls.values():
        jax.block_until_ready(call())
    order, rng = list(calls), np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def answers(folder: Path, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the validation split."""
    run = load(folder, dtype=dtype)
    forward, data = run.forward(), run.dataset()
    batches = [jax.tree.map(np.asarray, b) for b in data.evaluation("validation", 64)]
    size = data.size("validation")
    logits = np.concatenate([forward(batch) for batch in batches])[:size]
    return logits, np.concatenate([batch.targets for batch in batches])[:size]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--rounds", type=int, default=300, help="turns of each, with 64 rows a third"
    )
    parser.add_argument("--run", type=Path, help="a text classifier, judged in each on validation")
    options = parser.parse_args()
    if options.run:
        expected, labels = answers(options.run, "float32")
        for dtype in READ:
            logits, _ = answers(options.run, dtype)
            far = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
            changed = int(np.sum(logits.argmax(1) != expected.argmax(1)))
            right = float(np.mean(logits.argmax(1) == labels))
            print(
                f"{dtype}: accuracy {right:.4f}, {changed} of {len(labels)} labels changed, ",
                end="",
            )
            print(f"logits moved by {100 * far:.2f} %", flush=True)
    for cell in ("lstm", "gru"):
        for rows in options.rows:
            times = timed(entrants(cell, rows), max(1, options.rounds // (3 if rows >= 64 else 1)))
            line = ", ".join(
                f"{name} {statistics.median(t):.2f} ({min(t):.2f})" for name, t in times.items()
            )
            print(f"{cell}, {rows} rows; ms, median (fastest): {line}", flush=True)


if __name__ == "__main__":
    main()
