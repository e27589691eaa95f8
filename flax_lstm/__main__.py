# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m flax_lstm train | evaluate | predict | plan`."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax_lstm.errors import UserError, listing, nearest, require

logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
logging.getLogger("flax_lstm").setLevel(logging.INFO)


def train_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of `train` that are not fields of a config."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--no-tuned-malloc", action="store_true")
    parser.add_argument("--no-compilation-cache", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-test", action="store_true")
    parser.add_argument("--no-report", action="store_true")
    parser.add_argument("--local-processes", type=int)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--connect-seconds", type=float, default=300)
    return parser


def train(arguments: Sequence[str], prog: str = "python -m flax_lstm train") -> int:
    """Trains, or resumes the run in the work directory."""
    options, rest = train_parser(prog).parse_known_args(arguments)
    if options.local_processes is not None:
        from flax_lstm.machine.distributed import run_locally

        return run_locally(options.local_processes, without(arguments, "--local-processes"))
    if not options.no_tuned_malloc and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        from flax_lstm.machine.malloc import tune_malloc

        tune_malloc()
    if not options.no_compilation_cache:
        from flax_lstm.machine.cache import use_compilation_cache

        use_compilation_cache()
    from flax_lstm.config import load_config, override, shipped_configs
    from flax_lstm.machine.distributed import init_distributed, is_first, leave, process_count
    from flax_lstm.training.loop import fit
    from flax_lstm.training.signals import Stopped

    config = override(
        load_config(options.config),
        rest,
        prog,
        f"Trains the config {options.config}; the same command again resumes. --config FILE or "
        "one of "
        f"{listing(shipped_configs())}; --workdir DIR (default runs/NAME); --no-tuned-malloc "
        "keeps the C library's "
        "memory allocation as it is; --no-compilation-cache compiles anew what an earlier run "
        "has compiled; --profile "
        "traces a few steps and prints what takes longest; --no-test leaves the test split "
        "unread at the end, for "
        "choosing settings; --no-report draws no plots. "
        "--local-processes N trains in N processes of this machine. On several machines, "
        "what SLURM, Open MPI, Kubernetes, SkyPilot or a TPU pod says of the processes is "
        "understood; otherwise say "
        "--coordinator HOST:PORT --num-processes N --process-id I. They have --connect-seconds S "
        "(default 300) to find "
        "each other. Every other flag overrides a field of the config:",
    )
    init_distributed(
        options.coordinator, options.num_processes, options.process_id, options.connect_seconds
    )
    try:
        fit(config, options.workdir, options.profile, not options.no_test, not options.no_report)
    except Stopped as stopped:
        if is_first():
            print(stopped, file=sys.stderr)
        return stopped.code
    except UserError:
        raise
    except Exception as error:
        if process_count() > 1:
            leave(error)
        raise
    return 0


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments less a flag and its value."""
    at = next(n for n, argument in enumerate(arguments) if argument.split("=")[0] == flag)
    return [*arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]


def evaluate(arguments: Sequence[str]) -> int:
    """Prints the figures of a saved run."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_lstm evaluate", description=evaluate.__doc__
    )
    parser.add_argument("workdir", type=Path, metavar="DIR", help="the folder of a run")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    from flax_lstm.inference import load
    from flax_lstm.runs.journal import finite

    figures = load(options.workdir).evaluate(options.split, options.checkpoint)
    if options.json:
        names = ("split", "step", "examples")
        numbers = {name: value for name, value in figures.items() if name not in names}
        print(json.dumps({**finite(numbers), **{name: figures[name] for name in names}}))
    else:
        for name, value in figures.items():
            print(f"{name:15} {value:.6g}" if isinstance(value, float) else f"{name:15} {value}")
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Predictions of a saved run, for a text or for a file of inputs with the columns of the
    training data."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_lstm predict", description=predict.__doc__
    )
    parser.add_argument("workdir", type=Path, metavar="DIR", help="the folder of a run")
    parser.add_argument("--text", help="one text to classify")
    parser.add_argument("--input", type=Path, help="a table of inputs")
    parser.add_argument(
        "--output", type=Path, help="where to write: .csv, .tsv, .jsonl or .parquet"
    )
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    if (options.text is None) == (options.input is None) or (options.input is None) != (
        options.output is None
    ):
        parser.error("give either --text TEXT, or --input FILE and --output FILE")
    if options.output is not None:
        check_output(options.output, options.overwrite)
    import pandas as pd

    from flax_lstm.inference import load

    run = load(options.workdir)
    if options.text is not None:
        column = getattr(run.info, "text_column", None)
        require(
            column is not None,
            f"--text: {options.workdir} is not a run on texts; give --input and --output",
        )
        result = run.predict(pd.DataFrame({column: [options.text]}), options.checkpoint)
        row = {
            name: result[name].iloc[0].item() if name != "label" else str(result[name].iloc[0])
            for name in ("label", "probability")
        }
        print(json.dumps({**row, "probabilities": result.attrs["probabilities"][0]}))
        return 0
    result = run.predict(run.config.data.read(options.input), options.checkpoint)
    write_table(result, options.output)
    print(f"{len(result)} rows in {options.output}", file=sys.stderr)
    return 0


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    ".jsonl": lambda frame, path: frame.to_json(
        path, orient="records", lines=True, date_format="iso"
    ),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def write_table(table: Any, path: Path) -> None:
    """Writes the file whole, or leaves what was there."""
    draft = path.with_name(f".{path.name}.part")
    try:
        WRITERS[path.suffix](table, draft)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(
            f"--output {path}: cannot be written ({error.strerror or error})"
        ) from error


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses, before any work, an output that could not be written or would replace something."""
    require(
        path.suffix in WRITERS, f"--output {path}: the extension must be one of {listing(WRITERS)}"
    )
    require(path.parent.is_dir(), f"--output {path}: the folder {path.parent} does not exist")
    require(not path.is_dir(), f"--output {path}: this is a folder")
    require(
        overwrite or not path.exists(), f"--output {path}: exists already; --overwrite replaces it"
    )


def plan_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of `plan` that are not fields of a config."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--topology", default="cpu:8")
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def plan(arguments: Sequence[str]) -> int:
    """Says what training a config would take on chips that are not there: memory, exchanges, and a
    predicted speed."""
    prog = "python -m flax_lstm plan"
    options, rest = plan_parser(prog).parse_known_args(arguments)
    from flax_lstm.config import load_config, override
    from flax_lstm.plan import plan, report
    from flax_lstm.plan.chips import parse_topology

    config = override(
        load_config(options.config),
        rest,
        prog,
        "Says what training would take on chips that are not there. --config FILE or name; "
        "--topology KIND:SIZE, for "
        "example v5e:16x16, v5p:4x4x4, v6e:8x8, h200:64, cpu:8 (default; virtual devices, "
        "without predicted speeds); "
        "--no-scaling leaves out the smaller sizes; --json prints one JSON array. Every other "
        "flag overrides a field "
        "of the config, --mesh.* above all:",
    )
    topology = parse_topology(options.topology)
    plans = plan(config, topology, (options.config, rest), not options.no_scaling)
    if options.json:
        print(json.dumps(plans))
    else:
        report(config.name, plans, topology)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "plan": plan,
}


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of a command; a mistake of the user's is printed in a few lines, without a
    traceback."""
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = f"usage: python -m flax_lstm {{{','.join(COMMANDS)}}} ... (each has --help)"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(
            f"error: unknown command {arguments[0]}.{nearest(arguments[0], COMMANDS)}\n{usage}",
            file=sys.stderr,
        )
        return 2
    return guarded(COMMANDS[arguments[0]], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
