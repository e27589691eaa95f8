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


@pytest.mark.parametrize("backend", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", RUNS)
def test_weights_optimiser_and_state_are_float32(task: str, backend: str, train: Any) -> None:
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


@pytest.mark.parametrize("backend", ["fused", "scan"])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_add_up_in_float32(name: str, backend: str) -> None:
    """Over 16 rows of 400 steps, whose contributions all have one sign: sums in bfloat16 would
    stand still."""
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
