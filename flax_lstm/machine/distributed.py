# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: who they are, how they meet, and how they act together.

JAX's own distributed runtime does the work (`jax.distributed`); here is what tells it from the
launcher's environment. Every process runs the same program on the same data; process 0 alone logs
and writes files, checkpoints excepted, to which each adds its part. The work directory must lie on
a file system that all of them share.
"""

import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_lstm.errors import UserError, require

T = TypeVar("T")
Environment = Mapping[str, str]

CONNECT_SECONDS = 300  # for all processes to start and find each other
HEARTBEAT_SECONDS = 30  # after which a silent process counts as lost, and the others end
SHUTDOWN_SECONDS = 30  # that a process waits for the others at its end
LOCAL = "unix:"  # begins the address of a socket of this machine, a path in the place of host:port
MOST = 1_000_000  # processes
LOST = ("Gloo", "onnection", "eartbeat", "oordination")  # in errors that another's end has caused
SAVED = 75  # the exit status of what SIGTERM has ended, with nothing lost
PORT = 8476  # of the coordinator, where neither launcher nor user names one


class Launch(NamedTuple):
    """What a launcher says: how many processes there are, which this is, and where process 0
    listens."""

    launcher: str
    coordinator: str  # host:port, or unix:path
    processes: int
    process: int
    device: int | None = None  # the one of this machine's devices that is this process's; None: all


def job_port(job: int) -> int:
    """A port in the upper ephemeral range, different for most pairs of jobs on a machine (JAX's own
    rule)."""
    return 61440 + job % 4096


def first_host(nodes: str) -> str:
    """The first name in a SLURM list such as `node[001-004,7],login`."""
    return re.sub(r"^([^,\[]*)(?:\[(\w+))?.*$", r"\1\2", nodes)


def one_device(local_rank: str, local_size: int, env: Environment) -> int | None:
    """Which device is a process's own where several share a machine, unless the launcher shows it
    just one."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    return int(local_rank) if local_size > 1 and (not visible or "," in visible) else None


