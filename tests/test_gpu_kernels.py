# SPDX-License-Identifier: Apache-2.0
"""What a GPU would launch at each step of a recurrence, seen by compiling for one that is not
there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flax_lstm.plan import environment
from flax_lstm.plan.chips import parse_topology

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin, the GPU compiler, is not there",
)


def loops(cell, dtype, backend="fused"):
    command = [sys.executable, Path(__file__).with_name("gpu_kernels.py"), cell, dtype, backend]
    settings = environment(parse_topology("h200:1"))
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def products(kernels):
    return [
        name
        for name in kernels
        if any(word in name for word in ("gemm", "dot", "custom-call", "cublas"))
    ]


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_fused_launches_at_most_four_kernels_a_step(cell, dtype):
    """One of them is the matmul of the recurrence; that of a weight gradient is in neither loop."""
    forward, backward = loops(cell, dtype)
    assert len(forward) <= 4 and len(backward) <= 4, (forward, backward)
    assert len(products(forward)) == len(products(backward)) == 1, (forward, backward)


@needs_compiler
def test_a_plain_scan_launches_more_and_is_seen_to():
    forward, backward = loops("lstm", "bfloat16", "scan")
    assert len(forward) > 4 and len(backward) > 4
    assert len(products(backward)) > 1  # the weight gradient, summed at every step
