# SPDX-License-Identifier: Apache-2.0
"""An unforgiving place to run in: eight CPU devices, warnings are errors, and no array changes rank
unasked.

Without JAX_PLATFORMS the tests run on the CPU. float64 is for tests that ask for the fixture `x64`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import compiling
import jax
import pytest
from cudnn_stand_in import cudnn  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.getoption("markexpr"):
        compiling.quickly()
    config.addinivalue_line("filterwarnings", "error")
    # Orbax leaves coroutines and event loops behind when it meets a damaged file; the collector
    # finds them at any time, in whatever test is next, under changing messages.
    for warning in ("pytest.PytestUnraisableExceptionWarning", "RuntimeWarning"):
        pattern = "coroutine .* was never awaited" if warning == "RuntimeWarning" else ""
        config.addinivalue_line("filterwarnings", f"ignore:{pattern}:{warning}")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compile():
    """XLA without its dear passes, for tests whose time is that of compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
