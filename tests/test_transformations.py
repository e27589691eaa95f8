# SPDX-License-Identifier: Apache-2.0
"""Every transformation of JAX works through every backend and gives what it gives through the scan.

The table of docs/backends.md is made of what is run here.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.interpreters.partial_eval
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import flax_lstm
from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.layers import RNN
from flax_lstm.nn.recurrence import primitives

pytestmark = pytest.mark.usefixtures("quick_compile")

Function = Callable[..., Any]
B, T, D, H = 2, 3, 2, 3
LENGTHS, RESETS = np.array([T, 1]), np.zeros((B, T), bool)
RESETS[0, 1] = True


def layer(name: str, backend: str, outputs: float = 1.0) -> tuple[Function, Any]:
    """A number (weights, x) -> loss, and random weights and inputs. outputs: what those of all
    steps count; the final state counts in any case."""
    rnn = RNN(CELLS[name](H), backend=backend)
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    shapes = jax.eval_shape(rnn.init, jax.random.key(0), x_BTD)
    variables = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), shapes)

    def loss(variables: Any, x_BTD: Any) -> Any:
        state, y_BTH = rnn.apply(variables, x_BTD, LENGTHS, reset_BT=RESETS)
        ends = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state))
        return outputs * jnp.sum(jnp.sin(y_BTH)) + ends if outputs else ends

    return loss, (variables, x_BTD)


def like(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


def several(tree: Any, n: int = 3) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a + 0.1 * k for k in range(n)]), tree)


def linearized(f: Function, w: Any, x: Any) -> Any:
    value, push = jax.linearize(f, w, x)
    return value, push(like(w, 1), like(x, 2))


def hvp(f: Function, w: Any, x: Any) -> Any:
    return jax.jvp(jax.grad(f, (0, 1)), (w, x), (like(w, 1), like(x, 2)))


def gradient_of_gradient(f: Function, w: Any, x: Any) -> Any:
    return jax.grad(
        lambda w, x: sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(f, (0, 1))(w, x))),
        (0, 1),
    )(w, x)


def reverse_over_forward(f: Function, w: Any, x: Any) -> Any:
    push = lambda w, x: jax.jvp(f, (w, x), (like(w, 1), like(x, 2)))[1]  # noqa: E731
    return jax.grad(push, (0, 1))(w, x)


def scanned(f: Function, w: Any, x: Any) -> Any:
    def step(total: Any, x: Any) -> Any:
        return total + f(w, x), None

    return jax.lax.scan(step, jnp.zeros(()), several(x))[0]


def checked(f: Function, w: Any, x: Any) -> Any:
    error, found = checkify.checkify(jax.grad(f), errors=checkify.float_checks)(w, x)
    assert error.get() is None
    bad, _ = checkify.checkify(f, errors=checkify.nan_checks)(w, x.at[0, 0].set(jnp.nan))
    assert "nan" in str(bad.get())
    return found


def mesh() -> Any:
    return jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))


def mapped_shards(check: bool, f: Function, w: Any, x: Any) -> Any:
    """The layer on each device with its rows, one of two with a row each would need other lengths:
    so examples are rows of `several`."""
    rows = jax.P("rows")

    @partial(jax.shard_map, mesh=mesh(), in_specs=(jax.P(), rows), out_specs=rows, check_vma=check)
    def each(w: Any, xs: Any) -> Any:
        return jax.vmap(partial(f, w))(xs)

    return jax.grad(lambda w, xs: jnp.sum(each(w, xs)), (0, 1))(w, several(x, 4))


def pmapped(f: Function, w: Any, x: Any) -> Any:
    return jax.pmap(partial(f, w))(several(x, 2))


TRANSFORMATIONS: dict[str, Function] = {
    "jax.jit": lambda f, w, x: f(w, x),
    "jax.grad": lambda f, w, x: jax.value_and_grad(f, (0, 1))(w, x),
    "jax.jvp": lambda f, w, x: jax.jvp(f, (w, x), (like(w, 1), like(x, 2))),
    "jax.linearize": linearized,
    "jax.jacfwd": lambda f, w, x: jax.jacfwd(f, (0, 1))(w, x),
    "jax.jacrev": lambda f, w, x: jax.jacrev(jax.grad(f))(w, x),
    "jvp of grad (hvp)": hvp,
    "grad of jvp": reverse_over_forward,
    "grad of grad": gradient_of_gradient,
    "jax.hessian": lambda f, w, x: jax.hessian(f, 1)(w, x),
    "vmap over inputs": lambda f, w, x: jax.vmap(partial(f, w))(several(x)),
    "vmap over weights": lambda f, w, x: jax.vmap(f, (0, None))(several(w), x),
    "grad of vmap": lambda f, w, x: jax.grad(
        lambda w, xs: jnp.sum(jax.vmap(f, (None, 0))(w, xs)), (0, 1)
    )(w, several(x)),
    "vmap of grad": lambda f, w, x: jax.vmap(jax.grad(f), (None, 0))(w, several(x)),
    "grad of an ensemble": lambda f, w, x: jax.vmap(jax.grad(f, (0, 1)), (0, None))(several(w), x),
    "vmap of jvp": lambda f, w, x: jax.vmap(lambda x: jax.jvp(f, (w, x), (like(w, 1), like(x, 2))))(
        several(x)
    ),
    "vmap of vmap": lambda f, w, x: jax.vmap(jax.vmap(f, (None, 0)), (0, None))(
        several(w, 2), several(x)
    ),
    "jax.checkpoint": lambda f, w, x: jax.grad(jax.checkpoint(f), (0, 1))(w, x),
    "lax.scan": lambda f, w, x: jax.grad(partial(scanned, f), (0, 1))(w, x),
    "checkify": checked,
    "shard_map": partial(mapped_shards, False),
    "shard_map, check_vma": partial(mapped_shards, True),
    "pmap": pmapped,
}
NOT_JITTED = ("pmap", "checkify")


@pytest.mark.parametrize("backend", ["cpu", "fused"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_equals_that_of_the_scan(transformation: str, backend: str) -> None:
    compare(transformation, backend, outputs=1.0)


@pytest.mark.parametrize(
    "transformation",
    ["jvp of grad (hvp)", "grad of grad", "grad of vmap", "vmap of grad", "shard_map, check_vma"],
)
def test_equals_it_where_the_final_state_alone_counts(transformation: str) -> None:
    """The gradient of the outputs is then an array without elements."""
    compare(transformation, "cpu", outputs=0.0)


def test_no_gradient_of_zeros_is_made_of_outputs_that_do_not_count() -> None:
    for outputs, shape in ((0.0, (0,)), (1.0, (B, T, H))):
        loss, arguments = layer("gru", "cpu", outputs)
        program = jax.make_jaxpr(jax.grad(loss))(*arguments)
        (call,) = [e for e in program.eqns if e.primitive is primitives.backward_p]
        assert call.invars[-2].aval.shape == shape  # and then the final state's


def compare(transformation: str, backend: str, outputs: float) -> None:
    """What a backend gives, and the scan."""
    found = {}
    for one in (backend, "scan"):
        loss, arguments = layer("lstm", one, outputs)
        whole = partial(TRANSFORMATIONS[transformation], loss)
        found[one] = (whole if transformation in NOT_JITTED else jax.jit(whole))(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4 * max(1, np.abs(b).max())),
        found[backend],
        found["scan"],
    )


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_batch_sharded_by_others_is_never_gathered(name: str) -> None:
    """In a training loop that knows nothing of our meshes: the outputs stay where their rows are,
    and all that devices exchange is the sum of the weights' gradients."""
    rnn = RNN(CELLS[name](H))
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(8, T, D)), jnp.float32)
    lengths_B, resets_BT = jnp.arange(8) % (T + 1), jnp.asarray(rng.random((8, T)) < 0.3)
    variables = rnn.init(jax.random.key(0), x_BTD)
    variables = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), variables)

    def step(variables: Any, x_BTD: Any, lengths_B: Any, resets_BT: Any) -> Any:
        def loss(variables: Any, x_BTD: Any) -> Any:
            _, y_BTH = rnn.apply(variables, x_BTD, lengths_B, reset_BT=resets_BT)
            return jnp.sum(jnp.sin(y_BTH)), y_BTH

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x_BTD)

    rows = jax.sharding.NamedSharding(
        jax.make_mesh((4,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P("mine")
    )
    whole = jax.sharding.NamedSharding(rows.mesh, jax.P())
    arguments = (variables, x_BTD, lengths_B, resets_BT)
    expected = jax.jit(step)(*arguments)
    placed = (jax.device_put(variables, whole), *jax.device_put(arguments[1:], rows))
    program = jax.jit(step).lower(*placed).compile()
    kinds = r"= [^=]*? (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
    assert set(re.findall(kinds, program.as_text())) == {"all-reduce"}
    found = program(*placed)
    assert found[0][1].sharding.is_equivalent_to(rows, 3)
    assert found[1][1].sharding.is_equivalent_to(rows, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), found, expected)


WORKS = ("cpu", "fused", "scan")  # columns of the table; the scan is what the others are held to


def table() -> str:
    """In Markdown: what is run above."""
    lines = [f"| transformation | {' | '.join(WORKS)} |", "| --- |" + " --- |" * len(WORKS)]
    lines += [f"| {name} |" + " yes |" * len(WORKS) for name in TRANSFORMATIONS]
    return "\n".join(lines)


def test_the_table_of_the_docs_is_what_is_run_here() -> None:
    docs = Path(__file__).parent.parent / "docs" / "backends.md"
    assert table() in docs.read_text(), f"docs/backends.md lacks:\n{table()}"


def test_portable_programs_are_for_any_batch_and_any_time() -> None:
    """Exported with symbolic sizes, whatever backend the layer names; its gradient too."""
    rnn = RNN(CELLS["gru"](H), backend="cpu")
    variables = rnn.init(jax.random.key(0), jnp.zeros((B, T, D)))

    def loss(x_BTD: Any, lengths_B: Any) -> Any:
        return jnp.sum(rnn.apply(variables, x_BTD, lengths_B)[1] ** 2)

    batch, time = jax.export.symbolic_shape("batch, time")
    x = jax.ShapeDtypeStruct((batch, time, D), jnp.float32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    with flax_lstm.portable():
        exported = jax.export.export(jax.jit(jax.value_and_grad(loss)))(x, lengths)
    assert "@flax_lstm" not in exported.mlir_module()
    for rows, steps in ((2, 5), (3, 1)):
        rng = np.random.default_rng(rows)
        x_BTD = jnp.asarray(rng.normal(size=(rows, steps, D)), jnp.float32)
        lengths_B = jnp.asarray(rng.integers(0, steps + 1, rows), jnp.int32)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6),
            exported.call(x_BTD, lengths_B),
            jax.value_and_grad(loss)(x_BTD, lengths_B),
        )


def test_programs_are_pruned_as_every_supported_jax_asks_for_it() -> None:
    """jax 0.12 also hands over which inputs are alive."""
    loss, (variables, x_BTD) = layer("gru", "fused")
    rule = jax.interpreters.partial_eval.dce_rules[primitives.backward_p]
    program = jax.make_jaxpr(jax.grad(loss))(variables, x_BTD)
    found = [e for e in program.eqns if e.primitive is primitives.backward_p]
    assert len(found) == 1
    used = [False] * len(found[0].outvars)
    for arguments in ((used, found[0]), (used, [True] * len(found[0].invars), found[0])):
        assert rule(*arguments) == ([False] * len(found[0].invars), None)
