# SPDX-License-Identifier: Apache-2.0
"""cuDNN where there is no GPU: the two primitives of `jax.experimental.rnn`, by that module's own reference.

It is no kinder than cuDNN: a length outside of 1 to T spoils everything, and what is in the padding of outputs and of
the gradient of the inputs is nothing to rely on. Both are NaN here.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import rnn

from flax_lstm.recurrence import cudnn as backend

Array = jax.Array
CALLS: list[dict[str, Any]] = []  # the settings of each call that was traced, and its rows


def reference(x: Array, h: Array, c: Array, w: Array, lengths: Array, settings: dict[str, Any]) -> Any:
    assert {a.dtype for a in (x, h, c, w)} == {jnp.dtype("float32")}
    shape = [settings[key] for key in ("input_size", "hidden_size", "num_layers")]
    matrices = rnn.unpack_lstm_weights(w, *shape, settings["bidirectional"])
    wrong = jnp.any((lengths < 1) | (lengths > x.shape[1]))
    out = rnn.lstm_ref(x, h, c, *matrices, lengths, *shape, settings["dropout"], settings["bidirectional"])
    return jax.tree.map(lambda a: jnp.where(wrong, jnp.nan, a), out)


def spoil_padding(x: Array, lengths: Array) -> Array:
    return jnp.where((jnp.arange(x.shape[1])[None] < lengths[:, None])[:, :, None], x, jnp.nan)


def forward(x: Array, h: Array, c: Array, w: Array, lengths: Array, **settings: Any) -> Any:
    CALLS.append({**settings, "rows": len(x)})
    y, *state = reference(x, h, c, w, lengths, settings)
    return spoil_padding(y, lengths), *state, jnp.zeros(1)


def backward(dy, dh, dc, x, h, c, w, y, reserved, lengths, **settings):
    _, pull = jax.vjp(lambda *primals: reference(*primals, lengths, settings), x, h, c, w)
    dx, *others = pull((dy, dh, dc))
    return spoil_padding(dx, lengths), *others


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
