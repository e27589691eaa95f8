# SPDX-License-Identifier: Apache-2.0
"""flax_lstm: the training step of `flax_lstm.training.steps`, as `train.py` runs it; with resets
`RNN` in a step of one's own, as an agent's."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from workloads import Unsupported, Work, Workload

from flax_lstm import RNN, Classification, GRUCell, RecurrentModel, SequenceRegression, TextModel
from flax_lstm.data.base import Batch
from flax_lstm.machine.malloc import trim_malloc
from flax_lstm.machine.sharding import make_mesh, put_batch
from flax_lstm.nn.words import with_tables
from flax_lstm.training.optim import learning_rate, make_optimizer
from flax_lstm.training.steps import TrainState, apply, make_steps
from flax_lstm.training.tables import Table, by_rows
from peers.optax_step import make_step


class Agent(nn.Module):
    """A GRU that begins from zeros where it is told to, and a dense layer on its last output."""

    rnn: RNN
    outputs: int

    @nn.compact
    def __call__(self, x_BTD: Any, lengths_B: Any, resets_BT: Any) -> Any:
        _, y_BTH = self.rnn(x_BTD, lengths_B, reset_BT=resets_BT)
        return nn.Dense(self.outputs, name="head")(y_BTH[:, -1])


def make_agent(work: Work, backend: str) -> Callable[[int], Any]:
    w, (kernel, bias) = work.workload, work.weights.head
    agent = Agent(RNN(GRUCell(w.hidden[0]), backend=backend), w.outputs)
    params = {"rnn": work.weights.stack["layers_0"], "head": {"kernel": kernel, "bias": bias}}
    return make_step(work, params, lambda params, *inputs: agent.apply({"params": params}, *inputs))


def parts(w: Workload, settings: Any) -> tuple[Any, Any, Any]:
    """The model of these settings, the task, and what they need to know of the data."""
    if w.vocabulary:
        info = SimpleNamespace(labels=range(w.outputs), vocabulary_size=w.vocabulary)
        return TextModel(**settings, embed_size=w.features), Classification(), info
    return RecurrentModel(**settings), SequenceRegression(), SimpleNamespace(outputs=w.outputs)


def make(work: Work, backend: str, dtype: str = "float32") -> Callable[[int], float | np.ndarray]:
    if work.workload.resets:
        if dtype != "float32":
            raise Unsupported("the agent's layer is timed in float32")
        return make_agent(work, backend)
    w, weights, mesh = work.workload, work.weights, make_mesh(1)
    settings: Any = {
        "cell": w.cell,
        "hidden_size": w.hidden,
        "bidirectional": w.bidirectional,
        "backend": backend,
        "dtype": dtype,
    }
    model, task, info = parts(w, settings)
    ones = np.ones(w.batch, np.float32)
    batches = [Batch(b.inputs, b.targets, b.lengths, ones) for b in work.batches]
    schedule = learning_rate("constant", 1e-3, 0, 1)
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.0, clip=0.0)
    module = task.build(model, info)
    # The other backends are for machines without a compiler, and so without this.
    native = backend in ("auto", "cpu") and by_rows(module, mesh)
    table = Table(weight_decay=0.0, epsilon=1e-8, clip=0.0) if native else None
    steps = make_steps(
        module,
        task.loss,
        lambda outputs, batch: task.measure(outputs, batch, info),
        optimizer,
        schedule,
        mesh,
        batches[0],
        table=table,
    )
    kernel, bias = weights.head
    params = {"recurrent": weights.stack, "head": {"kernel": kernel, "bias": bias}}
    if weights.embedding is not None:
        params["embed"] = {"embedding": weights.embedding}
    params = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, steps.abstract.params)
    placed = [put_batch(batch, mesh) for batch in batches]
    if not w.train:  # as `Run.forward` does it
        forward = steps.forward
        if (reader := with_tables(module, params)) is not None:
            forward, params = jax.jit(partial(apply, reader[0])), reader[1]
        return lambda n: np.asarray(forward(params, None, placed[n])[1])
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None, None)
    state = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, steps.abstract)

    shapes: set[Batch] = set()

    def step(n: int) -> float:
        nonlocal state
        state, metrics = steps.train(state, placed[n])
        jax.block_until_ready(state)
        if (shape := jax.tree.map(jnp.shape, placed[n])) not in shapes:  # as `fit` does it
            shapes.add(shape)
            trim_malloc()
        return float(metrics["loss"])

    return step
