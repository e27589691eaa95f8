# SPDX-License-Identifier: Apache-2.0
"""Ways of running a recurrence over time, each equal to the scan of `layers.py`, and the choice
among them.

A backend is a module with two functions, or more:

    run(cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse, reset_BT) -> (state, y_BTH)
    supports(cell, x_BTD, recurrent_dropout, resets) -> None, or the reason why not
    run_stack(cell, weights, x_BTD, lengths_B, states) -> (states, y_BTH), where one call can run
    several layers
    run_words(...), as run without gradients, of words whose Wx + b is in a table
    NATIVE: whether it calls code that is not JAX's own
    ROUNDS: it takes the weights as they are kept, and rounds them itself
    run_states(...), as run -> (state, (y_BTH, states)), where it has the state after every step
    MANY_STEPS: `auto` takes another for one step alone

`weights` are a cell's `Weights` in the dtype of the matmuls, `lengths_B` is None where all steps
are valid, `mask_BJ` is recurrent dropout (None without it). Steps at or beyond a row's length leave
its state untouched and output zero; `reverse` reads each row from its last valid step to its first,
outputs staying in their places. `recurrent_dropout`
tells of the mask in training: None, "tied" [B, J], or "per gate" [B, G, J], where the inputs too
may be [B, T, G * D] (see `cells.input_matmul`). A layer has one backend, in training and out of it,
but that `auto` may run single steps, as an agent's, by another.
`reset_BT` marks steps that are the first of a sequence of their own (None: there are none, and
`resets` says so): no state crosses the border before such a step. A step read right after a border
begins from zeros: read forward that is the marked step itself, read backward the one before it.
`rows.fresh` says it in a line. Padding may hold anything, NaN included: it reaches neither outputs
nor gradients.

`run_stack` takes layers of equal cells on each other with nothing in between, each of one direction
or each of two,
forward and backward: `weights` and `states` are tuples of layers of tuples of directions.
"""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import jax.numpy as jnp

from flax_lstm.errors import UserError
from flax_lstm.nn.cells import LSTMCell
from flax_lstm.nn.recurrence import cpu, cudnn, fused

log = logging.getLogger(__name__)

Masks = Literal[None, "tied", "per gate"]
BackendName = Literal["auto", "cpu", "cudnn", "fused", "scan"]

# In the order in which `auto` tries them.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cudnn": cudnn, "fused": fused}

_notes: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "notes", default=None
)


@contextlib.contextmanager
def noting() -> Iterator[dict[str, str]]:
    """While a model is traced: which backend each layer resolves to, by the layer's path."""
    notes: dict[str, str] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


_portable: contextvars.ContextVar[bool] = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """While a model is traced: nothing that needs native code, whatever the layers' backend says.
    What is traced can be exported and run where this package is not installed.

    Example: a program for any batch and any number of steps.

        with flax_lstm.portable():
            shape = jax.export.symbolic_shape("batch, time, 16")
            inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
            program = jax.export.export(jax.jit(apply))(inputs).serialize()
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def tried(name: BackendName) -> list[str]:
    """The backends among which one asked for is chosen."""
    if _portable.get():
        others = [n for n, module in BACKENDS.items() if not module.NATIVE]
        return others if name == "auto" or name not in (*others, "scan") else [name]
    return [n for n in BACKENDS if name in ("auto", n)]


def resolve(
    name: BackendName,
    cell: Any,
    x_BTD: Any,
    recurrent_dropout: Masks = None,
    resets: bool = False,
    states: bool = False,
    layer: str = "",
) -> ModuleType | None:
    """The backend to run a layer, or None for the scan itself. A backend asked for by name that
    does not support the case is a `UserError` with its reason."""
    if name not in (known := ("auto", *BACKENDS, "scan")):
        raise UserError(f"model.backend {name}: there are {', '.join(known)}")
    reasons: dict[str, str] = {}  # against those that come before the chosen one
    chosen = "scan"
    for other in tried(name):
        reason = BACKENDS[other].supports(cell, x_BTD, recurrent_dropout, resets)
        if reason is None and states and not hasattr(BACKENDS[other], "run_states"):
            reason = "it does not give the state after every step"
        one_step = name == "auto" and x_BTD.shape[1] == 1
        if reason is None and one_step and hasattr(BACKENDS[other], "MANY_STEPS"):
            reason = "one step alone is faster without it"
        if reason is None:
            chosen = other
            break
        reasons[other] = reason
    if name not in ("auto", chosen) and not _portable.get():
        raise UserError(
            f"model.backend {name} cannot run this layer: {reasons[name]}. Use auto or scan."
        )
    notes = _notes.get()
    if notes is not None and layer not in notes:
        notes[layer] = chosen
        passed_over = "; ".join(f"not {other}: {reason}" for other, reason in reasons.items())
        log.info(
            "%s: backend %s%s",
            layer or "recurrent layer",
            chosen,
            f" ({passed_over})" if passed_over else "",
        )
    return BACKENDS.get(chosen)


def backends() -> dict[str, str]:
    """The backends in the order in which `auto` tries them, each with what it is, and for those
    that cannot run a float32 LSTM on this machine the reason why."""
    described = {}
    for name, module in BACKENDS.items():
        reason = module.supports(LSTMCell(8), jnp.zeros((1, 1, 8)), False, False)
        line = (module.__doc__ or "").splitlines()[0]
        described[name] = f"{line} Not here: {reason}." if reason else line
    return {
        **described,
        "scan": "flax.linen.scan over the cell's step: the definition, for every cell.",
    }
