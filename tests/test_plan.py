# SPDX-License-Identifier: Apache-2.0
"""The planner: what it reads from programs, counts and predicts; its compiler stays in a process of
its own."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import small_runs
from commands import ROOT, call
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from flax_lstm import (
    Classification,
    Config,
    LanguageModel,
    LanguageModeling,
    LSTMCell,
    MeshConfig,
    TextModel,
    TrainConfig,
    UserError,
    load_config,
)
from flax_lstm.config import shipped_configs
from flax_lstm.data.imdb import Imdb
from flax_lstm.data.language import ImdbLanguage, LanguageTable
from flax_lstm.machine.sharding import AXES, abstract_batch, make_mesh, platform
from flax_lstm.nn.recurrence import cpu, fused
from flax_lstm.plan import compile_for, environment, exchange_seconds, plan, predict, report, scaled
from flax_lstm.plan.chips import CHIPS, Topology, parse_topology
from flax_lstm.plan.compiler import measure, out_of_memory, read_program, trace, whole
from flax_lstm.plan.program import Program, groups_of, size_of
from flax_lstm.training.assembly import assemble

CPU8 = Topology("cpu", (8,))
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="the TPU compiler (libtpu) is not installed"
)


# --- topologies and mistakes


def test_topologies_and_their_halves():
    assert parse_topology("v5p:4x4x4") == Topology("v5p", (4, 4, 4))
    assert [t.name for t in parse_topology("v5e:4x2").smaller()] == [
        "v5e:4x2",
        "v5e:2x2",
        "v5e:2x1",
        "v5e:1x1",
    ]
    assert [t.chips for t in parse_topology("h200:64").smaller()] == [64, 32, 16, 8, 4, 2, 1]
    assert [t.chips for t in parse_topology("cpu:6").smaller()] == [6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5x:4x4", r"unknown kind. Did you mean v5\w\? Known: v5e, v5p, v6e, h200, cpu"),
        ("v5e", "v5e comes as v5e:NxN"),
        ("v5p:4x4", "v5p comes as v5p:NxNxN"),
        ("h200:eight", "h200 comes as h200:N"),
        ("cpu:0", "cpu comes as cpu:N"),
    ],
)
def test_a_topology_that_is_none(text, said, capsys):
    outcome = call(capsys, f"plan --config adding_problem --topology {text}")
    assert outcome.code == 2
    with pytest.raises(UserError, match=said):
        parse_topology(text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mesh.data 3 --mesh.model 4", "mesh .* does not fit the 8 devices"),
        ("--mesh.data 4", "takes 4 of the 8 chips of cpu:8; a plan takes them all"),
        ("--mesh.model 3", "does not fit the 8 devices"),
        ("--train.batch-size 12", "train.batch-size 12 does not divide by 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit(flags, said, capsys):
    outcome = call(capsys, f"plan --config adding_problem --topology cpu:8 {flags}")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert pd.Series([outcome.err]).str.contains(said).all(), outcome.err


@pytest.mark.parametrize(
    ("topology", "said"), [("v5e:2x2", r"'flax_lstm\[plan\]'"), ("h200:8", "jax-cuda13-plugin==")]
)
def test_a_compiler_that_is_not_installed(topology, said, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{said}.*--topology cpu:"):
        environment(parse_topology(topology))


# --- reading a program


def test_sizes_of_arrays():
    assert size_of("bf16[2,3]{1,0}") == 12 and size_of("pred[5]") == 5 and size_of("f32[]") == 4
    assert size_of("(f32[4]{0:T(128)S(1)}, /*index=1*/s64[2]{0}, token[])") == 32
    assert size_of("(f32[4]{0:T(128)S(1)}, s64[2]{0})", slow_memory_only=True) == 16


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_devices(text, groups):
    assert groups_of(text).tolist() == groups


def loop_program(model=8):
    """A loop of 7 steps in a loop of 5, with a matmul and a sum over devices in the inner one."""
    mesh = make_mesh(8 // model, 1, model)

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def run(w, x):
        def inner(x, _):
            return jax.lax.psum(jnp.tanh(x @ w), "model"), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=7)[0] + 1, None

        return jax.lax.scan(outer, x, None, length=5)[0]

    whole = NamedSharding(mesh, PartitionSpec())
    return run.lower(
        *(jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for s in ((16, 16), (4, 16)))
    ).compile()


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
    program = Program(loop_program().as_text())
    (exchange,) = program.collectives()
    assert (exchange.kind, exchange.bytes, exchange.times, exchange.in_loop) == (
        "all-reduce",
        4 * 16 * 4,
        35,
        True,
    )
    assert exchange.groups.tolist() == [list(range(8))]
    assert len(program.loops()) == 2
    launched = [found for found in program.executed() if found.operation.is_kernel()]
    products = [found for found in launched if "dot_general" in found.operation.line]
    assert [product.times for product in products] == [35]
    assert program.traffic(products[0]) == 4 * (
        16 * 16 + 2 * 4 * 16
    )  # both operands, and the product


def test_slices_count_alone():
    """A loop that reads one row of a large array and writes one of another moves rows, not
    arrays."""

    def run(x_TD):
        return jax.lax.scan(lambda total, x: (total + x, jnp.sin(total) * x), jnp.zeros(256), x_TD)

    program = Program(
        jax.jit(run).lower(jax.ShapeDtypeStruct((1000, 256), jnp.float32)).compile().as_text()
    )
    moved = sum(e.times * program.traffic(e) for e in program.executed() if e.in_loop)
    assert (
        2 * 1000 * 1024 <= moved < 20 * 1000 * 1024
    )  # 1 KB each; the whole would be 1000 times 1 MB


TPU_LOOP = """
%start (p: bf16[2,4]) -> bf16[2,16] {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %g.1 = bf16[2,16]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}
%done (p: bf16[2,4]) -> bf16[2,16] {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %g.2 = bf16[2,16]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}
%condition (c: (s32[], bf16[2,4])) -> pred[] {
  %c = (s32[], bf16[2,4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(70)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%body (c: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %c = (s32[], bf16[2,4]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = bf16[2,4]{1,0:T(8,128)S(1)} get-tuple-element(%c), index=1
  %one = s32[]{:T(128)} constant(1)
  %begin = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%start, backend_config={"estimated_cycles":"100"}
  %end = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%done, backend_config={"estimated_cycles":"20"}
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[], bf16[2,4]) tuple(%next, %x)
}
ENTRY %main (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %p = (s32[], bf16[2,4]) parameter(0)
  ROOT %while = (s32[], bf16[2,4]) while(%p), condition=%condition, body=%body
}
"""  # noqa: E501


def test_the_text_of_a_tpu_program():
    """Steps by the condition, one gather spread over two fusions, arrays in fast memory, estimates
    of the compiler."""
    found = read_program(Program(TPU_LOOP))
    (gather,) = found["collectives"]
    assert (gather["kind"], gather["bytes"], gather["times"], gather["in_loop"]) == (
        "all-gather",
        64,
        70,
        True,
    )
    assert found["cycles"] == {"outside": 0, "in_loops": 70 * 120}
    assert found["kernels"] == {"outside": 0, "in_loops": 70 * 2}
    assert found["traffic"]["in_loops"] == 70 * 2 * 64  # what is read is in fast memory


# --- bytes and FLOPs


def classifier(mesh=(8, 1, 1), **model):
    settings = TextModel(hidden_size=32, embed_size=16, dense=8, recurrent_dropout=0.2, **model)
    data = Imdb(vocabulary_size=64, max_length=24)
    return Config(
        "text", data, Classification(), settings, TrainConfig(batch_size=16), MeshConfig(*mesh)
    )


def language_model(mesh=(8, 1, 1), data=None, **train):
    data = data or ImdbLanguage(vocabulary_size=64, sequence_length=12)
    settings = LanguageModel(cell="gru", hidden_size=(32, 48), num_layers=2, embed_size=16)
    return Config(
        "lm",
        data,
        LanguageModeling(),
        settings,
        TrainConfig(batch_size=16, **train),
        MeshConfig(*mesh),
    )


def layer(B, T, D, H, G, first=False):
    """(in the loops, outside) of a recurrent layer with its gradient. In the loops: h R forwards,
    da R^T backwards.
    Outside: W x, its two gradients (one where x needs none), the gradient of R, and da R^T once
    more, for the state before the first step."""
    loop = 2 * B * T * H * G * H
    project = 2 * B * T * D * G * H
    return np.array([2 * loop, (2 if first else 3) * project + loop])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_flops_of_a_classifier_by_hand(mesh):
    B, T, D, H, K, O = 16, 24, 16, 32, 8, 2
    _, found = trace(classifier(mesh), CPU8)
    expected = layer(B, T, D, H, 4) + np.array([0, 3 * 2 * B * (H * K + K * O)])
    assert found["longest"] == T and found["tokens"] == B * T
    np.testing.assert_allclose(
        [found["flops"]["in_loops"], found["flops"]["outside"]], expected, rtol=1e-3
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_flops_of_a_language_model_by_hand(parts):
    B, T, D, H, J, V = 16, 12, 16, 32, 48, 64
    _, found = trace(language_model((2, 1, 4), accumulate=parts), CPU8)
    expected = layer(B, T, D, H, 3) + layer(B, T, H, J, 3) + np.array([0, 3 * 2 * B * T * J * V])
    # The state that is carried into the batch needs no gradient; 2 B G H^2 a layer may or may not
    # be counted for it.
    slack = 2 * B * 3 * (H * H + J * J)
    total = sum(found["flops"].values())
    assert abs(total - sum(expected)) <= slack
    if parts == 1:  # with more, all of it is in the loop over the parts
        assert abs(found["flops"]["in_loops"] - expected[0]) <= slack


@pytest.mark.parametrize("mesh", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_bytes_are_those_of_the_real_step(mesh, tmp_path, quick_compile):
    """Planned from settings alone, against the step compiled for the loaded data on real (virtual
    CPU) devices."""
    words = [f"w{n}" for n in range(61)]  # 64 with the special ones
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.permutation(words)) for _ in range(60)]
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "texts.csv", index=False)
    data = LanguageTable(path=str(tmp_path / "texts.csv"), vocabulary_size=64, sequence_length=12)
    config = language_model(mesh, data)
    planned = measure(config, CPU8)["bytes"]
    config = replace(config, model=replace(config.model, backend="fused"))
    dataset = data.load(tmp_path / "assets")
    made, steps, _ = assemble(config, dataset.info)
    batch = dataset.train(16, 0)[0]
    memory = (
        steps.train.lower(steps.abstract, abstract_batch(batch, made)).compile().memory_analysis()
    )
    state = steps.init()

    def on_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert planned["parameters"] == on_device(state.params)
    assert planned["optimizer"] == on_device(state.opt_state)
    inputs = planned["parameters"] + planned["optimizer"] + planned["other_inputs"]
    np.testing.assert_allclose(inputs, memory.argument_size_in_bytes, rtol=0.05)
    np.testing.assert_allclose(planned["activations"], memory.temp_size_in_bytes, rtol=0.05)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    np.testing.assert_allclose(planned["total"], total - memory.alias_size_in_bytes, rtol=0.05)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2), (1, 2, 4)])
def test_the_large_model_is_whole_nowhere(mesh):
    """No parameter and no moment is: each device has its share of them. Nothing of that size is
    made here."""
    config = replace(load_config("imdb_lm_large"), mesh=MeshConfig(*mesh))
    state = assemble(config, config.data.outline()).steps.abstract
    stored = {"parameters": state.params, "optimizer": state.opt_state}
    assert whole(stored) == []
    share = mesh[1] * mesh[2]
    for leaf in jax.tree.leaves(stored):
        assert leaf.size < 10_000 or leaf.size == share * np.prod(
            leaf.sharding.shard_shape(leaf.shape)
        )
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    gradients = total / 3
    assert total + gradients > 0.8 * CHIPS["v5e"].memory > (total + gradients) / share


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "the total memory required for HLO temporaries (17.50G) exceeds available HBM "
            "(15.75G).",
            17.5 * 2**30,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.", 2**29),
        ("something else", None),
    ],
)
def test_what_would_be_taken_is_read_from_a_refusal(message, size):
    assert out_of_memory(message) == size


def test_whole_arrays_are_named():
    config = replace(classifier((1, 2, 4)), model=TextModel(hidden_size=7, embed_size=9, dense=5))
    _, found = trace(config, CPU8)
    assert (
        "parameters/dense/bias (5,)" in found["whole"]
        and "optimizer/1/0/mu/dense/kernel (7, 5)" in found["whole"]
    )
    assert not any(
        "embedding" in name or "cell" in name for name in found["whole"]
    )  # vocabulary 64, four gates


# --- what data say of themselves


@pytest.mark.parametrize(
    "run",
    [small_runs.adding_run, small_runs.language_run, small_runs.text_run, small_runs.series_run],
)
def test_an_outline_has_the_form_of_the_data(run, tmp_path):
    config = run() if run is small_runs.adding_run else run(tmp_path)
    outline, dataset = config.data.outline(), config.data.load(tmp_path / "assets")
    longest = dataset.info.sample(4)
    assert (
        max(dataset.train(4, 0)[step].inputs.shape[1] for step in range(4))
        <= longest.inputs.shape[1]
    )
    if run in (small_runs.text_run, small_runs.series_run):
        assert outline is None  # labels and columns are in the file
        return
    for found, expected in zip(outline.sample(4), longest, strict=True):
        assert found is expected is None or (found.shape, found.dtype) == (
            expected.shape,
            expected.dtype,
        )


def test_outlines_of_texts():
    info = Imdb(vocabulary_size=100, max_length=203).outline()
    assert info.vocabulary_size == 100 and info.labels == ("neg", "pos")
    assert info.sample(3).inputs.shape == (3, 208)
    assert ImdbLanguage(vocabulary_size=100).outline().vocabulary_size == 100


# --- predictions


def test_time_of_an_exchange():
    one = {"kind": "all-gather", "devices": 4, "bytes": 4e9, "times": 3, "ids": [0, 1, 2, 3]}
    torus, host = CHIPS["v5e"], CHIPS["h200"]
    np.testing.assert_allclose(exchange_seconds(one, torus), 3 * 3e9 / torus.link)
    np.testing.assert_allclose(
        exchange_seconds({**one, "kind": "all-reduce"}, torus), 6 * 3e9 / torus.link
    )
    np.testing.assert_allclose(exchange_seconds({**one, "bytes": 4}, torus), 3 * 2 * torus.latency)
    np.testing.assert_allclose(exchange_seconds({**one, "bytes": 4}, host), 3 * host.latency)
    np.testing.assert_allclose(exchange_seconds(one, host), 3 * 3e9 / host.link)
    beyond = {**one, "ids": [0, 1, 8, 9]}  # two in either machine share two network cards
    np.testing.assert_allclose(exchange_seconds(beyond, host), 3 * 3e9 / (2 * host.network))
    assert exchange_seconds({**one, "devices": 1}, host) == 0


def test_a_prediction_by_hand():
    chip = CHIPS["h200"]
    found = {
        "dtype": "bfloat16",
        "chips": 2,
        "batch_size": 10,
        "tokens": 1000,
        "flops": {"outside": 2 * chip.bfloat16, "in_loops": chip.bfloat16},
        "traffic": {"outside": 0.5 * chip.bandwidth, "in_loops": 3 * chip.bandwidth},
        "kernels": {"outside": 1, "in_loops": 100},
        "cycles": {"outside": 0, "in_loops": 0},
        "collectives": [],
    }
    predicted = predict(found, chip)
    assert "compiler" not in predicted
    np.testing.assert_allclose(
        predicted["roofline"], 1 + 3
    )  # arithmetic outside, memory in the loops
    np.testing.assert_allclose(predicted["tokens_per_second"], 250)
    np.testing.assert_allclose(predicted["examples_per_second_and_chip"], 1.25)
    on_tpu = predict({**found, "cycles": {"outside": 1.5e9, "in_loops": 3e9}}, CHIPS["v5e"])
    np.testing.assert_allclose(on_tpu["compiler"], 3)
    assert on_tpu["step"] == max(on_tpu["compiler"], on_tpu["roofline"])


def test_fewer_chips_have_the_same_share_of_the_batch():
    config = replace(load_config("imdb_lm_large"), mesh=MeshConfig(-1, 4, 8))
    pod = parse_topology("v5e:16x16")
    sizes = {t.chips: t for t in pod.smaller()}
    found = {n: scaled(config, pod, sizes[n]) for n in (256, 64, 16, 4, 1)}
    meshes = {
        n: (c.mesh.data, c.mesh.fsdp, c.mesh.model, c.train.batch_size) for n, c in found.items()
    }
    assert meshes == {
        256: (8, 4, 8, 1024),
        64: (2, 4, 8, 256),
        16: (1, 2, 8, 64),
        4: (1, 1, 4, 16),
        1: (1, 1, 1, 4),
    }
    few = replace(config, train=TrainConfig(batch_size=128))
    assert scaled(few, pod, sizes[1]) is None


# --- processes and platforms


def test_steps_know_what_they_are_traced_for():
    assert platform() == "cpu" and not fused.on_gpu()
    assert not (cpu.supports(LSTMCell(4), jnp.zeros((1, 1, 4)), None) or "").startswith(
        "the arrays"
    )
    for kind, name in (("NVIDIA H200", "gpu"), ("TPU v5 lite", "tpu")):
        device = AbstractDevice(device_kind=kind, num_cores=1, platform=name)
        mesh = AbstractMesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert platform() == name and fused.on_gpu() == (name == "gpu")
            assert (
                cpu.supports(LSTMCell(4), jnp.zeros((1, 1, 4)), None)
                == f"the arrays are on a {name}, not on a CPU"
            )


def test_the_command(capsys):
    before = dict(os.environ)
    flags = (
        "--config adding_problem --data.length 20 --model.hidden-size 16 --mesh.model 2 "
        "--topology cpu:4"
    )
    outcome = call(capsys, f"plan {flags} --json")
    assert outcome.code == 0, outcome.err
    (found,) = json.loads(outcome.out)
    assert (
        found["mesh"] == {"data": 2, "fsdp": 1, "model": 2}
        and found["backend"] == "fused"
        and found["fits"]
    )
    assert {one["kind"] for one in found["collectives"] if one["in_loop"]} >= {"all-gather"}
    assert {one["times"] for one in found["collectives"] if one["in_loop"]} == {20}
    assert dict(os.environ) == before and len(jax.devices()) == 8
    report("adding_problem", [found], parse_topology("cpu:4"))
    told = capsys.readouterr().out
    assert "in a loop, 20 times" in told and "FLOPs" in told and "predicted" not in told


def test_a_report_with_predictions(capsys):
    """Of one that fits eight GPUs and not one."""
    gather = {
        "kind": "all-gather",
        "devices": 2,
        "bytes": 2**20,
        "times": 70,
        "in_loop": True,
        "ids": [0, 1],
    }
    both = {"outside": 10, "in_loops": 1000}
    one = {
        "topology": "h200:8",
        "chips": 8,
        "fits": True,
        "mesh": {"data": 4, "fsdp": 1, "model": 2},
        "whole": [],
        "batch_size": 64,
        "longest": 70,
        "tokens": 4480,
        "parameters": 5,
        "dtype": "float32",
        "backend": "fused",
        "data": "read",
        "bytes": {"parameters": 2**30, "activations": 3 * 2**30, "total": 2**32},
        "flops": both,
        "traffic": both,
        "kernels": both,
        "cycles": both,
        "collectives": [gather],
    }
    one["predicted"] = {**predict(one, CHIPS["h200"]), "efficiency": 0.87}
    refused = {
        "topology": "h200:1",
        "fits": False,
        "too_large": "it said no",
        "bytes": {"parameters": 2**31},
    }
    report("lm", [one, refused], parse_topology("h200:8"))
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        *(
            "activations 3 GiB ?",
            "total 4 GiB ?",
            "fits in 131 GiB fits DOES NOT FIT",
            "h200:1: it said no",
        ),
        *("all-gather 2 in a loop, 70 times 1 70 MiB", "8 4x1x2 64", "tokens/s eff.", "87%"),
        *("Predictions, not measurements", "docs.nvidia.com/dgx-basepod"),
    ):
        assert part in told, told


def plainly(code):
    """A program in the environment of a user: no platform named, no flag set. Neither may it wait
    for a TPU."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX", "XLA", "TPU", "LIBTPU"))
    }
    env |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_libtpu
