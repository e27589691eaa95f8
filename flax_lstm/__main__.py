# SPDX-License-Identifier: Apache-2.0
"""The command line: `flax-lstm COMMAND ...`, or `python -m flax_lstm COMMAND ...`."""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from flax_lstm.commands import COMMANDS
from flax_lstm.errors import UserError, nearest

Command = Callable[[Sequence[str]], int]


def usage() -> str:
    """What the commands do."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {does}" for name, does in COMMANDS.items())
    return (
        "usage: flax-lstm COMMAND ...   (or: python -m flax_lstm COMMAND ...)\n\n"
        f"{lines}\n\nflax-lstm COMMAND --help lists the flags of one; --version says which this is."
    )


def guarded(command: Command, arguments: Sequence[str]) -> int:
    """The exit status of a command; a mistake of the user's is printed in a few lines, without a
    traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    logging.getLogger("flax_lstm").setLevel(logging.INFO)
    try:
        return quietly(command, arguments)
    except UserError as error:
        print(f"error: {short(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # of a file that the user, or the machine, does not let us have
        if error.filename is None:
            raise
        name = short(str(error.filename))
        print(f"error: {name}: {error.strerror or error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: memory is not enough: {short(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def short(message: str) -> str:
    """What fits on a screen: the beginning and the end of a message that quotes too much."""
    return message if len(message) <= 3000 else f"{message[:1500]} ... {message[-1500:]}"


def quietly(command: Command, arguments: Sequence[str]) -> int:
    """The exit status of a command, whose reader may have seen enough (`| head`) before its end."""
    try:
        try:
            status = command(arguments)
        except SystemExit as done:  # of a parser that has printed help or a mistake
            status = done.code if isinstance(done.code, int) else 2
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def call(name: str, prog: str) -> Command:
    """The command of this name."""
    module = importlib.import_module(f"flax_lstm.commands.{name.replace('-', '_')}")
    return lambda arguments: module.main(arguments, prog)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; returns the exit status."""
    return quietly(dispatch, sys.argv[1:] if arguments is None else arguments)


def dispatch(arguments: Sequence[str]) -> int:
    """See `main`."""
    if arguments[:1] == ["--version"]:
        from flax_lstm.machine.version import version_of

        print(f"flax-lstm {version_of()}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(
            f"error: unknown command {name}.{nearest(name, COMMANDS)}\n{usage()}", file=sys.stderr
        )
        return 2
    return guarded(call(name, f"flax-lstm {name}"), rest)


if __name__ == "__main__":
    sys.exit(main())
