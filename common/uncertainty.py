"""Error bars: what noise, and what the luck of the sample, may have done to a metric.

Both come from Monte Carlo runs on public numbers alone: the released sums, and the standard deviation of
their noise, which sites declare. The runs are seeded: the same sums have the same error bars everywhere.

*Noise*: cells carry independent Gaussian noise of one known standard deviation; at merged sites variances
add. The same noise is added once more, and the 2.5 % and 97.5 % quantiles of the metrics that come of it
bound what a run without noise would have said (percentile bootstrap, Efron & Tibshirani 1993, ch. 13). That
supposes a metric whose spread hardly depends on the true counts. The calibration error isn't one, because
noise only adds to it; its interval inverts a test instead (`_calibration_interval`).

*Sampling*: other patients from the same population would have come out otherwise. The counts of cells are
drawn from Poisson distributions around the released ones; under noise those are first brought to the
nearest counts that aren't negative. A patient with many records counts as one with one, so the bars are
rather too wide. Of several classes or labels, whose histograms don't tell how one patient scored in all, the
metrics are taken to rise and fall together. For regression see `_error_deviations`. In survival the sums of
squared errors are drawn likewise and by themselves, which makes bars of the Brier score too wide; the draws
are of patients in a cell of time for each interval, and of a hundred risks.

Neither knows of the other: with noise, the true sampling error is that of counts which nobody has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from common import curves
from common.curves import Grid
from common.histograms import overall
from common.messages import Array, Arrays
from common.metrics import LINE, Measured, measure, value_ranges, values, within
from common.study import Study
from common.survival import coarser

Interval = tuple[float, float]

TAIL = 0.025
MOST_DRAWS, FEWEST_DRAWS = 1000, 200
NUMBERS = 4_000_000  # drawn for one group of patients, unless the fewest draws need more
NUMBERS_AT_ONCE = 2_000_000
SEED = 20_250_101
BISECTIONS = 30
CALIBRATION = "calibration_error"
MOST_RISKS = 100


@dataclass(frozen=True)
class Intervals:
    """95 % intervals by metric, named as the fields of `Measured`, and of operating points as
    `accuracy@0.3`, `sensitivity@0.3` …; a metric that is absent has none.

    Attributes:
        noise: of what the metric is without noise, on these very patients; empty if exact.
        sampling: of what it is for all patients of such a population, noise aside.
    """

    noise: Mapping[str, Interval] = field(default_factory=dict)
    sampling: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """Metrics of one group of patients with their error bars."""

    measured: Measured
    intervals: Intervals


@dataclass(frozen=True)
class Run:
    """What a Monte Carlo run did.

    Attributes:
        deviations: metric → metrics of the draws less that of what was drawn around, float64 [draws].
        sums, counts: what the draws added to `curves.calibration_sums` [draws, groups] and to the number
            of patients [draws]; None but for classes.
    """

    deviations: Mapping[str, Array]
    sums: Array | None = None
    counts: Array | None = None


@dataclass(frozen=True)
class _Source:
    """What a run draws from.

    Attributes:
        draw: gives so many draws around `centre`, name → [draws, …].
        grid: see `values`; None for all bins.
        noise: that `centre` is without and the draws have.
        together: see `values`.
    """

    centre: Arrays
    draw: Callable[[int], dict[str, Array]]
    grid: Grid | None
    noise: float
    together: bool


def estimate(study: Study, sums: Arrays, noise: float) -> Estimate:
    """The metrics of (merged) sums with their error bars, subgroups aside.

    A calibration line whose interval noise makes infinite is left out altogether.

    Args:
        noise: standard deviation of the noise in every cell; 0 = exact.
    """
    own = overall(sums)
    measured = measure(study, own, noise)
    runs = simulated(study, own, noise, np.random.default_rng(SEED))
    bounds = _intervals(study, own, measured, runs)
    if noise > 0 and any(name not in bounds.noise for name in LINE):
        measured = replace(measured, calibration_intercept=None, calibration_slope=None)
    return Estimate(measured, bounds)


def merged_noise(noises: Sequence[float]) -> float:
    """Standard deviation of the noise in each cell of merged sums: variances add."""
    return float(np.sqrt(np.sum(np.square(noises))))


def simulated(study: Study, sums: Arrays, noise: float, random: np.random.Generator) -> tuple[Run, Run]:
    """What noise alone, and what sampling alone, does to the metrics of one group of patients. The run of
    noise is empty if there is none."""
    by_noise = _run(study, _noise_source(sums, noise, random)) if noise > 0 else Run({})
    if study.objective.task == "regression":
        return by_noise, Run(_error_deviations(study, sums, noise, random))
    if study.objective.task == "survival":
        sums = coarser(study, dict(sums), MOST_RISKS)
        return by_noise, _run(study, _sampling_source(sums, noise, random, gridded=False))
    return by_noise, _run(study, _sampling_source(sums, noise, random))


def _intervals(study: Study, sums: Arrays, measured: Measured, runs: tuple[Run, Run]) -> Intervals:
    points = {name: float(value) for name, value in values(study, sums).items()}
    ranges = value_ranges(study)
    counts = _counts(sums)
    found: list[dict[str, Interval]] = []
    for run, debiased in zip(runs, (False, True), strict=True):
        bounds = {
            name: _percentiles(points[name], deviations, ranges[name])
            for name, deviations in run.deviations.items()
            if name in points and not np.isnan(points[name])
        }
        bounds = {name: pair for name, pair in bounds.items() if np.isfinite(pair).all()}
        if counts is not None and run.sums is not None and measured.calibration_error is not None:
            seen = float(_calibration_errors(counts, Grid.whole(counts.shape[-1]), 0.0))
            bounds[CALIBRATION] = _calibration_interval(
                counts, run, measured.calibration_error if debiased else seen
            )
        found.append(bounds)
    found[1].pop("patients", None)  # how many there are is no estimate
    return Intervals(*found)


def _percentiles(point: float, deviations: Array, interval: Interval) -> Interval:
    """Draws in which the metric is undefined count at both ends. The metric itself is always inside."""
    low = np.quantile(np.nan_to_num(point + deviations, nan=-np.inf), TAIL, method="lower")
    high = np.quantile(np.nan_to_num(point + deviations, nan=np.inf), 1 - TAIL, method="higher")
    kept = [within(bound, interval) for bound in (min(point, float(low)), max(point, float(high)))]
    return kept[0] or 0.0, kept[1] or 0.0


def _calibration_interval(counts: Array, run: Run, seen: float) -> Interval:
    """Those calibration errors for which `seen` is neither among the 2.5 % highest nor the 2.5 % lowest that
    come of them with the run's deviations (a test, inverted: Casella & Berger 2002, section 9.2.1).

    How a calibration error is spread over score intervals is taken from the counts; only its size varies.
    """
    if run.sums is None or run.counts is None:
        return (0.0, 1.0)
    added, patients = run.sums, counts.sum() + run.counts
    direction = curves.calibration_sums(counts, Grid.whole(counts.shape[-1]))
    size = np.abs(direction).sum()
    direction = direction * (counts.sum() / size) if size > 0 else direction

    def bound(tail: float, undefined: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            error = (low + high) / 2
            drawn = curves.ratio(np.abs(error * direction + added).sum(axis=-1), patients)
            above = np.quantile(np.nan_to_num(drawn, nan=undefined), tail, method="nearest") > seen
            low, high = (low, error) if above else (error, high)
        return low

    return min(seen, bound(1 - TAIL, np.inf)), bound(TAIL, -np.inf)


def _counts(sums: Arrays) -> Array | None:
    """What the calibration error is made of, if the label is a class."""
    return sums.get("scores", sums.get("confidence"))


def _ordered(sums: Arrays) -> list[tuple[str, Array]]:
    """By name, because a file may give them back in any order, and draws follow one another."""
    return sorted(sums.items())


def _noise_source(sums: Arrays, noise: float, random: np.random.Generator) -> _Source:
    def draw(count: int) -> dict[str, Array]:
        return {n: a + noise * random.standard_normal((count, *a.shape)) for n, a in _ordered(sums)}

    return _Source(sums, draw, None, noise, together=False)


def _sampling_source(
    sums: Arrays, noise: float, random: np.random.Generator, gridded: bool = True
) -> _Source:
    """Args:
    gridded: leave out bins in which nobody is; all sums have the same ones as their last axis.
    """
    nearest = _nearest_counts if noise > 0 else _positive
    centre = {name: nearest(array) for name, array in sums.items()}
    grid: Grid | None = None
    if gridded:
        bins = next(iter(centre.values())).shape[-1]
        filled = [np.flatnonzero((a > 0).reshape(-1, bins).any(axis=0)) for a in centre.values()]
        grid = Grid(bins, np.unique(np.concatenate([[0], *filled])))
        centre = {name: array[..., grid.columns] for name, array in centre.items()}

    def draw(count: int) -> dict[str, Array]:
        return {n: random.poisson(a, (count, *a.shape)).astype(np.float64) for n, a in _ordered(centre)}

    return _Source(centre, draw, grid, 0.0, together=True)


def _run(study: Study, source: _Source) -> Run:
    """Draw in batches that memory bears, and compare with what was drawn around."""
    cells = sum(array.size for array in source.centre.values())
    wanted = int(np.clip(NUMBERS // cells, FEWEST_DRAWS, MOST_DRAWS))
    size = max(1, min(wanted, NUMBERS_AT_ONCE // cells))
    points = values(study, source.centre, source.grid)
    counts = _counts(source.centre)
    if counts is None:
        found = []
        for start in range(0, wanted, size):
            drawn = source.draw(min(size, wanted - start))
            found.append(values(study, drawn, source.grid, source.together))
        return Run({n: np.concatenate([each[n] for each in found]) - point for n, point in points.items()})
    grid = source.grid or Grid.whole(counts.shape[-1])
    points[CALIBRATION] = _calibration_errors(counts, grid, 0.0)
    parts: list[Run] = []
    for start in range(0, wanted, size):
        batch = source.draw(min(size, wanted - start))
        told = values(study, batch, source.grid, source.together)
        own = batch["scores" if "scores" in batch else "confidence"]
        told[CALIBRATION] = _calibration_errors(own, grid, source.noise)
        deviations = {name: told[name] - point for name, point in points.items()}
        added = own - counts
        parts.append(Run(deviations, curves.calibration_sums(added, grid), curves.total(added)))
    return Run(
        {name: np.concatenate([part.deviations[name] for part in parts]) for name in points},
        np.concatenate([part.sums for part in parts if part.sums is not None]),
        np.concatenate([part.counts for part in parts if part.counts is not None]),
    )


def _calibration_errors(counts: Array, grid: Grid, noise: float) -> Array:
    if noise > 0:
        return curves.denoised_calibration_error(counts, grid, noise)
    return curves.ratio(np.abs(curves.calibration_sums(counts, grid)).sum(axis=-1), curves.total(counts))


def _positive(counts: Array) -> Array:
    return np.asarray(np.maximum(counts, 0.0))


def _nearest_counts(counts: Array) -> Array:
    """The nearest counts (least squares) that aren't negative and have the same sum along the last axis; all
    zero where that is negative (Duchi et al. 2008, "Efficient projections onto the l1-ball", figure 1)."""
    whole = np.maximum(counts.sum(axis=-1, keepdims=True), 0.0)
    falling = -np.sort(-counts, axis=-1)
    excess = (np.cumsum(falling, axis=-1) - whole) / np.arange(1, counts.shape[-1] + 1)
    last = np.maximum((falling > excess).sum(axis=-1, keepdims=True) - 1, 0)
    return np.where(whole > 0, np.maximum(counts - np.take_along_axis(excess, last, -1), 0.0), 0.0)


def _error_deviations(
    study: Study, sums: Arrays, noise: float, random: np.random.Generator
) -> dict[str, Array]:
    """Sampling error in regression.

    Mean errors: normal, with the variances that the moments themselves tell: of u the mean of u² less the
    square of the mean of u, likewise of |u|; of u² by the kurtosis of the histogram of errors. A metric whose
    variance noise makes negative has no deviations. Quantiles: Poisson counts in the cells of |u|.
    """
    errors, width = sums["errors"], study.data.label.width
    count = float(errors.sum())
    counts = _nearest_counts(errors) if noise > 0 else _positive(errors)
    if count <= 1 or counts.sum() <= 0:
        return {}
    mean, square, bent = sums["moments"] / count
    size, square = max(0.0, square + bent / 4), max(0.0, square)
    edges = np.linspace(-1.0, 1.0, len(errors) + 1)
    fourth, second = (
        float(counts @ np.diff(edges ** (k + 1)) / ((k + 1) * np.diff(edges)[0]) / counts.sum())
        for k in (4, 2)
    )
    variances = {
        "bias": square - mean**2,
        "mae": square - size**2,
        "rmse": square**2 * (fourth / second**2 - 1),
    }
    half = len(errors) // 2
    folded = counts[half:] + counts[:half][::-1]
    drawn = random.poisson(folded, (MOST_DRAWS, half)).astype(np.float64)
    found = {
        name: width * (curves.quantile(drawn, share) - curves.quantile(folded, share))
        for name, share in (("median_absolute_error", 0.5), ("absolute_error_90", 0.9))
    }
    for name, variance in variances.items():
        step = np.sqrt(max(0.0, variance) / count) * random.standard_normal(MOST_DRAWS)
        if name == "rmse":
            step = np.sqrt(np.maximum(0.0, square + step)) - np.sqrt(square)
        if variance > 0 or noise == 0:
            found[name] = width * step
    return found
