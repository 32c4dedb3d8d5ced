"""Measurements over time, as a site holds them: a file a series (PhysioNet's), or one long table of all.

Both come to `Rows`, a batch at a time. What is wrong with a series touches no other: each file is parsed on
its own, and of a table's rows only those count that belong to a series which a record names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv

from client.settings import DataSource, Files
from client.sources.bounded import opened
from client.sources.columnar import read_parquet
from client.sources.delimited import read_csv
from client.sources.named import named_files
from common.errors import DataError, SiteError
from common.modalities import SeriesColumn
from common.schema import FINITE_NUMBER, missing_text, normal_text
from common.table import PLACES_SHOWN

Ints = npt.NDArray[np.int64]

NO_HEADER = "its file's first line does not name time, parameter and value"
NO_LINES = "a line of its file is not time, parameter, value"
ABSENT_KEY = "the table of measurements has no line of it"

_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_SERIES_A_BATCH = 2048
_BYTES_A_BATCH = 64 << 20
_MOST_ROWS = 1 << 31
_CLOCK = re.compile(r"([0-9]{1,5}):([0-5][0-9])(?::([0-5][0-9])(?:\.0+)?)?")


@dataclass(frozen=True, repr=False)
class Rows:
    """Measurements of some series, each within its variable's plausible range, in the data's order.

    Attributes:
        records: of each series, positions of the records that name it.
        series: int64 [rows]: place in `records`.
        variable: int64 [rows]: place in the column's variables.
        hours: float64 [rows], since the record's beginning.
        value: float64 [rows], in the study's unit.
        problems: what is wrong → series (int64) it is wrong with.
    """

    records: Sequence[Sequence[int]]
    series: Ints
    variable: Ints
    hours: npt.NDArray[np.float64]
    value: npt.NDArray[np.float64]
    problems: Mapping[str, Ints]


@dataclass(frozen=True)
class Plan:
    """What a measurement's parameter means to the study.

    Attributes:
        variable: name in the data → place in the column's variables.
        multiply, add: float64 [variables]: conversion to the study's unit.
    """

    column: SeriesColumn
    files: Files
    variable: Mapping[str, int]
    multiply: npt.NDArray[np.float64]
    add: npt.NDArray[np.float64]


def measurements(
    column: SeriesColumn, cells: Sequence[str | None], path: Path, files: Files
) -> Iterator[Rows]:
    """The measurements of every series that a cell names, some series at a time.

    Raises:
        SiteError: if [data.files.NAME.parameters] of site.toml doesn't fit the study.
        DataError: if the files or the table can't be opened at all.
    """
    plan = plan_of(column, files)
    if path.suffix.lower() in _TABLES and not path.is_dir():
        yield from _from_table(plan, cells, path)
    else:
        yield from _from_files(plan, cells, path)


def plan_of(column: SeriesColumn, files: Files) -> Plan:
    """Raises:
    SiteError: if site.toml doesn't fit the study.
    """
    if not files.delimiter.isascii() or files.delimiter in '"\r\n\0':
        raise SiteError(
            f"site.toml: data.files.{column.name}: its delimiter cannot be used",
            remedy="use a comma, semicolon or tab",
        )
    variable: dict[str, int] = {}
    multiply, add = np.ones(len(column.variables)), np.zeros(len(column.variables))
    for i, each in enumerate(column.variables):
        ours = files.parameters.get(each.name)
        names = (each.name,) if ours is None or not ours.names else ours.names
        where = f"site.toml: data.files.{column.name}.parameters.{each.name}"
        for name in names:
            if variable.setdefault(name.strip(), i) != i:
                other = column.variables[variable[name.strip()]].name
                raise SiteError(
                    f"{where}: has a name that stands for {other}, too", remedy="give each parameter to one"
                )
        if ours is None:
            continue
        if ours.unit not in (None, each.unit) and ours.multiply == 1.0 and ours.add == 0.0:
            raise SiteError(
                f"{where}: is in {ours.unit} but the study wants {each.unit}", remedy="give multiply or add"
            )
        if ours.multiply == 0.0:
            raise SiteError(f"{where}: multiply = 0 would erase every value", remedy="give the unit's factor")
        multiply[i], add[i] = ours.multiply, ours.add
    return Plan(column, files, variable, multiply, add)


def _from_files(plan: Plan, cells: Sequence[str | None], path: Path) -> Iterator[Rows]:
    records: list[Sequence[int]] = []
    tables: list[Any] = []
    problems: dict[str, list[int]] = {}
    size = 0
    for positions, content in named_files(path, cells, plan.files.max_bytes, ("", ".txt", ".csv")):
        table = content if isinstance(content, str) else _parsed(content, plan.files)
        if isinstance(table, str):
            problems.setdefault(table, []).append(len(records))
            table = _NOTHING
        records.append(positions)
        tables.append(table)
        size += len(content)
        if len(records) == _SERIES_A_BATCH or size > _BYTES_A_BATCH:
            yield _batch(plan, records, tables, problems)
            records, tables, problems, size = [], [], {}, 0
    if records:
        yield _batch(plan, records, tables, problems)


_NAMES = ("time", "parameter", "value")
_NOTHING = pa.table({name: pa.array([], pa.string()) for name in _NAMES})


def _parsed(content: bytes, files: Files) -> Any:
    """A file's times, parameters and values as text (pyarrow Table), or what is wrong with it."""
    first = re.match(rb"[^\r\n]*", content)
    header = first.group() if first else b""
    try:
        names = [n.strip().strip('"').casefold() for n in header.decode("utf-8-sig").split(files.delimiter)]
    except UnicodeDecodeError:
        return NO_HEADER
    wanted = [getattr(files, name).casefold() for name in _NAMES]
    if any(names.count(name) != 1 for name in wanted):
        return NO_HEADER
    if not content[len(header) :].strip():
        return _NOTHING
    quotes = content.count(b'"', len(header))
    if quotes % 2 or b"\0" in content:
        return NO_LINES
    columns = [str(i) for i in range(len(names))]
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(content),
            arrow_csv.ReadOptions(
                use_threads=False,
                block_size=min(max(len(content), 1 << 10), _BYTES_A_BATCH),
                column_names=columns,
                skip_rows=1,
            ),
            arrow_csv.ParseOptions(delimiter=files.delimiter, quote_char='"' if quotes else False),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, ValueError):  # its text quotes the line
        return NO_LINES
    return table.select([names.index(name) for name in wanted]).rename_columns(_NAMES)


