"""The data dictionary at work: text in, checked columns out.

A study's dictionary compiles to pandera schemas over *coded* columns (numbers as they are, categories
and labels as the index of their code, NaN = missing). Every violation is collected before anything is
raised. What becomes of sound columns is common/encoding's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pandera.pandas as pandera
import pyarrow as pa
import pyarrow.compute as pc

from common.columns import NumericColumn
from common.errors import DataError, StudyError
from common.features import WHOLE, missing_rule, normal_code, ordered_codes
from common.label import Label
from common.modalities import Wide
from common.study import Study
from common.table import Table, Violation

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FINITE_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NUMBER = FINITE_NUMBER + r"|^[+-]?(?i:inf|infinity)$"
_COMMA = "not a number, for a comma (if decimals follow it, site.toml can say so: [data] decimal)"
DECIMAL_COMMA = r"^[+-]?[0-9]+,[0-9]+$"
_MISSING = "missing though the study refuses missing values"
_SCHEMAS_KEPT = 32


@dataclass(frozen=True)
class Coded:
    """Decoded columns, float64 [records] or [records, repeat] each; NaN = missing. Labels float64 [records]:
    the index of the class, or the number; [records, labels] where there are several, 1 = yes, NaN = not
    known; [records, 2] of a time until an event: the time, and 1 if the event was seen. Wide columns,
    float32 [records, width], as `Decoded.values`."""

    columns: Mapping[str, Floats]
    labels: Floats
    wide: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Dictionary:
    """What a study's data dictionary compiles to, once.

    Attributes:
        schema: over the coded columns that stand alone, and the label.
        repeated: name → schema of one long column, for columns that repeat.
        codes: name → code in normal form → its index.
    """

    schema: Any
    repeated: Mapping[str, Any]
    codes: Mapping[str, Mapping[str, int]]


_dictionaries: OrderedDict[str, _Dictionary] = OrderedDict()


def compile_schema(study: Study) -> pandera.DataFrameSchema:
    """The pandera schema of the coded columns that stand alone, and of the label.

    Raises:
        StudyError: if two codes of a column are the same once `1.0` reads as `1`.
    """
    schema: pandera.DataFrameSchema = _dictionary(study).schema
    return schema


def missing_text(text: Any, codes: Sequence[str] = ()) -> Any:
    """Where trimmed text (pyarrow) is missing: null, empty, NaN, or one of the column's missing codes."""
    absent = pc.is_in(pc.utf8_lower(text), value_set=pa.array(["", "nan"]))
    if codes:
        known = pa.array([*codes, *(normal_code(code) for code in codes)])
        absent = pc.or_(absent, pc.is_in(normal_text(text), value_set=known))
    return pc.or_(pc.is_null(text), absent)


def normal_text(text: Any) -> Any:
    """`normal_code` of a whole pyarrow column."""
    return pc.replace_substring_regex(pc.utf8_trim_whitespace(text), WHOLE, r"\1")


def examine(table: Table, study: Study) -> tuple[Coded, list[Violation]]:
    """Decode a table and say everything that breaks the dictionary.

    Returns:
        The coded columns (meaningless where there are violations), and the violations.

    Raises:
        DataError: if the table lacks columns of the dictionary.
    """
    require_columns(table, study)
    dictionary = _dictionary(study)
    violations: list[Violation] = []
    coded: dict[str, Floats] = {}
    wide = {column.name: _decoded(table, column, violations) for column in study.data.wide}
    for column in study.data.tabular:
        if isinstance(column, NumericColumn):
            coded[column.name] = _decode_numeric(table, column, violations)
        else:
            text = pc.utf8_trim_whitespace(table.columns[column.name])
            missing = missing_text(text, column.missing_codes)
            coded[column.name] = _decode_codes(text, missing, dictionary.codes[column.name])
    found = _decode_label(table, study.data.label, dictionary.codes, violations)
    label = study.data.label.sources
    alone = {c.name: coded[c.name] for c in study.data.tabular if c.name not in dictionary.repeated}
    violations += _violations(dictionary.schema, {**alone, **found}, table, {}, label)
    for name, schema in dictionary.repeated.items():
        block = coded[name]
        sources = next(c.sources for c in study.data.tabular if c.name == name)
        violations += _violations(schema, {name: block.T.reshape(-1)}, table, {name: sources}, label)
    order = {s: i for i, s in enumerate(s for c in study.data.columns for s in c.sources)}
    violations.sort(key=lambda v: order.get(v.column, len(order)))
    values = list(found.values())
    labels = values[0] if study.data.label.kind in ("class", "number") else np.stack(values, axis=1)
    return Coded(coded, labels, wide), violations


