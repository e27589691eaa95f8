# SPDX-License-Identifier: Apache-2.0
"""Epochs over the IMDB reviews, as users of each library would have them: how long, and how
accurate after each.

    pip install -e '.[bench]'
    TFDS_DATA_DIR=... python benchmarks/imdb_epoch.py [--who ours keras-tf torch] [--epochs 3]
    [--seeds 0 1 2]

The same token ids (20,000 words, the last 500 of a review), splits and first weights; embedding
128, LSTM 128, last output, dense 64 with ReLU, dropout 0.5, two logits; Adam 1e-3, gradients
clipped at a global norm of 1 (without that this training is unstable whoever does it), batches of
32. Ours and PyTorch read the same batches in the same order, and PyTorch's second bias of the gates
stays 0: with dropout of 0 their losses would be those of each other.

    ours       flax_lstm's batches in buckets and training step, tuned malloc (what `train.py` does)
    torch      batches of similar length, each padded to its longest row, fused Adam, tuned malloc
    keras-tf   `fit` on reviews padded on the left to 500 tokens; keras-jax is the same on JAX

Each run has a process of its own, one at a time, turn by turn. Seconds are those of training alone,
the first epoch's with compiling, without reading the data. The validation reviews (a tenth of the
training reviews) are judged after each epoch; no test review is read.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from run import machine, versions
from worker import load_malloc, memory

LENGTH, VOCABULARY, FEATURES, HIDDEN, DENSE, BATCH, DROPOUT = 500, 20_000, 128, 128, 64, 32, 0.5
CLIP = 1.0  # largest global norm of the gradient, as in `train.py`
POOL = 50  # batches sorted by length together, as in flax_lstm

Epochs = Iterator[
    tuple[float, np.ndarray]
]  # seconds of an epoch, and what is then predicted for validation: [rows, 2] logits


class Reviews(NamedTuple):
    tokens: list[np.ndarray]  # int32, at most LENGTH each
    labels: np.ndarray  # int32


class Job(NamedTuple):
    """What each implementation is given."""

    train: Reviews
    validation: list[np.ndarray]  # tokens
    weights: dict[
        str, Any
    ]  # "embedding", "stack", "dense" and "head" (kernel, bias); stack for each library
    epochs: int
    seed: int


def load(rows: int | None) -> tuple[Reviews, Reviews]:
    """Training and validation reviews; the first `rows` of the former."""
    from flax_lstm.data.imdb import Imdb

    with tempfile.TemporaryDirectory() as folder:
        dataset = Imdb(max_length=LENGTH, vocabulary_size=VOCABULARY).load(Path(folder))
        source, tokens, labels = dataset.train(1, seed=0), [], []
        for n in range(min(rows or len(source), len(source))):
            tokens.append(source[n].inputs[0, : source[n].lengths[0]])
            labels.append(source[n].targets[0])
        batches = list(dataset.evaluation("validation", 1))
        validation = Reviews(
            [b.inputs[0, : b.lengths[0]] for b in batches],
            np.array([b.targets[0] for b in batches]),
        )
        return Reviews(tokens, np.array(labels, np.int32)), validation


def first_weights(seed: int) -> dict[str, Any]:
    """Glorot's for the matrices, orthogonal for the recurrence, 1 for the bias of the forget
    gate."""
    from flax_lstm import convert

    rng = np.random.default_rng(seed)

    def glorot(rows: int, columns: int) -> np.ndarray:
        return rng.uniform(-1, 1, (rows, columns)).astype(np.float32) * np.float32(
            (6 / (rows + columns)) ** 0.5
        )

    bias_GH = np.zeros((4, HIDDEN), np.float32)
    bias_GH[1] = 1
    cell = {
        "input": np.stack([glorot(FEATURES, HIDDEN) for _ in range(4)], axis=1),
        "recurrent": np.stack(
            [np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0] for _ in range(4)], axis=1
        ),
        "bias": bias_GH,
    }
    stack = {"layers_0": {"cell": {name: array.astype(np.float32) for name, array in cell.items()}}}
    return {
        "embedding": rng.normal(0, 0.05, (VOCABULARY, FEATURES)).astype(np.float32),
        "stack": {
            "ours": stack,
            "torch": convert.to_torch(stack),
            "keras": convert.to_keras(stack)[0],
        },
        "dense": (glorot(HIDDEN, DENSE), np.zeros(DENSE, np.float32)),
        "head": (glorot(DENSE, 2), np.zeros(2, np.float32)),
    }


def our_params(weights: dict[str, Any]) -> dict[str, Any]:
    dense, head = (
        {"kernel": kernel, "bias": bias} for kernel, bias in (weights["dense"], weights["head"])
    )
    embed = {"embedding": weights["embedding"]}
    return {"embed": embed, "recurrent": weights["stack"]["ours"], "dense": dense, "head": head}


def ours(job: Job) -> Epochs:
    load_malloc().tune_malloc()
    import jax

    from flax_lstm import Classification, TextModel
    from flax_lstm.data.buckets import BucketedBatches, Rows, choose_boundaries, pad
    from flax_lstm.machine.malloc import trim_malloc
    from flax_lstm.machine.sharding import make_mesh, put_batch
    from flax_lstm.training.loop import batches
    from flax_lstm.training.optim import learning_rate, make_optimizer
    from flax_lstm.training.steps import make_steps
    from flax_lstm.training.tables import Table, by_rows

    rows, mesh, task = Rows(*job.train), make_mesh(1), Classification()
    boundaries = choose_boundaries([len(ids) for ids in rows.tokens], LENGTH)
    source = BucketedBatches(rows, boundaries, BATCH, job.seed)
    info = SimpleNamespace(labels=("neg", "pos"), vocabulary_size=VOCABULARY)
    model = TextModel(hidden_size=HIDDEN, embed_size=FEATURES, dense=DENSE, head_dropout=DROPOUT)
    schedule = learning_rate("constant", 1e-3, 0, 1)
    module = task.build(model, info)
    table = Table(weight_decay=0.0, epsilon=1e-8, clip=CLIP) if by_rows(module, mesh) else None
    steps = make_steps(
        module,
        task.loss,
        lambda outputs, batch: task.measure(outputs, batch, info),
        make_optimizer("adamw", schedule, weight_decay=0.0, clip=CLIP),
        schedule,
        mesh,
        source[0],
        seed=job.seed,
        table=table,
    )
    params = our_params(job.weights)
    state = steps.init()
    state = state._replace(
        params=jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, state.params)
    )
    lengths = set()
    for epoch in range(job.epochs):
        began = time.perf_counter()
        metrics: Any = {"loss": 0.0}
        for batch in batches(source, epoch * len(source), (epoch + 1) * len(source)):
            before = metrics
            state, metrics = steps.train(state, put_batch(batch, mesh))
            float(before["loss"])  # of the step before, as the training loop reads it
            if (length := batch.inputs.shape[1]) not in lengths:  # as the training loop does
                lengths.add(length)
                trim_malloc()
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        parts = [job.validation[n : n + BATCH] for n in range(0, len(job.validation), BATCH)]
        inputs = (
            pad(Rows(part, np.zeros(len(part), np.int32)), boundaries, BATCH) for part in parts
        )
        logits = np.concatenate([steps.forward(state.params, None, batch)[1] for batch in inputs])
        yield seconds, logits[: len(job.validation)]


def batches_of(sizes: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each batch of an epoch, in the order of `flax_lstm.data.buckets`."""
    rng = np.random.default_rng([seed, epoch])
    order, groups = rng.permutation(len(sizes)), []
    for start in range(0, len(order), POOL * BATCH):
        pool = order[start : start + POOL * BATCH]
        pool = pool[np.argsort(sizes[pool], kind="stable")]
        groups += [pool[n : n + BATCH] for n in range(0, len(pool), BATCH)]
    return [groups[n] for n in rng.permutation(len(groups))]


