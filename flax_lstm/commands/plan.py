# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm plan`: what training would take on chips that are not there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from flax_lstm.commands.grammar import flag_names, parse_with_config

ABOUT = """What training would take on chips that are not there.

Memory, exchanges between chips, and a predicted speed.

A flag with a dot overrides that field of the config, --mesh.data for example."""


@dataclass(frozen=True)
class Options:
    config: str = "quickstart"  # a file, or the name of a shipped config
    # KIND:SIZE, for example v5e:16x16, v5p:4x4x4, v6e:8x8, h200:64, or cpu:8, virtual devices
    # without predicted speeds
    topology: str = "cpu:8"
    no_scaling: bool = False  # leave out the smaller sizes
    json: bool = False  # one JSON array on standard output


def main(arguments: Sequence[str], prog: str = "flax-lstm plan") -> int:
    """Prints the plans; returns the exit status."""
    options, config = parse_with_config(Options, arguments, prog, ABOUT)
    from flax_lstm.plan import plan, report
    from flax_lstm.plan.chips import parse_topology

    topology = parse_topology(options.topology)
    own = (options.config, overrides(arguments))
    plans = plan(config, topology, own, not options.no_scaling)
    if options.json:
        print(json.dumps(plans))
    else:
        report(config.name, plans, topology)
    return 0


def overrides(arguments: Sequence[str]) -> list[str]:
    """Those of the arguments that override a field of the config: a compiler in a process of its
    own reads them again."""
    own = flag_names(Options)
    kept, keep = [], False
    for argument in arguments:
        if argument.startswith("--"):
            keep = argument[2:].split("=")[0].replace("_", "-") not in own
        if keep:
            kept.append(argument)
    return kept
