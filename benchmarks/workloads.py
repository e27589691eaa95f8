# SPDX-License-Identifier: Apache-2.0
"""What is timed: shapes, weights and batches, the same for every implementation, and the loss they
must give.

Axes: B batch, T time, D input features, H hidden units, G gates.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

MAX_LENGTH = 400  # tokens kept of a review
BUCKETED_BATCHES = 8  # of an epoch, evenly spaced by their padded length


class Unsupported(Exception):
    """Raised by an implementation for a workload that it does not have, with the reason."""


GATES = {"lstm": 4, "gru": 3, "layernorm_lstm": 4}


@dataclass(frozen=True)
class Workload:
    """Shapes of model and batch. Embedding, recurrent layers, last output, dense; cross-entropy;
    Adam; no dropout."""

    hidden: tuple[int, ...] = (128,)  # units of each layer
    batch: int = 32
    time: int = 200
    cell: Literal["lstm", "gru", "layernorm_lstm"] = "lstm"
    bidirectional: bool = False
    # Not full: those of IMDB, up to MAX_LENGTH
    lengths: Literal["full", "padded", "bucketed"] = "full"
    train: bool = True  # False: the outputs alone
    vocabulary: int = 20_000  # 0: real inputs without embedding, and the squared error
    features: int = 128  # D
    outputs: int = 2
    resets: float = 0.0  # share of the steps that begin from zeros

    @property
    def ragged(self) -> bool:
        return self.lengths != "full"

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    def textbook_only(self) -> None:
        """Raises Unsupported where this is no plain LSTM or GRU."""
        if self.resets:
            raise Unsupported("its layers know no resets within a row")
        if self.cell not in ("lstm", "gru"):
            raise Unsupported(f"it has no {self.cell}")


FORECASTER = {"hidden": (50, 50), "time": 60, "vocabulary": 0, "features": 1, "outputs": 1}
READER = {"hidden": (256,), "time": MAX_LENGTH, "bidirectional": True}

WORKLOADS = {
    "imdb": Workload(),
    "imdb-500": Workload(time=500),
    "stacked": Workload(hidden=(128, 64)),
    "forecaster": Workload(**FORECASTER),
    "forecaster-256": Workload(batch=256, **FORECASTER),
    "gru": Workload(cell="gru"),
    "bi-padded": Workload(lengths="padded", **READER),
    "bi-bucketed": Workload(lengths="bucketed", **READER),
    "h256": Workload(hidden=(256,), batch=64),
    "h512": Workload(hidden=(512,), batch=64, time=128),
    **{f"t{time}": Workload(time=time) for time in (100, 1000, 2000, 4000)},
    **{f"b{batch}": Workload(batch=batch) for batch in (1, 4, 8, 64, 256)},
    "t16000": Workload(hidden=(256,), batch=8, time=16_000, features=256),
    "latency": Workload(batch=1, train=False),
    "layernorm": Workload(cell="layernorm_lstm"),
    "gru-resets": Workload(  # as a recurrent agent is trained
        cell="gru", batch=64, time=128, vocabulary=0, outputs=1, resets=0.01
    ),
    "tiny": Workload(hidden=(8,), batch=4, time=6, vocabulary=50, features=8),
}
GROUPS = {
    "anchors": ("imdb", "imdb-500", "stacked", "forecaster", "forecaster-256", "gru"),
    "all": tuple(name for name in WORKLOADS if name != "tiny"),
}


class Batch(NamedTuple):
    inputs: np.ndarray  # [B, T] int32 tokens, or [B, T, D] float32
    targets: np.ndarray  # [B] int32, or [B, outputs] float32
    lengths: np.ndarray  # [B] int32
    resets: np.ndarray | None = None  # [B, T] bool: steps that begin from zeros


class Weights(NamedTuple):
    """The same numbers as each library wants them. The recurrent layers one by one, the lowest
    first. The three libraries have the textbook's cells alone."""

    embedding: np.ndarray | None  # [vocabulary, D]
    head: tuple[np.ndarray, np.ndarray]  # kernel, bias
    stack: dict[str, Any]  # the parameters of a flax_lstm Stack
    torch: list[dict[str, np.ndarray]]
    keras: list[list[np.ndarray]]
    flax: list[dict[str, Any]]


class Work(NamedTuple):
    """All that an implementation is given."""

    workload: Workload
    weights: Weights
    batches: list[Batch]
    note: str  # where the lengths are from


def make_work(workload: Workload, seed: int) -> Work:
    rng = np.random.default_rng(seed)
    weights = make_weights(workload, rng)
    if not workload.ragged:
        return Work(
            workload,
            weights,
            [make_batch(workload, np.full(workload.batch, workload.time), rng)],
            "",
        )
    lengths, note = review_lengths(rng)
    return Work(
        workload,
        weights,
        [make_batch(workload, n, rng) for n in group(workload, lengths, seed)],
        note,
    )


