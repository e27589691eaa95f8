# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm train`: trains, or resumes the run in the work directory."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flax_lstm.commands.grammar import parse_with_config
from flax_lstm.config import Config
from flax_lstm.errors import UserError, require

MOST_SEEDS = 1000

ABOUT = """Trains a config. Again: resumes its run, or prints the result of a finished one.

A flag with a dot overrides that field of the config.

Several seeds (--seeds 3) train one after the other, each in its DIR/seed-N.

Processes are found by what SLURM, Open MPI, Kubernetes or a TPU pod sets."""


@dataclass(frozen=True)
class Options:
    config: str = "quickstart"  # a file, or the name of a shipped config
    workdir: Path | None = None  # folder of the run; default: runs/NAME
    seeds: int = 1  # train so many, from the config's seed on; each a run in a folder of its own
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
    with stopped_early():
        tune(arguments)
        quiet_late_answers()
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
        train = partial(
            fit,
            profile=options.profile,
            test=not options.no_test,
            plots=not options.no_report,
            init_from=origin,
            resume_with=options.resume_with,
        )
        if options.seeds == 1:
            train(config, options.workdir)
        else:
            train_seeds(train, config, options.workdir, options.seeds)
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


@contextmanager
def stopped_early() -> Iterator[None]:
    """SIGTERM ends the process with the status that it has after saving, for there is nothing to
    save yet: whoever sent it may give the command again."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_seeds(
    train: Callable[[Config, Path], dict[str, Any]],
    config: Config,
    workdir: Path | None,
    seeds: int,
) -> None:
    """Trains so many seeds, each in a folder of its own, and says the mean of their figures."""
    from rich.console import Console

    from flax_lstm.machine.distributed import is_first
    from flax_lstm.runs.report import report_seeds
    from flax_lstm.runs.workdir import Workdir

    require(1 < seeds <= MOST_SEEDS, f"--seeds {seeds}: choose a number from 1 to {MOST_SEEDS}")
    folder = workdir or Path("runs") / config.name
    require(
        not Workdir(folder).config.exists(),
        f"--workdir {folder}: holds a run of one seed; name another folder for --seeds {seeds}",
    )
    configs = [replace(config, seed=config.seed + n) for n in range(seeds)]
    results = [train(one, folder / f"seed-{one.seed}") for one in configs]
    if is_first():
        report_seeds(results, folder, Console(stderr=True))


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


def quiet_late_answers() -> None:
    """TensorStore answers Orbax also when Orbax has given a save up for want of room and closed its
    loop, and Orbax leaves errors of the disk in tasks that it does not look after. Python would
    print a traceback for each; that the save failed is told anyway."""
    show = sys.unraisablehook

    def hook(late: Any) -> None:
        if str(late.exc_value) != "Event loop is closed":
            show(late)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], OSError))
    )


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments less a flag and its value."""
    at = next(n for n, a in enumerate(arguments) if a.split("=")[0].replace("_", "-") == flag)
    return [*arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]
