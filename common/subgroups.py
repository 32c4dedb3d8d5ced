"""Metrics by subgroup, and the gaps between groups, with what chance makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.histograms import cells_of_patients, subgroup_sums
from common.messages import Array, Arrays
from common.metrics import Measured, measure
from common.study import Study
from common.uncertainty import CALIBRATION, SEED, TAIL, Intervals, Run, estimate, simulated

GAP_METRICS = ("auroc", "accuracy", CALIBRATION, "mae", "c_index")
FEWEST_PATIENTS = 20


@dataclass(frozen=True)
class Subgroup:
    """Metrics of the patients of one group. A patient with records in several groups counts in each with
    the share of its records there.

    Attributes:
        column: of `Study.subgroup_columns`.
        group: the code, or `(missing)`.
        meaning: what the code means.
    """

    column: str
    group: str
    meaning: str
    measured: Measured
    intervals: Intervals


@dataclass(frozen=True)
class Gap:
    """The largest minus the smallest of a metric among a column's groups.

    It is no smaller than 0 by construction, so it must be held against what chance makes of equal groups.

    Attributes:
        highest, lowest: the groups.
        noise: 95 % of the gaps that noise alone makes between equal groups stay below; None if exact.
        sampling: the same of sampling error alone.
    """

    column: str
    metric: str
    gap: float
    highest: str
    lowest: str
    noise: float | None
    sampling: float | None


@dataclass(frozen=True)
class _Group:
    measured: Measured
    by_noise: Run
    by_sampling: Run


def subgroups(study: Study, sums: Arrays, noise: float) -> tuple[Subgroup, ...]:
    """The metrics of every subgroup with their error bars.

    Args:
        noise: standard deviation of the noise in every cell; 0 = exact.
    """
    found = []
    for column, code, meaning, own in subgroup_sums(study, sums):
        each = estimate(study, own, noise)
        found.append(Subgroup(column, code, meaning, each.measured, each.intervals))
    return tuple(found)


def gaps(study: Study, sums: Arrays, noise: float) -> tuple[Gap, ...]:
    """The gaps of `GAP_METRICS` in each subgroup column.

    Groups count that have `FEWEST_PATIENTS` at least, with 97.5 % certainty where their number is noised. A
    metric that fewer than two of them have, has no gap.

    Args:
        noise: standard deviation of the noise in every cell; 0 = exact.
    """
    random = np.random.default_rng(SEED)
    columns: dict[str, dict[str, _Group]] = {column.name: {} for column in study.subgroup_columns}
    for column, code, _, own in subgroup_sums(study, sums):
        measured = measure(study, own, noise)
        if measured.patients >= FEWEST_PATIENTS + 1.96 * noise * np.sqrt(cells_of_patients(own)):
            columns[column][code] = _Group(measured, *simulated(study, own, noise, random))
    found = [_gap(name, metric, groups) for name, groups in columns.items() for metric in GAP_METRICS]
    return tuple(gap for gap in found if gap is not None)


def _gap(column: str, metric: str, groups: Mapping[str, _Group]) -> Gap | None:
    known = {code: value for code, g in groups.items() if (value := getattr(g.measured, metric)) is not None}
    if len(known) < 2:
        return None
    highest, lowest = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    return Gap(
        column=column,
        metric=metric,
        gap=known[highest] - known[lowest],
        highest=highest,
        lowest=lowest,
        noise=_range_by_chance([groups[code].by_noise.deviations.get(metric) for code in known]),
        sampling=_range_by_chance([groups[code].by_sampling.deviations.get(metric) for code in known]),
    )


def _range_by_chance(deviations: Sequence[Array | None]) -> float | None:
    """95 % quantile of the range among groups that differ by chance only; None if a run is missing."""
    known = [each for each in deviations if each is not None]
    if len(known) < len(deviations):
        return None
    draws = min(len(each) for each in known)
    spread = np.ptp(np.stack([each[:draws] for each in known]), axis=0)
    bound = float(np.quantile(np.nan_to_num(spread, nan=np.inf), 1 - 2 * TAIL, method="higher"))
    return bound if np.isfinite(bound) else None
