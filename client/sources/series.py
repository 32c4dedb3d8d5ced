"""Time series: measurements at any time, put on the study's regular grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from client.settings import Where
from client.sources.measurements import Rows, measurements
from common.errors import DataError
from common.modalities import SeriesColumn
from common.table import Decoded, Positions

_LARGEST = 3.0  # of a scaled value
_ROUNDING = 1e-9  # of a step: 0.3 h in steps of 0.1 h lies in the fourth


def read(column: SeriesColumn, cells: Sequence[str | None], where: Where | None) -> Decoded:
    """Each record's series on the grid of `column.shape`, row by row: values, then masks.

    Cell s of the grid spans [s, s + 1) steps since the record's beginning. A value is the cell's own
    measurement; else the last one carried forward; before the first, the variable's default. What was
    measured before the beginning, after the end or outside the plausible range counts as not measured.

    Raises:
        SiteError: if site.toml doesn't fit the study.
        DataError: if the files can't be opened at all.
    """
    if where is None:
        raise DataError(f"column {column.name}: its series are nowhere", remedy="name them in site.toml")
    values = np.full((len(cells), column.width), np.nan, dtype=np.float32)
    problems: dict[str, list[Positions]] = {}
    for rows in measurements(column, cells, where.path, where.files):
        found = grid(column, rows)
        for problem, series in rows.problems.items():
            found[series] = np.nan
            positions = [np.array(rows.records[s], dtype=np.int64) for s in series]
            problems.setdefault(problem, []).extend(positions)
        named = [len(positions) for positions in rows.records]
        values[np.concatenate([np.array(p, dtype=np.int64) for p in rows.records])] = np.repeat(
            found, named, axis=0
        )
    return Decoded(values, {problem: np.sort(np.concatenate(each)) for problem, each in problems.items()})


def grid(column: SeriesColumn, rows: Rows) -> npt.NDArray[np.float32]:
    """Measurements on the study's grid, float32 [series, width]; no series' numbers depend on another's."""
    steps, variables, count = column.steps, len(column.variables), len(rows.records)
    inside = np.flatnonzero((rows.hours >= 0) & (rows.hours < column.hours))
    step = np.floor(rows.hours[inside] / column.step_hours + _ROUNDING).astype(np.int64).clip(0, steps - 1)
    cell = (rows.series[inside] * steps + step) * variables + rows.variable[inside]
    # of two at one time the larger counts: the order of lines leaves no trace, nor do roundings of sums
    order = np.lexsort((rows.value[inside], rows.hours[inside], cell))
    cell, value = cell[order], rows.value[inside][order]
    ends = np.flatnonzero(np.diff(cell, append=-1))
    measured = cell[ends]
    if column.cell == "last":
        number = value[ends]
    else:
        counts = np.diff(ends, prepend=-1)
        which = np.repeat(np.arange(len(measured)), counts)
        number = np.bincount(which, value, len(measured)) / counts
    low, high = np.array([v.interval for v in column.variables]).T
    default = np.array(
        [sum(v.interval) / 2 if v.default is None else v.default for v in column.variables], dtype=np.float64
    )

    def scaled(value: npt.NDArray[np.float64], of: Positions) -> npt.NDArray[np.float32]:
        found = 2.0 * (value - low[of]) / (high[of] - low[of]) - 1.0
        return np.asarray(found.clip(-_LARGEST, _LARGEST), dtype=np.float32)

    result = np.zeros((count, *column.shape), dtype=np.float32)
    known = np.zeros((count, steps, variables), dtype=np.bool_)
    known.reshape(-1)[measured] = True
    series, place = np.divmod(measured, steps * variables)
    result[series, place // variables, place % variables] = scaled(number, place % variables)
    before = np.broadcast_to(scaled(default, np.arange(variables)), (count, variables))
    for s in range(steps):
        now = result[:, s, :variables]
        now[...] = np.where(known[:, s], now, before)
        before = now
    if column.masks:
        result[..., variables:] = known
    return result.reshape(count, column.width)
