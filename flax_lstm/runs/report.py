# SPDX-License-Identifier: Apache-2.0
"""The end of a run: what made its figures, and the figures in a table."""

import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from flax_lstm.machine.distributed import process_count
from flax_lstm.machine.sharding import on_host
from flax_lstm.machine.version import version_of
from flax_lstm.runs.journal import distinct
from flax_lstm.runs.workdir import Workdir

PACKAGES = ("flax-lstm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

OF_INTERVALS = ("coverage", "nominal", "width")


def params_sha256(params: Any) -> str:
    """SHA-256 over the parameters: leaves sorted by '/'-joined path, each as path, dtype, shape and
    little-endian bytes in C order."""
    digest = hashlib.sha256()
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): on_host(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name in sorted(leaves):
        array = leaves[name]
        digest.update(f"{name}{array.dtype.name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that figures depend on."""
    packages = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def device_name() -> str:
    """What trained, for example `cpu x 1 (2 cores)` or `NVIDIA H200 x 8`."""
    devices = jax.devices()
    cores = f" ({len(os.sched_getaffinity(0))} cores)" if devices[0].platform == "cpu" else ""
    return f"{devices[0].device_kind} x {len(devices)}{cores}"


# The figure of a task that rules are compared by, and 1 where less is better, else -1
JUDGED = {
    "Forecasting": ("mase", 1),
    "Classification": ("accuracy", -1),
    "Tagging": ("f1", -1),
    "LanguageModeling": ("perplexity", 1),
}

AGAINST_LINEAR = (
    "--model.ngrams 3, or a language model of your own texts before (--config text_lm, then "
    "--init-from): docs/text.md. Else take the linear model."
)
# What to try where a rule has the better figure
TO_TRY = {
    ("mase", ""): "a longer --data.lookback (several seasons), --model.window seasonal, "
    "--model.cycle True, or columns known in advance (--data.future); flax-lstm backtest DIR says "
    "more. A series close to a random walk has nothing to learn: take the rule.",
    ("accuracy", "linear"): AGAINST_LINEAR,
    ("f1", "linear"): AGAINST_LINEAR,
    ("f1", ""): "more --train.steps or another --train.learning-rate.",
    ("accuracy", ""): "more --train.steps or another --train.learning-rate; where the classes are "
    "uneven, look at f1 and auc, which the majority does not have.",
    ("perplexity", ""): "more --train.steps, or more texts.",
}


def conditions() -> dict[str, Any]:
    """What the numbers of a run depend on to the last bit, beside its config, data and backend."""
    cores = len(os.sched_getaffinity(0))
    own = {"device": device_name(), "processes": process_count(), "cores": cores}
    return {**own, **{name: versions()[name] for name in ("jax", "jaxlib")}}


def report(result: dict[str, Any], folder: Workdir, console: Console) -> None:
    """Prints the test figures beside those of the baselines, or the validation figures where the
    test split was not read, and where everything is."""
    split = "test" if result["test"] else "validation"
    columns = {"model": result[split], **result["baselines"]}
    table = Table(
        title=f"{result['name']}: {split}, best step {result['best_step']} of {result['steps']}"
    )
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name in distinct(result[split]):
        # A rule has no interval.
        known = ("model",) if name in OF_INTERVALS else columns
        values = [figures.get(name) if n in known else None for n, figures in columns.items()]
        digits = ",.0f" if name == "observed" else ".4g"
        table.add_row(name, *("-" if value is None else f"{value:{digits}}" for value in values))
    console.print(table)
    paths = (folder.result, folder.metrics, folder.config, folder.checkpoints, folder.tensorboard)
    shown = [path.name for path in paths]
    plots = sorted(f"{folder.plots.name}/{path.name}" for path in folder.plots.glob("*.png"))
    console.print(
        f"In {folder.path.absolute()}: {', '.join(shown + plots)}",
        soft_wrap=True,
        highlight=False,
    )
    if told := beaten(result):
        console.print(told, soft_wrap=True, highlight=False)


def report_seeds(results: Sequence[dict[str, Any]], folder: Path, console: Console) -> None:
    """Prints each figure's mean and standard deviation (n - 1) over seeds."""
    split = "test" if all(result["test"] for result in results) else "validation"
    table = Table(title=f"{results[0]['name']}: {split}, {len(results)} seeds")
    for heading in ("", "mean", "deviation", "least", "most"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in distinct(results[0][split]):
        values = np.array([result[split].get(name) for result in results], np.float64)
        shown = (values.mean(), values.std(ddof=1), values.min(), values.max())
        table.add_row(name, *("-" if np.isnan(value) else f"{value:.4g}" for value in shown))
    console.print(table)
    seeds = [result["seed"] for result in results]
    console.print(
        f"In {folder.absolute()}: {', '.join(f'seed-{n}' for n in seeds)}. "
        f"flax-lstm evaluate {folder} judges the mean of the models, predict gives it.",
        soft_wrap=True,
        highlight=False,
    )


def beaten(result: dict[str, Any]) -> str:
    """What to say where a model loses to a rule or to the linear one, and what to try; else
    empty."""
    figures = result["test"] or result["validation"]
    judged, sign = JUDGED.get(result.get("task", ""), ("", 1))
    own = figures.get(judged)
    rules = {name: found.get(judged) for name, found in result["baselines"].items()}
    known = {name: value for name, value in rules.items() if value is not None}
    name = min(known, key=lambda n: sign * known[n], default="")
    if own is None or not name or sign * known[name] > sign * own:
        return ""
    said = f"{name} is as good or better: {judged} {known[name]:.4g} against {own:.4g}. Try "
    return said + TO_TRY.get((judged, name), TO_TRY[judged, ""])
