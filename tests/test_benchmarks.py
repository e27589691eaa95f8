# SPDX-License-Identifier: Apache-2.0
"""The speed benchmark from end to end on a tiny workload, with the implementations that are always
there."""

import dataclasses
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
import types

import compiling
import numpy as np
import pytest
import small_runs
from commands import ROOT

from flax_lstm import fit, load
from flax_lstm.config import load_config, override
from flax_lstm.data.prepared import Prepared, rows_file

FIGURES = (
    "ms",
    "first_step_s",
    "before_mb",
    "memory_mb",
    "times_best_peer",
    "times_best_default_peer",
    "times_linen",
)


def test_tiny_workload_with_one_peer_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none here', name='torch')")
    command = (
        "benchmarks/run.py --workloads tiny --rounds 2 --seconds 0.01 --malloc default --json "
        f"{tmp_path / 'f.json'}"
    )
    peers = ("ours-scan", "ours-fused", "linen", "torch", "floor-numpy")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, *command.split(), "--peers", *peers],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": compiling.flags(1)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert {"date", "machine", "load_average", "versions", "seed", "workloads"} <= figures.keys()
    rows = {row["implementation"]: row for row in figures["rows"]}
    assert rows.keys() == set(peers)

    assert rows.pop("torch")["status"] == "missing"
    assert "- torch: missing (tiny): none here" in run.stdout
    floor = rows.pop("floor-numpy")
    assert all(row["status"] == "ok" for row in rows.values()), rows
    for name, row in rows.items():
        assert all(row[field] > 0 for field in FIGURES), row
        assert (
            math.isclose(row["over_floor"], row["ms"] / floor["ms"]) and len(row["ms_rounds"]) == 2
        )
        for loss, other in zip(row["losses"], rows["linen"]["losses"], strict=True):
            assert math.isclose(loss, other, rel_tol=1e-4), name
        assert f"| tiny | {name} |" in run.stdout
    for row in (floor, *rows.values()):
        assert math.isclose(row["over_limit"], row["ms"] / figures["limit_ms"]["tiny"])
        assert row["over_limit"] > 1, row
    assert "Memory, GB/s read and written" in run.stdout
    assert floor["over_floor"] == 1 and floor["times_linen"] is None
    assert rows["linen"]["losses"][-1] < rows["linen"]["losses"][0]  # it learns
    assert rows["linen"]["times_linen"] == rows["linen"]["times_best_peer"] == 1


def test_other_losses_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run
    from workloads import WORKLOADS, make_work, reference_loss

    work = make_work(WORKLOADS["tiny"], seed=0)
    right = reference_loss(work)

    class Entrant:
        is_floor, peer = False, run.Peer("ours")

        def __init__(self, *losses):
            self.report, self.trouble = {"losses": losses}, {}

        def fail(self, why):
            self.trouble = {"failed": why}

    fine, fine_too = Entrant(right, right - 0.02), Entrant(right * 1.00001, right - 0.022)
    other_weights, no_updates = Entrant(right * 1.001, right - 0.02), Entrant(right, right)
    run.check_losses(work, [fine, fine_too, other_weights, no_updates])
    assert [bool(e.trouble) for e in (fine, fine_too, other_weights, no_updates)] == [
        False,
        False,
        True,
        True,
    ]