def make_weights(workload: Workload, rng: np.random.Generator) -> Weights:
    """Of a size that lets the loss depend on all of them. The bias of a GRU's candidate is 0, since
    nnx has none."""
    from flax_lstm import (
        convert,  # here: the workers read this file, and not all of them shall load JAX
    )

    def uniform(scale: float, *shape: int) -> np.ndarray:
        return rng.uniform(-scale, scale, shape).astype(np.float32)

    gates, features, layers = workload.gates, workload.features, []
    for hidden in workload.hidden:
        cells = []
        for _ in range(1 + workload.bidirectional):
            bias_GH = uniform(0.2, gates, hidden)
            if gates == 4:
                bias_GH[1] += 1  # the forget gate, as libraries begin
            cell = {"input": uniform(features**-0.5, features, gates, hidden), "bias": bias_GH}
            cell["recurrent"] = uniform(hidden**-0.5, hidden, gates, hidden)
            if workload.cell == "gru":
                cell["recurrent_bias"] = np.zeros(hidden, np.float32)
            if workload.cell == "layernorm_lstm":
                # Of a size that forgets: larger gains amplify every rounding from step to step.
                for name in ("input_gain", "recurrent_gain"):
                    cell[name] = 0.3 + uniform(0.1, gates, hidden)
                cell |= {"c_gain": 0.3 + uniform(0.1, hidden), "c_bias": uniform(0.2, hidden)}
            cells.append({"cell": cell})
        layers.append(
            dict(zip(("forward", "backward"), cells, strict=True))
            if workload.bidirectional
            else cells[0]
        )
        features = hidden * len(cells)
    stack = {f"layers_{n}": layer for n, layer in enumerate(layers)}
    embedding = rng.normal(size=(workload.vocabulary, workload.features)).astype(np.float32)
    textbook = workload.cell in ("lstm", "gru")
    return Weights(
        embedding=embedding if workload.vocabulary else None,
        head=(uniform(1.0, features, workload.outputs), uniform(0.2, workload.outputs)),
        stack=stack,
        torch=[convert.to_torch({"layers_0": layer}) for layer in layers if textbook],
        keras=convert.to_keras(stack) if textbook else [],
        flax=convert.to_flax(stack) if textbook else [],
    )


def make_batch(workload: Workload, lengths_B: np.ndarray, rng: np.random.Generator) -> Batch:
    time = int(lengths_B.max()) if workload.lengths == "bucketed" else workload.time
    batch, lengths_B = len(lengths_B), np.minimum(lengths_B, time).astype(np.int32)
    if not workload.vocabulary:
        inputs_BTD = rng.normal(size=(batch, time, workload.features)).astype(np.float32)
        targets_BO = rng.normal(size=(batch, workload.outputs)).astype(np.float32)
        resets_BT = rng.random((batch, time)) < workload.resets if workload.resets else None
        return Batch(inputs_BTD, targets_BO, lengths_B, resets_BT)
    inputs_BT = rng.integers(1, workload.vocabulary, (batch, time)).astype(np.int32)
    inputs_BT[np.arange(time) >= lengths_B[:, None]] = 0  # padding, as Keras' mask_zero wants it
    return Batch(inputs_BT, rng.integers(0, workload.outputs, batch).astype(np.int32), lengths_B)