def by_variables_of_jax(env: Environment) -> Launch | None:
    """JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES with JAX_PROCESS_ID (Kubeflow TrainJob) or the
    completion index of an indexed Kubernetes job (JobSet)."""
    if not env.keys() >= {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"}:
        return None
    index = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", ""))
    require(
        index.isdigit(),
        "JAX_COORDINATOR_ADDRESS is set, but neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX is",
    )
    launcher = (
        "Kubeflow TrainJob or JAX_PROCESS_ID" if "JAX_PROCESS_ID" in env else "Kubernetes JobSet"
    )
    return Launch(
        launcher, env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(index)
    )


def by_skypilot(env: Environment) -> Launch | None:
    """One process a node; SKYPILOT_NODE_IPS has a line for each."""
    if not env.keys() >= {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"}:
        return None
    addresses = env["SKYPILOT_NODE_IPS"].split()
    return Launch("SkyPilot", addresses[0], len(addresses), int(env["SKYPILOT_NODE_RANK"]))


def by_open_mpi(env: Environment) -> Launch | None:
    """`mpirun python train.py`, from the machine of rank 0. Version 5 does not tell the others
    which that is."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    size, rank = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
    local_size, local_rank = (
        int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)),
        env["OMPI_COMM_WORLD_LOCAL_RANK"],
    )
    place = env.get("OMPI_MCA_orte_hnp_uri", "")
    if found := re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", place):
        coordinator = f"{found[2] or f'[{found[3]}]'}:{job_port(int(found[1]) >> 12)}"
    else:  # "" where it takes --coordinator to know
        port = job_port(zlib.crc32(env.get("PMIX_NAMESPACE", "").encode()))
        coordinator = f"127.0.0.1:{port}" if local_size == size else ""
    return Launch("Open MPI", coordinator, size, rank, one_device(local_rank, local_size, env))


def by_slurm(env: Environment) -> Launch | None:
    """`srun python train.py`: one process a node, or one a GPU."""
    if not env.keys() >= {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}:
        return None
    size = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    nodes = int(env.get("SLURM_STEP_NUM_NODES", size))
    coordinator = f"{first_host(env['SLURM_STEP_NODELIST'])}:{job_port(int(env['SLURM_JOB_ID']))}"
    device = one_device(env["SLURM_LOCALID"], -(-size // nodes), env)
    return Launch("SLURM", coordinator, size, int(env["SLURM_PROCID"]), device)


def by_tpu_hosts(env: Environment) -> Launch | None:
    """The hosts of a TPU slice, as GKE (xpk) and Ray name them; with several slices, those of
    all."""
    hosts = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slices, number = int(env.get("MEGASCALE_NUM_SLICES", 1)), int(env.get("MEGASCALE_SLICE_ID", 0))
    if "TPU_WORKER_ID" not in env or len(hosts) * slices == 1:
        return None
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).rsplit(":", 1)[0]
    return Launch(
        "TPU pod", first, slices * len(hosts), number * len(hosts) + int(env["TPU_WORKER_ID"])
    )


# The first that applies, by the beginning of its variables' names.
RECOGNISED = {
    "JAX_": by_variables_of_jax,
    "SKYPILOT_": by_skypilot,
    "OMPI_": by_open_mpi,
    "SLURM_": by_slurm,
    "TPU_ and MEGASCALE_": by_tpu_hosts,
}


def recognise(env: Environment) -> Launch | None:
    """What a launcher says in the environment. Raises UserError where that makes no sense."""
    for names, launcher in RECOGNISED.items():
        try:
            if launch := launcher(env):
                return launch
        except (ValueError, LookupError, ArithmeticError) as error:
            raise UserError(
                f"the environment's variables {names}... make no sense ({error}). Unset them to "
                "train in one process, or say --coordinator, --num-processes and --process-id "
                "after unsetting them"
            ) from error
    return None


def find_launch(
    env: Environment,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """What the flags and the environment say of this process; flags count more. None: there is but
    one process."""
    launch = recognise(env)
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    if launch is None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        require(
            not missing,
            "several processes need --coordinator HOST:PORT, --num-processes N and --process-id "
            "I; "
            f"not given: {', '.join(missing)}",
        )
        launch = Launch("flags", "", 1, 0)
    launch = launch._replace(
        coordinator=coordinator or launch.coordinator,
        processes=launch.processes if num_processes is None else num_processes,
        process=launch.process if process_id is None else process_id,
    )
    require(
        1 <= launch.processes <= MOST,
        f"{launch.processes} processes: there must be at least one, and {MOST:,} at most",
    )
    if launch.processes == 1:
        return None
    require(
        0 <= launch.process < launch.processes,
        f"process {launch.process} of {launch.processes}: processes count from 0 to "
        f"{launch.processes - 1}",
    )
    require(
        bool(launch.coordinator),
        f"{launch.launcher} does not say where process 0 is; name it by --coordinator HOST:PORT",
    )
    return launch._replace(coordinator=with_port(launch.coordinator))


def with_port(coordinator: str) -> str:
    """host:port, or unix:path. Raises UserError where it is neither."""
    if coordinator.startswith(LOCAL):
        return coordinator
    try:
        coordinator.encode("idna")
    except UnicodeError:
        raise UserError(f"coordinator {coordinator[:100]!r}: not the name of a machine") from None
    alone = coordinator.endswith("]")  # an address of version 6 without a port
    named = None if alone else re.fullmatch(r"(.+):(\d{1,9})", coordinator.removesuffix(":"))
    if not named:
        return f"{coordinator}:{PORT}"
    require(
        1 <= int(named[2]) <= 65535,
        f"coordinator {coordinator}: a port is a number from 1 to 65535",
    )
    return coordinator


def init_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    connect_seconds: float = CONNECT_SECONDS,
) -> None:
    """Joins the processes of a run, before JAX is used for anything else, and says what it found.
    Does nothing in a process that is alone, or that somebody (Ray Train) has joined to others
    already.

    Raises UserError where the coordinator is not reached within `connect_seconds`; where not all
    processes come, says so and ends the program with status 2, for JAX would end it without a word
    of ours.
    """
    if jax.distributed.is_initialized():
        announce("joined already")
        return
    require(
        0 < connect_seconds < 1e6,
        f"--connect-seconds {connect_seconds}: a time in seconds, more than 0 and below 1e6",
    )
    launch = find_launch(os.environ, coordinator, num_processes, process_id)
    limits: dict[str, Any] = {
        "initialization_timeout": int(connect_seconds) + 60,  # ours comes first
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    if launch is None:
        if on_tpu_machine(os.environ):  # whose pod JAX asks the metadata server for
            jax.distributed.initialize(**limits)
            announce("TPU machine")
        return
    who = f"process {launch.process} of {launch.processes} ({launch.launcher})"
    if launch.process:
        await_coordinator(launch.coordinator, connect_seconds, who)
    else:
        check_port(launch.coordinator, who)
    too_long = threading.Timer(connect_seconds, give_up, [who, launch.coordinator, connect_seconds])
    too_long.start()
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            None if launch.device is None else [launch.device],
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind_address(launch.coordinator),
            **limits,
        )
    except RuntimeError as error:
        raise UserError(
            f"{who} cannot join at {launch.coordinator}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        too_long.cancel()
    announce(f"{launch.launcher}, coordinator {launch.coordinator}")


def on_tpu_machine(env: Environment) -> bool:
    devices = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    return (
        devices
        and "cpu" not in env.get("JAX_PLATFORMS", "")
        and importlib.util.find_spec("libtpu") is not None
    )


def await_coordinator(address: str, seconds: float, who: str) -> None:
    """Returns once somebody listens at the address."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connect(address).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{who} cannot reach the coordinator, process 0 at {address}, within "
                    f"{seconds:.0f} s ({error}). It "
                    "must have started, under that name, and its port be open between the machines"
                ) from error
            time.sleep(0.2)


def connect(address: str) -> socket.socket:
    """A connection to what listens at the address. Raises OSError."""
    if address.startswith(LOCAL):
        local = socket.socket(socket.AF_UNIX)
        try:
            local.connect(address.removeprefix(LOCAL))
        except OSError:
            local.close()
            raise
        return local
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=5)