def test_an_epoch_of_imdb_teaches_pytorch_what_it_teaches_ours(monkeypatch):
    """Batches, their order, the update of the table by rows, clipping and padding are the same, so
    that only dropout tells them apart."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import imdb_epoch

    kept = types.SimpleNamespace(tune_malloc=lambda: True)
    monkeypatch.setattr(imdb_epoch, "load_malloc", lambda: kept)
    sizes = {"LENGTH": 24, "VOCABULARY": 40, "FEATURES": 8, "HIDDEN": 8, "DENSE": 8, "BATCH": 4}
    for name, value in {**sizes, "DROPOUT": 0.0, "CLIP": 0.02}.items():
        monkeypatch.setattr(imdb_epoch, name, value)
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 40, n).astype(np.int32) for n in generator.integers(1, 25, 30)]
    train = imdb_epoch.Reviews(rows, generator.integers(0, 2, 30).astype(np.int32))
    job = imdb_epoch.Job(train, rows[:5], imdb_epoch.first_weights(0), 3, 0)
    ours, theirs = ([y for _, y in learn(job)] for learn in (imdb_epoch.ours, imdb_epoch.torch_))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.abs(ours[2] - ours[0]).max() > 0.01


def test_operations_are_those_of_the_products_written_out(monkeypatch):
    """Of the floor, which multiplies what every implementation has to: full rows in two layers,
    real inputs, both directions, and outputs alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from limit import operations
    from peers import floor
    from workloads import Workload, make_work

    counted = 0

    def product(a, b, out):
        nonlocal counted
        counted += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    monkeypatch.setattr(floor.np, "matmul", product)
    for workload in (
        Workload(hidden=(8, 5), batch=4, time=6, vocabulary=50, features=7),
        Workload(hidden=(8,), batch=4, time=6, vocabulary=0, features=7, cell="gru"),
        Workload(hidden=(8, 3), batch=4, time=6, vocabulary=9, features=7, bidirectional=True),
        Workload(hidden=(8,), batch=4, time=6, vocabulary=9, features=7, train=False),
    ):
        work, counted = make_work(workload, seed=0), 0
        floor.make(work, "numpy")(0)
        assert operations(work) == counted, workload


@pytest.mark.usefixtures("quick_compile")
def test_resets_and_layer_normalisation_have_a_reference(monkeypatch):
    """The first loss of ours, and of Flax's scan, is NumPy's."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peers import linen, ours
    from workloads import Workload, make_work, reference_loss

    small = {"hidden": (8,), "batch": 4, "time": 6, "features": 8}
    for workload in (
        Workload(cell="layernorm_lstm", vocabulary=50, **small),
        Workload(cell="gru", vocabulary=0, outputs=1, resets=0.3, **small),
    ):
        work = make_work(workload, seed=0)
        expected = reference_loss(work)
        for step in (ours.make(work, "auto"), linen.make(work)):
            assert math.isclose(step(0), expected, rel_tol=1e-4), workload


@pytest.fixture
def gpu(monkeypatch):
    """The GPU's benchmark, of one cell in two cases and formats, and what it says of `fused`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "CELLS", {"lstm": gpu.CELLS["lstm"]})
    monkeypatch.setattr(gpu, "CASES", {"resets": gpu.CASES["resets"]})
    monkeypatch.setattr(gpu, "BACKEND_NAMES", ("cudnn", "fused"))
    makers = {name: gpu.MAKERS[name] for name in ("ours-cudnn", "ours-fused", "flax", "torch")}
    monkeypatch.setattr(gpu, "MAKERS", makers)
    exact = gpu.NUMBERS["float32"]._replace(cases=("resets",))
    monkeypatch.setattr(gpu, "NUMBERS", {"float32": exact, "bfloat16": gpu.NUMBERS["bfloat16"]})
    monkeypatch.setitem(sys.modules, "torch", None)  # is missing
    return gpu


@pytest.mark.usefixtures("quick_compile")
def test_the_benchmark_of_a_gpu_on_a_cpu(gpu, monkeypatch, capsys, tmp_path):
    """It compares, times, reports who is not here, and is silent about nothing."""
    command = f"gpu.py --sizes 2x3x4 --parity 4x5x4 --repeats 2 --json {tmp_path / 'f.json'}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert gpu.main() == 0
    figures, text = json.loads((tmp_path / "f.json").read_text()), capsys.readouterr().out
    statuses = {(r["backend"], r["numbers"]): r["status"] for r in figures["parity"]}
    assert statuses == {
        ("cudnn", "float32"): "unsupported",
        ("cudnn", "bfloat16"): "unsupported",
        ("fused", "float32"): "ok",
        ("fused", "bfloat16"): "ok",
    }
    near, far = (r["distance"] for r in figures["parity"] if r["status"] == "ok")
    assert near < 1e-6 < 1e-3 < far  # bfloat16 is told from float32
    timed = {(r["implementation"], r["numbers"]): r for r in figures["times"]}
    assert timed.keys() == set(itertools.product(gpu.MAKERS, gpu.NUMBERS))
    assert timed["torch", "float32"]["status"] == "missing"
    for who in ("ours-fused", "flax"):
        assert timed[who, "bfloat16"]["forward_ms"] > 0 < timed[who, "bfloat16"]["both_ms"]
        assert f"| B2 T3 H4 | lstm | bfloat16 | {who} |" in text
    assert "- torch: missing" in text and "- ours-cudnn: unsupported" in text