def _batch(
    plan: Plan, records: Sequence[Sequence[int]], tables: Sequence[Any], problems: Mapping[str, list[int]]
) -> Rows:
    series = np.repeat(np.arange(len(records)), [t.num_rows for t in tables])
    text = pa.concat_tables(tables)
    parts = [text.column(name).combine_chunks() for name in _NAMES]
    told = {problem: np.array(each, dtype=np.int64) for problem, each in problems.items()}
    return _rows(plan, records, series, parts, told)


def _from_table(plan: Plan, cells: Sequence[str | None], path: Path) -> Iterator[Rows]:
    text = _long_table(plan.files, path)
    named = normal_text(pa.array(cells, pa.string()))
    keys = pc.unique(named).drop_null()
    place = pc.index_in(named, value_set=keys).to_numpy(zero_copy_only=False)
    records: list[list[int]] = [[] for _ in range(len(keys))]
    for position, key in enumerate(place):
        if key == key:
            records[int(key)].append(position)
    series = pc.index_in(normal_text(text["key"]), value_set=keys)
    ours = np.flatnonzero(~np.isnan(pc.cast(series, pa.float64()).to_numpy(zero_copy_only=False)))
    of = series.take(pa.array(ours)).to_numpy().astype(np.int64)
    order = np.argsort(of, kind="stable")
    ours, of = ours[order], of[order]
    for start in range(0, len(records), _SERIES_A_BATCH):
        stop = min(start + _SERIES_A_BATCH, len(records))
        a, b = np.searchsorted(of, (start, stop))
        parts = [text[name].take(pa.array(ours[a:b])) for name in _NAMES]
        absent = np.setdiff1d(np.arange(stop - start), of[a:b] - start)
        told = {ABSENT_KEY: absent} if len(absent) else {}
        yield _rows(plan, records[start:stop], of[a:b] - start, parts, told)