def review_lengths(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Tokens of each IMDB training review, and where they are from."""
    if os.environ.get("TFDS_DATA_DIR"):
        from flax_lstm.data.imdb import Imdb

        with tempfile.TemporaryDirectory() as folder:
            rows = Imdb(max_length=MAX_LENGTH).load(Path(folder)).train(1, seed=0)
            return np.array(
                [rows[n].lengths[0] for n in range(len(rows))]
            ), "lengths of the IMDB training reviews"
    drawn = rng.lognormal(5.405, 0.645, 22_558).astype(
        int
    )  # mean and deviation of the logarithms of the real ones
    return np.clip(
        drawn, 11, MAX_LENGTH
    ), "lengths drawn from a log-normal like IMDB's: TFDS_DATA_DIR is not set"


def group(workload: Workload, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    """The lengths of the rows of each batch: random rows padded alike, or batches of an epoch in
    buckets, as `flax_lstm` makes them (the longest row filling the bucket), evenly spaced by
    length."""
    from flax_lstm.data.buckets import BucketedBatches, Rows, choose_boundaries

    if workload.lengths == "padded":
        return [lengths[: workload.batch]]
    rows = Rows([np.zeros(n, np.int32) for n in lengths], np.zeros(len(lengths), np.int32))
    source = BucketedBatches(rows, choose_boundaries(lengths, MAX_LENGTH), workload.batch, seed)
    full = [batch for n in range(len(source)) if (batch := source[n]).lengths.all()]
    batches = sorted(full, key=lambda batch: batch.inputs.shape[1])
    middles = (np.arange(BUCKETED_BATCHES) + 0.5) / BUCKETED_BATCHES * len(batches)
    chosen = [batches[int(n)] for n in middles]
    for batch in chosen:
        batch.lengths[np.argmax(batch.lengths)] = batch.inputs.shape[1]
    return [batch.lengths for batch in chosen]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def normalise(x: np.ndarray, axes: tuple[int, ...], gain: np.ndarray | None) -> np.ndarray:
    """Mean 0 and variance 1 over these axes, times the gain; without one, x as it is."""
    if gain is None:
        return x
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + 1e-5) * gain


def last_output(
    cell: dict[str, np.ndarray],
    x_BTD: np.ndarray,
    lengths_B: np.ndarray,
    resets_BT: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [B, T, H] and that of each row's last valid step [B, H], in NumPy."""
    gates = cell["bias"].shape[0]
    xs_BTGH = np.einsum("btd,dgh->btgh", x_BTD, cell["input"], optimize=True)
    xs_BTGH = normalise(xs_BTGH, (-2, -1), cell.get("input_gain")) + cell["bias"]
    recurrent_JK = cell["recurrent"].reshape(len(cell["recurrent"]), -1)
    h_BH = c_BH = np.zeros((len(x_BTD), cell["bias"].shape[1]))
    outputs = []
    for t in range(x_BTD.shape[1]):
        if resets_BT is not None:
            h_BH, c_BH = (np.where(resets_BT[:, t, None], 0, s_BH) for s_BH in (h_BH, c_BH))
        rh_BGH = (h_BH @ recurrent_JK).reshape(len(h_BH), gates, -1)
        rh_BGH = normalise(rh_BGH, (-2, -1), cell.get("recurrent_gain"))
        if gates == 4:
            i, f, g, o = np.moveaxis(xs_BTGH[:, t] + rh_BGH, 1, 0)
            new_c = sigmoid(f) * c_BH + sigmoid(i) * np.tanh(g)
            shown = normalise(new_c, (-1,), cell.get("c_gain")) + cell.get("c_bias", 0)
            new_h = sigmoid(o) * np.tanh(shown)
        else:
            r, z = np.moveaxis(sigmoid(xs_BTGH[:, t, :2] + rh_BGH[:, :2]), 1, 0)
            n = np.tanh(xs_BTGH[:, t, 2] + r * (rh_BGH[:, 2] + cell["recurrent_bias"]))
            new_c, new_h = c_BH, (1 - z) * n + z * h_BH
        valid_B1 = (t < lengths_B)[:, None]
        c_BH, h_BH = np.where(valid_B1, new_c, c_BH), np.where(valid_B1, new_h, h_BH)
        outputs.append(h_BH)
    return np.stack(outputs, 1), h_BH


def loss_of(outputs: np.ndarray, batch: Batch) -> float:
    """Mean cross-entropy of logits, or mean squared error."""
    outputs = outputs.astype(np.float64)
    if batch.targets.ndim == 2:
        return float(np.mean(np.square(outputs - batch.targets)))
    shifted = outputs - outputs.max(1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-np.mean(log_shares[np.arange(len(outputs)), batch.targets]))


def reference_loss(work: Work) -> float:
    """The loss of the first batch, in NumPy and float64: what every implementation must give before
    it is timed."""
    batch, weights = work.batches[0], work.weights
    x_BTD = (batch.inputs if weights.embedding is None else weights.embedding[batch.inputs]).astype(
        np.float64
    )
    for layer in weights.stack.values():
        if "cell" in layer:
            x_BTD, last_BH = last_output(layer["cell"], x_BTD, batch.lengths, batch.resets)
            continue
        order_BT = (batch.lengths[:, None] - 1 - np.arange(x_BTD.shape[1])) % x_BTD.shape[
            1
        ]  # valid steps reversed
        reversed_BTD = np.take_along_axis(x_BTD, order_BT[..., None], axis=1)
        y_BTH, forward_BH = last_output(layer["forward"]["cell"], x_BTD, batch.lengths)
        z_BTH, backward_BH = last_output(layer["backward"]["cell"], reversed_BTD, batch.lengths)
        x_BTD = np.concatenate(
            [y_BTH, np.take_along_axis(z_BTH, order_BT[..., None], axis=1)], axis=-1
        )
        last_BH = np.concatenate([forward_BH, backward_BH], axis=-1)
    kernel, bias = weights.head
    return loss_of(last_BH @ kernel + bias, batch)
