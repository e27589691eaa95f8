# SPDX-License-Identifier: Apache-2.0
"""In which order training sees the examples: a permutation per epoch, cut into batches, addressed
by the step."""

import functools
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@functools.lru_cache(
    maxsize=8
)  # safe across threads: two may draw the same permutation, never different ones
def permutation(size: int, seed: int, epoch: int) -> Array:
    """The order of `size` examples in one epoch, read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class EpochOrder:
    """Item `step` holds the examples of that batch: (B,) integers, -1 for padding at the end of an
    epoch's last batch.

    Every example appears exactly once an epoch; the steps go on without end, one epoch after
    another.
    """

    size: int  # examples in one epoch
    batch_size: int
    seed: int

    def __len__(self) -> int:
        """Steps in one epoch."""
        return -(-self.size // self.batch_size)

    def __getitem__(self, step: int) -> Array:
        epoch, index = divmod(step, len(self))
        rows = permutation(self.size, self.seed, epoch)[
            index * self.batch_size : (index + 1) * self.batch_size
        ]
        return padded(rows, self.batch_size)


def in_order(size: int, batch_size: int) -> list[Array]:
    """The batches of one pass from the first example to the last, padded with -1 like those of
    `EpochOrder`."""
    return [
        padded(np.arange(i, min(i + batch_size, size)), batch_size)
        for i in range(0, size, batch_size)
    ]


def padded(rows: Array, batch_size: int) -> Array:
    """`rows`, filled up with -1 to `batch_size`."""
    return np.pad(rows, (0, batch_size - len(rows)), constant_values=-1)
