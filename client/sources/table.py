"""A site's table under the names, units and codes of a study's dictionary, as site.toml maps them."""

from __future__ import annotations

import re
from collections import abc
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from client.settings import DataSource, Mapping, SiteFolder
from client.sources.bounded import opened
from client.sources.columnar import Locate, read_parquet
from client.sources.delimited import read_csv
from client.sources.fhir import read_fhir
from client.sources.wide import check, decode
from common.columns import CategoricalColumn, Column, NumericColumn
from common.errors import DataError, SiteError
from common.features import normal_code
from common.schema import FINITE_NUMBER, missing_text, needed_columns, normal_text
from common.study import Study
from common.table import Place, Table

_MAP_REMEDY = "mend [data.columns] in site.toml"


def read_table(folder: SiteFolder, study: Study) -> Table:
    """Read the site's records, all of them as text, under the study's names.

    Sizes are checked before anything is read: the file's own, and what a Parquet header claims; a query's
    result and FHIR resources are counted while they come.

    Raises:
        SiteError: if the mapping in site.toml doesn't fit the study or the table.
        DataError: if the data are absent, too large, damaged, or lack a column.
    """
    check(folder, study)
    plan = _Plan(folder, study)
    rows, place, locate, origin = _rows(folder, study, plan.wanted)
    columns = plan.apply(rows, origin)
    return Table(origin, columns, rows, place, locate, decode(folder, study, columns))


def _rows(folder: SiteFolder, study: Study, wanted: abc.Mapping[str, str]) -> tuple[Any, Place, Locate, str]:
    """The table as the site has it, what finds its records again, and how messages name it."""
    source, path = folder.file.data, folder.data_path
    if source.sql is not None:
        from client.sources.sql import read_sql  # SQLAlchemy is loaded where it is needed

        return read_sql(folder, study)
    if source.fhir is not None:
        return read_fhir(folder)
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".txt", ".parquet", ".pq"):
        raise SiteError(
            f"{path}: neither CSV nor Parquet by its name", remedy="name a .csv or .parquet file in site.toml"
        )
    with opened(path, source) as file:
        if ending in (".parquet", ".pq"):
            return *read_parquet(file, str(path), source, wanted), str(path)
        return *read_csv(file, str(path), source), str(path)