def _decode_label(
    table: Table, label: Label, codes: Mapping[str, Mapping[str, int]], violations: list[Violation]
) -> dict[str, Floats]:
    """Each of the label's sources, float64 [records]."""
    found: dict[str, Floats] = {}
    for number in (label.number, label.time):
        if number is not None:
            found[number.name] = _decode_numeric(table, number, violations)
    absent = {each.name: each.missing_codes for each in label.columns}
    for name in label.codes:
        text = pc.utf8_trim_whitespace(table.columns[name])
        found[name] = _decode_codes(text, missing_text(text, absent.get(name, ())), codes[name])
    return found


def needed_columns(study: Study) -> tuple[str, ...]:
    """Every name that a table must offer: patient key, label, split column and the dictionary's sources."""
    data = study.data
    split = (data.split.column,) if data.split.column else ()
    return (data.patient_key, *data.label.sources, *split, *(s for c in data.columns for s in c.sources))


def require_columns(table: Table, study: Study) -> None:
    """Raises:
    DataError: naming the columns that the table lacks.
    """
    lacking = [name for name in needed_columns(study) if name not in table.columns]
    if lacking:
        more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
        raise DataError(
            f"{table.origin}: the table lacks column {', '.join(lacking[:10])}{more}",
            remedy="export the columns, or say in site.toml [data.columns.NAME] what they are called there",
        )


def _decoded(table: Table, column: Wide, violations: list[Violation]) -> npt.NDArray[np.float32]:
    """A wide column's numbers; what the study refuses becomes violations."""
    found = table.decoded[column.name]
    if column.missing == "refuse":
        for problem, positions in found.problems.items():
            violations.append(table.violation(column.name, problem, positions))
        told = np.concatenate([np.empty(0, dtype=np.int64), *found.problems.values()])
        lacking = np.setdiff1d(np.flatnonzero(np.isnan(found.values[:, 0])), told)
        if len(lacking):
            violations.append(table.violation(column.name, _MISSING, lacking))
    return found.values


def _decode_numeric(table: Table, column: NumericColumn, violations: list[Violation]) -> Floats:
    """Numbers as float64 [records] or [records, repeat]; cells that are no numbers become violations."""
    chunks = [table.columns[source] for source in column.sources]
    text = pc.utf8_trim_whitespace(pa.concat_arrays(chunks) if len(chunks) > 1 else chunks[0])
    text = pc.if_else(missing_text(text, column.missing_codes), None, text)
    try:
        values = _floats(pc.cast(text, pa.float64()))
        strange = np.isnan(values) & ~_mask(pc.is_null(text))  # such as "-nan"
    except pa.ArrowInvalid:  # its text quotes the cell
        readable = pc.match_substring_regex(text, _NUMBER)
        values = _floats(pc.cast(pc.if_else(readable, text, None), pa.float64()))
        strange = _mask(pc.invert(pc.fill_null(readable, True)))
    if strange.any():
        for s, source in enumerate(column.sources):
            found = np.flatnonzero(strange[s * table.records : (s + 1) * table.records])
            if len(found):
                cells = text.take(pa.array(found + s * table.records))
                commas = pc.all(pc.match_substring_regex(cells, DECIMAL_COMMA)).as_py()
                reason = _COMMA if commas else "not a number"
                violations.append(table.violation(source, reason, found))
        values[strange] = (column.range[0] + column.range[1]) / 2  # already told; no second violation
    if column.beyond != "refuse":
        low, high = column.range
        beyond = np.isfinite(values) & ((values < low) | (values > high))
        values[beyond] = np.nan if column.beyond == "missing" else values[beyond].clip(low, high)
    return values if column.repeat == 1 else values.reshape(column.repeat, table.records).T


