"""Estimates and 95 % intervals from counts and sums that carry Gaussian noise of known size.

The intervals are about that noise alone. Ratios and quantiles invert an exact test, so they hold however
large the noise is; a standard deviation uses the delta method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

Floats = npt.NDArray[np.float64]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_ROUNDING = 1e-6  # of a count, when it is exact
_POINTS = 50  # of a histogram's cell, where its cumulative count is looked at


@dataclass(frozen=True)
class Figure:
    """A number and its 95 % interval under the privacy noise; `low` <= `value` <= `high`."""

    value: float
    low: float
    high: float

    def mapped(self, start: float, step: float) -> Figure:
        """start + step * figure; step > 0."""
        return Figure(start + step * self.value, start + step * self.low, start + step * self.high)


@dataclass(frozen=True)
class Counts:
    """Noised counts of a column's cells, after all columns were made to agree on the number of patients.

    Attributes:
        cells: float64 [m]; the first `present` ones are of patients with a value, one more of the others.
        variance: v, of the noise in each cell before.
        coupling: κ; sums over the cells of A and of B have the covariance v (|A and B| + κ |A| |B|).
    """

    cells: Floats
    present: int
    variance: float
    coupling: float

    @property
    def patients(self) -> float:
        """Patients with a value."""
        return float(self.cells[: self.present].sum())

    @property
    def patients_variance(self) -> float:
        return self._covariance(self.present, self.present, self.present)

    def figure(self) -> Figure:
        """Patients with a value."""
        error = _Z * math.sqrt(self.patients_variance)
        return _kept(self.patients, self.patients - error, self.patients + error, 0.0, math.inf)

    def too_few(self, minimum: int) -> bool:
        """Whether fewer patients have a value than `minimum` and two standard deviations of noise."""
        return _too_few(self.patients, self.patients_variance, minimum)

    def missing_share(self) -> Figure | None:
        """Share of all patients without a value; None where there is no cell for them."""
        return None if self.present == len(self.cells) else self._share(self.present, len(self.cells))

    def shares(self, minimum: int) -> list[Figure | None]:
        """Each cell's share of the patients with a value; None where the cell holds too few."""
        of_cell = self._covariance(1, 1, 1)
        return [
            None if _too_few(float(self.cells[k]), of_cell, minimum) else self._share(k, self.present)
            for k in range(self.present)
        ]

    def _share(self, cell: int, whole: int) -> Figure:
        return ratio(
            float(self.cells[cell]),
            float(self.cells[:whole].sum()),
            (self._covariance(1, 1, 1), self._covariance(1, 1, whole), self._covariance(whole, whole, whole)),
            lowest=0.0,
        )

    def _covariance(self, common: int, first: int, second: int) -> float:
        return self.variance * (common + self.coupling * first * second)


def consistent(parts: Sequence[tuple[Floats, int]], variance: float) -> list[Counts]:
    """Make all columns agree on the number of patients, by least squares.

    With cells x of column c, m_c of them, S_c = Σ x and W = Σ_c 1 / m_c (Hay et al. 2010, "Boosting the
    accuracy of differentially private histograms through consistency"): N = (Σ_c S_c / m_c) / W, and the
    cells become x + (N - S_c) / m_c. Then κ = (1 / (W m_c) - 1) / m_c, and N has the variance v / W.

    Args:
        parts: of each column the noised cells, float64 [m], and how many of them are of patients with a
            value.
        variance: v, of the independent noise in each cell.
    """
    weight = math.fsum(1 / len(cells) for cells, _ in parts)
    patients = math.fsum(float(cells.sum()) / len(cells) for cells, _ in parts) / weight
    return [
        Counts(
            cells=cells + (patients - cells.sum()) / len(cells),
            present=present,
            variance=variance,
            coupling=(1 / (weight * len(cells)) - 1) / len(cells),
        )
        for cells, present in parts
    ]


@dataclass(frozen=True)
class Spread:
    """Moments of numbers in [-1, 1].

    Attributes:
        variance: its estimate, which may be negative.
        variance_sd: standard deviation of the noise in it; infinite where the number of patients isn't
            clearly above its noise.
    """

    mean: Figure
    variance: float
    variance_sd: float

    @property
    def deviation(self) -> Figure:
        """Standard deviation."""
        error = _Z * self.variance_sd
        low, value, high = (math.sqrt(min(1.0, max(0.0, self.variance + d))) for d in (-error, 0.0, error))
        return Figure(value, low, high)


