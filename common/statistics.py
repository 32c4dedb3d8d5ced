"""Statistics of a cohort as mergeable sums: what a site releases once, and the description made of it.

A site releases one vector with Gaussian noise in every cell (client/statistics fills it in). Every patient
adds at most a bounded amount to it, however many records it has. Sums of sites are the sums of all patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.columns import CategoricalColumn, NumericColumn, Tabular
from common.encoding import Scaling
from common.errors import StudyError
from common.estimates import Counts, Figure, Spread, consistent, quantiles, spread
from common.features import ordered_codes
from common.messages import Arrays
from common.schema import Floats
from common.study import Statistics, Study

QUANTILES = (5, 25, 50, 75, 95)  # per cent
SMALLEST_DEVIATION = 0.01  # of the public interval's width
NOTE = "95 % intervals show the privacy noise alone, no error of sampling or of a histogram's width"


@dataclass(frozen=True)
class Cell:
    """Attributes:
    name: code, class, or the interval of a number.
    meaning: of a code.
    share: of the patients with a value; None: too few.
    """

    name: str
    meaning: str
    share: Figure | None


@dataclass(frozen=True)
class Summary:
    """One column, or the label. Where too few patients have a value, its name, kind and unit are all.

    Attributes:
        kind: `numeric`, `categorical` or `label`.
        patients: with at least one value.
        missing: share of all patients with none; None where the dictionary lets no record lack it.
        mean, standard_deviation: of single values, each clipped to `clipped` (in the column's unit); all
            values of a patient together weigh one.
        quantiles: per cent → quantile over patients (of their means), linear within a histogram's cell.
        edges: of the histogram's cells, in the column's unit.
        cells: the histogram (of patients' means), or the codes or classes.
    """

    name: str
    kind: str
    unit: str = ""
    patients: Figure | None = None
    missing: Figure | None = None
    mean: Figure | None = None
    standard_deviation: Figure | None = None
    clipped: tuple[float, float] | None = None
    quantiles: Mapping[int, Figure] | None = None
    edges: tuple[float, ...] = ()
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Description:
    """A cohort of several sites, as its noised sums tell.

    Attributes:
        study: digest.
        patients: of all sites; None: too few.
        noise: standard deviation of the noise in every cell of the merged sums, in patients.
        minimum_patients: what is about fewer (plus two standard deviations of noise) is left out.
        columns: in the dictionary's order, the label last.
    """

    study: str
    patients: Figure | None
    noise: float
    minimum_patients: int
    columns: tuple[Summary, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain, finite values for `json.dumps`; None where there are too few."""
        return {**asdict(self), "intervals": NOTE}

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table: a row per column, and one per code or class; `NOTE` belongs below."""
        header = ["column", "patients", "missing", "mean or share", "sd", "median", "5 % to 95 %"]
        rows = []
        for c in self.columns:
            name = c.name + (f" ({c.unit})" if c.unit not in {"", "1"} else "")
            start = [name, _shown(c.patients) or "too few", _percent(c.missing)]
            if c.quantiles is None:
                rows.append([*start, "", "", "", ""])
                rows += [_cell_row(cell) for cell in c.cells]
            else:
                low, median, high = (c.quantiles[q] for q in (5, 50, 95))
                most = f"{low.value:.4g} to {high.value:.4g}"
                rows.append([*start, _shown(c.mean), _shown(c.standard_deviation), _shown(median), most])
        return header, rows


def layout(study: Study) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float64 arrays that a site releases, from the study alone.

    `sums` [numeric, 2]: over patients, of s and of 1 - u. A value is clipped to `moment_span` and mapped
    linearly to [-1, 1]; s is the mean of a patient's values, u the mean of their squares, over all its
    records and a repeated column's positions.
    `histograms` [numeric, bins]: patients by the mean of their values, in equal cells over the range.
    `codes` [all codes]: patients by code, one categorical column (its `ordered_codes`) after the other; a
    patient's unit is shared equally by its records with a known code.
    `missing` [columns that may be missing]: patients without any value in the column.
    `label` [classes]: patients by class, shared likewise; no record may lack it. A label that is a number
    is the last of the numeric columns instead; several labels, and the time and event of a survival study,
    are columns too, the last ones.

    The number of patients has no cell of its own: every column's cells add up to it.

    Raises:
        StudyError: if the study asks for no statistics.
    """
    return {
        "sums": (len(numeric_columns(study)), 2),
        "histograms": (len(numeric_columns(study)), asked(study).bins),
        "codes": (sum(len(c.codes) for c in described_columns(study) if isinstance(c, CategoricalColumn)),),
        "missing": (sum(may_be_missing(study, c) for c in described_columns(study)),),
        "label": (len(study.data.label.classes),),
    }


def sensitivity(study: Study) -> float:
    """Largest L2 norm of what one patient adds to the vector, reached: √(2 numeric + categorical), where the
    label counts as one or the other, or as several.

    In a column a patient adds one unit to one cell or shares it among several: at most 1 to the squared
    norm. In a numeric column that it has, it also adds s and 1 - u. As s² <= u <= 1
    (Jensen), s² + (1 - u)² <= s² + (1 - s²)² = 1 - s² (1 - s²) <= 1, reached at s = 0 and ±1. With u
    in place of 1 - u it would be 2, with u - 1/2 it would be 5/4.
    """
    columns = len(described_columns(study)) + bool(study.data.label.classes)
    return math.sqrt(columns + len(numeric_columns(study)))


def asked(study: Study) -> Statistics:
    """Raises:
    StudyError: if the study asks for no statistics.
    """
    if study.statistics is None:
        raise StudyError(
            f"study {study.name} asks for no statistics",
            remedy="add a [statistics] table with epsilon and delta to the study's file",
        )
    return study.statistics


def described_columns(study: Study) -> tuple[Tabular, ...]:
    """The dictionary's numbers and codes, and the label last unless it is one of several classes."""
    return (*study.data.tabular, *study.data.label.described)


def numeric_columns(study: Study) -> tuple[NumericColumn, ...]:
    """Those of `described_columns` that are numbers."""
    return tuple(c for c in described_columns(study) if isinstance(c, NumericColumn))


def may_be_missing(study: Study, column: Tabular) -> bool:
    """Whether a site's data may lack the column's values; if not, a cell for it would add noise only."""
    return (column.missing or study.data.missing) != "refuse"


def centre_and_half(low: float, high: float) -> tuple[float, float]:
    """Middle and half the width of an interval, without overflow; half the width is above 0."""
    return low / 2 + high / 2, max(high / 2 - low / 2, float(np.finfo(np.float64).tiny))


def moment_span(column: NumericColumn) -> tuple[float, float]:
    """What values are clipped to for mean and deviation: the public interval, at twice its width, within the
    range. Noise is in proportion to the span, and a plausible range is often ten deviations and more."""
    (low, high), (lowest, highest) = column.interval, column.range
    centre, half = centre_and_half(low, high)
    span = max(lowest, centre - 2 * half), min(highest, centre + 2 * half)
    return span if span[0] < span[1] else column.range


def cell_edges(column: NumericColumn, bins: int) -> Floats:
    """Edges of a histogram's cells over the range, float64 [bins + 1], in the column's unit. A cell holds its
    lower edge, and the last one its upper edge too."""
    low, high = column.range
    _, half = centre_and_half(low, high)
    steps = half / bins * np.arange(bins)
    return np.append(low + steps + steps, high)  # no overflow


def describe(study: Study, sums: Arrays, noise_sds: Sequence[float], minimum_patients: int) -> Description:
    """What merged, noised sums tell about the patients of all sites.

    Counts are used as they are noised, negative ones too, where sums are made of them; what comes out is
    kept within its possible range. A column, code, class or cell of a histogram is left out where fewer
    than `minimum_patients` plus two standard deviations of noise are in it.

    Args:
        sums: merged over the sites; finite, with the shapes of `layout`.
        noise_sds: each site's standard deviation of noise in a cell; 0 = exact.

    Raises:
        StudyError: if the study asks for no statistics.
    """
    asked(study)
    variance = math.fsum(sd * sd for sd in noise_sds)
    counts = _counts(study, sums, variance)
    spreads = iter(_spreads(study, sums, counts))
    label = study.data.label
    columns: list[Summary] = []
    for column, count in zip(described_columns(study), counts, strict=False):
        if isinstance(column, NumericColumn):
            kind = "label" if len(columns) >= len(study.data.tabular) else "numeric"
            columns.append(_numeric(column, kind, count, next(spreads), minimum_patients))
        else:
            names = [(code, column.codes[code]) for code in ordered_codes(column)]
            kind = "label" if len(columns) >= len(study.data.tabular) else "categorical"
            columns.append(_categorical(column.name, kind, names, count, minimum_patients))
    if label.classes:
        names = [(c.name, "") for c in label.classes]
        columns.append(_categorical(label.column, "label", names, counts[-1], minimum_patients))
    return Description(
        study.digest, columns[-1].patients, math.sqrt(variance), minimum_patients, tuple(columns)
    )


def moments(study: Study, sums: Arrays, noise_sds: Sequence[float]) -> Scaling:
    """Means and standard deviations to scale numeric features by; arguments as of `describe`.

    The deviation is of single values, each patient's together weighing one. No deviation is below 1 % of
    the public interval's width. A column whose variance is not above two standard deviations of its noise
    (it may come out negative) is scaled by its public interval.

    Raises:
        StudyError: if the study asks for no statistics.
    """
    asked(study)
    spreads = _spreads(study, sums, _counts(study, sums, math.fsum(sd * sd for sd in noise_sds)))
    numbers = [c for c in study.data.tabular if isinstance(c, NumericColumn)]  # a label is no feature
    means: list[float] = []
    deviations: list[float] = []
    for column, found in zip(numbers, spreads, strict=False):
        mean, deviation = centre_and_half(*column.interval)
        if found.variance > 2 * found.variance_sd:
            centre, half = centre_and_half(*moment_span(column))
            mean = centre + half * found.mean.value
            deviation = max(2 * SMALLEST_DEVIATION * deviation, half * found.deviation.value)
        means += [mean] * column.repeat
        deviations += [deviation] * column.repeat
    return Scaling(np.array(means, dtype=np.float64), np.array(deviations, dtype=np.float64))


def _counts(study: Study, sums: Arrays, variance: float) -> list[Counts]:
    """Of the described columns, and of the label's classes if it has them."""
    parts: list[tuple[Floats, int]] = []
    number = code = lacking = 0
    for column in described_columns(study):
        if isinstance(column, NumericColumn):
            own = sums["histograms"][number]
            number += 1
        else:
            own = sums["codes"][code : code + len(column.codes)]
            code += len(column.codes)
        may = may_be_missing(study, column)
        parts.append((np.append(own, sums["missing"][lacking : lacking + may]), len(own)))
        lacking += may
    if study.data.label.classes:
        parts.append((sums["label"], len(sums["label"])))
    return consistent(parts, variance)


def _spreads(study: Study, sums: Arrays, counts: Sequence[Counts]) -> list[Spread]:
    pairs = zip(described_columns(study), counts, strict=False)
    numeric = [count for column, count in pairs if isinstance(column, NumericColumn)]
    return [spread(float(t), float(i), c) for (t, i), c in zip(sums["sums"], numeric, strict=True)]


def _numeric(column: NumericColumn, kind: str, count: Counts, found: Spread, minimum: int) -> Summary:
    if count.too_few(minimum):
        return Summary(column.name, kind, column.unit)
    span, bins = moment_span(column), count.present
    centre, half = centre_and_half(*span)
    edges = cell_edges(column, bins).tolist()
    names = [(f"{a:.4g} to {b:.4g}", "") for a, b in pairwise(edges)]
    places = quantiles(count, [q / 100 for q in QUANTILES])
    return Summary(
        column.name,
        kind,
        column.unit,
        patients=count.figure(),
        missing=count.missing_share(),
        mean=found.mean.mapped(centre, half),
        standard_deviation=found.deviation.mapped(0.0, half),
        clipped=span,
        quantiles={
            q: p.mapped(edges[0], edges[1] - edges[0]) for q, p in zip(QUANTILES, places, strict=True)
        },
        edges=tuple(edges),
        cells=_cells(names, count, minimum),
    )


def _categorical(
    name: str, kind: str, names: Sequence[tuple[str, str]], count: Counts, minimum: int
) -> Summary:
    if count.too_few(minimum):
        return Summary(name, kind)
    return Summary(
        name,
        kind,
        patients=count.figure(),
        missing=count.missing_share(),
        cells=_cells(names, count, minimum),
    )


def _cells(names: Sequence[tuple[str, str]], count: Counts, minimum: int) -> tuple[Cell, ...]:
    pairs = zip(names, count.shares(minimum), strict=True)
    return tuple(Cell(name, meaning, share) for (name, meaning), share in pairs)


def _cell_row(cell: Cell) -> list[str]:
    name = f"  {cell.name}" + (f" ({cell.meaning})" if cell.meaning else "")
    return [name, "", "", _percent(cell.share) or "too few", "", "", ""]


def _shown(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"


def _percent(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{100 * figure.value:.1f} % ({100 * figure.low:.1f} to {100 * figure.high:.1f})"
