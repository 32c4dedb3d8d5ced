"""A cohort's exact sums for its description; noise is added where they are released."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.columns import NumericColumn
from common.messages import Array
from common.schema import Coded, Floats
from common.statistics import (
    asked,
    cell_edges,
    centre_and_half,
    described_columns,
    may_be_missing,
    moment_span,
    numeric_columns,
)
from common.study import Study

_GRID = 2.0**30  # parts of a unit

Indices = npt.NDArray[np.int64]


def patient_sums(study: Study, coded: Coded, patients: Indices) -> dict[str, Array]:
    """What the patients add to the vector that common/statistics lays out, float64, without noise.

    A value beyond its column's range, infinity too, counts as the range's end, and a code that isn't in
    the dictionary as missing. What a patient adds is rounded to multiples of 2^-30: below eight million
    patients the sums are exact, so that a patient changes nothing but its own addend. Floating-point sums
    of unrounded numbers would not grant that (Casacuberta et al. 2022, "Widespread underestimation of
    sensitivity in differentially private libraries and how to fix it").

    Args:
        coded: columns of all records, NaN = missing.
        patients: int64 [records], the index of each record's patient.

    Raises:
        StudyError: if the study asks for no statistics.
    """
    bins = asked(study).bins
    ids, who = np.unique(patients, return_inverse=True)
    count = len(ids)
    sums, histograms, codes, missing = [], [], [], []
    labels = coded.labels[:, None] if coded.labels.ndim == 1 else coded.labels
    for i, column in enumerate(described_columns(study)):
        own = i - len(study.data.tabular)
        values = labels[:, own] if own >= 0 else coded.columns[column.name]
        if isinstance(column, NumericColumn):
            moments, histogram, present = _numbers(values, column, bins, who, count)
            sums.append(moments)
            histograms.append(histogram)
        else:
            shares, present = _shares(values, len(column.codes), who, count)
            codes.append(shares)
        missing += [count - present] if may_be_missing(study, column) else []
    numbers, classes = len(numeric_columns(study)), len(study.data.label.classes)
    return {
        "sums": np.array(sums, dtype=np.float64).reshape(numbers, 2),
        "histograms": np.array(histograms, dtype=np.float64).reshape(numbers, bins),
        "codes": np.concatenate([np.empty(0), *codes]),
        "missing": np.array(missing, dtype=np.float64),
        "label": _shares(coded.labels, classes, who, count)[0] if classes else np.empty(0),
    }


def _numbers(
    values: Floats, column: NumericColumn, bins: int, who: Indices, count: int
) -> tuple[list[float], Array, int]:
    """Over patients: Σs and Σ(1 - u), the histogram [bins], and the number of patients with a value."""
    centre, half = centre_and_half(*moment_span(column))
    values = np.clip(values, *column.range).reshape(len(values), column.repeat)
    there = ~np.isnan(values)
    with np.errstate(over="ignore"):  # beyond the span either way
        scaled = np.where(there, np.clip((values - centre) / half, -1.0, 1.0), 0.0)
    records = np.bincount(who, there.sum(axis=1), minlength=count)
    present = records > 0

    def mean(numbers: Floats) -> Floats:
        return (np.bincount(who, numbers.sum(axis=1), minlength=count)[present]) / records[present]

    s = np.trunc(np.clip(mean(scaled), -1.0, 1.0) * _GRID) / _GRID
    # Rounding may not bring u below s²: the bound on a patient's norm rests on it.
    inner = (_GRID - np.ceil(np.clip(mean(scaled * scaled), s * s, 1.0) * _GRID)) / _GRID
    # In the column's unit, so that a round number on an edge is counted where it is said to be.
    with np.errstate(over="ignore", invalid="ignore"):
        own = mean(np.where(there, values, 0.0))
    cells = np.searchsorted(cell_edges(column, bins), own, side="right") - 1
    histogram = np.bincount(cells.clip(0, bins - 1), minlength=bins)
    return [float(s.sum()), float(inner.sum())], histogram, int(present.sum())


def _shares(index: Floats, codes: int, who: Indices, count: int) -> tuple[Floats, int]:
    """Patients by code, float64 [codes], each one's unit shared by its records; and how many have a code."""
    known = (index >= 0) & (index < codes)
    pairs, times = np.unique(who[known] * codes + index[known].astype(np.int64), return_counts=True)
    records = np.bincount(who[known], minlength=count)
    own, first = pairs // codes, np.cumsum(records) - records
    # Rounded as running sums, so that a patient's shares add up to 1 exactly.
    until = np.cumsum(times) - first[own]
    ends, starts = (np.trunc(n / records[own] * _GRID) / _GRID for n in (until, until - times))
    shares = ends - starts
    cells = np.asarray(np.bincount(pairs % codes, shares, minlength=codes), dtype=np.float64)
    return cells, int((records > 0).sum())