def torch_(job: Job) -> Epochs:
    load_malloc().tune_malloc()
    import torch

    torch.manual_seed(job.seed)
    (dense_kernel, dense_bias), (head_kernel, head_bias) = job.weights["dense"], job.weights["head"]
    embed = torch.nn.Embedding.from_pretrained(torch.tensor(job.weights["embedding"]), freeze=False)
    lstm = torch.nn.LSTM(FEATURES, HIDDEN)
    dense, head, dropout = (
        torch.nn.Linear(HIDDEN, DENSE),
        torch.nn.Linear(DENSE, 2),
        torch.nn.Dropout(DROPOUT),
    )
    lstm.load_state_dict(
        {name: torch.tensor(array) for name, array in job.weights["stack"]["torch"].items()}
    )
    dense.load_state_dict(
        {"weight": torch.tensor(dense_kernel.T.copy()), "bias": torch.tensor(dense_bias)}
    )
    head.load_state_dict(
        {"weight": torch.tensor(head_kernel.T.copy()), "bias": torch.tensor(head_bias)}
    )
    modules = torch.nn.ModuleList([embed, lstm, dense, head, dropout])
    # Both biases of a gate have the same gradient: learning both would double their learning rate.
    lstm.bias_hh_l0.requires_grad_(False)
    learnt = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=1e-3, fused=True)

    def logits(tokens: list[np.ndarray]) -> Any:
        lengths = np.array([len(ids) for ids in tokens])
        inputs_TB = np.zeros((lengths.max(), len(tokens)), np.int64)
        for column, ids in enumerate(tokens):
            inputs_TB[: len(ids), column] = ids
        y_TBH, _ = lstm(embed(torch.from_numpy(inputs_TB)))
        last_BH = y_TBH[torch.from_numpy(lengths - 1), torch.arange(len(tokens))]
        return head(dropout(torch.relu(dense(last_BH))))

    train, labels = job.train.tokens, torch.tensor(job.train.labels, dtype=torch.int64)
    sizes = np.array([len(ids) for ids in train])
    for epoch in range(job.epochs):
        modules.train()
        began = time.perf_counter()
        for rows in batches_of(sizes, job.seed, epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                logits([train[i] for i in rows]), labels[rows]
            ).backward()
            torch.nn.utils.clip_grad_norm_(learnt, CLIP)
            optimizer.step()
        seconds = time.perf_counter() - began
        modules.eval()
        with torch.inference_mode():
            parts = (job.validation[n : n + BATCH] for n in range(0, len(job.validation), BATCH))
            yield seconds, np.concatenate([logits(part).numpy() for part in parts])