def bind_address(coordinator: str) -> str:
    """Where process 0 listens: at the address of this machine that the coordinator's name has, so
    that nobody else's network reaches it; at all where the name says no such address (it is
    translated on its way, or the machine knows itself by a loopback address alone)."""
    if coordinator.startswith(LOCAL):
        return coordinator
    host, port = coordinator.rsplit(":", 1)
    host = host.strip("[]")
    meant = host == "localhost" or host.startswith("127.") or host == "::1"
    with contextlib.suppress(OSError):
        for family, _, _, _, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            found = str(place[0])
            loopback = found.startswith("127.") or found == "::1"
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as server:
                server.bind((found, 0))
                if meant or not loopback:
                    return f"[{found}]:{port}" if ":" in found else f"{found}:{port}"
    return f"[::]:{port}"


def check_port(address: str, who: str) -> None:
    """That nobody else listens where process 0 is to; JAX would crash."""
    if address.startswith(LOCAL):
        return
    try:
        socket.create_server(("", int(address.rsplit(":", 1)[1]))).close()
    except OSError as error:
        raise UserError(
            f"{who} cannot listen at {address} ({error.strerror}): name another port"
        ) from error


def give_up(who: str, address: str, seconds: float) -> None:
    print(
        f"error: {who}: not all processes met at {address} within {seconds:.0f} s. See what the "
        "others say, and "
        "that all were started",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def announce(found: str) -> None:
    if not is_first():
        logging.getLogger("flax_lstm").setLevel(logging.ERROR)
        return
    logging.getLogger(__name__).info(
        "%d processes (%s), %d devices, %d of them here",
        jax.process_count(),
        found,
        jax.device_count(),
        jax.local_device_count(),
    )


# --- acting together


def process_count() -> int:
    """The processes of this run. Does not start JAX's backend where there is but one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that logs and writes."""
    return process_count() == 1 or jax.process_index() == 0


def processes_here() -> int:
    """How many of the run's processes share this machine. All must ask together."""
    if process_count() == 1:
        return 1
    boot = Path("/proc/sys/kernel/random/boot_id")  # machines may have one name
    name = f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}"
    own = np.uint32(zlib.crc32(name.encode()))
    return int(np.sum(multihost_utils.process_allgather(own) == own))


