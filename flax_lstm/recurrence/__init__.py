# SPDX-License-Identifier: Apache-2.0
"""Ways of running a recurrence over time, each equal to the scan of `layers.py`, and the choice among them.

A backend is a module with two functions:

    run(cell, weights, x_BTD, lengths_B, state, mask_BJ, reverse) -> (state, y_BTH)
    supports(cell, x_BTD, mask_BJ) -> None, or the reason why not

`weights` are a cell's `Weights` in the dtype of the matmuls, `lengths_B` is None where all steps are valid, `mask_BJ`
is recurrent dropout (None without it). Steps at or beyond a row's length leave its state untouched and output zero;
`reverse` reads each row from its last valid step to its first, outputs staying in their places.
"""

from types import ModuleType
from typing import Any, Literal

from flax_lstm.errors import UserError
from flax_lstm.recurrence import fused

BackendName = Literal["auto", "fused", "scan"]

BACKENDS: dict[str, ModuleType] = {"fused": fused}  # in the order in which `auto` tries them


def resolve(name: BackendName, cell: Any, x_BTD: Any, mask_BJ: Any) -> ModuleType | None:
    """The backend to run, or None for the scan itself. A backend asked for by name that does not support the case is a
    `UserError` with its reason."""
    if name == "scan":
        return None
    if name != "auto":
        if reason := BACKENDS[name].supports(cell, x_BTD, mask_BJ):
            raise UserError(f"model.backend {name} cannot run this layer: {reason}. Use auto or scan.")
        return BACKENDS[name]
    return next((b for b in BACKENDS.values() if b.supports(cell, x_BTD, mask_BJ) is None), None)


def backends() -> dict[str, str]:
    """The backends by name, in the order in which `auto` tries them, each with what it is."""
    described = {name: (module.__doc__ or "").splitlines()[0] for name, module in BACKENDS.items()}
    return {**described, "scan": "flax.linen.scan over the cell's step: the definition, for every cell."}