def keras_(job: Job, backend: str) -> Epochs:
    os.environ["KERAS_BACKEND"] = backend
    import keras

    def padded(tokens: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(ids, (LENGTH - len(ids), 0)) for ids in tokens])

    keras.utils.set_random_seed(job.seed)
    layers, weights = keras.layers, job.weights
    named = {
        "embed": (layers.Embedding(VOCABULARY, FEATURES), [weights["embedding"]]),
        "lstm": (layers.LSTM(HIDDEN), weights["stack"]["keras"]),
        "dense": (layers.Dense(DENSE, activation="relu"), weights["dense"]),
        "dropout": (layers.Dropout(DROPOUT), []),
        "head": (layers.Dense(2), weights["head"]),
    }
    model = keras.Sequential(
        [keras.Input((LENGTH,), dtype="int32"), *(layer for layer, _ in named.values())]
    )
    for name, (layer, arrays) in named.items():
        if name != "dropout":
            layer.set_weights(list(arrays))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, optimizer=keras.optimizers.Adam(1e-3, global_clipnorm=CLIP))
    inputs, validation = padded(job.train.tokens), padded(job.validation)
    for _ in range(job.epochs):
        began = time.perf_counter()
        model.fit(inputs, job.train.labels, batch_size=BATCH, epochs=1, verbose=0)
        yield time.perf_counter() - began, model.predict(validation, verbose=0)