def spread(total: float, inner: float, count: Counts) -> Spread:
    """Mean m = Σs / n, and variance V = 1 - Σ(1 - u) / n - m².

    The noise of the three sums is independent. V is freed of the bias that noise brings to second order,
    and has its standard deviation to first order (delta method).

    Args:
        total: noised Σs over patients.
        inner: noised Σ(1 - u).
        count: of n.
    """
    n, v, of_n = count.patients, count.variance, count.patients_variance
    if n <= 0 or n * n <= _Z * _Z * of_n:
        return Spread(Figure(0.0, -1.0, 1.0), 0.0, math.inf)
    m, r = total / n, inner / n
    bias = (v + of_n * (r + 3 * m * m)) / (n * n)
    noise = math.sqrt(v * (1 + 4 * m * m) + of_n * (r + 2 * m * m) ** 2) / n
    return Spread(ratio(total, n, (v, 0.0, of_n), lowest=-1.0), 1 - r - m * m + bias, noise)


def quantiles(count: Counts, levels: Sequence[float]) -> list[Figure]:
    """Where the cumulative count of a histogram reaches each level of the patients, in cells from its lower
    end, linear within a cell. More than 1.96 standard deviations' worth of patients must be there.

    An interval holds every place at which (cumulative count - level * patients), which is linear in the
    noised cells, is within 1.96 of its own standard deviations of 0 (Woodruff 1952).
    """
    cells = count.cells[: count.present]
    bins, n = len(cells), float(cells.sum())
    known = np.append(0.0, np.clip(isotonic_regression(np.cumsum(cells)).x, 0.0, n))
    known[-1] = n
    places = np.arange(bins * _POINTS + 1) / _POINTS
    weights = np.clip(places[:, None] - np.arange(bins), 0.0, 1.0)
    cumulative, whole, squares = weights @ cells, weights.sum(axis=1), (weights**2).sum(axis=1)
    figures = []
    for level in levels:
        k = max(1, int(np.searchsorted(known, level * n)))
        value = k - 1 + (level * n - known[k - 1]) / (known[k] - known[k - 1])
        # Weights of the cells are `weights` - level: their squares, and the square of their sum.
        factor = squares - 2 * level * whole + level * level * bins
        factor += count.coupling * (whole - level * bins) ** 2
        error = _Z * np.sqrt(count.variance * np.maximum(0.0, factor))
        over = cumulative - level * n
        low = _first_zero(places, over + error)
        high = _first_zero(places[::-1], (error - over)[::-1])
        figures.append(_kept(float(value), low, high, 0.0, float(bins)))
    return figures


def ratio(top: float, below: float, noise: tuple[float, float, float], lowest: float) -> Figure:
    """top / below, within [lowest, 1], with Fieller's (1954) interval: every r for which top - r * below
    is within 1.96 of its standard deviations of 0. All of [lowest, 1] where `below` isn't clearly positive.

    Args:
        noise: variance of top, covariance, variance of below.
    """
    of_top, both, of_below = noise
    square = below * below - _Z * _Z * of_below
    if below <= 0 or square <= 0:
        return Figure(max(lowest, 0.0), lowest, 1.0)
    middle = (top * below - _Z * _Z * both) / square
    root = math.sqrt(max(0.0, middle * middle - (top * top - _Z * _Z * of_top) / square))
    return _kept(top / below, middle - root, middle + root, lowest, 1.0)


def _first_zero(places: Floats, values: Floats) -> float:
    """Where `values`, linear between places, stop to be negative."""
    i = int(np.argmax(values >= 0))
    if i == 0:
        return float(places[0])
    step = values[i - 1] / (values[i - 1] - values[i])
    return float(places[i - 1] + step * (places[i] - places[i - 1]))


def _too_few(count: float, variance: float, minimum: int) -> bool:
    return count <= 0 or count + _ROUNDING < minimum + 2 * math.sqrt(variance)


def _kept(value: float, low: float, high: float, lowest: float, highest: float) -> Figure:
    value, low, high = (min(highest, max(lowest, v)) for v in (value, low, high))
    return Figure(value, min(low, value), max(high, value))
