# SPDX-License-Identifier: Apache-2.0
"""`flax-lstm backtest`: forecasts from rolling origins over the test period of a run."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_lstm.commands.grammar import Folders, named, parse
from flax_lstm.commands.tables import check_output, write_table
from flax_lstm.errors import require

if TYPE_CHECKING:
    from flax_lstm.backtest import Backtest

ABOUT = """Forecasts of a run from rolling origins over its test period, beside those of naive rules
and of a linear regression: figures over all of them, MASE for each series and step, and whether the
model is better than the best rule (Diebold & Mariano 1995). Draws DIR/plots/backtest.png.

Of several folders, or one that --seeds filled, the mean of the models is judged; with --compare
each folder by itself, beside the others.

With --config it trains first, in DIR (runs/NAME by default), or resumes what is there: DIR comes
first then, and flags with a dot, --seed and --seeds are those of train."""

OF_TRAINING = ("config", "seed", "seeds")


@dataclass(frozen=True)
class Options:
    workdir: Folders  # the folder of a run; of several the mean is judged, or see --compare
    compare: bool = False  # of several folders judge each by itself, in a column of its name
    windows: int = 0  # origins of each series, the latest; 0: all
    step: int = 0  # steps between origins; 0: one horizon
    refit: bool = False  # train anew for every origin, on what was known by then
    statistical: bool = False  # also ETS and AutoARIMA, fitted at every origin: slow
    draw: tuple[str, ...] = ()  # times: draw forecasts from there; empty: nine of all
    json: bool = False  # one JSON object on standard output
    output: Path | None = None  # where to write every forecast: .csv, .tsv, .jsonl or .parquet
    overwrite: bool = False  # replace an existing output


def main(arguments: Sequence[str], prog: str = "flax-lstm backtest") -> int:
    """Prints the figures; returns the exit status."""
    training, arguments = apart(arguments)
    options = parse(Options, arguments, prog, ABOUT)
    require(options.windows >= 0, f"--windows {options.windows}: must be at least 1, or 0 for all")
    require(options.step >= 0, f"--step {options.step}: must be at least 1, or 0 for one horizon")
    if options.output is not None:
        check_output(options.output, options.overwrite)
    folders = options.workdir
    if training:
        folders, status = trained(training, folders)
        if status:
            return status
    from flax_lstm.backtest import backtest
    from flax_lstm.inference import load

    if options.compare:
        require(len(folders) > 1, "--compare: name two folders or more; of one, leave it out")
        run, *others = [load(folder) for folder in folders]
    else:
        run, others = load(*named(folders)), []
    asked = (options.windows, options.step, options.refit, options.statistical)
    result = backtest(run, *asked, beside=others)
    result.shown(options.draw)  # a time from which there is no forecast is told before all else
    report = report_of(result)
    if options.json:
        print(json.dumps(report))
    else:
        show(report, result.verdict())
    path = result.draw(run.workdir / "plots" / "backtest.png", options.draw)
    print(f"picture: {path}", file=sys.stderr)
    if options.output is not None:
        rows = result.rows()
        write_table(rows, options.output)
        print(f"{len(rows)} rows in {options.output}", file=sys.stderr)
    return 0


def apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are flags of `train` with their values, and all others."""
    training: list[str] = []
    others: list[str] = []
    chosen = others
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0]
            chosen = training if "." in name or name in OF_TRAINING else others
        chosen.append(argument)
    return training, others


def trained(arguments: list[str], folders: tuple[Path, ...]) -> tuple[tuple[Path, ...], int]:
    """Where a config was trained, and the exit status of that."""
    from flax_lstm.commands import train
    from flax_lstm.config import load_config
    from flax_lstm.tasks.forecasting import Forecasting

    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(arguments)[0].config
    require(
        config is not None, f"{arguments[0]} is a flag of training: give the --config to train, too"
    )
    require(len(folders) < 2, "--config trains in one folder: name one DIR, or none")
    shipped = load_config(config)
    require(
        isinstance(shipped.task, Forecasting),
        f"--config {config}: a backtest is for configs that forecast series, such as series_table",
    )
    folder = folders[0] if folders else Path("runs") / shipped.name
    return (folder,), train.main([*arguments, "--workdir", str(folder), "--no-test"])


def report_of(result: "Backtest") -> dict[str, Any]:
    """What is printed, ready for JSON: what could not be judged is null."""
    from flax_lstm.runs.journal import finite

    outcomes = {name: result.comparison(name) for name in result.models}
    shown = {name: outcome and outcome._asdict() for name, outcome in outcomes.items()}
    steps = {
        name: finite({str(n): v for n, v in enumerate(x)})
        for name, x in result.by_horizon().items()
    }
    return {
        "windows": len(result.windows_W),
        "step": result.step,
        "observed": int(result.truth.counted_WNC.sum()),
        "models": list(result.models),
        "figures": {name: finite(found) for name, found in result.figures().items()},
        "nominal": result.nominal(),
        "by_series": {name: finite(found) for name, found in result.by_series().items()},
        "by_horizon": {name: list(found.values()) for name, found in steps.items()},
        "best_rule": result.best_rule(),
        "diebold_mariano": shown[result.models[0]] if len(shown) == 1 else shown,
    }


def show(report: dict, verdict: str) -> None:  # type: ignore[type-arg]
    """Prints the tables and the verdict."""
    from rich.console import Console

    console, figures = Console(), report["figures"]
    whole = (
        f"{report['windows']} windows, {report['step']} steps apart; {report['observed']:,} targets"
    )
    names = dict.fromkeys(name for found in figures.values() for name in found)
    console.print(
        _table(whole, figures, {name: [x.get(name) for x in figures.values()] for name in names})
    )
    by_horizon, first = report["by_horizon"], report["models"][0]
    horizon = len(by_horizon[first])
    steps = sorted({0, horizon // 4, horizon // 2, 3 * horizon // 4, horizon - 1})
    rows = {str(n + 1): [found[n] for found in by_horizon.values()] for n in steps}
    console.print(_table("MASE by step of the horizon", figures, rows))
    by_series = report["by_series"]
    if len(by_series) > 1:
        worst = sorted(by_series, key=lambda name: -(by_series[name][first] or 0))
        rows = {name: [*by_series[name].values()] for name in worst[:10]}
        title = f"MASE by series: the {len(rows)} worst of {len(worst)}"
        console.print(_table(title, figures, rows))
    for name, nominal in report["nominal"].items():
        of = "" if len(report["models"]) == 1 else f" of {name}"
        console.print(f"coverage{of} {figures[name]['coverage']:.3f}, nominal {nominal:.3g}")
    console.print(verdict, soft_wrap=True, highlight=False)


def _table(title: str, columns: Iterable[str], rows: Mapping[str, Sequence[float | None]]) -> Any:
    """Numbers under headings; "-" for those that are not known."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, values in rows.items():
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values))
    return table
