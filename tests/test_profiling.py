# SPDX-License-Identifier: Apache-2.0
"""What a trace of some steps is made to say."""

import re

import jax
import jax.numpy as jnp
from commands import call

from flax_lstm.training.profiling import STEPS, Profiler


def test_a_trace_of_ten_steps_names_what_took_longest(tmp_path):
    work = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x)))
    x, profiler = jnp.ones((300, 300)), Profiler(tmp_path)
    told = []
    for step in range(STEPS.stop + 3):
        told.append(profiler.at(step, x))
        work(x).block_until_ready()
    (said,) = [line for line in told if line]
    assert told.index(said) == STEPS.stop
    heading, first, *_ = said.splitlines()
    assert re.match(r"[\d.]+ ms a step, device idle [\d.]+%", heading)
    milliseconds, share, name = first.split()[0], first.split()[2], first.split()[-1]
    assert float(milliseconds) > 0 and float(share.rstrip("%")) > 50
    assert "dot" in name or "fusion" in name, "the matmul is what takes longest"
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_without_operations_says_so(tmp_path):
    profiler = Profiler(tmp_path)
    told = [profiler.at(step, None) for step in range(STEPS.stop + 1)]
    assert told[-1].endswith("holds no operation.")


def test_a_run_too_short_to_be_traced_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--train.steps {STEPS.stop} --mesh.data 1 --workdir run"
    outcome = call(capsys, f"train --config adding_problem {flags} --profile")
    assert outcome.code == 2 and f"{STEPS.stop} are left" in outcome.err