@pytest.mark.skipif(
    os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"), reason="there may be a TPU here"
)
def test_an_installed_compiler_changes_no_device():
    """Nor does the planner's import, or making its environment: what train.py sees are the devices
    that are there."""
    names = (
        "sorted(n for n in os.environ if n.startswith(('JAX', 'XLA', 'TPU', 'LIBTPU', 'ALLOW')))"
    )
    plain = f"import jax, os; print([d.platform for d in jax.devices()], {names})"
    planner = "import flax_lstm.plan as p; p.environment(p.Topology('v5e', (1, 1)))"
    seen = plainly(plain)
    assert seen.startswith("['cpu']") and plainly(f"{planner}\n{plain}") == seen


@needs_libtpu
def test_a_tpu_topology_that_the_compiler_does_not_know():
    with pytest.raises(UserError, match=r"v5e:3x3: the compiler has no such thing"):
        compile_for(parse_topology("v5e:3x3"), "adding_problem", ["--train.batch-size=9"])


@pytest.fixture
def files(tmp_path):
    """Flags that give the configs of the user's own files some."""
    hours = pd.date_range("2024-01-01", periods=2000, freq="h").astype(str)
    waves = {f"c{n}": np.sin(np.arange(2000) / (n + 3)) for n in range(7)}
    pd.DataFrame({"time": hours, **waves}).to_csv(tmp_path / "series.csv", index=False)
    rows = [{"text": f"film number {n}", "label": "ab"[n % 2]} for n in range(100)]
    pd.DataFrame(rows).to_csv(tmp_path / "texts.csv", index=False)
    long = pd.DataFrame({"unique_id": np.repeat(["a", "b"], 1000), "ds": np.tile(hours[:1000], 2)})
    long.assign(y=np.tile(waves["c0"][:1000], 2)).to_csv(tmp_path / "panel.csv", index=False)
    panel = [f"--data.path={tmp_path}/panel.csv"]
    series, texts = f"--data.path={tmp_path}/series.csv", f"--data.path={tmp_path}/texts.csv"
    split = ["--data.split", "0.7", "0.1", "0.2"]
    own = {"series_table": [series], "text_table": [texts], "panel_table": panel}
    own["tag_table"] = [texts, "--data.label-column=label"]
    return {**own, "etth1": [series, *split], "m4_hourly": panel}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_compiles_for_a_pod(name, files):
    mesh = ["--mesh.data=16", "--mesh.fsdp=4", "--mesh.model=4", "--train.batch-size=256"]
    found = compile_for(parse_topology("v5e:16x16"), name, [*files.get(name, []), *mesh])
    assert found["backend"] == "fused" and found["bytes"]["total"] < CHIPS["v5e"].memory
    assert sum(found["cycles"].values()) > 0 and sum(found["flops"].values()) > 0
    assert any(one["in_loop"] for one in found["collectives"]) or name in (
        "stocks",
    )  # its 50 units do not divide by 4


@needs_libtpu
@pytest.mark.slow
def test_the_large_model_fits_a_slice_and_not_a_chip():
    config = load_config("imdb_lm_large")
    whole, *_, last = plan(config, parse_topology("v5e:2x2"), ("imdb_lm_large", ["--mesh.model=4"]))
    assert whole["fits"] and whole["predicted"]["efficiency"] == 1
    assert last["chips"] == 1 and not last["fits"] and last["bytes"]["total"] > CHIPS["v5e"].memory
