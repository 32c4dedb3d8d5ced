"""Metrics as formulas on histograms, exact or noised.

Every function takes any leading axes (draws of a Monte Carlo run) and gives NaN where a metric is
undefined. Sums over many cells use noised counts as they are: the noise has mean zero, and taking
negative counts as zero would bias them. Nothing is kept within its range here; `RANGES` is for the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit, ndtr

Array = np.ndarray[Any, np.dtype[Any]]

CALIBRATION_GROUPS = 10
ROUNDING = 1e-9
PRECISION_SLACK = 0.15
NEWTON_STEPS = 60
LONGEST_STEP = 2.0
STEEPEST = 50.0
BISECTIONS = 30


@dataclass(frozen=True)
class Grid:
    """Which of `bins` equal score intervals on [0, 1] the last axis of a histogram stands for.

    Attributes:
        columns: int64 [columns], rising; all of them, or those that hold a patient.
    """

    bins: int
    columns: Array

    @staticmethod
    def whole(bins: int) -> Grid:
        return Grid(bins, np.arange(bins))

    @property
    def middles(self) -> Array:
        """Middle of each interval, float64 [columns]."""
        return np.asarray((self.columns + 0.5) / self.bins)

    @property
    def groups(self) -> Array:
        """Which score interval of the calibration curve each column falls in, as float64 0 or 1
        [columns, groups]: ten groups, or one a bin where bins can't be joined to ten."""
        count = calibration_groups(self.bins)
        return np.asarray((self.columns * count // self.bins)[:, None] == np.arange(count), dtype=np.float64)

    def below(self, threshold: float) -> int:
        """How many of the columns lie below a threshold, which must be an edge of the bins.

        Raises:
            ValueError: if it isn't.
        """
        edge = threshold * self.bins
        if not 0 <= threshold <= 1 or abs(edge - round(edge)) > ROUNDING * self.bins:
            raise ValueError(f"threshold {threshold} is no edge of {self.bins} bins")
        return int(np.searchsorted(self.columns, round(edge)))


def calibration_groups(bins: int) -> int:
    return CALIBRATION_GROUPS if bins % CALIBRATION_GROUPS == 0 else bins


def ratio(part: Array, whole: Array) -> Array:
    """part / whole, NaN where whole isn't positive; what rounding alone put outside [0, 1] is put back."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    found = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    np.divide(part, whole, out=found, where=whole > 0)
    kept = np.clip(found, 0.0, 1.0)
    return np.where(np.abs(found - kept) < ROUNDING, kept, found)


def total(h: Array) -> Array:
    """Patients in histograms [..., 2, bins]."""
    return np.asarray(h.sum(axis=(-2, -1)))


def auroc(h: Array) -> Array:
    """P(score of a positive > of a negative) + half the ties (Mann & Whitney 1947), ties within a bin.

    Args:
        h: counts by label (0, 1) and rising score [..., 2, bins].
    """
    negatives, positives = h[..., 0, :], h[..., 1, :]
    below = np.cumsum(negatives, axis=-1) - negatives
    n, p = negatives.sum(axis=-1), positives.sum(axis=-1)
    wins = (positives * (below + negatives / 2)).sum(axis=-1)
    return np.where(np.minimum(n, p) > 0, ratio(wins, n * p), np.nan)


def auprc(h: Array) -> Array:
    """Average precision: Σ (recall_n - recall_{n-1}) precision_n over falling thresholds.

    Args:
        h: counts by label and score, as for `auroc`. Both running sums use noised counts as they are, so
            that what noise does to empty cells cancels. Precision is a ratio of few patients at the highest
            thresholds, so it is bounded there; but not at 1 exactly, because a good model's is near 1, and
            keeping only the noise that goes down would pull the average down.
    """
    negatives, positives = h[..., 0, ::-1], h[..., 1, ::-1]
    found, called = np.cumsum(positives, axis=-1), np.cumsum(positives + negatives, axis=-1)
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    precision = precision.clip(-PRECISION_SLACK, 1.0 + PRECISION_SLACK)
    return ratio((positives * precision).sum(axis=-1), positives.sum(axis=-1))


def brier(h: Array, middles: Array) -> Array:
    """Mean squared difference of score and label (0, 1), scores rounded to the middles of bins."""
    missed = (h[..., 0, :] * middles**2 + h[..., 1, :] * (1 - middles) ** 2).sum(axis=-1)
    return ratio(missed, total(h))


def operating(h: Array, below: int) -> tuple[Array, Array, Array]:
    """Accuracy, sensitivity and specificity where the first `below` columns are called negative."""
    rejected, found = h[..., 0, :below].sum(axis=-1), h[..., 1, below:].sum(axis=-1)
    return (
        ratio(rejected + found, total(h)),
        ratio(found, h[..., 1, :].sum(axis=-1)),
        ratio(rejected, h[..., 0, :].sum(axis=-1)),
    )


def precision(h: Array, below: int) -> Array:
    """Share of positives among those who score in the columns from `below` on."""
    found = h[..., 1, below:].sum(axis=-1)
    return ratio(found, found + h[..., 0, below:].sum(axis=-1))


def best_of_both(h: Array) -> Array:
    """The largest, over the columns' lower edges as thresholds, of the least of sensitivity and precision."""
    falling = np.cumsum(h[..., ::-1], axis=-1)
    positives = h[..., 1, :].sum(axis=-1)
    found, called = falling[..., 1, :], falling.sum(axis=-2)
    both = np.minimum(ratio(found, positives[..., None]), ratio(found, called))
    best = np.max(np.nan_to_num(both, nan=-np.inf), axis=-1)
    return np.where(np.isfinite(best) & (positives > 0), best, np.nan)


def sensitivity_at(h: Array, specificity: float) -> Array:
    """Sensitivity where specificity is so much, on the ROC curve with straight lines between its points, as
    `quantile` finds them."""
    negatives, positives = h[..., 0, ::-1], h[..., 1, ::-1]
    place = quantile(negatives, 1.0 - specificity) * negatives.shape[-1]
    cells = np.arange(negatives.shape[-1])
    inside = (np.nan_to_num(place, nan=0.0)[..., None] - cells).clip(0.0, 1.0)
    found = ratio((positives * inside).sum(axis=-1), positives.sum(axis=-1))
    return np.where(np.isnan(place), np.nan, found)


def calibration_line(h: Array, middles: Array) -> tuple[Array, Array]:
    """Intercept and slope of logit P(label 1) = intercept + slope · logit(score) (Cox 1958); 0 and 1 in a
    calibrated model. Maximum likelihood by Newton's method.

    Scores are rounded to the middles of bins first: it is the line of the model that says so. Noised
    counts enter as they are, because the equations that the estimate solves are linear in them.
    NaN if no finite line fits (labels that a score separates), or noise leaves no maximum.
    """
    x, n, p = logit(middles), h.sum(axis=-2), h[..., 1, :]
    intercept, slope = np.zeros(n.shape[:-1]), np.ones(n.shape[:-1])
    done = np.zeros(n.shape[:-1], dtype=np.bool_)
    for _ in range(NEWTON_STEPS):
        fitted = expit(intercept[..., None] + slope[..., None] * x)
        rest, weight = p - n * fitted, n * fitted * (1 - fitted)
        g, k = rest.sum(axis=-1), (rest * x).sum(axis=-1)
        a, b, c = weight.sum(axis=-1), (weight * x).sum(axis=-1), (weight * x * x).sum(axis=-1)
        determinant = a * c - b * b
        sound = (a > 0) & (determinant > ROUNDING * np.abs(a * c))
        scale = np.where(sound, determinant, 1.0)
        first, second = (c * g - b * k) / scale, (a * k - b * g) / scale
        length = np.maximum(np.hypot(first, second) / LONGEST_STEP, 1.0)
        intercept, slope = intercept + first * sound / length, slope + second * sound / length
        done = sound & (np.hypot(first, second) < ROUNDING)
        if (done | ~sound).all():
            break
    done &= (np.abs(intercept) < STEEPEST) & (np.abs(slope) < STEEPEST)
    return np.where(done, intercept, np.nan), np.where(done, slope, np.nan)


def calibration_sums(h: Array, grid: Grid) -> Array:
    """Σ score - Σ label in each score interval of the calibration curve, float64 [..., groups]."""
    m = grid.middles
    return np.asarray((h[..., 0, :] * m + h[..., 1, :] * (m - 1)) @ grid.groups)


def calibration_error(h: Array) -> Array:
    """Σ over score intervals of share · |mean score - frequency| (Naeini et al. 2015), counts [2, bins]."""
    bins = h.shape[-1]
    groups = calibration_groups(bins)
    count, middles = h.sum(axis=-2), Grid.whole(bins).middles
    score_sum = (count * middles).reshape(groups, -1).sum(axis=1)
    positive_sum = h[1].reshape(groups, -1).sum(axis=1)
    return ratio(np.abs(score_sum - positive_sum).sum(), count.sum())


def denoised_calibration_error(h: Array, grid: Grid, noise: float) -> Array:
    """Expected calibration error without what noise adds to it.

    An interval's difference d = Σ score - Σ label comes with Gaussian noise of known standard deviation
    t, so Σ |d| is too large on average. The differences are shrunk by one factor f in [0, 1], chosen so
    that the mean of Σ |f d + t z|, z standard normal, is the Σ |d| that was seen (a folded normal has the
    mean t √(2/π) exp(-d²/2t²) + d (1 - 2 Φ(-d/t)), Leone et al. 1961). 0 if noise alone gives as much.

    Args:
        h: counts [..., 2, bins] with independent noise of standard deviation `noise` in every cell.
    """
    d, m = calibration_sums(h, grid), grid.middles
    t = noise * np.sqrt((m**2 + (1 - m) ** 2) @ grid.groups)
    seen = np.abs(d).sum(axis=-1)
    low, high = np.zeros(seen.shape), np.ones(seen.shape)
    for _ in range(BISECTIONS):
        factor = (low + high) / 2
        mean = factor[..., None] * d
        expected = t * np.sqrt(2 / np.pi) * np.exp(-0.5 * (mean / t) ** 2) + mean * (1 - 2 * ndtr(-mean / t))
        above = expected.sum(axis=-1) > seen
        low, high = np.where(above, low, factor), np.where(above, factor, high)
    return ratio(low * seen, total(h))


def error_values(errors: Array, moments: Array, width: float) -> dict[str, Array]:
    """Metrics of regression in the label's unit, from what `common.metrics.histograms` releases.

    Args:
        errors: patients by signed error over [-width, width], [..., bins].
        moments: sums over patients of u, u² and 4 (|u| - u²), where u = error / width; [..., 3].
    """
    count = errors.sum(axis=-1)
    folded = errors[..., errors.shape[-1] // 2 :] + errors[..., : errors.shape[-1] // 2][..., ::-1]
    square = ratio(moments[..., 1], count)
    return {
        "mae": width * ratio(moments[..., 1] + moments[..., 2] / 4, count),
        "rmse": width * np.sqrt(np.maximum(0.0, square)),
        "bias": width * ratio(moments[..., 0], count),
        "median_absolute_error": width * quantile(folded, 0.5),
        "absolute_error_90": width * quantile(folded, 0.9),
    }


def quantile(counts: Array, share: float) -> Array:
    """Quantile of numbers on [0, 1] from counts in equal cells [..., cells], evenly spread in each.

    Noise makes the running sum cross the wanted share several times: the middle of the first and the
    last crossing is taken.
    """
    cells = counts.shape[-1]
    after = np.cumsum(counts, axis=-1)
    before, whole = after - counts, after[..., -1:]
    wanted = share * whole
    upward = (before < wanted) & (after >= wanted)
    first = np.argmax(upward, axis=-1)
    last = cells - 1 - np.argmax(upward[..., ::-1], axis=-1)
    places = []
    for cell in (first, last):
        own = cell[..., None]
        start, step = np.take_along_axis(before, own, -1), np.take_along_axis(counts, own, -1)
        inside = np.divide(wanted - start, step, out=np.zeros_like(start), where=step > 0)
        places.append((own + inside.clip(0.0, 1.0))[..., 0] / cells)
    return np.where(whole[..., 0] > 0, (places[0] + places[1]) / 2, np.nan)


def mean_of(parts: Sequence[Array]) -> Array:
    """Mean over classes of those that are defined."""
    known = np.sum([~np.isnan(part) for part in parts], axis=0)
    return np.asarray(np.divide(_sum_of(parts), known, out=np.full(known.shape, np.nan), where=known > 0))


def sum_of(parts: Sequence[Array]) -> Array:
    """Sum over classes of those that are defined; NaN if none is."""
    return np.where(np.all([np.isnan(part) for part in parts], axis=0), np.nan, _sum_of(parts))


def _sum_of(parts: Sequence[Array]) -> Array:
    whole = np.zeros(np.shape(parts[0]))
    for part in parts:
        whole = whole + np.where(np.isnan(part), 0.0, part)
    return whole
