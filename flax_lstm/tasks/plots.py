# SPDX-License-Identifier: Apache-2.0
"""The pictures that a run leaves behind."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_TAGS = 30  # that are drawn


def _save(figure: Figure, path: Path) -> Path:
    """Whole, or not at all."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(picture.getvalue())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The loss of training and validation over the steps, from the rows of `metrics.jsonl`."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for split, style in (("train", "-"), ("validation", "o-")):
        points = [
            (r["step"], r["loss"])
            for r in rows
            if r["split"] == split and r.get("loss") is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=split, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def plot_forecasts(
    times: np.ndarray,
    windows: Sequence[int],
    truth_LC: np.ndarray,
    forecasts: Sequence[np.ndarray],
    names: Sequence[str],
    path: Path,
    levels: Sequence[float] = (),
    point: int = 0,
    beside: Mapping[str, Any] | None = None,
) -> Path:
    """Forecasts against truth, one panel a channel.

    times: [L] time stamps. truth_LC: [L, C] in the units of the data. windows: the row where each
    forecast begins.
    forecasts: one [N, C, Q] for each window; `levels` names the Q quantiles, `point` is the point
    forecast. beside: further forecasts by name, one [N, C] for each window.
    """
    figure = Figure(figsize=(11, 1 + 2.6 * len(names)), layout="constrained")
    for channel, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, channel + 1)
        axes.plot(times, truth_LC[:, channel], color="0.3", linewidth=1, label="truth")
        for n, (begin, forecast) in enumerate(zip(windows, forecasts, strict=True)):
            when = times[begin : begin + len(forecast)]
            axes.plot(
                when,
                forecast[:, channel, point],
                color="C1",
                marker="." if len(when) == 1 else None,
                label="forecast" if n == 0 else None,
            )
            for label, others in (beside or {}).items():
                axes.plot(
                    when,
                    others[n][:, channel],
                    color="C0",
                    linewidth=1,
                    linestyle="--",
                    marker="." if len(when) == 1 else None,
                    label=label if n == 0 else None,
                )
            if len(levels) > 1:
                low, high = forecast[:, channel, 0], forecast[:, channel, -1]
                band = f"{levels[0]:g} to {levels[-1]:g}" if n == 0 else None
                axes.fill_between(when, low, high, color="C1", alpha=0.2, linewidth=0, label=band)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelrotation=20)
        if channel == 0:
            axes.legend(loc="upper left", fontsize=8)
    return _save(figure, path)


def plot_panel(
    ids: Sequence[str],
    truth: np.ndarray,
    forecasts: np.ndarray,
    path: Path,
    levels: Sequence[float] = (),
    point: int = 0,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """One forecast each of several series, three panels in a row.

    truth: [series, past + N] in the units of the data; forecasts: [series, N, Q] of its last steps;
    beside: further forecasts [series, N] by name.
    """
    rows = -(-len(ids) // 3)
    figure = Figure(figsize=(11, 0.5 + 2 * rows), layout="constrained")
    ahead = np.arange(1, forecasts.shape[1] + 1)
    steps = np.arange(truth.shape[1]) - (truth.shape[1] - len(ahead)) + 1
    for n, name in enumerate(ids):
        axes = figure.add_subplot(rows, 3, n + 1)
        axes.plot(steps, truth[n], color="0.3", linewidth=1, label="truth")
        axes.plot(ahead, forecasts[n, :, point], color="C1", label="forecast")
        for label, other in (beside or {}).items():
            axes.plot(ahead, other[n], color="C0", linewidth=1, linestyle="--", label=label)
        if len(levels) > 1:
            low, high = forecasts[n, :, 0], forecasts[n, :, -1]
            band = f"{levels[0]:g} to {levels[-1]:g}"
            axes.fill_between(ahead, low, high, color="C1", alpha=0.2, linewidth=0, label=band)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        if n == 0:
            axes.legend(loc="upper left", fontsize=7)
    return _save(figure, path)


def plot_examination(found: Mapping[str, Any], path: Path) -> Path:
    """What `examination.examine` found: confusion (of tags: the F1 of the most frequent), accuracy
    against confidence, and by length."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    classes, reliability, lengths = figure.subplots(1, 3)
    if "confusion" in found:
        draw_confusion(found["confusion"], classes)
    else:
        often = sorted(found["classes"], key=lambda row: -row["examples"])[:MOST_TAGS][::-1]
        classes.barh(
            [row["label"] for row in often], [row["f1"] or 0 for row in often], color="0.6"
        )
        classes.set(xlim=(0, 1), title="F1 by tag")
    bins = found["calibration"]["bins"]
    reliability.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    reliability.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-")
    ece = found["calibration"]["ece"]
    reliability.set(xlabel="confidence", ylabel="accuracy", title=f"calibration (ECE {ece:.3f})")
    names = [f"{group['shortest']}-{group['longest']}" for group in found["lengths"]]
    lengths.bar(names, [group["accuracy"] for group in found["lengths"]], color="0.6")
    lengths.set(xlabel="tokens", ylabel="accuracy", title="by length")
    return _save(figure, path)


def draw_confusion(found: Mapping[str, Any], axes: Any) -> None:
    """How often each class was predicted, as shares of the actual ones."""
    labels, table = found["labels"], found["actual_by_predicted"]
    share = np.array(table) / np.maximum(np.sum(table, axis=1, keepdims=True), 1)
    axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    places = np.arange(len(labels))
    axes.set_xticks(places, labels, rotation=45, ha="right")
    axes.set_yticks(places, labels)
    if len(labels) <= 12:
        for row, column in np.ndindex(share.shape):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, table[row][column], ha="center", va="center", color=color)
    axes.set(xlabel="predicted", ylabel="actual", title="confusion")
