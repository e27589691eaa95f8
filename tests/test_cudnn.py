# SPDX-License-Identifier: Apache-2.0
"""What is special to cuDNN: layers and directions in one call. That one layer equals the scan is in
`test_backends.py`.

Without a GPU cuDNN has a stand-in (`cudnn_stand_in.py`); `JAX_PLATFORMS=cuda pytest
tests/test_cudnn.py` calls it.

Axes: B batch, T time, D input features, H hidden units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cudnn_stand_in import CALLS
from jax.experimental import rnn

from flax_lstm.errors import UserError
from flax_lstm.machine.sharding import batch_sharding, make_mesh, on_mesh, replicated
from flax_lstm.nn import recurrence
from flax_lstm.nn.cells import GRUCell, LSTMCell
from flax_lstm.nn.layers import RNN, Bidirectional, Stack
from flax_lstm.nn.recurrence import cudnn as backend

B, T, D, H = 6, 7, 3, 4
LENGTHS = np.array([7, 3, 0, 1, 5, 7])
ON_GPU = jax.default_backend() == "gpu"
pytestmark = pytest.mark.usefixtures("cudnn", "quick_compile")


def one(name: str, size: int = H, **dropouts: float) -> RNN:
    return RNN(LSTMCell(size), backend=name, **dropouts)


def both(name: str, size: int = H, **dropouts: float) -> Bidirectional:
    return Bidirectional(one(name, size, **dropouts), one(name, size, **dropouts))


# How a model may be built, given the name of the backend, and the layers and directions of each
# call of cuDNN.
DROPOUT = {"dropout": 0.3, "weight_dropout": 0.2}
MODELS = {
    "both directions": (lambda name: both(name), [(1, True)]),
    "three layers": (lambda name: Stack([one(name), one(name), one(name)]), [(3, False)]),
    "two layers of both directions": (lambda name: Stack([both(name), both(name)]), [(2, True)]),
    "dropout on weights": (
        lambda name: Stack([one(name, weight_dropout=0.4), one(name, weight_dropout=0.2)]),
        [(2, False)],
    ),
    "two widths": (lambda name: Stack([one(name), one(name, 5)]), [(1, False)] * 2),
    "one direction after both": (
        lambda name: Stack([both(name), one(name)]),
        [(1, True), (1, False)],
    ),
    "residual": (lambda name: Stack([one(name), one(name)], residual=True), [(1, False)] * 2),
    "dropout on inputs": (lambda name: Stack([one(name), one(name, **DROPOUT)]), [(1, False)] * 2),
    "and of both directions": (lambda name: both(name, **DROPOUT), [(1, False)] * 2),
    "beside another cell": (lambda name: Stack([one(name), RNN(GRUCell(H))]), [(1, False)]),
    "beside another backend": (lambda name: Stack([one(name), one("scan")]), [(1, False)]),
}


def calls() -> Any:
    return [(call["num_layers"], call["bidirectional"]) for call in CALLS]


def random_like(tree: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


def problem(model: Any) -> Any:
    """Random (weights, inputs, initial state), and the layer as a function of them, dropping what
    it drops."""
    x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    (state, _), params = jax.eval_shape(model.init_with_output, jax.random.key(1), x_BTD)

    def run(params: Any, x_BTD: Any, state: Any, lengths_B: Any) -> Any:
        rngs = {"dropout": jax.random.key(2)}
        return model.apply(params, x_BTD, lengths_B, state, deterministic=False, rngs=rngs)

    return random_like((params, x_BTD, state)), run


def outcome(model: Any, lengths_B: Any) -> Any:
    """Final states and outputs, and the gradients of a random weighing of these."""
    primals, run = problem(model)

    @jax.jit
    def everything(primals: Any) -> Any:
        out, pull = jax.vjp(lambda *p: run(*p, lengths_B), *primals)
        return out, pull(random_like(out))

    return everything(primals)


@pytest.mark.parametrize(
    "name, lengths_B",
    [
        ("both directions", LENGTHS),
        ("two layers of both directions", LENGTHS),
        ("two layers of both directions", None),
        ("dropout on weights", LENGTHS),
        ("and of both directions", LENGTHS),
    ],
)
def test_layers_equal_those_of_the_scan(name: str, lengths_B: Any) -> None:
    build, _ = MODELS[name]
    ours, scans = (outcome(build(other), lengths_B) for other in ("cudnn", "scan"))
    assert jax.tree.structure(ours) == jax.tree.structure(scans)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, scans)


@pytest.mark.skipif(ON_GPU, reason="calls of cuDNN itself are not counted")
@pytest.mark.parametrize("name", MODELS)
def test_one_call_where_there_is_nothing_in_between(name: str) -> None:
    build, expected = MODELS[name]
    primals, run = problem(build("cudnn"))
    CALLS.clear()
    end, y_BTH = jax.eval_shape(run, *primals, LENGTHS)
    assert calls() == expected
    _, scan = problem(build("scan"))
    assert jax.eval_shape(scan, *primals, LENGTHS) == (end, y_BTH)


@pytest.mark.skipif(ON_GPU, reason="calls of cuDNN itself are not counted")
def test_evaluation_drops_nothing() -> None:
    model = Stack([both("cudnn", **DROPOUT), both("cudnn", **DROPOUT)])
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, T, D)))
    assert calls() == [(2, True)]


def test_a_batch_over_eight_devices_in_one_call() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    model = both("cudnn")
    x_BTD, lengths_B = (
        jax.random.normal(jax.random.key(0), (8, T, D)),
        np.array([7, 3, 0, 1, 5, 7, 2, 4]),
    )
    variables = random_like(jax.eval_shape(model.init, jax.random.key(1), x_BTD))

    def loss(variables: Any, x_BTD: Any, lengths_B: Any) -> Any:
        state, y_BTH = model.apply(variables, x_BTD, lengths_B)
        return sum(jnp.sum(jnp.sin(3 * a)) for a in (y_BTH, *jax.tree.leaves(state)))

    gradient = jax.value_and_grad(loss, (0, 1))
    alone = jax.jit(gradient)(variables, x_BTD, lengths_B)
    CALLS.clear()
    mesh = make_mesh(4, 2, 1)
    on_eight = jax.jit(
        on_mesh(gradient, mesh), in_shardings=(replicated(mesh), *[batch_sharding(mesh)] * 2)
    )
    meshed = on_eight(variables, x_BTD, lengths_B)
    assert ON_GPU or [call["rows"] for call in CALLS] == [1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), meshed, alone)


def test_what_it_leaves_to_others() -> None:
    x_BTD = jnp.zeros((B, T, D))
    reasons = {
        "not LSTMCell": lambda: recurrence.resolve("cudnn", GRUCell(H), x_BTD),
        "float32, not bfloat16": lambda: recurrence.resolve(
            "cudnn", LSTMCell(H, dtype=jnp.bfloat16), x_BTD
        ),
        "recurrent dropout": lambda: one("cudnn", recurrent_dropout=0.2).init(
            jax.random.key(0), x_BTD
        ),
    }
    if jax.device_count() > 1:
        reasons["several devices"] = on_mesh(
            lambda: recurrence.resolve("cudnn", LSTMCell(H), x_BTD), make_mesh(1, 1, 2)
        )
    for reason, ask in reasons.items():
        with pytest.raises(
            UserError, match=f"model.backend cudnn cannot run this layer: .*{reason}"
        ):
            ask()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "not on a GPU" in (backend.supports(LSTMCell(H), jnp.zeros((B, T, D)), False) or "")
    assert "Not here: the arrays are on a tpu" in recurrence.backends()["cudnn"]


def test_auto_takes_it_before_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with recurrence.noting() as notes:
        model = Stack(
            [RNN(LSTMCell(H)), Bidirectional(RNN(LSTMCell(H)), RNN(LSTMCell(H))), RNN(GRUCell(H))]
        )
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, T, D)))
    assert notes == {
        "layers_0": "cudnn",
        "layers_1/forward": "cudnn",
        "layers_1/backward": "cudnn",
        "layers_2": "fused",
    }


@pytest.mark.parametrize(
    "asked, tf32",
    [
        (None, True),
        ("bfloat16", True),
        ("tensorfloat32", True),
        ("float32", False),
        ("highest", False),
    ],
)
def test_float32_or_tf32(asked: str | None, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.default_matmul_precision(asked):
        assert rnn._lstm_cudnn_allow_tf32(backend.precision()) == tf32