def run(who: str, job: Job, labels: np.ndarray) -> list[dict[str, float]]:
    """Seconds, validation accuracy and then the memory of each epoch; in a process of its own."""
    makers = {"ours": ours, "torch": torch_}
    epochs = makers[who](job) if who in makers else keras_(job, KERAS[who])
    return [
        {
            "seconds": seconds,
            "accuracy": float(np.mean(logits.argmax(1) == labels)),
            "memory_mb": memory("VmRSS"),
        }
        for seconds, logits in epochs
    ]


KERAS = {"keras-tf": "tensorflow", "keras-jax": "jax"}
WHO = ("ours", "torch", *KERAS)


COLUMNS = (
    "",
    "first epoch, s",
    "x ours",
    "later epochs, s",
    "x ours",
    "accuracy after each",
    "seconds to target",
)


def summary(runs: list[dict[str, Any]], target: float) -> str:
    """A table: medians of seconds and means of accuracy over the seeds."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    ours: tuple[float | None, float | None] = (None, None)
    for who in WHO:
        if not (mine := [run["epochs"] for run in runs if run["who"] == who]):
            continue
        first = statistics.median(epochs[0]["seconds"] for epochs in mine)
        rest = [epoch["seconds"] for epochs in mine for epoch in epochs[1:]]
        later = statistics.median(rest) if rest else None
        ours = (first, later) if who == "ours" else ours
        times = [
            text
            for seconds, baseline in zip((first, later), ours, strict=True)
            for text in (
                f"{seconds:.1f}" if seconds else "-",
                f"{seconds / baseline:.2f}" if baseline else "-",
            )
        ]
        means = (
            statistics.mean(epoch["accuracy"] for epoch in same) for same in zip(*mine, strict=True)
        )
        until = [seconds for epochs in mine if (seconds := time_to(epochs, target)) is not None]
        reached = (
            f"{statistics.median(until):.0f} ({len(until)} of {len(mine)} seeds)"
            if until
            else "not reached"
        )
        lines.append((who, *times, ", ".join(f"{mean:.3f}" for mean in means), reached))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time_to(epochs: list[dict[str, float]], target: float) -> float | None:
    """Seconds of training until an epoch ended with that accuracy."""
    for n, epoch in enumerate(epochs):
        if epoch["accuracy"] >= target:
            return sum(e["seconds"] for e in epochs[: n + 1])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--who", nargs="+", default=list(WHO), choices=WHO)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--target", type=float, default=0.85, help="validation accuracy whose time is told"
    )
    parser.add_argument("--rows", type=int, help="training reviews, for a trial; all by default")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    load_before = os.getloadavg()
    train, validation = load(options.rows)
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="2")
    runs, missing = [], []
    context = multiprocessing.get_context("spawn")
    # A process for each run; whatever libraries print goes to standard error, the table alone to
    # standard output.
    with ProcessPoolExecutor(
        1, context, initializer=os.dup2, initargs=(2, 1), max_tasks_per_child=1
    ) as pool:
        for seed in options.seeds:
            job = Job(train, validation.tokens, first_weights(seed), options.epochs, seed)
            for who in options.who:
                try:
                    epochs = pool.submit(run, who, job, validation.labels).result()
                except ModuleNotFoundError as error:
                    missing.append(f"- {who}: missing: {error}")
                    continue
                runs.append({"who": who, "seed": seed, "epochs": epochs})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    loads = {"start": load_before, "end": os.getloadavg()}
    about = {"machine": machine(), "versions": versions(), "load_average": loads}
    if options.json:
        options.json.write_text(
            json.dumps({**about, "rows": len(train.tokens), "runs": runs}, indent=1) + "\n"
        )
    print(f"target: a validation accuracy of {options.target}\n\n{summary(runs, options.target)}\n")
    print("\n".join(dict.fromkeys(missing)))


if __name__ == "__main__":
    main()
