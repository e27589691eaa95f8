# SPDX-License-Identifier: Apache-2.0
"""Where what was made once is kept for the next run: $XDG_CACHE_HOME/flax_lstm, or
~/.cache/flax_lstm."""

import os
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_lstm"


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs there, unless its own settings name a place. Importing the
    library does not."""
    import jax  # here: reading data does without

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
