# SPDX-License-Identifier: Apache-2.0
"""Several processes are one run: found by their launcher, equal to one process, stopped and resumed
together."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import compiling
import jax
import pytest
import small_runs

from flax_lstm import MeshConfig, UserError, fit
from flax_lstm.machine import distributed
from flax_lstm.machine.distributed import (
    await_all,
    await_coordinator,
    bind_address,
    check_port,
    find_launch,
    first_host,
    first_then_all,
    init_distributed,
    run_locally,
    start_all,
)

ROOT = Path(__file__).parent.parent

# --- who we are, by the variables that each launcher sets

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[003-004,7],login",
    "SLURM_NTASKS": "99",  # of the job; the step has its own
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}
CASES = {
    "SLURM, a process a node": (SLURM, ("SLURM", "gpu003:62016", 2, 1, None)),
    "SLURM, a process a GPU": (
        {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"},
        ("SLURM", "gpu003:62016", 8, 6, 2),
    ),
    "SLURM, a process a GPU, each bound to its own": (
        {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "2"},
        ("SLURM", "gpu003:62016", 8, 1, None),
    ),
    "Open MPI 4": (OPEN_MPI, ("Open MPI", "10.96.0.1:62624", 8, 5, 1)),
    "Open MPI 4, version 6 addresses": (
        {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370"},
        ("Open MPI", "[fe80::b9b]:62880", 8, 5, 1),
    ),
    "Open MPI 5 on one machine": (
        {
            **OPEN_MPI,
            "OMPI_MCA_orte_hnp_uri": "",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
            "PMIX_NAMESPACE": "prterun-a-1@1",
        },
        ("Open MPI", "127.0.0.1:63321", 8, 5, 1),
    ),
    "Kubernetes JobSet": (
        {
            "JAX_COORDINATOR_ADDRESS": "train-workers-0-0.train:1234",
            "JAX_NUM_PROCESSES": "4",
            "JOB_COMPLETION_INDEX": "3",
        },
        ("Kubernetes JobSet", "train-workers-0-0.train:1234", 4, 3, None),
    ),
    "Kubeflow TrainJob": (
        {
            "JAX_COORDINATOR_ADDRESS": "job-node-0-0.job",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        },
        ("Kubeflow TrainJob or JAX_PROCESS_ID", "job-node-0-0.job:8476", 2, 0, None),
    ),
    "SkyPilot": (
        {
            "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n",
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NUM_NODES": "2",
        },
        ("SkyPilot", "10.0.0.4:8476", 2, 1, None),
    ),
    "TPU pod": (TPU, ("TPU pod", "t0:8476", 4, 2, None)),
    "several TPU slices": (
        {
            **TPU,
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": "1",
            "MEGASCALE_COORDINATOR_ADDRESS": "s0-t0.svc:8080",
        },
        ("TPU pod", "s0-t0.svc:8476", 8, 6, None),
    ),
    "one TPU machine": ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    "a shell within a SLURM job": (
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        None,
    ),
    "srun of one task": ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    "nothing": ({"HOME": "/root"}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_launchers_are_recognised(name):
    environment, expected = CASES[name]
    assert find_launch(environment) == expected


def test_flags_count_more_than_the_environment():
    assert find_launch({}, "here:1", 2, 1) == ("flags", "here:1", 2, 1, None)
    assert find_launch(SLURM, "here:1") == ("SLURM", "here:1", 2, 1, None)
    assert find_launch({}, "[::1]", 2, 0).coordinator == "[::1]:8476"


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, ("here:1", None, None), "not given: --num-processes, --process-id"),
        ({}, (None, 2, 0), "not given: --coordinator"),
        ({}, ("here:1", 2, 2), "process 2 of 2: processes count from 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, (), "JOB_COMPLETION_INDEX"),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""},
            (),
            "Open MPI does not say where process 0 is.*--coordinator",
        ),
    ],
)
def test_what_is_missing_is_said(environment, flags, message):
    with pytest.raises(UserError, match=message):
        find_launch(environment, *flags)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "two"}, "SLURM_"),
        ({**SLURM, "SLURM_JOB_ID": ""}, "SLURM_"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": ""}, "OMPI_"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "0"}, "SLURM_"),
        ({**TPU, "TPU_WORKER_ID": "x"}, "TPU_"),
        ({"SKYPILOT_NODE_IPS": "", "SKYPILOT_NODE_RANK": "0"}, "SKYPILOT_"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "?", "JAX_PROCESS_ID": "0"},
            "JAX_",
        ),
    ],
)
def test_variables_that_make_no_sense_are_named(environment, said):
    with pytest.raises(UserError, match=rf"variables {said}.* make no sense"):
        find_launch(environment)


@pytest.mark.parametrize("port", ["99999", "0", "999999999"])
def test_a_port_is_a_port(port):
    with pytest.raises(UserError, match=f"here:{port}: a port is a number from 1 to 65535"):
        find_launch({}, f"here:{port}", 2, 0)


def test_numbers_of_processes_and_seconds_have_bounds():
    for processes in (0, -1, 10**23):
        with pytest.raises(UserError, match=f"{processes} processes: there must be at least one"):
            find_launch({}, "here:1", processes, 0)
    for host in ("a" * 64, "\ud800", ".."):
        with pytest.raises(UserError, match="not the name of a machine") as told:
            find_launch({}, f"{host}:1", 2, 0)
        assert len(str(told.value)) < 200
    with pytest.raises(UserError, match=r"--local-processes 100000: must be from 1 to \d+ here"):
        run_locally(100000, [])
    for seconds in (float("nan"), float("inf"), -1.0, 0.0):
        with pytest.raises(UserError, match="--connect-seconds"):
            init_distributed(connect_seconds=seconds)


def test_process_0_listens_where_the_coordinator_is_named_and_nowhere_else():
    assert bind_address("127.0.0.1:8476") == "127.0.0.1:8476"
    assert bind_address("localhost:1").split(":")[-1] == "1" and "::]" not in bind_address(
        "localhost:1"
    ).replace("::1]", "")
    assert bind_address("192.0.2.1:8476") == "[::]:8476"  # of no machine: translated on its way
    assert bind_address("no-such-host.invalid:8476") == "[::]:8476"


def test_local_processes_meet_where_no_other_user_comes(monkeypatch):
    """At a socket in a folder that is its user's alone, and gone afterwards."""
    seen = []

    def started(command, processes, stopped):
        address = command[command.index("--coordinator") + 1]
        folder = Path(address.removeprefix("unix:")).parent
        seen.append((address, processes, folder, stat.S_IMODE(folder.stat().st_mode)))
        return []

    monkeypatch.setattr(distributed, "start_all", started)
    monkeypatch.setattr(distributed, "await_all", lambda children, stopped: 7)
    assert run_locally(2, ["--config", "quickstart"]) == 7
    ((address, processes, folder, mode),) = seen
    assert address.startswith("unix:/") and len(address) < 100
    assert processes == 2 and mode == 0o700 and not folder.exists()
    assert find_launch({}, address, 2, 1).coordinator == bind_address(address) == address


