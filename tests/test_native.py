# SPDX-License-Identifier: Apache-2.0
"""The native kernel: built once for the processor, in every variant, by many processes at a time,
or not at all.

That it equals the scan is tested in test_backends.py; here with each instruction set that this
machine can run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flax_lstm.nn.recurrence import native

HERE = Path(__file__).parent
KERNEL = HERE.parent / "flax_lstm" / "nn" / "recurrence" / "native"
HARNESS = HERE / "native_harness.cc"

# Prints which backend `auto` takes and its distance from the scan, over ragged rows, with
# gradients: in float32 the largest, in bfloat16 relative to the scan's in float32.
PROBE = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
import jax, jax.numpy as jnp
from flax_lstm import RNN, GRUCell, LSTMCell, SimpleRNNCell
from flax_lstm.nn.recurrence import resolve
x, lengths = jax.random.normal(jax.random.key(0), (5, 9, 6)), jnp.array([9, 0, 1, 5, 9])
chosen, worst, rough = resolve("auto", LSTMCell(19), x, None), 0.0, 0.0
for cell in (LSTMCell(19), GRUCell(19), SimpleRNNCell(19)):
    variables = RNN(cell).init(jax.random.key(1), x)
    def loss(variables, x, backend):
        state, y = RNN(cell, backend=backend).apply(variables, x, lengths)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(s**2) for s in jax.tree.leaves(state))
    ours, scans = (jax.value_and_grad(loss, (0, 1))(variables, x, b) for b in ("auto", "scan"))
    apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), ours, scans)
    worst = max(worst, *jax.tree.leaves(apart))
    half = RNN(type(cell)(19, dtype="bfloat16"))
    gradient = jax.grad(lambda v: jnp.sum(jnp.sin(half.apply(v, x, lengths)[1].astype(float))))
    exact = jax.grad(lambda v: jnp.sum(jnp.sin(RNN(cell, backend="scan").apply(v, x, lengths)[1])))
    for a, b in zip(*map(jax.tree.leaves, (gradient(variables), exact(variables)))):
        rough = max(rough, float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
print(chosen.__name__.split(".")[-1], worst, rough)
"""

# Prints which backend `auto` takes, and nothing of its numbers.
CHOICE = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
import jax, jax.numpy as jnp
from flax_lstm import RNN, LSTMCell
from flax_lstm.nn.recurrence import resolve
rnn, x = RNN(LSTMCell(3)), jnp.ones((1, 2, 3))
assert jnp.isfinite(rnn.init_with_output(jax.random.key(0), x)[0][1]).all()
print(resolve("auto", LSTMCell(3), x, None).__name__.split(".")[-1], 0, 0)
"""

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


def environment(cache: Path, **extra: str) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        **extra,
    }


def start_probe(cache: Path, program: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(cache, **extra),
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def probe(cache: Path, program: str = PROBE, **extra: str) -> tuple[str, float, float, str]:
    """(backend, largest distance from the scan, that in bfloat16, log)."""
    out, errors = (process := start_probe(cache, program, **extra)).communicate(timeout=300)
    assert process.returncode == 0, errors
    name, worst, rough = out.split()
    return name, float(worst), float(rough), errors


@needs_compiler
@pytest.mark.parametrize("variant", native.VARIANTS)
def test_each_instruction_set_equals_the_scan(variant: str, tmp_path: Path) -> None:
    if variant not in (possible := native.possible()):
        pytest.skip(f"this processor has {', '.join(possible)} only")
    name, worst, rough, log = probe(tmp_path, FLAX_LSTM_CPU=variant)
    assert name == "cpu"
    assert worst < 2e-5  # sums of 45 x 19 terms of size 1, each wrong by some 1e-7
    # Twice what bfloat16 can tell apart: roundings of weights, inputs and gradients, not all alike.
    assert rough < 2 * 2**-7
    assert ("float32 gives better figures" in log) == (variant != "avx512bf16")


def test_an_unknown_instruction_set_is_said_and_the_fused_recurrence_runs(tmp_path: Path) -> None:
    name, *_, log = probe(tmp_path, CHOICE, FLAX_LSTM_CPU="avx1024")
    assert name == "fused"
    assert "FLAX_LSTM_CPU=avx1024" in log


def test_without_a_compiler_the_fused_recurrence_runs(tmp_path: Path) -> None:
    name, worst, _, log = probe(tmp_path, PATH=str(tmp_path), CXX="")
    assert name == "fused"
    assert worst < 2e-5
    assert log.count("no C++ compiler") == 1


@needs_compiler
def test_a_compiler_that_fails_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    name, *_, log = probe(tmp_path, CHOICE, CXX=str(broken))
    assert name == "fused"
    assert "it is broken" in log
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "flax_lstm").write_text("a file where the folder should be")
    name, *_, log = probe(tmp_path, CHOICE)
    assert name == "fused"
    assert "could not be compiled into" in log


# A compiler that leaves half a library where the whole one goes, until three have come so far.
SLOW = """#!/bin/sh
case "$*" in *--version*) exec {compiler} --version;; esac
for last; do :; done
echo half > "$last"
: > "{begun}/$$"
tries=0
while [ $(ls "{begun}" | wc -l) -lt 3 ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries + 1))
done
exec {compiler} "$@"
"""


@needs_compiler
def test_processes_that_begin_together_share_one_library(tmp_path: Path) -> None:
    begun, slow = tmp_path / "begun", tmp_path / "slow"
    begun.mkdir()
    slow.write_text(SLOW.format(compiler=native.compiler(), begun=begun))
    slow.chmod(0o755)
    processes = [start_probe(tmp_path, CHOICE, CXX=str(slow)) for _ in range(3)]
    outputs = [process.communicate(timeout=500) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert all(out.startswith("cpu ") for out, _ in outputs)
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert [
        path.name
        for path in (tmp_path / "flax_lstm").iterdir()
        if path.is_dir() and path.name != "xla"
    ] == []


def run_harness(folder: Path, compiler: str, flags: list[str], runner: tuple[str, ...] = ()) -> str:
    program = folder / "harness"
    command = [
        compiler,
        "-std=c++20",
        "-g",
        *flags,
        "-I",
        str(KERNEL),
        str(HARNESS),
        "-o",
        str(program),
        "-pthread",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(output: str) -> np.ndarray:
    """All that is printed; of one row of figures, the words before them left out."""
    rows = [line.split("=")[-1].split()[1:] for line in output.splitlines()]
    return np.array([[*map(float, row), *[0.0] * (11 - len(row))] for row in rows])


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("shape", [["-DLANES=4", "-DTILE=6"], ["-DLANES=16", "-DTILE=12"]])
def test_sanitizers_find_nothing(sanitizer: str, shape: list[str], tmp_path: Path) -> None:
    flags = ["-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *shape]
    output = run_harness(tmp_path, native.compiler(), flags)
    assert np.all(np.isfinite(numbers(output))) and len(output.splitlines()) == 60


@pytest.mark.slow
@needs_compiler
def test_neon_under_emulation_equals_this_processor(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs a cross-compiler for aarch64 and qemu-user")
    here = numbers(run_harness(tmp_path, native.compiler(), ["-O2", "-DLANES=4", "-DTILE=6"]))
    flags = ["-O3", "-static", *native.VARIANTS["neon"][1]]
    there = numbers(run_harness(tmp_path, compiler, flags, (emulator,)))
    assert len(here) == 60
    np.testing.assert_allclose(
        there, here, rtol=1e-3, atol=1e-3
    )  # printed with six digits, of sums that cancel