@pytest.mark.usefixtures("quick_compile")
def test_the_benchmark_of_a_gpu_says_who_is_wrong(gpu, monkeypatch):
    fused = gpu.BACKENDS["fused"]
    run = fused.run

    def wrong(*arguments, **options):
        state, y_BTH = run(*arguments, **options)
        return state, y_BTH * 1.001

    monkeypatch.setattr(fused, "run", wrong)
    rows = [r for r in gpu.parity(gpu.Shape(4, 5, 4)) if r["backend"] == "fused"]
    # A thousandth is within what bfloat16 can tell apart.
    assert {r["numbers"]: r["status"] for r in rows} == {"float32": "wrong", "bfloat16": "ok"}
    assert "WRONG: resets" in gpu.parity_table(rows)


def test_weak_scaling_over_three_devices():
    """On one and two of them: each size is a power of two, and the batch grows with it."""
    run = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--rounds", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": compiling.flags(3)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [
        line.strip("| ").split(" | ")
        for line in run.stdout.splitlines()
        if line[:3] in ("| 1", "| 2", "| 3")
    ]
    assert [row[:2] for row in rows] == [["1", "64"], ["2", "128"]]
    assert rows[0][-1] == "100%" and all(float(row[2]) > 0 for row in rows)


THEIRS = """
import jax
import jax.numpy as jnp
from flax import linen as nn
from wrappers import LogWrapper


class ScannedRNN(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return nn.GRUCell()(carry, x[0][0])

    @staticmethod
    def initialize_carry(batch, hidden):
        return nn.GRUCell.initialize_carry(jax.random.key(0), (batch,), hidden)


class Net(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return ScannedRNN()(carry, x)


def make_train(config):
    print("layer of", ScannedRNN.__module__)

    def train(rng):
        carry = ScannedRNN.initialize_carry(config["NUM_ENVS"], 3)
        x = jnp.ones((1, *carry.shape)), jnp.zeros((1, len(carry)))
        end, _ = Net().init_with_output(rng, carry, x)[0]
        returns = jnp.arange(20.0).reshape(20, 1, 1) + 0 * end[0, 0]
        ended = returns != 18
        return {"metric": {"returned_episode_returns": returns, "returned_episode": ended}}

    return train
"""


