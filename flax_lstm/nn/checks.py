# SPDX-License-Identifier: Apache-2.0
"""What the layers ask of their arguments, said in one line where it is not met.

Axes: B batch, T time, D input features, H hidden units. Shapes are known while a function is
traced, so these checks cost nothing when it runs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.errors import ArgumentError

Array = jax.Array


def fail(problem: str) -> None:
    raise ArgumentError(problem)


def array(name: str, value: Any, expected: str) -> Array:
    """Numbers, as a JAX array; they may come as lists or NumPy arrays."""
    try:
        traced = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
        found = value if traced else np.asarray(value)
        if traced or jnp.issubdtype(found.dtype, jnp.number) or found.dtype == bool:
            return jnp.asarray(found)
    except (TypeError, ValueError):
        pass
    raise ArgumentError(f"{name}: expected {expected}, got {describe(value)}")


def describe(value: Any) -> str:
    """Types, shapes and dtypes of an argument, in few words."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list) and len(value) <= 8:
        return f"{type(value).__name__} of ({', '.join(map(describe, value))})"
    return type(value).__name__


def inputs(x_BTD: Any, time_major: bool = False) -> Array:
    """Real inputs of three axes."""
    axes = "[time, batch, features]" if time_major else "[batch, time, features]"
    x_BTD = array("inputs", x_BTD, f"real numbers {axes}")
    if x_BTD.ndim != 3 or jnp.issubdtype(x_BTD.dtype, jnp.complexfloating):
        one = ": a single sequence is x[None]" if x_BTD.ndim == 2 and not time_major else ""
        fail(f"inputs: expected real numbers {axes}, got {describe(x_BTD)}{one}")
    return x_BTD


def lengths(lengths_B: Any, batch: int) -> Array | None:
    """Integers, one for each row."""
    if lengths_B is None:
        return None
    expected = f"integers [batch] = [{batch}], or None"
    found = array("lengths", lengths_B, expected)
    if found.shape != (batch,) or not jnp.issubdtype(found.dtype, jnp.integer):
        mask = ": of a mask [batch, time] they are mask.sum(1)" if found.ndim == 2 else ""
        fail(f"lengths: expected {expected}, got {describe(found)}{mask}")
    return found


def resets(reset_BT: Any, batch: int, time: int, time_major: bool = False) -> Array | None:
    """Marks of steps, booleans or numbers that are nonzero where a sequence begins."""
    if reset_BT is None:
        return None
    axes, shape = (
        ("[time, batch]", (time, batch)) if time_major else ("[batch, time]", (batch, time))
    )
    expected = f"booleans {axes} = {list(shape)}, or None"
    found = array("resets", reset_BT, expected)
    if found.shape != shape or jnp.issubdtype(found.dtype, jnp.complexfloating):
        fail(f"resets: expected {expected}, got {describe(found)}")
    return found.astype(bool)


def state(given: Any, like: Any) -> Any:
    """A state in the structure, shapes and dtypes of `like`.

    Plain tuples and lists are taken for named ones with as many entries. A leaf [1, ...] (a learned
    initial state) begins every row.
    """
    shapes = jax.tree.leaves(like)
    leaves = jax.tree.leaves(given)
    own: Any = jax.tree.structure(given)
    structure: Any = jax.tree.structure(like)
    sequence = isinstance(given, tuple | list) and isinstance(like, tuple | list)
    same = own == structure or (sequence and len(given) == len(leaves) == len(shapes))

    def fits(leaf: Any, shape: Any) -> bool:
        return (
            isinstance(leaf, jax.Array | np.ndarray)
            and jnp.issubdtype(leaf.dtype, jnp.number)
            and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
            and leaf.shape in (shape.shape, (1, *shape.shape[1:]))
        )

    if not same or not all(map(fits, leaves, shapes)):
        fail(f"state: expected {describe_state(like)}, got {describe(given)}")
    cast = [
        jnp.broadcast_to(jnp.asarray(leaf, shape.dtype), shape.shape)
        for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    return jax.tree.unflatten(structure, cast)


def describe_state(like: Any) -> str:
    """`LSTMState(c_BH=[8, 64], h_BH=[8, 64])`, `[8, 64]`."""
    if hasattr(like, "_fields"):
        parts = (
            f"{name}={list(part.shape)}" for name, part in zip(like._fields, like, strict=True)
        )
        return f"{type(like).__name__}({', '.join(parts)})"
    return describe(like)


def parts(given: Any, names: str, count: int) -> tuple[Any, ...]:
    """The states of so many layers or directions; None: all begin from zeros."""
    if given is None:
        return (None,) * count
    if not isinstance(given, tuple | list) or hasattr(given, "_fields") or len(given) != count:
        fail(f"state: expected a tuple of those of {count} {names}, got {describe(given)}")
    return tuple(given)
