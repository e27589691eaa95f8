# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm checkpoints`: what is kept of a run, and whether it is as it was saved."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax_lstm.commands.grammar import Folder, parse

ABOUT = """Lists the checkpoints of a run.

With --verify, exit status 2 where a byte is not as it was saved."""


@dataclass(frozen=True)
class Options:
    workdir: Folder  # the folder of a run
    verify: bool = False  # compare every byte with the hash that was saved
    json: bool = False  # one JSON object on standard output


def main(arguments: Sequence[str], prog: str = "flax-lstm checkpoints") -> int:
    """Prints the list; returns the exit status."""
    options = parse(Options, arguments, prog, ABOUT)
    from flax_lstm.inference import checkpoints

    found = checkpoints(options.workdir, options.verify)
    if options.json:
        print(json.dumps({"checkpoints": found}))
    else:
        print("\n".join(line(row) for row in found))
    return 2 if any(row["damage"] for row in found) else 0


def line(row: dict[str, Any]) -> str:
    """One checkpoint in words."""
    monitor = "" if row["monitor"] is None else f"  validation {row['monitor']:.6g}"
    marks = [name for name in ("best", "latest") if row[name]]
    if row["damage"]:
        state = f"damaged: {row['damage']}"
    else:
        state = {True: "every byte as it was saved", False: "no hashes", None: ""}[row["intact"]]
    return f"step {row['step']:<9}{row['bytes']:>12,} bytes{monitor}  {' '.join(marks)}  {state}"