def first_then_all(action: Callable[[], T]) -> T:
    """Does it in process 0 and then, with what that has written, in the others. Where it fails in
    one, all fail."""
    if process_count() == 1:
        return action()
    result: Any = None
    for turn in (is_first(), not is_first()):
        failure: Exception | None = None
        if turn:
            try:
                result = action()
            except Exception as error:
                failure = error
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
        if failure is not None:
            raise failure
        if len(failed):
            raise UserError(
                f"process {jax.process_index()} ends, for process {failed[0]} failed: see its "
                "message"
            )
    return result


def meet(name: str) -> None:
    """Waits until all processes of the run are here."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)


def stop_agreed(step: int) -> bool:
    """Whether all processes are to stop before this step, because one of them was sent SIGTERM. All
    must ask at each step."""
    return multihost_utils.reached_preemption_sync_point(step)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised for, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def leave(error: Exception) -> None:
    """Ends this process at once after an error that the others do not know of, so that they notice
    now and not at the end of a time limit."""
    told = [str(cause) for cause in causes(error) if isinstance(cause, jax.errors.JaxRuntimeError)]
    others = len(told) > 0
    if any(word in text for text in told for word in LOST):
        print(str(error).splitlines()[0], file=sys.stderr)
    else:
        traceback.print_exception(error)
    if others:
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends; if the lines "
            "above speak of a "
            "connection or of another task, another process ended first: see its message. The "
            "same command goes on "
            "from the last checkpoint",
            file=sys.stderr,
        )
    sys.stderr.flush()
    os._exit(1)


# --- several processes on this machine


def end_with_parent(parent: int) -> None:
    """Asks Linux to send this process SIGTERM, at which it saves and ends, when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before
            os._exit(SAVED)


def run_locally(processes: int, arguments: Sequence[str]) -> int:
    """Starts `python -m flax_lstm train` with these arguments that many times on this machine, on
    the CPU unless JAX_PLATFORMS says otherwise, and returns the status of the first that fails,
    having ended the others. They meet at a socket in a folder that no other user can enter."""
    most = max(8, 4 * len(os.sched_getaffinity(0)))
    require(
        1 <= processes <= most,
        f"--local-processes {processes}: must be from 1 to {most} here, four a core",
    )
    # The path of a socket has about a hundred letters at most.
    short = None if len(tempfile.gettempdir()) < 60 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="flax_lstm-", dir=short) as private:
        command = [sys.executable, "-m", "flax_lstm", "train", *arguments]
        command += ["--coordinator", f"{LOCAL}{private}/0"]
        stopped = threading.Event()
        return await_all(start_all(command, processes, stopped), stopped)


def start_all(
    command: Sequence[str], processes: int, stopped: threading.Event
) -> list[subprocess.Popen[bytes]]:
    """The processes, started, in their order. SIGTERM sets `stopped` and is passed on."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path}
    children: list[subprocess.Popen[bytes]] = []

    def stop(*_: object) -> None:
        stopped.set()
        if not children:
            sys.exit(SAVED)
        children[0].terminate()

    # Before there are children, so that none is left behind. Ctrl-C reaches them from the terminal.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, stop)
    for index in range(processes):
        more = ["--num-processes", str(processes), "--process-id", str(index)]
        ends = partial(end_with_parent, os.getpid())
        try:
            children.append(subprocess.Popen([*command, *more], env=env, preexec_fn=ends))
        except OSError as error:
            for child in children:
                child.kill()
            raise UserError(
                f"--local-processes {processes}: only {index} could be started ({error.strerror})"
            ) from error
    return children


def await_all(children: Sequence[subprocess.Popen[bytes]], stopped: threading.Event) -> int:
    """0 once all have ended well; else the status of the first that did not, when all are gone.
    75 where SIGTERM came so early that one of them ended by it: there was nothing to save."""
    while (codes := [child.poll() for child in children]) and all(
        code in (None, 0) for code in codes
    ):
        if None not in codes:
            return 0
        time.sleep(0.1)
    # One that was killed counts first, for it brought the others down.
    index, code = min(((n, code) for n, code in enumerate(codes) if code), key=lambda one: one[1])
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    if code == -signal.SIGTERM and stopped.is_set():
        print("Stopped before training went on. The same command begins again.", file=sys.stderr)
        deadline, code = 0, SAVED
    elif code < 0:
        print(
            f"error: process {index} was ended by signal {-code}, and so are the others now. The "
            "same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        deadline = 0
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return code if code > 0 else 1
