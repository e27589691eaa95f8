# SPDX-License-Identifier: Apache-2.0
"""The native kernel: built once for the processor, in every variant, by many processes at a time,
or not at all.

That it equals the scan is tested in test_backends.py; here with each instruction set that this
machine can run.
"""

import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_outcomes import outcomes

from flax_lstm import RNN, LSTMCell
from flax_lstm.nn.recurrence import BACKENDS, native, resolve

HERE = Path(__file__).parent
KERNEL = HERE.parent / "flax_lstm" / "nn" / "recurrence" / "native"
HARNESS = HERE / "native_harness.cc"

# Prints why there is no kernel, or None.
REGISTER = "from flax_lstm.nn.recurrence import native; print(native.unavailable())"

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


def start(*arguments: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.flags(1), **extra},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_compiler
@pytest.mark.parametrize("variant", native.VARIANTS)
def test_each_instruction_set_equals_the_scan(variant: str, tmp_path: Path) -> None:
    """In the user's cache, so that each is compiled once for all that ask for this kernel."""
    if variant not in (possible := native.possible()):
        pytest.skip(f"this processor has {', '.join(possible)} only")
    file = tmp_path / "outcomes.npz"
    process = start(str(HERE / "native_outcomes.py"), str(file), FLAX_LSTM_CPU=variant)
    name, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert name.strip() == "cpu"
    with np.load(file) as ours:
        for name, exact in outcomes("scan", "float32").items():
            # Sums of 45 x 27 terms of size 1, each wrong by some 1e-7.
            np.testing.assert_allclose(ours[name], exact, rtol=0, atol=2e-5, err_msg=name)
            # Twice what bfloat16 can tell apart: roundings of weights, inputs and gradients, not
            # all alike.
            apart = np.linalg.norm(ours[f"rough {name}"] - exact) / np.linalg.norm(exact)
            assert apart < 2 * 2**-7, name
    assert ("float32 gives better figures" in log) == (variant != "avx512bf16")


@pytest.fixture
def chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], str]:
    """Which backend `auto` takes where the kernel is asked for the first time, and runs; the cache
    is empty."""
    monkeypatch.setattr(native, "unavailable", functools.cache(native.unavailable.__wrapped__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level(logging.INFO)

    def choice() -> str:
        rnn, x_BTD = RNN(LSTMCell(3)), jnp.ones((1, 2, 3))
        assert jnp.isfinite(rnn.init_with_output(jax.random.key(0), x_BTD)[0][1]).all()
        return resolve("auto", rnn.cell, x_BTD).__name__.split(".")[-1]

    return choice


def test_an_unknown_instruction_set_is_said_and_the_fused_recurrence_runs(
    chosen: Callable[[], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLAX_LSTM_CPU", "avx1024")
    assert chosen() == "fused"
    assert "FLAX_LSTM_CPU=avx1024" in caplog.text


def test_without_a_compiler_the_fused_recurrence_runs(
    chosen: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    assert chosen() == chosen() == "fused"
    assert caplog.text.count("no C++ compiler") == 1


@needs_compiler
def test_one_step_alone_is_run_by_another_unless_asked_for_by_name() -> None:
    """As an agent's in its environment, where laying out the weights would take longer."""
    one, two = jnp.ones((4, 1, 3)), jnp.ones((4, 2, 3))
    found = [
        resolve(name, LSTMCell(3), x) for name, x in (("auto", one), ("auto", two), ("cpu", one))
    ]
    assert found == [BACKENDS["fused"], BACKENDS["cpu"], BACKENDS["cpu"]]


@needs_compiler
def test_a_compiler_that_fails_is_said(
    chosen: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert chosen() == "fused"
    assert "it is broken" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said(
    chosen: Callable[[], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flax_lstm").write_text("a file where the folder should be")
    assert chosen() == "fused"
    assert "could not be compiled into" in caplog.text


# A compiler that leaves half a library where the whole one goes, until three have come so far.
SLOW = """#!/bin/sh
case "$*" in *--version*) exec {compiler} --version;; esac
for last; do :; done
echo half > "$last"
: > "{begun}/$$"
tries=0
while [ $(ls "{begun}" | wc -l) -lt 3 ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries + 1))
done
exec cp {library} "$last"
"""


@needs_compiler
def test_processes_that_begin_together_share_one_library(tmp_path: Path) -> None:
    begun, slow = tmp_path / "begun", tmp_path / "slow"
    begun.mkdir()
    library = native.build()
    slow.write_text(SLOW.format(compiler=native.compiler(), begun=begun, library=library))
    slow.chmod(0o755)
    extra = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(slow)}
    processes = [start("-c", REGISTER, **extra) for _ in range(3)]
    outputs = [process.communicate(timeout=500) for process in processes]
    assert [out.strip() for out, _ in outputs] == ["None"] * 3, outputs
    assert len(list(begun.iterdir())) == 3
    assert [path.read_bytes() for path in tmp_path.rglob("*.so")] == [library.read_bytes()]
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
    assert np.all(np.isfinite(numbers(output))) and len(output.splitlines()) == 97


@pytest.mark.slow
@needs_compiler
def test_neon_under_emulation_equals_this_processor(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs a cross-compiler for aarch64 and qemu-user")
    here = numbers(run_harness(tmp_path, native.compiler(), ["-O2", "-DLANES=4", "-DTILE=6"]))
    flags = ["-O3", "-static", *native.VARIANTS["neon"][1]]
    there = numbers(run_harness(tmp_path, compiler, flags, (emulator,)))
    assert len(here) == 97
    np.testing.assert_allclose(
        there, here, rtol=1e-3, atol=1e-3
    )  # printed with six digits, of sums that cancel
