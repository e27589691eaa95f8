# SPDX-License-Identifier: Apache-2.0
"""Windows over one or many series that lie one after another in one buffer: a window is the number
of the row where its forecast begins, and nothing is copied until a batch is asked for.

Axes: P series, R rows of all series, U different times, D input channels (the C targets first),
B windows of a batch, T steps of the look-back, N steps of the horizon, K covariates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from flax_lstm.data.base import Batch, Known
from flax_lstm.data.order import EpochOrder, in_order

Array = np.ndarray
SPLITS = ("train", "validation", "test")


class Scale(NamedTuple):
    """By what the channels of each series are scaled, and how hard they are to forecast; float64.
    Of the training rows."""

    mean_PD: Array
    std_PD: Array
    naive_PC: Array  # mean |x[t] - x[t - season]| of the targets, scaled

    def units(self, reference_C: Array) -> Array:
        """What a batch says of its targets, float32 (P, 4, C): the mean in units of the scale, the
        scale in units of `reference_C` (so that it fits into float32 whatever the units of the
        data), the error of the seasonal naive, scaled, and the scale as it is, for counts (as near
        as float32 has it)."""
        count = self.naive_PC.shape[1]
        mean_PC, std_PC = self.mean_PD[:, :count], self.std_PD[:, :count]
        bounded_PC = np.clip(std_PC, 1e-30, 1e30)
        parts = (mean_PC / std_PC, std_PC / reference_C, self.naive_PC, bounded_PC)
        return np.stack(parts, axis=1).astype(np.float32)


class Held(NamedTuple):
    """What was known at a time of series whose holes were interpolated: within a hole, no more than
    the value before it."""

    known_RD: Array  # bool
    values_RD: Array  # float32, scaled; what is absent is the value before

    def before(self, rows_BT: Array, values_BTD: Array) -> Array:
        """The look-backs, with holes that reach up to the forecast as they are seen from there."""
        known_BTD = self.known_RD[rows_BT]
        closed_BTD = np.logical_or.accumulate(known_BTD[:, ::-1], axis=1)[:, ::-1]
        return np.where(closed_BTD, values_BTD, self.values_RD[rows_BT])


class Buffer(NamedTuple):
    """All series, one after another."""

    ids: Array  # (P,) object
    begins: Array  # (P + 1,) int64: where each series begins; the last is R
    times: pd.DatetimeIndex  # (U,), each time once
    time_R: Array  # int32, which of the times
    values_RD: Array  # float32, scaled; what is absent was filled
    observed_RC: Array  # bool, where a target was measured
    position_U: Array  # int64, number of the time on its grid
    calendar_UK: Array  # float32
    future_RK: Array  # float32, known in advance by row; K may be 0
    static_PF: Array  # float32
    codes_PG: Array  # int32
    units_P4C: Mapping[str, Array]  # see `Scale.units`, by split
    held: Held | None = None  # where holes were interpolated


@dataclass(frozen=True)
class WindowForm:
    """The sizes of windows, and what is told about them."""

    lookback: int
    horizon: int
    season: int
    masked: bool  # batches say which values were observed


class WindowDataset:
    """A buffer and, for each split, its windows: the row where the forecast begins. The windows of
    a split count from 0. A look-back that begins before its series is filled with the first value,
    marked as not observed."""

    def __init__(self, form: WindowForm, buffer: Buffer, windows: Mapping[str, Array]):
        self.form, self.buffer, self._windows = form, buffer, windows

    def size(self, split: str) -> int:
        """Windows of a split."""
        return len(self._windows[split])

    def first_rows(self, split: str) -> Array:
        """(windows,): the row of the buffer where each window's forecast begins."""
        return self._windows[split]

    def series(self, split: str) -> Array:
        """(windows,): the number of each window's series."""
        return np.searchsorted(self.buffer.begins, self._windows[split], side="right") - 1

    def times(self, split: str, windows_B: Array | None = None) -> Array:
        """The times (windows, N) of the forecast steps, datetime64 without time zone, in the order
        of `evaluation`."""
        stamps = self.stamps(split, windows_B)
        return stamps.tz_localize(None).to_numpy().reshape(-1, self.form.horizon)

    def stamps(self, split: str, windows_B: Array | None = None) -> pd.DatetimeIndex:
        """The same times in their zone, window by window: local ones alone would repeat as clocks
        go back."""
        first_B = self._windows[split] if windows_B is None else self._windows[split][windows_B]
        rows_BN = first_B[:, None] + np.arange(self.form.horizon)
        return self.buffer.times[self.buffer.time_R[rows_BN.ravel()]]

    def observed(self, split: str) -> int:
        """Target values that are scored over a split."""
        before_R1 = np.concatenate([[0], np.cumsum(self.buffer.observed_RC.sum(axis=1))])
        first = self._windows[split]
        return int((before_R1[first + self.form.horizon] - before_R1[first]).sum())

    def train(self, batch_size: int, seed: int) -> "WindowBatches":
        """Shuffled batches without end; each window once an epoch."""
        return WindowBatches(self, EpochOrder(self.size("train"), batch_size, seed))

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Each window of a split once, series by series in time order; rows that fill the last
        batch have weight 0."""
        return (
            self.batch(split, windows_B) for windows_B in in_order(self.size(split), batch_size)
        )

    def batch(self, split: str, windows_B: Array) -> Batch:
        """These windows of a split; -1 gives a row of weight 0."""
        form, buffer = self.form, self.buffer
        lookback, horizon = form.lookback, form.horizon
        first_B = self._windows[split][np.maximum(windows_B, 0)]
        series_B = np.searchsorted(buffer.begins, first_B, side="right") - 1
        rows_BS = first_B[:, None] + np.arange(-lookback, horizon)
        begin_B1 = buffer.begins[series_B][:, None]
        inside_BT = rows_BS[:, :lookback] >= begin_B1
        rows_BS = np.maximum(rows_BS, begin_B1)
        values_BSD = buffer.values_RD[rows_BS]
        observed_BSC = buffer.observed_RC[rows_BS]
        counted_B11 = (windows_B >= 0)[:, None, None]
        targets = buffer.observed_RC.shape[1]
        inputs_BTD = np.ascontiguousarray(values_BSD[:, :lookback])
        if buffer.held is not None:
            inputs_BTD = buffer.held.before(rows_BS[:, :lookback], inputs_BTD)
        return Batch(
            inputs=inputs_BTD,
            targets=np.ascontiguousarray(values_BSD[:, lookback:, :targets]),
            lengths=np.full(len(windows_B), lookback, np.int32),
            weights=(observed_BSC[:, lookback:] & counted_B11).astype(np.float32),
            covariates=Known(
                phase=self._phase(first_B),
                future=self._future(rows_BS),
                observed=(observed_BSC[:, :lookback] & inside_BT[..., None]).astype(np.float32)
                if form.masked
                else None,
                static=buffer.static_PF[series_B] if buffer.static_PF.shape[1] else None,
                codes=buffer.codes_PG[series_B] if buffer.codes_PG.shape[1] else None,
            ),
            units=buffer.units_P4C[split][series_B],
        )

    def _phase(self, first_B: Array) -> Array:
        position_B = self.buffer.position_U[self.buffer.time_R[first_B]]
        return ((position_B - self.form.lookback) % self.form.season).astype(np.int32)

    def _future(self, rows_BS: Array) -> Array | None:
        parts = []
        if self.buffer.calendar_UK.shape[1]:
            parts.append(self.buffer.calendar_UK[self.buffer.time_R[rows_BS]])
        if self.buffer.future_RK.shape[1]:
            parts.append(self.buffer.future_RK[rows_BS])
        return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0] if parts else None


@dataclass(frozen=True)
class WindowBatches:
    """Training batches by global step (`BatchSource`)."""

    dataset: WindowDataset
    order: EpochOrder

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Batch:
        return self.dataset.batch("train", self.order[step])


def scored(first_W: Array, horizon: int, observed_RC: Array) -> Array:
    """Those of the windows that have something to forecast that was measured."""
    if observed_RC.all() or not len(first_W):
        return first_W
    before_R1 = np.concatenate([[0], np.cumsum(observed_RC.any(axis=1))])
    return first_W[before_R1[first_W + horizon] > before_R1[first_W]]