def test_purejaxrl_is_trained_with_both_layers(tmp_path, monkeypatch, capsys):
    """A file in the form of theirs; the return is that of episodes that end in the last tenth."""
    (tmp_path / "ppo_rnn.py").write_text(THEIRS)
    for name in ("gymnax", "gymnax.wrappers", "gymnax.wrappers.purerl", "wrappers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    purerl = sys.modules["gymnax.wrappers.purerl"]
    sys.modules["gymnax"].wrappers = sys.modules["gymnax.wrappers"]
    sys.modules["gymnax.wrappers"].purerl, purerl.LogWrapper = purerl, object
    monkeypatch.setattr(sys, "argv", ["purejaxrl.py", str(tmp_path / "ppo_rnn.py"), "--seeds", "2"])
    runpy.run_path(str(ROOT / "benchmarks" / "purejaxrl.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[1:]
    figures = "return 19.00 +- 0.00 (19.00, 19.00)"
    for at, layer, name in ((0, "ppo_rnn", "its own"), (2, "flax_lstm.nn.layers", "flax_lstm")):
        assert rows[at] == f"layer of {layer}"
        assert rows[at + 1].startswith(f"{name}") and figures in rows[at + 1]


def test_generated_tokens_are_taken_for_prepared_ones(tmp_path):
    """In whole: every byte is compared with its hash, and documents are told by their ends."""
    generate = runpy.run_path(str(ROOT / "benchmarks" / "prepared.py"))["generate"]
    generate(tmp_path / "tokens", 2_600)
    found = Prepared.open(tmp_path / "tokens")
    found.verify()
    ends = found.stream("train").ends()
    assert len(ends) == found.parts["train"][0].documents == 11
    lengths = np.fromfile(rows_file(tmp_path / "tokens" / found.parts["train"][0].name), "<i4")
    assert lengths.tolist() == np.diff(ends, prepend=1).tolist() == [250] * 10 + [100]


def test_each_change_of_the_ablation_is_one_to_the_shipped_config():
    changes = runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))["CHANGES"]
    shipped = load_config("etth1")
    changed = [override(shipped, flags) for name, flags in changes.items() if flags]
    assert len(changed) == len(changes) - 1 > 5
    assert all(config != shipped for config in changed)


def test_the_curve_of_pretraining_is_that_of_the_document():
    made = runpy.run_path(str(ROOT / "benchmarks" / "pretraining.py"))
    text = (ROOT / "docs" / "results.md").read_text()
    row = r"^\| (\d+) \|[ \d,]*\|[ .\d]*\| \.\d{4} \| \**(\.\d{4})\** \|$"
    told = re.findall(row, text, re.MULTILINE)
    found = made["curve"](ROOT / "results")
    assert {n: f"{x:.4f}"[1:] for n, x in found.items()} == {int(n): x for n, x in told}
    assert len(found) == 5 and made["linear"](ROOT / "results") < min(found.values())


def test_tables_of_other_packages_are_read_with_flags_that_exist(tmp_path, monkeypatch):
    module = runpy.run_path(str(ROOT / "benchmarks" / "held_back.py"))
    for kind in module["KINDS"].values():
        config = "panel_table" if kind.series else "series_table"
        assert override(load_config(config), kind.flags.split()) is not None  # or it exits
    kind = module["KINDS"]["sales per week, 7"]._replace(package="ships_tables")
    folder = tmp_path / "ships_tables" / "datasets"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / kind.file).write_text("id,Date,Weekly_Sales\n1_1,2010-02-05,7\n1_3,2010-02-12,8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    frame = module["table"](kind)
    assert frame["unique_id"].tolist() == ["1_1", "1_3"] and frame["y"].tolist() == [7, 8]
    assert str(frame["ds"][1]) == "2010-02-12 00:00:00"
    with pytest.raises(SystemExit, match="pip install --no-deps none_such"):
        module["table"](kind._replace(package="none_such"))


def test_forecasters_of_other_look_backs_are_averaged(tmp_path, monkeypatch, capsys):
    made = runpy.run_path(str(ROOT / "benchmarks" / "lookbacks.py"))
    config = small_runs.series_run(tmp_path, steps=1)
    for name, changes in {"a": {}, "b": {"lookback": 5}, "c": {"horizon": 2}}.items():
        data = dataclasses.replace(config.data, **changes)
        fit(dataclasses.replace(config, data=data), tmp_path / name, plots=False, test=False)
    found = [made["read"](load(tmp_path / name), "validation") for name in "ab"]
    (one, batch), (other, _) = found
    middle = config.task.quantiles.index(0.5)
    error = ((one + other)[..., middle] / 2 - batch.targets).ravel()
    command = ["lookbacks.py", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "b")])
    made["main"]()
    told = dict(pair.split() for pair in capsys.readouterr().out.split("together: ")[1].split(", "))
    assert float(told["mae"]) == pytest.approx(np.abs(error).mean(), abs=1e-4)
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "c")])
    with pytest.raises(SystemExit, match="c has other windows than"):
        made["main"]()
