# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm train`: trains, or resumes the run in the work directory."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flax_lstm.commands.grammar import parse_with_config
from flax_lstm.errors import UserError

ABOUT = """Trains a config. Again: resumes its run, or prints the result of a finished one.

A flag with a dot overrides that field of the config.

Processes are found by what SLURM, Open MPI, Kubernetes or a TPU pod sets."""


@dataclass(frozen=True)
class Options:
    config: str = "quickstart"  # a file, or the name of a shipped config
    workdir: Path | None = None  # folder of the run; default: runs/NAME
    # a run to begin with: weights that fit by name and shape, vocabulary
    init_from: Path | None = None
    no_test: bool = False  # leave the test split unread at the end, for choosing settings
    no_report: bool = False  # draw no plots
    # settings that may differ from the run's: learning-rate, clip, seed, schedule-steps
    resume_with: tuple[str, ...] = ()
    profile: bool = False  # trace a few steps and print what takes longest
    no_tuned_malloc: bool = False  # keep the C library's memory allocation as it is
    no_compilation_cache: bool = False  # compile anew what an earlier run has compiled
    local_processes: int | None = None  # train in so many processes of this machine
    coordinator: str | None = None  # HOST:PORT of the first process
    num_processes: int | None = None  # processes in all
    process_id: int | None = None  # which of them this one is, from 0
    connect_seconds: float = 300.0  # time that processes have to find each other


def main(arguments: Sequence[str], prog: str = "flax-lstm train") -> int:
    """Trains, or resumes; returns the exit status."""
    tune(arguments)
    options, config = parse_with_config(Options, arguments, prog, ABOUT)
    from flax_lstm.machine import distributed

    if options.local_processes is not None:
        return distributed.run_locally(
            options.local_processes, without(arguments, "--local-processes")
        )
    from flax_lstm.inference import load
    from flax_lstm.training.loop import fit
    from flax_lstm.training.signals import Stopped

    distributed.init_distributed(
        options.coordinator, options.num_processes, options.process_id, options.connect_seconds
    )
    try:
        origin = load(options.init_from) if options.init_from is not None else None
        fit(
            config,
            options.workdir,
            profile=options.profile,
            test=not options.no_test,
            plots=not options.no_report,
            init_from=origin,
            resume_with=options.resume_with,
        )
    except Stopped as stopped:
        if distributed.is_first():
            print(stopped, file=sys.stderr)
        return stopped.code
    except UserError:
        raise
    except Exception as error:
        if distributed.process_count() > 1:
            distributed.leave(error)
        raise
    return 0


def tune(arguments: Sequence[str]) -> None:
    """What has to be done before JAX starts its backend, and so before the config is read."""
    if {"-h", "--help", "--local-processes"} & {a.split("=")[0] for a in arguments}:
        return
    flags = {argument.replace("_", "-") for argument in arguments}
    if "--no-tuned-malloc" not in flags and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        from flax_lstm.machine.malloc import tune_malloc

        tune_malloc()
    if "--no-compilation-cache" not in flags:
        from flax_lstm.machine.cache import use_compilation_cache

        use_compilation_cache()


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments less a flag and its value."""
    at = next(n for n, a in enumerate(arguments) if a.split("=")[0].replace("_", "-") == flag)
    return [*arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]