def _decode_codes(text: Any, missing: Any, codes: Mapping[str, int]) -> Floats:
    """Index of each code, -1 if unknown, NaN if missing; float64 [records]."""
    index = pc.index_in(normal_text(text), value_set=pa.array(list(codes)))
    classes = np.array(list(codes.values()), dtype=np.float64)
    found = pc.fill_null(index, -1).to_numpy(zero_copy_only=False)
    return np.where(_mask(missing), np.nan, np.where(found < 0, -1.0, classes[found]))


def _floats(array: Any) -> Floats:
    return np.array(pc.fill_null(array, float("nan")).to_numpy(zero_copy_only=False), dtype=np.float64)


def _mask(array: Any) -> Mask:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.bool_)


def _violations(
    schema: Any,
    coded: Mapping[str, Floats],
    table: Table,
    sources: Mapping[str, Sequence[str]],
    label: Sequence[str],
) -> list[Violation]:
    """What pandera finds; a long column's cells are traced back to their source and record."""
    try:
        schema.validate(pd.DataFrame(dict(coded)), lazy=True)
    except pandera.errors.SchemaErrors as failure:
        cases = failure.failure_cases[["column", "check", "index"]]
    else:
        return []
    found = []
    for (name, check), group in cases.groupby(["column", "check"], sort=False):
        cells = np.sort(group["index"].to_numpy(dtype=np.int64))
        problem = str(check)
        if check == "not_nullable":
            problem = "missing; every record needs a label" if name in label else _MISSING
        names = sources.get(str(name), (str(name),))
        for s in np.unique(cells // table.records):
            chosen = cells[cells // table.records == s] % table.records
            found.append(table.violation(names[int(s)], problem, chosen))
    return found


def _dictionary(study: Study) -> _Dictionary:
    known = _dictionaries.get(study.digest)
    if known is None:
        known = _dictionaries[study.digest] = _compile(study)
        if len(_dictionaries) > _SCHEMAS_KEPT:
            _dictionaries.popitem(last=False)
    return known


def _compile(study: Study) -> _Dictionary:
    codes: dict[str, Mapping[str, int]] = {}
    alone: dict[str, Any] = {}
    repeated: dict[str, Any] = {}
    for column in study.data.tabular:
        nullable = missing_rule(column, study) != "refuse"
        if isinstance(column, NumericColumn):
            schema = pandera.Column(float, _numeric_checks(column), nullable=nullable)
            if column.repeat > 1:
                repeated[column.name] = pandera.DataFrameSchema({column.name: schema})
                continue
        else:
            codes[column.name] = _indices(
                [(code, i) for i, code in enumerate(ordered_codes(column))], column.name, study
            )
            schema = pandera.Column(float, _code_check("unknown code"), nullable=nullable)
        alone[column.name] = schema
    label = study.data.label
    for name, pairs in label.codes.items():
        codes[name] = _indices(pairs, name, study)
        may_lack = label.kind == "several"
        alone[name] = pandera.Column(float, _code_check("unknown label code"), nullable=may_lack)
    for number in (label.number, label.time):
        if number is not None:
            alone[number.name] = pandera.Column(float, _numeric_checks(number), nullable=False)
    return _Dictionary(pandera.DataFrameSchema(alone), repeated, codes)


def _numeric_checks(column: NumericColumn) -> list[Any]:
    low, high = column.range
    unit = "" if column.unit == "1" else f" {column.unit}"

    def plausible(values: pd.Series[float]) -> pd.Series[bool]:
        return values.between(low, high) | np.isinf(values)

    def finite(values: pd.Series[float]) -> pd.Series[bool]:
        return values.abs() != np.inf

    return [
        pandera.Check(finite, error="infinite"),
        pandera.Check(plausible, error=f"outside the plausible range {low:g} to {high:g}{unit}"),
    ]


def _code_check(problem: str) -> Any:
    return pandera.Check.ge(0, error=problem)


def _indices(codes: Sequence[tuple[str, int]], column: str, study: Study) -> dict[str, int]:
    normal = {normal_code(code): index for code, index in codes}
    if len(normal) != len(codes):
        raise StudyError(
            f"study {study.name}, column {column}: two of its codes are the same once 1.0 reads as 1",
            remedy="remove one of them",
        )
    return normal
