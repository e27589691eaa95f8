# SPDX-License-Identifier: Apache-2.0
"""The launch recipes: each is read or run as it is, with the variables of its launcher, in two
processes here."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import compiling
import pytest
import yaml

from flax_lstm.config import load_config
from flax_lstm.machine.distributed import find_launch

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SMALL = """
    --config adding_problem --workdir run --data.length 8 --data.examples 40
    --data.validation-examples 10 --data.test-examples 10 --model.hidden-size 4
    --train.steps 4 --train.batch-size 8 --train.eval-every 4
"""
SHORT = shlex.split(SMALL)

# Stands for srun and mpirun: starts the command twice, each with the variables that the launcher
# sets for it.
LAUNCHER = """#!{python}
import json, os, subprocess, sys
command = sys.argv[sys.argv.index("python"):]
variables = json.loads(os.environ["VARIABLES"])
children = [subprocess.Popen(command, env={{**os.environ, **mine}}) for mine in variables]
sys.exit(max(child.wait() for child in children))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pod(name):
    """The container of a Kubernetes recipe: command line and variables."""
    document = yaml.safe_load((LAUNCH / name).read_text())
    if document["kind"] == "TrainJob":
        trainer = document["spec"]["trainer"]
        return document, trainer["command"] + trainer["args"], {}
    (job,) = document["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return (
        document,
        container["command"] + container["args"],
        {v["name"]: v["value"] for v in container["env"]},
    )


def test_kubernetes_recipes():
    jobset, command, variables = pod("jobset.yaml")
    assert jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["completionMode"] == "Indexed" and pods["backoffLimit"] == 0
    assert pods["completions"] == pods["parallelism"] == int(variables["JAX_NUM_PROCESSES"])
    launch = find_launch({**variables, "JOB_COMPLETION_INDEX": "1"})
    name = jobset["metadata"]["name"]
    assert launch.coordinator == f"{name}-{job['name']}-0-0.{name}:8476" and launch.process == 1
    (container,) = pods["template"]["spec"]["containers"]
    assert container["ports"] == [{"containerPort": 8476}]
    trainjob, other, _ = pod("trainjob.yaml")
    assert (
        trainjob["kind"] == "TrainJob"
        and trainjob["spec"]["runtimeRef"]["name"] == "jax-distributed"
    )
    for line in (command, other):
        assert line[:2] == ["python", "train.py"] and load_config(line[line.index("--config") + 1])


def test_other_recipes_can_be_read():
    for path in (*LAUNCH.glob("*.sbatch"), *LAUNCH.glob("*.sh")):
        subprocess.run(["bash", "-n", path], check=True)
        assert "python train.py" in path.read_text() or "python3 train.py" in path.read_text()
    options = [
        dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", path.read_text()))
        for path in LAUNCH.glob("*.sbatch")
    ]
    assert sorted(o["ntasks-per-node"] for o in options) == ["1", "8"]
    assert all(o["gpus-per-node"] == "8" and o["signal"].startswith("TERM@") for o in options)
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert sky["num_nodes"] == 2 and load_config(shlex.split(sky["run"])[3])
    compile((LAUNCH / "ray_train.py").read_text(), "ray_train.py", "exec")


def test_the_image_has_what_it_copies_and_installs():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert {*re.findall(r"EXTRA=(\w+)", text)} <= extras.keys()
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    built_from = {"README.md", "hatch_build.py", "flax_lstm", "configs", "pyproject.toml"}
    assert built_from <= {*copied}