def test_the_process_that_was_killed_is_named_and_not_one_that_it_brought_down(capfd):
    """Also where both have ended before anybody looks."""
    ends = ("exit 1", "kill -9 $$", "sleep 60")
    children = [subprocess.Popen(["sh", "-c", end]) for end in ends]
    for child in children[:2]:
        child.wait()
    assert await_all(children, threading.Event()) == 1
    assert "process 1 was ended by signal 9" in capfd.readouterr().err
    assert children[2].returncode == -signal.SIGKILL


@pytest.fixture
def handlers():
    """Whatever a test does to them, signals are handled as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_before_the_processes_can_save_is_as_good_as_saved(handlers, capfd):
    """The first is ended by it; nobody is left behind, and the command may be given again."""
    stopped = threading.Event()
    children = start_all(["sh", "-c", "exec sleep 60"], 2, stopped)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await_all(children, stopped) == 75
    assert "The same command begins again" in capfd.readouterr().err
    assert [child.returncode for child in children] == [-signal.SIGTERM, -signal.SIGKILL]


def test_sigterm_before_anything_is_read_is_as_good_as_saved():
    program = (
        "import os; from flax_lstm.commands import train; "
        "train.parse_with_config = lambda *_: os.kill(os.getpid(), 15); train.main([])"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 75


def test_an_error_that_another_process_caused_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", lambda code: None)
    lost = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"
    for told, short in ((lost, True), ("RESOURCE_EXHAUSTED: out of memory", False)):
        distributed.leave(jax.errors.JaxRuntimeError(f"{told}\nframes"))
        said = capsys.readouterr().err
        assert told in said and ("frames" not in said) == short
        assert "The same command goes on from the last checkpoint" in said
    error = TimeoutError("Timed out at a barrier")  # as Orbax raises it
    error.__cause__ = jax.errors.JaxRuntimeError("ABORTED: CoordinationServiceError")
    distributed.leave(error)
    said = capsys.readouterr().err
    assert "Timed out at a barrier" in said and "Traceback" not in said
    assert "The same command goes on from the last checkpoint" in said


def test_a_socket_that_is_not_there_or_comes_late(tmp_path):
    address = f"unix:{tmp_path}/0"
    with pytest.raises(UserError, match="process 1 cannot reach the coordinator"):
        await_coordinator(address, 0.3, "process 1")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "0"))
        late = threading.Timer(0.5, server.listen)
        late.start()
        await_coordinator(address, 30, "process 1")
        late.join()


def test_first_host_of_a_list():
    lists = [
        "node001",
        "node001,host2",
        "node[001-0015],host2",
        "node[001,007-015],host2",
        "a-b[1]",
    ]
    assert [first_host(nodes) for nodes in lists] == [
        "node001",
        "node001",
        "node001",
        "node001",
        "a-b1",
    ]


def test_a_coordinator_that_is_not_there_or_comes_late():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        UserError, match=rf"process 1 cannot reach the coordinator.*{port}, within 0 s .*refused"
    ):
        await_coordinator(f"127.0.0.1:{port}", 0.3, "process 1")
    held = []
    late = threading.Timer(0.5, lambda: held.append(socket.create_server(("127.0.0.1", port))))
    late.start()
    await_coordinator(f"127.0.0.1:{port}", 30, "process 1")
    with pytest.raises(UserError, match=f"process 0 cannot listen at here:{port}.*another port"):
        check_port(f"here:{port}", "process 0")
    held[0].close()


def test_alone_there_is_nothing_to_agree_on():
    assert first_then_all(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        first_then_all(lambda: 1 // 0)


# --- real processes on this machine

CONFIG = f"""
import hashlib, os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import jax
import small_runs
from flax_lstm import MeshConfig
from flax_lstm.training import loop
from dataclasses import replace
from functools import partial
from flax_lstm.machine.sharding import put_batch as put

