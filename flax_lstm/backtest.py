# SPDX-License-Identifier: Apache-2.0
"""Forecasts of a run from rolling origins over its test period, beside those of simple rules.

Axes: W windows (a series and an origin each), N horizon, C target channels, Q quantiles.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flax_lstm.errors import listing, require
from flax_lstm.inference import Ensemble, Run, load
from flax_lstm.tasks.forecasting import Forecasting, naive_forecasts
from flax_lstm.tasks.judging import Comparison, Truth, better, compare, figures, linear_of
from flax_lstm.tasks.plots import plot_panel
from flax_lstm.tasks.statistical import statistical_forecasts
from flax_lstm.training.loop import fit

Array = np.ndarray
log = logging.getLogger(__name__)
MODEL = "model"
DRAWN = 9  # windows
# Names of other columns.
TAKEN = {"origin", "time", "channel", "horizon", "actual", "forecast", "ets", "arima"} | {
    *("last_value", "seasonal_naive", "drift", "mean", "linear")
}


@dataclass(frozen=True)
class Backtest:
    """What was forecast, and what came."""

    task: Forecasting
    dataset: Any
    windows_W: Array  # of the test split
    step: int  # steps between origins
    truth: Truth
    forecasts: dict[str, Array]  # (W, N, C) by name: the models first, then the rules
    quantiles: dict[str, Array]  # (W, N, C, Q), of the models that have them
    levels: dict[str, tuple[float, ...]]  # of these
    models: tuple[str, ...] = (MODEL,)  # names; the first is the one whose data these are

    @property
    def series_W(self) -> Array:
        """The number of each window's series."""
        return self.dataset.series("test")[self.windows_W]

    @property
    def times_WN(self) -> Array:
        """The times forecast."""
        return self.dataset.times("test", self.windows_W)

    def figures(self) -> dict[str, dict[str, float]]:
        """Of each forecast, over all windows."""
        return {
            name: figures(self.truth, x, self.quantiles.get(name), self.levels.get(name, ()))
            for name, x in self.forecasts.items()
        }

    def nominal(self) -> dict[str, float]:
        """What the coverage of each model that has one should be."""
        return {name: q[-1] - q[0] for name, q in self.levels.items() if len(q) > 1}

    def by_horizon(self) -> dict[str, list[float]]:
        """The mean absolute error of each forecast at each step, in units of MASE."""
        scaled = self.truth.counted_WNC / self.truth.scale_WC[:, None]
        count_N = self.truth.counted_WNC.sum(axis=(0, 2))
        return {
            name: _means((np.abs(x - self.truth.actual_WNC) * scaled).sum(axis=(0, 2)), count_N)
            for name, x in self.forecasts.items()
        }

    def by_series(self) -> dict[str, dict[str, float]]:
        """MASE of each forecast for each series (of a panel) or channel."""
        info, found = self.dataset.info, {}
        if info.id_column:
            for number in np.unique(self.series_W):
                rows = np.flatnonzero(self.series_W == number)
                name = str(self.dataset.buffer.ids[number])
                found[name] = self._mase(self.truth.take(rows), rows, slice(None))
            return found
        for n, name in enumerate(info.targets):
            part = Truth(
                self.truth.actual_WNC[..., n : n + 1],
                self.truth.counted_WNC[..., n : n + 1],
                self.truth.scale_WC[:, n : n + 1],
            )
            found[name] = self._mase(part, np.arange(len(self.windows_W)), slice(n, n + 1))
        return found

    def _mase(self, truth: Truth, rows: Array, channels: slice) -> dict[str, float]:
        return {
            name: figures(truth, x[rows][..., channels], None, ())["mase"]
            for name, x in self.forecasts.items()
        }

    def best_rule(self) -> str:
        """Which of the rules has the lowest MASE."""
        return self.ranked([name for name in self.forecasts if name not in self.models])[0]

    def ranked(self, names: Sequence[str]) -> list[str]:
        """These forecasts, that with the lowest MASE first."""
        found = self.figures()
        return sorted(names, key=lambda name: found[name]["mase"])

    def comparison(self, model: str = "", other: str = "") -> Comparison | None:
        """A model (the first, if none is named) against another forecast (the best rule)."""
        lags = -(-self.dataset.info.horizon // self.step) - 1
        stamps = self.dataset.stamps("test", self.windows_W)
        origin_W = stamps[:: self.dataset.info.horizon].asi8
        one, two = (self.forecasts[x] for x in (model or self.models[0], other or self.best_rule()))
        return compare(self.truth, one, two, self.series_W, origin_W, max(lags, 0))

    def verdict(self) -> str:
        """A sentence for each model on whether it is worth its training; of several, also on
        whether the best is better than the next."""
        rule = self.best_rule()
        said = [self._verdict(name, rule) for name in self.models]
        if len(self.models) > 1:
            best, second = self.ranked(self.models)[:2]
            said.append(self._better(best, second, best))
        return "\n".join(said)

    def _verdict(self, model: str, rule: str) -> str:
        found = self.figures()
        called = "The model" if self.models == (MODEL,) else model
        if found[model]["mase"] < found[rule]["mase"]:
            return self._better(model, rule, called)
        than = f"MASE {found[rule]['mase']:.4g} against {found[model]['mase']:.4g}"
        than += "" if called != model else f" of {model}"
        return (
            f"{rule} is as good or better: {than}, {_chance(self.comparison(model, rule))}. Try a "
            "longer --data.lookback (several seasons), --model.window seasonal, --model.cycle "
            "True, or columns known in advance (--data.future); or use the rule."
        )

    def _better(self, one: str, other: str, called: str) -> str:
        found, outcome = self.figures(), self.comparison(one, other)
        shown = "" if better(outcome) == "yes" else ", which may be chance"
        return (
            f"{called} is better than {other}: MASE {found[one]['mase']:.4g} against "
            f"{found[other]['mase']:.4g}, {_chance(outcome)}{shown}."
        )

    def rows(self) -> pd.DataFrame:
        """Every forecast: series, origin (the first time that is forecast), time, channel, step,
        what came (empty where it was not measured), the model's forecast and quantiles, and a
        column for each rule. Of several models each has columns of its own name: `NAME`, and
        `NAME q0.1` and so on."""
        info, (windows, horizon, channels) = self.dataset.info, self.truth.actual_WNC.shape
        names = self.dataset.buffer.ids[self.series_W]
        stamps = info.grid.written(self.dataset.stamps("test", self.windows_W))
        actual = np.where(self.truth.counted_WNC, self.truth.actual_WNC, np.nan)
        columns: dict[str, Any] = {
            info.id_column: np.repeat(names, horizon * channels),
            "origin": stamps[::horizon].repeat(horizon * channels),
            "time": stamps.repeat(channels),
            "channel": np.tile(np.asarray(info.targets, object), windows * horizon),
            "horizon": np.tile(np.repeat(np.arange(1, horizon + 1), channels), windows),
            "actual": actual.ravel(),
        }
        alone = self.models == (MODEL,)
        for name, forecast in self.forecasts.items():
            columns["forecast" if alone and name == MODEL else name] = forecast.ravel()
            for n, q in enumerate(self.levels.get(name, ())):
                column = f"q{q}" if alone else f"{name} q{q}"
                columns[column] = self.quantiles[name][..., n].ravel()
        return pd.DataFrame({name: column for name, column in columns.items() if name})

    def shown(self, times: Sequence[str] = ()) -> Array:
        """Which of the windows a picture shows: a sample, spread over series and origins; or of
        those that forecast from these times on. Raises UserError for a time from which none
        does."""
        within = np.arange(len(self.windows_W))
        if times:
            where = {time: f"--draw {time}" for time in times}
            found = [self.dataset.from_time("test", time, where[time]) for time in times]
            within = np.flatnonzero(np.isin(self.windows_W, np.concatenate(found)))
            require(len(within) > 0, f"{listing(where.values())}: not among the origins; --step 1")
        return within[np.unique(np.linspace(0, len(within) - 1, DRAWN).astype(int))]

    def draw(self, path: Path, times: Sequence[str] = ()) -> Path:
        """The windows `shown`, with the best rule beside, and other models."""
        chosen = self.shown(times)
        info, dataset = self.dataset.info, self.dataset
        past = min(info.lookback, max(2 * info.horizon, info.season))
        truth = dataset.around("test", self.windows_W[chosen], past)[..., 0]
        first, begins = self.models[0], self.times_WN[:, 0]
        origins = info.grid.written(pd.DatetimeIndex(begins)) if info.counted else begins
        shown = self.quantiles.get(first, self.forecasts[first][..., None])[chosen][:, :, 0]
        titles = [
            f"{dataset.buffer.ids[s] or info.targets[0]}, from {str(t)[:16]}"
            for s, t in zip(self.series_W[chosen], origins[chosen], strict=True)
        ]
        names = (*self.models[1:], self.best_rule())
        beside = {name: self.forecasts[name][chosen][..., 0] for name in names}
        return plot_panel(titles, truth, shown, path, self.task.levels, self.task.point, beside)


def _chance(outcome: Comparison | None) -> str:
    return "too few origins to test" if outcome is None else f"p = {outcome.p_value:.2g}"


def _means(sums: Array, counts: Array) -> list[float]:
    return [float(s / n) if n else float("nan") for s, n in zip(sums, counts, strict=True)]


def origins(dataset: Any, windows: int, step: int) -> Array:
    """The windows of the test split that begin `step` steps apart, counted from the end of each
    series; at most `windows` of each (0: all)."""
    series_W = dataset.series("test")
    chosen = []
    for number in np.unique(series_W):
        own = np.flatnonzero(series_W == number)[::-1][::step]
        chosen.append(own[:windows] if windows else own)
    return np.sort(np.concatenate(chosen))


def backtest(
    workdir: str | Path | Run,
    windows: int = 0,
    step: int = 0,
    refit: bool = False,
    statistical: bool = False,
    data: Any = None,
    beside: Sequence[str | Path | Run] = (),
) -> Backtest:
    """Forecasts of the run in `workdir`, or of what `load` gave, from origins `step` steps apart
    (0: one horizon).

    refit: train the run's config anew for every origin, on what was known by then, in the folder
    `backtest` of the run; otherwise all forecasts are those of the run's best checkpoint. Of
    several runs, or a folder that `--seeds` filled, each, and the mean of what they say.
    statistical: also ETS and AutoARIMA, see `flax_lstm.tasks.statistical`.
    data: what `fit` was given as `data`, if it was.
    beside: further runs to judge on the same windows, each by itself, under the name of its folder.
    They may differ in all but the data, targets and horizon: rules and the scale of MASE are those
    of the first, by its look-back and season.
    Raises UserError for a run that forecasts no series.
    """
    runs = [x if isinstance(x, Run) else load(x) for x in (workdir, *beside)]
    settings = [_settings(run, data) for run in runs]
    datasets: list[Any] = [s.load(run.assets) for s, run in zip(settings, runs, strict=True)]
    dataset = datasets[0]
    step = step or dataset.info.horizon
    windows_W = origins(dataset, windows, step)
    names = _names(runs) if beside else (MODEL,)
    forecasts, quantiles, levels = {}, {}, {}
    for name, run, own, data_of in zip(names, runs, settings, datasets, strict=True):
        own_W = windows_W if run is runs[0] else _same(dataset, windows_W, data_of, runs[0], run)
        outputs, task = _forecasts(run, own, data_of, own_W, refit), config_task(run)
        forecasts[name] = outputs[..., task.point]
        if task.levels:
            quantiles[name], levels[name] = outputs, task.levels
    forecasts |= _rules(dataset, windows_W)
    if statistical:
        forecasts |= statistical_forecasts(dataset, windows_W)
    task, truth = config_task(runs[0]), _truth(dataset, windows_W)
    return Backtest(
        task, dataset, windows_W, step, truth, forecasts, quantiles, levels, tuple(names)
    )


def _settings(run: Run, data: Any) -> Any:
    """Where the data of a run are."""
    require(
        isinstance(run.config.task, Forecasting),
        f"{run.workdir}: a backtest is for runs that forecast series",
    )
    return run.config.data if data is None else run.config.data.holding(data)


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the models are called: after their folders, or the paths of these where that would be
    two of a name, or that of another column."""
    names = [run.workdir.name for run in runs]
    if len(set(names)) < len(names) or not TAKEN.isdisjoint(names):
        names = [str(run.workdir.absolute()) for run in runs]
    require(
        len(set(names)) == len(names), f"{listing(names)}: a folder is named twice; name others"
    )
    return tuple(names)


def _same(dataset: Any, windows_W: Array, other: Any, first: Run, run: Run) -> Array:
    """The windows of another run's test split that forecast what these do. Raises UserError where
    the two are not to be compared."""
    pair = f"{first.workdir} and {run.workdir}"
    for name in ("horizon", "targets"):
        ours, theirs = (getattr(x.info, name) for x in (dataset, other))
        require(
            ours == theirs,
            f"{pair} differ in data.{name}, {ours} and {theirs}: only runs that forecast the same "
            "are compared",
        )
    places = {origin: n for n, origin in enumerate(_origins(other))}
    chosen_W = np.array([places.get(origin, -1) for origin in _origins(dataset, windows_W)])
    ours, theirs = (_truth(x, w) for x, w in ((dataset, windows_W), (other, chosen_W)))
    known_WNC = ours.counted_WNC
    same = (chosen_W >= 0).all() and (known_WNC == theirs.counted_WNC).all()
    # They were scaled in float32, each by its own settings.
    far_WNC = np.abs(ours.actual_WNC - theirs.actual_WNC) > 1e-3 * ours.scale_WC[:, None]
    require(
        bool(same) and not far_WNC[known_WNC].any(),
        f"{pair} were trained on different data, or test on other times: only runs that forecast "
        "the same are compared",
    )
    return chosen_W


def _forecasts(run: Run, settings: Any, dataset: Any, windows_W: Array, refit: bool) -> Array:
    """(W, N, C, Q) of a run, in the units of the data."""
    if refit:
        members = run.members if isinstance(run, Ensemble) else (run,)
        found = [_refitted(member, settings, dataset, windows_W) for member in members]
        return np.asarray(np.mean(found, axis=0))
    task, forward, size = config_task(run), run.forward(), min(run.config.train.batch_size, 256)
    parts = _parts(windows_W, size)
    return np.concatenate([task.original(dataset, "test", w, forward) for w in parts])


def _parts(windows_W: Array, size: int) -> list[Array]:
    return np.array_split(windows_W, -(-len(windows_W) // size))


def _truth(dataset: Any, windows_W: Array) -> Truth:
    batch, series_W = dataset.batch("test", windows_W), dataset.series("test")[windows_W]
    count = len(dataset.info.targets)
    scale_WC = batch.units[:, 2].astype(np.float64) * dataset.scale.std_PD[series_W][:, :count]
    return Truth(dataset.unscale(batch.targets, series_W), batch.weights > 0, scale_WC)


def _rules(dataset: Any, windows_W: Array) -> dict[str, Array]:
    """The forecasts (W, N, C) of naive rules and of a linear regression, in the units of the
    data."""
    info = dataset.info
    channels = len(info.targets)
    rules: dict[str, Any] = dict(
        naive_forecasts(channels, info.lookback, info.horizon, info.season)
    )
    if (linear := linear_of(dataset)) is not None:
        rules["linear"] = lambda batch: linear(batch.inputs[..., :channels])
    found: dict[str, list[Array]] = {name: [] for name in rules}
    for part in _parts(windows_W, 256):
        batch, series = dataset.batch("test", part), dataset.series("test")[part]
        for name, rule in rules.items():
            found[name].append(dataset.unscale(np.asarray(rule(batch)), series))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _refitted(run: Run, settings: Any, dataset: Any, windows_W: Array) -> Array:
    """The forecasts (W, N, C, Q) of runs trained anew up to each origin."""
    found: dict[int, Array] = {}
    for folder, numbers, config in _configs(run, settings, dataset, windows_W):
        log.info("%d of %d forecasts made; training %s", len(found), len(windows_W), folder)
        # What is to be said of the data has been said of the first origin's.
        with hushed() if found else nullcontext():
            fit(config, folder, test=False, plots=False, quiet=True)
            again = load(folder)
            data: Any = config.data.load(again.assets)
        places = {origin: n for n, origin in enumerate(_origins(data))}
        for n, origin in zip(numbers, _origins(dataset, windows_W[numbers]), strict=True):
            require(
                origin in places,
                f"--refit: at {dataset.times('test', windows_W[[n]])[0, 0]} the last rows of the "
                "horizon have no target: refit from other origins (--step, --windows)",
            )
            where = np.array([places[origin]])
            found[int(n)] = config_task(again).original(data, "test", where, again.forward())[0]
    return np.stack([found[n] for n in range(len(windows_W))])


@contextmanager
def hushed() -> Iterator[None]:
    """The package says nothing but errors meanwhile."""
    package = logging.getLogger("flax_lstm")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _origins(dataset: Any, windows: Any = slice(None)) -> list[tuple[str, int]]:
    """The series and the first time (as a number, for local times may repeat) of test windows."""
    buffer, first_W = dataset.buffer, dataset.first_rows("test")[windows]
    names = buffer.ids[dataset.series("test")[windows]]
    stamps = buffer.times.as_unit("ns").asi8[buffer.time_R[first_W]]
    return [(str(name), int(stamp)) for name, stamp in zip(names, stamps, strict=True)]


def config_task(run: Run) -> Forecasting:
    """The task of a run that forecasts."""
    task = run.config.task
    assert isinstance(task, Forecasting)
    return task


def _configs(
    run: Run, settings: Any, dataset: Any, windows_W: Array
) -> Iterator[tuple[Path, Array, Any]]:
    """For each time from which windows forecast: a folder, which of `windows_W` these are, and the
    run's config over a table that ends, for every series, with its forecast."""
    info, buffer = dataset.info, dataset.buffer
    frame = settings.whole()
    stamps = info.times(frame, str(settings.path)).as_unit("ns").asi8
    settled = {name: getattr(info, name) for name in ("lookback", "horizon", "season")}
    # What the run found on its own validation windows is found anew.
    config = replace(run.config, task=replace(config_task(run), stretch=()))
    first_W = dataset.first_rows("test")[windows_W]
    time_U = buffer.times.as_unit("ns").asi8
    begin_W, end_W = (time_U[buffer.time_R[first_W + n]] for n in (0, info.horizon - 1))
    for begin in np.unique(begin_W):
        numbers = np.flatnonzero(begin_W == begin)
        # The rows of a window may lie further apart in one series than in another.
        end_R: Any = end_W[numbers].max()
        if info.id_column:
            names = buffer.ids[dataset.series("test")[windows_W[numbers]]]
            ends = dict(zip(map(str, names), end_W[numbers], strict=True))
            end_R = np.array([ends.get(str(name), end_R) for name in frame[info.id_column]])
        name = f"{pd.Timestamp(begin):%Y-%m-%dT%H%M%S}"
        folder = run.workdir / "backtest" / name
        folder.parent.mkdir(exist_ok=True)
        table = folder.with_suffix(".parquet")
        frame[stamps <= end_R].to_parquet(table, index=False)
        changes: dict[str, Any] = {**settled, "path": str(table)}
        if not info.id_column:
            rows, total = int(first_W[numbers[0]]), len(buffer.values_RD)
            share = settings.split[1] if max(settings.split) <= 1 else settings.split[1] / total
            validation = max(round(share * total), info.horizon)
            changes["split"] = (rows - validation, validation, info.horizon)
        else:
            changes |= {"validation": 0, "test": 0}
        yield folder, numbers, replace(config, data=replace(settings, **changes))