def variables_of(launcher, rank):
    """What each launcher sets for a process of two on this machine, and which port they meet at."""
    if launcher == "slurm":
        job = os.getpid()
        return {
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NAME": "name",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
    if launcher == "open_mpi":
        return {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "PMIX_NAMESPACE": f"prterun-here-{os.getpid()}@1",
        }
    if launcher == "skypilot":
        return {
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        }
    return {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(rank)}


def both(commands, folder):
    """Two processes, each a command with variables of its own; they must end well, as one run of
    four steps."""
    children = [
        subprocess.Popen(
            command, cwd=folder, env={**os.environ, **mine}, stderr=subprocess.PIPE, text=True
        )
        for command, mine in commands
    ]
    said = [child.communicate(timeout=900)[1] for child in children]
    assert [child.returncode for child in children] == [0] * len(children), said
    assert_trained(folder, "".join(said))


def assert_trained(folder, said):
    assert said.count("2 processes (") == 1, said
    assert json.loads((folder / "run" / "result.json").read_text())["steps"] == 4


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """`python` that is ours, and stand-ins for what only a cluster has, first in the path."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("XLA_FLAGS", compiling.flags(1))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "python": f'#!/bin/sh\nshift\nexec {sys.executable} {ROOT}/train.py "$@"\n',
        "srun": LAUNCHER.format(python=sys.executable),
        "mpirun": LAUNCHER.format(python=sys.executable),
        "hostname": "#!/bin/sh\necho 127.0.0.1\n",
        "scontrol": '#!/bin/sh\necho "$@" > scontrol\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def run_script(script, launcher, folder, monkeypatch, *arguments):
    monkeypatch.setenv("VARIABLES", json.dumps([variables_of(launcher, rank) for rank in range(2)]))
    for name, value in variables_of(launcher, 0).items():
        if name in ("SLURM_JOB_ID", "SLURM_JOB_NAME"):
            monkeypatch.setenv(name, value)
    command = ["bash", LAUNCH / script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    "script", ["slurm_node.sbatch", pytest.param("slurm_gpu.sbatch", marks=pytest.mark.slow)]
)
def test_slurm(script, tools, tmp_path, monkeypatch):
    outcome = run_script(script, "slurm", tmp_path, monkeypatch, *SHORT)
    assert outcome.returncode == 0, outcome.stderr
    assert "SLURM, coordinator localhost:" in outcome.stderr
    assert_trained(tmp_path, outcome.stderr)


def test_slurm_puts_a_stopped_run_in_the_queue_again(tools, tmp_path, monkeypatch):
    (tools / "python").write_text("#!/bin/sh\nexit 75\n")
    outcome = run_script("slurm_node.sbatch", "slurm", tmp_path, monkeypatch, *SHORT)
    assert outcome.returncode == 75
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", str(os.getpid())]


@pytest.mark.slow
def test_open_mpi(tools, tmp_path, monkeypatch):
    outcome = run_script("open_mpi.sh", "open_mpi", tmp_path, monkeypatch, "2", "hosts", *SHORT)
    assert outcome.returncode == 0, outcome.stderr
    assert "Open MPI, coordinator 127.0.0.1:8476" in outcome.stderr
    assert_trained(tmp_path, outcome.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_kubernetes(name, tools, tmp_path):
    _, command, variables = pod(name)
    index = "JOB_COMPLETION_INDEX" if name == "jobset.yaml" else "JAX_PROCESS_ID"
    here = {
        "JAX_NUM_PROCESSES": "2",
        **variables,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    both([([*command, *SHORT], {**here, index: str(rank)}) for rank in range(2)], tmp_path)


@pytest.mark.slow
def test_skypilot(tools, tmp_path):
    command = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    line = ["bash", "-c", f"{command} {shlex.join(SHORT)}"]
    both([(line, variables_of("skypilot", rank)) for rank in range(2)], tmp_path)


@pytest.mark.slow
def test_tpu_pod(tools, tmp_path):
    both(
        [(["python", "train.py", *SHORT], variables_of("tpu", rank)) for rank in range(2)], tmp_path
    )


@pytest.mark.slow
def test_ray(tools, tmp_path):
    """Ray joins the workers before it calls `work`; so does this."""
    program = f"""
import sys, jax
sys.path.insert(0, {str(LAUNCH)!r})
jax.distributed.initialize("127.0.0.1:{free_port()}", 2, int(sys.argv[1]))
import ray_train
ray_train.work({{"arguments": {SHORT!r}}})
"""
    both(
        [
            ([sys.executable, "-c", program, str(rank)], {"JAX_PLATFORMS": "cpu"})
            for rank in range(2)
        ],
        tmp_path,
    )