taken = 0
last, me = int(os.environ.get("KILL_AT", "-1")), int(os.environ.get("KILL_PROCESS", "-1"))

def put_batch(batch, mesh):
    global taken
    taken += 1
    with open(f"order.{{jax.process_index()}}", "a") as file:
        file.write(hashlib.sha256(batch.inputs.tobytes()).hexdigest() + "\\n")
    if taken == last and jax.process_index() == me:
        Path("killed").touch()
        number = int(os.environ["KILL_BY"])
        if number == 0:
            raise RuntimeError("something unforeseen")
        os.kill(os.getpid(), number)
    return put(batch, mesh)

loop.Surroundings = partial(loop.Surroundings, put_batch=put_batch)

def get_config():
    make, tables = getattr(small_runs, os.environ["RUN"] + "_run"), Path(os.environ["TABLES"])
    config = make() if make is small_runs.adding_run else make(tables)
    return replace(config, mesh=MeshConfig())
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for kind in ("text", "series", "language"):
        getattr(small_runs, f"{kind}_run")(folder)
    (folder / "own.py").write_text(CONFIG)
    return folder


def environment(kind, tables, devices=1, **more):
    own = {
        "RUN": kind,
        "TABLES": tables,
        "XLA_FLAGS": compiling.flags(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": 1,
        **more,
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def train(folder, tables, kind="text", processes=2, devices=1, arguments=(), **more):
    """A run in some processes, started by one command, in the folder."""
    command = [
        sys.executable,
        ROOT / "train.py",
        "--config",
        tables / "own.py",
        "--workdir",
        "run",
        *arguments,
    ]
    if processes > 1:
        command += ["--local-processes", str(processes)]
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(kind, tables, devices, **more),
        capture_output=True,
        text=True,
        timeout=900,
    )


def assert_alike(one, other):
    """The same rows of the log to rounding, and the same result."""
    a, b = (small_runs.timeless(small_runs.rows(folder / "run")) for folder in (one, other))
    assert [row.pop("split") for row in a] == [row.pop("split") for row in b]
    for row, like in zip(a, b, strict=True):
        assert row == pytest.approx(like, rel=1e-4, abs=1e-5)
    results = [json.loads((folder / "run" / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["best_step"] == results[1]["best_step"]
    assert results[0]["test"] == pytest.approx(results[1]["test"], rel=1e-4, abs=1e-5)
    return results


def seconds_since_the_kill(folder):
    return time.time() - (folder / "killed").stat().st_mtime


def orders(folder):
    return [path.read_text() for path in sorted(folder.glob("order.*"))]


def test_two_processes_are_one_run(tables, tmp_path, quick_compile):
    """The evaluation splits do not divide by the batch: the last batches are ragged."""
    outcome = train(tmp_path / "two", tables, "adding")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.count("2 processes (flags") == outcome.stderr.count("examples, ") == 1
    fit(replace(small_runs.adding_run(), mesh=MeshConfig(data=2)), tmp_path / "one" / "run")
    assert_alike(tmp_path / "two", tmp_path / "one")
    first, second = orders(tmp_path / "two")
    assert first == second and len(set(first.split())) == 10
    assert not list(tmp_path.glob("two/run/.*")) and not list(tmp_path.glob("two/run/*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["text", "series", "language", "imdb"])
def test_processes_and_devices_make_no_difference(kind, processes, devices, tables, tmp_path):
    if kind == "imdb":
        small_runs.real_reviews()
    mesh = ("--mesh.fsdp", "2") if devices == 2 else ()
    outcome = train(tmp_path / "many", tables, kind, processes, devices, mesh)
    assert outcome.returncode == 0, outcome.stderr
    outcome = train(tmp_path / "one", tables, kind, 1, 1)
    assert outcome.returncode == 0, outcome.stderr
    assert_alike(tmp_path / "many", tmp_path / "one")
    assert set(orders(tmp_path / "many")) == set(orders(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "language", "imdb"])
def test_stopped_together_and_resumed_by_any_number(kind, tables, tmp_path):
    """SIGTERM to process 1 in its 4th step. Bit-equal where the processes are as many as before."""
    if kind == "imdb":
        small_runs.real_reviews()
    whole = tmp_path / "whole"
    assert train(whole, tables, kind).returncode == 0
    for processes in (2, 1, 4):
        parts = tmp_path / f"parts{processes}"
        outcome = train(parts, tables, kind, KILL_AT=4, KILL_PROCESS=1, KILL_BY=int(signal.SIGTERM))
        assert outcome.returncode == 75, outcome.stderr
        assert seconds_since_the_kill(parts) < 30
        assert outcome.stderr.count("everything is saved. The same command goes on") == 1
        saved = max(int(path.name) for path in (parts / "run" / "checkpoints").iterdir())
        assert 4 <= saved <= 6
        taken = orders(parts)
        assert [len(lines.split()) for lines in taken] == [saved, saved]
        for path in parts.glob("order.*"):
            path.unlink()
        outcome = train(parts, tables, kind, processes)
        assert outcome.returncode == 0, outcome.stderr
        results = assert_alike(parts, whole)
        if processes == 2:
            assert results[0]["params_sha256"] == results[1]["params_sha256"]
        assert taken[0] + orders(parts)[0] == orders(whole)[0]


@pytest.mark.slow
def test_the_others_end_when_one_is_killed_and_the_run_goes_on(tables, tmp_path):
    assert train(tmp_path / "whole", tables).returncode == 0
    for victim in (0, 1):
        parts = tmp_path / f"killed{victim}"
        outcome = train(parts, tables, KILL_AT=8, KILL_PROCESS=victim, KILL_BY=int(signal.SIGKILL))
        assert outcome.returncode == 1 and seconds_since_the_kill(parts) < 60
        assert "The same command goes on from the last checkpoint" in outcome.stderr
        assert train(parts, tables).returncode == 0
        results = assert_alike(parts, tmp_path / "whole")
        assert results[0]["params_sha256"] == results[1]["params_sha256"]


@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(tables, tmp_path):
    """It is killed, so that it can tell nobody; they notice, save and end."""
    command = [sys.executable, ROOT / "train.py", "--config", tables / "own.py", "--workdir"]
    command += [tmp_path / "run", "--local-processes", "2", "--train.steps", "100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment("adding", tables), stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "run").glob("checkpoints/[1-9]*")) and process.poll() is None:
        time.sleep(0.2)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    children = [int(line) for line in found.stdout.split()]
    assert len(children) == 2
    process.kill()
    process.wait()
    deadline = time.time() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.time() < deadline, "orphans train on"
        time.sleep(0.2)


@pytest.mark.slow
def test_an_error_in_one_ends_all_with_its_message_first(tables, tmp_path):
    outcome = train(tmp_path, tables, KILL_AT=3, KILL_PROCESS=1, KILL_BY=0)
    assert outcome.returncode == 1 and seconds_since_the_kill(tmp_path) < 60
    assert "RuntimeError: something unforeseen" in outcome.stderr
    others = outcome.stderr.find("ends; if the lines above")
    assert others == -1 or outcome.stderr.index("something unforeseen") < others


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_all_with_status_2(tables, tmp_path):
    outcome = train(tmp_path, tables, arguments=("--data.path", "nowhere.csv"))
    assert outcome.returncode == 2
    assert outcome.stderr.count("nowhere.csv") == 1 and "Traceback" not in outcome.stderr
    assert "process 1 ends, for process 0 failed" in outcome.stderr


@pytest.mark.slow
def test_a_process_that_nobody_joins_gives_up(tables, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = (
        "--coordinator",
        address,
        "--num-processes",
        "2",
        "--connect-seconds",
        "2",
        "--process-id",
    )
    for index, message in (("0", "not all processes met"), ("1", "cannot reach the coordinator")):
        outcome = train(tmp_path, tables, processes=1, arguments=(*flags, index))
        assert (
            outcome.returncode == 2
            and message in outcome.stderr
            and "Traceback" not in outcome.stderr
        )


@pytest.mark.slow
def test_twenty_runs_without_a_deadlock(tables, tmp_path):
    for repeat in range(20):
        outcome = train(
            tmp_path / str(repeat), tables, "series", devices=4, arguments=("--mesh.model", "2")
        )
        assert outcome.returncode == 0, outcome.stderr
