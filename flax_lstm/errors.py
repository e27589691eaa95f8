# SPDX-License-Identifier: Apache-2.0
"""The one exception that means: the user can mend this."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a flag, path, config or data file; the command line prints its text alone and
    exits with 2.

    The text says what was wrong, where, and what to do next (the possible values, where they can be
    listed).
    """


class ArgumentError(UserError, ValueError):
    """A call of a layer with arrays that do not fit it; a ValueError too, as JAX users expect."""


def listing(names: Iterable[object], limit: int = 20) -> str:
    """`a, b, c`, or the first `limit` names and how many were left out."""
    words = [str(name) for name in names]
    more = f", ... ({len(words) - limit} more)" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean X?` for a near miss, else an empty string."""
    match = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {match[0]}?" if match else ""


# What is counted on devices has 32 bits.
MOST = 2**31 - 1


def within(name: str, value: float, least: float, most: float = MOST) -> None:
    """Raises UserError for a setting outside these bounds, or that is no number."""
    require(value >= least, f"{name} {value}: must be at least {least:,}")
    require(value <= most, f"{name} {value}: must be at most {most:,}")


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