def _long_table(files: Files, path: Path) -> dict[str, Any]:
    """Key, time, parameter and value of every row, as text."""
    source = DataSource(
        file=files.at, delimiter=files.delimiter, max_bytes=files.max_bytes, max_records=_MOST_ROWS
    )
    wanted = {name: str(getattr(files, name)) for name in ("key", *_NAMES)}
    with opened(path, source) as file:
        if path.suffix.lower() in (".parquet", ".pq"):
            table, _, _ = read_parquet(file, str(path), source, wanted)
        else:
            table, _, _ = read_csv(file, str(path), source)
    theirs = {name.casefold(): name for name in reversed(table.column_names)}
    lacking = [name for name, column in wanted.items() if column.casefold() not in theirs]
    if lacking:
        raise DataError(
            f"{path}: the table of measurements lacks its column of {', '.join(lacking[:PLACES_SHOWN])}",
            remedy='say in [data.files.NAME] of site.toml what it is called, as time = "…"',
        )
    return {name: table.column(theirs[column.casefold()]).combine_chunks() for name, column in wanted.items()}


def _rows(
    plan: Plan,
    records: Sequence[Sequence[int]],
    series: Ints,
    parts: Sequence[Any],
    problems: Mapping[str, Ints],
) -> Rows:
    """Numbers out of text; what isn't a variable of the study is left out unread."""
    time, parameter, value = parts
    names = pc.index_in(pc.utf8_trim_whitespace(parameter), value_set=pa.array(list(plan.variable)))
    known = np.flatnonzero(pc.is_valid(names).to_numpy(zero_copy_only=False))
    taken = pa.array(known)
    place = np.array(list(plan.variable.values()), dtype=np.int64)
    variable = place[names.take(taken).to_numpy()]
    series = series[known]
    hours = _hours(time.take(taken), plan.files.time_unit)
    numbers, strange = _numbers(value.take(taken))
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = numbers * plan.multiply[variable] + plan.add[variable]

    told = dict(problems)
    wrong_time = np.isnan(hours)
    if wrong_time.any():
        form = plan.files.time_unit if plan.files.time_unit == "HH:MM" else f"in {plan.files.time_unit}"
        told[f"a time of its measurements is not {form}"] = np.unique(series[wrong_time])
    for v in np.unique(variable[strange]):
        name = plan.column.variables[int(v)].name
        told[f"a value of {name} is not a number"] = np.unique(series[strange & (variable == v)])
    ranges = np.array([v.range for v in plan.column.variables])
    low, high = ranges[variable, 0], ranges[variable, 1]
    kept = ~wrong_time & (numbers >= low) & (numbers <= high)
    return Rows(records, series[kept], variable[kept], hours[kept], numbers[kept], told)


def _hours(text: Any, unit: str) -> npt.NDArray[np.float64]:
    """Times as hours; NaN where they are none."""
    if unit != "HH:MM":
        found, _ = _numbers(text)
        found[np.isinf(found)] = np.nan
        return found / 60.0 if unit == "minutes" else found
    coded = pc.utf8_trim_whitespace(text).dictionary_encode()
    matches = [_CLOCK.fullmatch(each) for each in coded.dictionary.to_pylist()]
    hours = [int(m[1]) + int(m[2]) / 60.0 + int(m[3] or 0) / 3600.0 if m else float("nan") for m in matches]
    return _decoded(coded, np.array(hours, dtype=np.float64))


def _numbers(text: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Values, NaN where there is none, and which of them are no numbers. Each text is looked at once."""
    coded = pc.utf8_trim_whitespace(text).dictionary_encode()
    plain = coded.dictionary
    missing = missing_text(plain)
    number = pc.and_(pc.invert(missing), pc.match_substring_regex(plain, FINITE_NUMBER))
    values = pc.cast(pc.if_else(number, plain, None), pa.float64())
    strange = pc.invert(pc.or_(missing, number)).to_numpy(zero_copy_only=False)
    numbers = pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False)
    return _decoded(coded, numbers), _decoded(coded, strange.astype(np.float64)) == 1.0


def _decoded(coded: Any, of: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`of` the dictionary's entries, laid out again; NaN for null."""
    index = pc.fill_null(coded.indices, len(of)).to_numpy(zero_copy_only=False)
    return np.asarray(np.append(of, np.nan)[index], dtype=np.float64)
