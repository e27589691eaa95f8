# SPDX-License-Identifier: Apache-2.0
"""Training with `model.dtype bfloat16`: what is multiplied is bfloat16, what is kept or added up is
float32."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from flax_lstm.machine.sharding import put_batch
from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.recurrence import native
from flax_lstm.training.assembly import assemble

EPS = float(jnp.finfo(jnp.bfloat16).eps)
RUNS = {
    "classification": small_runs.text_run,
    "language": small_runs.language_run,
    "forecasting": small_runs.series_run,
}
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the jaxpr of a step, the state after 20, their losses), of a small run."""

    @cache
    def trained(task: str, dtype: str, backend: str) -> Any:
        folder = tmp_path_factory.mktemp("run")
        config = RUNS[task](folder, optimizer="adamw")
        config = replace(config, model=replace(config.model, dtype=dtype, backend=backend))
        dataset = config.data.load(folder / "assets")
        mesh, steps, _ = assemble(config, dataset.info)
        source, state, losses = dataset.train(config.train.batch_size, 0), steps.init(), []
        jaxpr = steps.train.trace(state, put_batch(source[0], mesh)).jaxpr
        for step in range(20):
            state, metrics = steps.train(state, put_batch(source[step], mesh))
            losses.append(float(metrics["loss"]))
        return jaxpr.jaxpr, state, np.array(losses)

    return trained


def inner(equation: Any) -> list[Any]:
    """The jaxprs within an equation."""
    found = jax.tree.leaves(
        [*equation.params.values()], is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    )
    found = [getattr(p, "jaxpr", p) for p in found]
    return [p for p in found if hasattr(p, "eqns")]


