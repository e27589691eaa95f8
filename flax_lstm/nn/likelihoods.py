# SPDX-License-Identifier: Apache-2.0
"""Distributions of a value to come: what a forecaster's outputs are the parameters of.

A module gives `sizes` numbers for each value: those that are values themselves (in the unit of the
data, moved and stretched with a window), those that are lengths (stretched with it) and those
without a unit. Targets are scaled as the data say in `units` (see `flax_lstm.data.windows.Scale`).

Axes: B batch, N horizon, C target channels, P parameters, Q quantiles, S sample paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy import special

from flax_lstm.data.base import SeriesForm

Array = jax.Array
HALVINGS = 24  # of an interval of counts
LEAST = 1e-3  # spread at least, in units of the window; dispersion of counts at least


class Paths(NamedTuple):
    """Sample paths in place of parameters."""

    values_BNCS: Array


class Sizes(NamedTuple):
    """How many of a likelihood's parameters are of each kind."""

    values: int
    lengths: int
    shapes: int


class Likelihood(Protocol):
    """A distribution, given its parameters [B, N, C, P]."""

    sizes: ClassVar[Sizes]

    def log_density(self, parameters: Array, targets_BNC: Array, units_BUC: Array) -> Array:
        """[B, N, C], of the targets."""
        ...

    def quantiles(self, parameters: Array, levels: Sequence[float], units_BUC: Array) -> Array:
        """[B, N, C, Q] in the scale of the targets."""
        ...

    def possible(self, values_BNCQ: Array, units_BUC: Array) -> Array:
        """The nearest values that there can be."""
        ...


def placed(
    y_BNCP: Array, level_BNC: Array, location_B1C: Array, scale_B1C: Array, form: SeriesForm
) -> Array:
    """Outputs for a window that was normalised by location and scale, in the scale of the data;
    `level` is what values are relative to within the window."""
    if form.likelihood is None:
        y_BNCP = y_BNCP + level_BNC[..., None]
        return y_BNCP * scale_B1C[..., None] + location_B1C[..., None]
    values, lengths, _ = form.likelihood.sizes
    y_value, y_length, y_shape = jnp.split(y_BNCP, (values, values + lengths), axis=-1)
    scale, location = scale_B1C[..., None], location_B1C[..., None]
    y_value = (y_value + level_BNC[..., None]) * scale + location
    return jnp.concatenate([y_value, (nn.softplus(y_length) + LEAST) * scale, y_shape], axis=-1)


@dataclass(frozen=True)
class StudentT:
    """Student's t: location, spread, and 2 + softplus(shape) degrees of freedom, so that the mean
    is there and outliers cost little (as in DeepAR's successors)."""

    sizes: ClassVar[Sizes] = Sizes(1, 1, 1)

    @staticmethod
    def freedom(parameters: Array) -> Array:
        """Degrees of freedom."""
        return 2 + nn.softplus(parameters[..., 2])

    def log_density(self, parameters: Array, targets_BNC: Array, units_BUC: Array) -> Array:
        location, spread = parameters[..., 0], parameters[..., 1]
        freedom = self.freedom(parameters)
        return jax.scipy.stats.t.logpdf((targets_BNC - location) / spread, freedom) - jnp.log(
            spread
        )

    def quantiles(self, parameters: Array, levels: Sequence[float], units_BUC: Array) -> Array:
        """Those of t are interpolated over 1 / degrees of freedom, to some 1e-6."""
        nodes = np.linspace(0, 0.5, 513)
        with np.errstate(divide="ignore"):
            tables = [special.stdtrit(1 / nodes[1:], level) for level in levels]
        tables = [
            np.concatenate([[special.ndtri(q)], t]) for q, t in zip(levels, tables, strict=True)
        ]
        inverse = 1 / self.freedom(parameters)
        t_BNCQ = jnp.stack([jnp.interp(inverse, nodes, table) for table in tables], axis=-1)
        return parameters[..., 0, None] + parameters[..., 1, None] * t_BNCQ

    def possible(self, values_BNCQ: Array, units_BUC: Array) -> Array:
        return values_BNCQ

    def sample(self, key: Array, parameters: Array) -> Array:
        """One value for each set of parameters [..., P]."""
        t = jax.random.t(key, self.freedom(parameters))
        return parameters[..., 0] + parameters[..., 1] * t


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts: mean m = softplus(location in counts) and dispersion a = softplus(shape), with the
    variance m + a m^2 (Salinas et al. 2020, section 3.1)."""

    sizes: ClassVar[Sizes] = Sizes(1, 0, 1)

    @staticmethod
    def moments(parameters: Array, units_BUC: Array) -> tuple[Array, Array]:
        """Mean in counts, and 1 / dispersion."""
        counts = in_counts(parameters[..., 0], units_BUC)
        return nn.softplus(counts) + 1e-6, 1 / (nn.softplus(parameters[..., 1]) + LEAST)

    def log_density(self, parameters: Array, targets_BNC: Array, units_BUC: Array) -> Array:
        mean, size = self.moments(parameters, units_BUC)
        count = jnp.round(in_counts(targets_BNC, units_BUC))
        # gamma(k + r) / (gamma(r) k!) = 1 / ((k + r) B(k + 1, r))
        choose = -jnp.log(count + size) - jax.scipy.special.betaln(count + 1, size)
        return choose + size * jnp.log(size / (size + mean)) + count * jnp.log(mean / (size + mean))

    def quantiles(self, parameters: Array, levels: Sequence[float], units_BUC: Array) -> Array:
        """The smallest counts whose probability of not being exceeded reaches the level, halved
        down from Cantelli's bounds; the distribution function is the incomplete beta function."""
        mean, size = (x[..., None] for x in self.moments(parameters, units_BUC))
        share, deviation = size / (size + mean), jnp.sqrt(mean + mean**2 / size)
        level = jnp.asarray(levels, mean.dtype).reshape((1,) * (mean.ndim - 1) + (-1,))
        reach = jnp.sqrt((1 - level) / level)
        below = jnp.floor(jnp.maximum(mean - deviation * reach, 0)) - 1
        above = jnp.ceil(mean + deviation / reach) + 1

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            below, above = bounds
            middle = jnp.floor((below + above) / 2)
            reached = jax.scipy.special.betainc(size, middle + 1, share) >= level
            inside = (middle > below) & (middle < above)
            below = jnp.where(inside & ~reached, middle, below)
            return below, jnp.where(inside & reached, middle, above)

        counts = jax.lax.fori_loop(0, HALVINGS, halve, (below, above))[1]
        offset, std = units_BUC[:, 0, None, :, None], units_BUC[:, 3, None, :, None]
        return counts / std - offset

    def possible(self, values_BNCQ: Array, units_BUC: Array) -> Array:
        """None below 0."""
        return jnp.maximum(values_BNCQ, -units_BUC[:, 0, None, :, None])


def in_counts(scaled_BNC: Array, units_BUC: Array) -> Array:
    """Scaled values in the units of the data."""
    return (scaled_BNC + units_BUC[:, 0, None]) * units_BUC[:, 3, None]


def path_quantiles(paths: Paths, levels: Sequence[float]) -> Array:
    """[B, N, C, Q] of sample paths."""
    quantiles: Any = partial(jnp.quantile, paths.values_BNCS, axis=-1)
    return jnp.stack([quantiles(level) for level in levels], axis=-1)