class _Plan:
    """Which of the table's columns each dictionary name reads, and how its values are converted.

    Raises:
        SiteError: where units or codes don't fit the dictionary, or two names read one column.
    """

    def __init__(self, folder: SiteFolder, study: Study) -> None:
        self.origin = str(folder.root / "site.toml")
        self.names = needed_columns(study)
        self.columns: dict[str, Column] = {s: c for c in study.data.columns for s in c.sources}
        self.stems: dict[str, Column] = {c.name: c for c in study.data.columns}
        self.comma = folder.file.data.decimal == ","
        self.single = {*folder.file.data.columns}
        self.label = study.data.label
        numbers = (study.data.label.number, study.data.label.time)
        self.numbers = {number.name: number for number in numbers if number}
        self.key = study.data.patient_key
        self.mappings = {name: self._mapping(name, folder.file.data) for name in self.names}
        self.wanted = {name: self.mappings[name].column or name for name in self.names}
        for name in {*self.names} & {*folder.file.data.columns} | {*self.stems}:
            self._check(name, folder.file.data.columns.get(name, Mapping()))
        first: dict[str, str] = {}
        for name, column in self.wanted.items():
            other = first.setdefault(column, name)
            if other != name:
                raise SiteError(
                    f"{self.origin}: {other} and {name} read the same column of the table", remedy=_MAP_REMEDY
                )

    def _mapping(self, name: str, source: DataSource) -> Mapping:
        """The name's own mapping, or for `ecg_7` that of its repeated column `ecg`."""
        if name in source.columns:
            return source.columns[name]
        column = self.columns.get(name)
        if column is None or column.name == name or column.name not in source.columns:
            return Mapping()
        stem = source.columns[column.name]
        renamed = None if stem.column is None else stem.column + name.removeprefix(column.name)
        return stem.model_copy(update={"column": renamed})

    def _check(self, name: str, mapping: Mapping) -> None:
        column = self.columns.get(name) or self.stems.get(name) or self.numbers.get(name)
        converts = mapping.multiply != 1.0 or mapping.add != 0.0
        if isinstance(column, NumericColumn):
            if mapping.unit not in (None, column.unit) and not converts:
                self._fail(
                    name, f"is in {mapping.unit} but the study wants {column.unit}: give multiply or add"
                )
            if mapping.multiply == 0.0:
                self._fail(name, "multiply = 0 would erase every value")
            missing = {"", *column.missing_codes}
            if any(c not in missing and not re.fullmatch(FINITE_NUMBER, c) for c in mapping.codes.values()):
                self._fail(name, "codes of a numeric column must be mapped to numbers or missing codes")
            return
        if converts or mapping.unit is not None:
            self._fail(name, "has no unit in this study")
        if mapping.codes and name == self.key:
            self._fail(name, "is the patient key; identifiers have no codes")
        self._check_codes(name, mapping, column)

    def _check_codes(self, name: str, mapping: Mapping, column: Column | None) -> None:
        if column is not None and not isinstance(column, CategoricalColumn):
            if mapping.codes:
                self._fail(name, f"is a column of kind {column.kind}, which has no codes")
            return
        if column is not None:
            known = {*column.codes, *column.missing_codes}
        elif name in self.label.codes:
            absent = {each.name: each.missing_codes for each in self.label.columns}
            known = {code for code, _ in self.label.codes[name]}
            known |= {"", *absent[name]} if name in absent else set()
        else:
            known = {"train", "test", ""}
        strange = {normal_code(c) for c in mapping.codes.values()} - {normal_code(c) for c in known}
        if strange:
            self._fail(name, f"{len(strange)} of its codes are mapped to codes that the study doesn't have")

    def _fail(self, name: str, problem: str) -> None:
        raise SiteError(f"{self.origin}: data.columns.{name}: {problem}", remedy=_MAP_REMEDY)

    def apply(self, rows: Any, origin: str) -> dict[str, Any]:
        """Dictionary name → converted text.

        Raises:
            DataError: naming the dictionary's columns that the table lacks; never what it has instead,
                because the first line of a file without a header is a patient.
        """
        have = set(rows.column_names)
        lacking = [name for name in self.names if self.wanted[name] not in have]
        if lacking:
            more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
            raise DataError(
                f"{origin}: the table lacks column {', '.join(lacking[:10])}{more}",
                remedy="export them with a header line, select them in the query, or say in site.toml "
                "[data.columns.NAME] what they are called there"
                + ("; the whole header is one column: say [data] delimiter, too" if len(have) == 1 else ""),
            )
        text = {name: rows.column(self.wanted[name]).combine_chunks() for name in self.names}
        for column in self.stems.values():
            sources = column.sources
            if len(sources) == 1 or self.single.intersection(sources):
                text |= {s: self._converted(s, text[s]) for s in sources}
            else:  # as one long column: a call per column would cost more than the work
                block = self._converted(sources[0], pa.concat_arrays([text[s] for s in sources]))
                text |= {s: block.slice(i * rows.num_rows, rows.num_rows) for i, s in enumerate(sources)}
        return text | {n: self._converted(n, text[n]) for n in self.names if n not in self.columns}

    def _converted(self, name: str, text: Any) -> Any:
        mapping, written = self.mappings[name], text
        column = self.columns.get(name) or self.numbers.get(name)
        if self.comma and isinstance(column, NumericColumn):
            text = _with_point(text, column)
        if mapping.codes:
            theirs = [normal_code(code) for code in mapping.codes]
            index = pc.index_in(normal_text(written), value_set=pa.array(theirs))
            ours = pa.array(list(mapping.codes.values()), pa.string()).take(index)
            text = pc.coalesce(ours, text)
        if isinstance(column, NumericColumn) and (mapping.multiply != 1.0 or mapping.add != 0.0):
            return _rescaled(text, mapping, column)
        return text


def _with_point(text: Any, column: NumericColumn) -> Any:
    """Of decimal commas, points; of points, what is no number. Missing codes stay as they are."""
    plain = pc.utf8_trim_whitespace(text)
    pointed = pc.replace_substring(pc.replace_substring(plain, ".", ":"), ",", ".")
    return pc.if_else(pc.fill_null(missing_text(plain, column.missing_codes), True), text, pointed)


def _rescaled(text: Any, mapping: Mapping, column: NumericColumn) -> Any:
    """Numbers in the dictionary's unit; missing codes and what is no number stay as they are."""
    plain = pc.utf8_trim_whitespace(text)
    convertible = pc.and_(
        pc.invert(missing_text(plain, column.missing_codes)),
        pc.fill_null(pc.match_substring_regex(plain, FINITE_NUMBER), False),
    )
    values = pc.cast(pc.if_else(convertible, plain, None), pa.float64()).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = pa.array(values * mapping.multiply + mapping.add).cast(pa.string())
    return pc.if_else(convertible, converted, text)