def matmuls(jaxpr: Any, in_loop: bool = False) -> list[tuple[bool, set[str]]]:
    """Whether it is in a loop over time, and the dtypes of its operands, of every matmul."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append((in_loop, {str(operand.aval.dtype) for operand in equation.invars}))
        below = inner(equation)
        # A loop over time holds no other; that over accumulated parts does.
        loop = equation.primitive.name == "scan" and not any(" scan[" in str(j) for j in below)
        for jaxpr in below:
            found += matmuls(jaxpr, in_loop or loop)
    return found


@pytest.mark.parametrize("backend", ["fused", "cpu", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", RUNS)
def test_weights_optimiser_and_state_are_float32(task: str, backend: str, train: Any) -> None:
    if backend == "cpu" and (reason := native.unavailable()):
        pytest.skip(reason)
    _, state, losses = train(task, "bfloat16", backend)
    dtypes = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    counts = {path for path in dtypes if path.endswith(("step", "count"))}
    assert {dtypes[path] for path in counts} == {jnp.dtype("int32")}
    assert {dtypes[path] for path in dtypes.keys() - counts} == {jnp.dtype("float32")}
    assert task != "language" or {leaf.dtype for leaf in jax.tree.leaves(state.carry)} == {
        jnp.dtype("float32")
    }

    _, _, exact = train(task, "float32", "fused")
    np.testing.assert_allclose(losses, exact, rtol=EPS / 4)
    assert not np.array_equal(losses, exact)


@pytest.mark.parametrize("task", RUNS)
def test_matmuls_are_bfloat16(task: str, train: Any) -> None:
    """All of them, in both passes, within the loops over time and outside."""
    found = matmuls(train(task, "bfloat16", "fused")[0])
    assert sum(in_loop for in_loop, _ in found) == 2
    assert len(found) > 6
    assert all(dtypes == {"bfloat16"} for _, dtypes in found), found


@pytest.mark.parametrize("backend", ["fused", "scan", "cpu"])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_add_up_in_float32(name: str, backend: str) -> None:
    """Over 16 rows of 400 steps, whose contributions all have one sign: sums in bfloat16 would
    stand still."""
    if backend == "cpu" and (reason := native.unavailable()):
        pytest.skip(reason)
    x_BTD = 1 + jnp.asarray(np.random.default_rng(0).normal(size=(16, 400, 3)), jnp.float32)
    params = RNN(CELLS[name](4)).init(jax.random.key(0), x_BTD[:, :1])

    def gradient(dtype: Any, backend: Any) -> Any:
        rnn = RNN(CELLS[name](4, dtype=dtype), backend=backend)
        return jax.jit(jax.grad(lambda p: jnp.mean(rnn.apply(p, x_BTD)[1].astype(jnp.float32))))(
            params
        )

    rough, exact = gradient(jnp.bfloat16, backend), gradient(jnp.float32, "fused")
    for path, expected in jax.tree_util.tree_leaves_with_path(exact):
        found = rough["params"]["cell"][path[-1].key]
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - expected) < 2 * EPS * np.linalg.norm(expected), path


def rounded(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def written_out(name: str, cell: Any, x_BTD: Any, lengths_B: Any, into: Any) -> np.ndarray:
    """Outputs in float64, of a loop; what enters a product goes through `into`, what is added up
    does not."""
    w = {key: np.asarray(value, np.float64) for key, value in cell.items()}
    y_BTH = np.zeros((*x_BTD.shape[:2], w["bias"].shape[1]))
    for b, length in enumerate(lengths_B):
        h_H = c_H = np.zeros(w["bias"].shape[1])
        for t in range(length):
            x_GH = np.einsum("d,dgh->gh", into(x_BTD[b, t]), into(w["input"])) + w["bias"]
            r_GH = np.einsum("j,jgh->gh", into(h_H), into(w["recurrent"]))
            if name == "lstm":
                i, f, g, o = x_GH + r_GH
                c_H = sigmoid(f) * c_H + sigmoid(i) * np.tanh(g)
                h_H = sigmoid(o) * np.tanh(c_H)
            elif name == "gru":
                r, z = sigmoid(x_GH[:2] + r_GH[:2])
                n = np.tanh(x_GH[2] + r * (r_GH[2] + w["recurrent_bias"]))
                h_H = (1 - z) * n + z * h_H
            else:
                h_H = np.tanh(x_GH[0] + r_GH[0])
            y_BTH[b, t] = h_H
    return y_BTH


@pytest.mark.skipif(native.unavailable() is not None, reason="no native kernel")
@pytest.mark.parametrize("features", [6, 7])  # pairs, and one that is alone
@pytest.mark.parametrize("name", CELLS)
def test_the_native_kernel_rounds_what_it_multiplies_and_nothing_else(
    name: str, features: int
) -> None:
    """Biases of 1, which bfloat16 would keep, and a bit more, which it would lose."""
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(3, 12, features)).astype(np.float32)
    lengths_B = np.array([12, 0, 7])
    rnn = RNN(CELLS[name](19, dtype=jnp.bfloat16), backend="cpu")
    drawn = jax.tree.map(
        lambda a: (0.5 * rng.normal(size=a.shape)).astype(np.float32),
        rnn.init(jax.random.key(0), x_BTD)["params"]["cell"],
    )
    drawn |= {key: 1 + 0.003 * drawn[key] for key in drawn if "bias" in key}
    state, _ = rnn.apply({"params": {"cell": drawn}}, x_BTD, lengths_B)
    gradient = jax.grad(lambda p: rnn.apply({"params": {"cell": p}}, x_BTD)[1].sum())(drawn)
    assert all(np.any(rounded(leaf) != leaf) for leaf in jax.tree.leaves(gradient))
    found_BH = jax.tree.leaves(state)[-1]  # float32, where outputs are bfloat16

    def distance(into: Any) -> float:
        y_BTH = written_out(name, drawn, x_BTD, lengths_B, into)
        last_BH = np.stack([y_BTH[0, 11], np.zeros(19), y_BTH[2, 6]])
        return float(np.linalg.norm(found_BH - last_BH) / np.linalg.norm(last_BH))

    # Sums in float32 now and then round an h to the other neighbour, which moves one term of a
    # product by EPS: far less than rounding all of them once does.
    assert distance(rounded) < EPS / 20 < distance(lambda x: np.asarray(x, np.float64))
