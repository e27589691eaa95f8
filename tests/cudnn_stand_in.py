# SPDX-License-Identifier: Apache-2.0
"""cuDNN where there is no GPU: the two primitives of `jax.experimental.rnn`, by that module's own
reference.

It is no kinder than cuDNN: a length outside of 1 to T spoils everything, and what is in the padding
of outputs and of the gradient of the inputs is nothing to rely on. Both are NaN here.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import rnn

from flax_lstm.nn.recurrence import cudnn as backend

Array = jax.Array
CALLS: list[dict[str, Any]] = []  # the settings of each call that was traced, and its rows


def reference(
    x: Array, h: Array, c: Array, w: Array, lengths: Array, settings: dict[str, Any]
) -> Any:
    assert {a.dtype for a in (x, h, c, w)} == {jnp.dtype("float32")}
    shape = [settings[key] for key in ("input_size", "hidden_size", "num_layers")]
    matrices = rnn.unpack_lstm_weights(w, *shape, settings["bidirectional"])
    return rnn.lstm_ref(
        x, h, c, *matrices, lengths, *shape, settings["dropout"], settings["bidirectional"]
    )


def spoil(x: Array, *others: Array, lengths: Array) -> tuple[Array, ...]:
    """NaN in the padding of x, and everywhere where a length is wrong."""
    valid_BT1 = (jnp.arange(x.shape[1])[None] < lengths[:, None])[:, :, None]
    wrong = jnp.any((lengths < 1) | (lengths > x.shape[1]))
    return tuple(jnp.where(wrong, jnp.nan, a) for a in (jnp.where(valid_BT1, x, jnp.nan), *others))


def forward(x: Array, h: Array, c: Array, w: Array, lengths: Array, **settings: Any) -> Any:
    CALLS.append({**settings, "rows": len(x)})
    return *spoil(*reference(x, h, c, w, lengths, settings), lengths=lengths), jnp.zeros(1)


def backward(dy, dh, dc, x, h, c, w, y, reserved, lengths, **settings):
    _, pull = jax.vjp(lambda *primals: reference(*primals, lengths, settings), x, h, c, w)
    return spoil(*pull((dy, dh, dc)), lengths=lengths)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend "cudnn" in float32: by cuDNN on a GPU, by the stand-in elsewhere."""
    CALLS.clear()
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(rnn, "rnn_fwd_p", SimpleNamespace(bind=forward))
        monkeypatch.setattr(rnn, "rnn_bwd_p", SimpleNamespace(bind=backward))
    with jax.default_matmul_precision("highest"):
        yield
