"""FHIR R4 resources as a table: a row a patient, or a row an encounter, in columns that site.toml defines."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import pyarrow as pa

from client.origins import FhirColumn
from client.settings import DataSource, SiteFolder
from client.sources.cells import text_of
from client.sources.observed import (
    Unfit,
    child,
    counts,
    identifier,
    matches,
    moment,
    observed,
    observed_at,
    reference,
    years,
)
from client.sources.persons import Persons, References
from client.sources.resources import Entry, Export, Resource
from common.errors import DataError, SiteError
from common.table import PLACES_SHOWN, VIOLATIONS_SHOWN, Place

Locate = Callable[[Sequence[int]], Sequence[int]]

_TURNED = "has a modifierExtension, which may turn its meaning round"
_log = logging.getLogger(__name__)
# What is kept of a Patient and an Encounter.
_KEPT = frozenset(
    {"gender", "birthDate", "deceasedDateTime", "deceasedBoolean", "subject", "class", "period"}
)


def read_fhir(folder: SiteFolder) -> tuple[Any, Place, Locate, str]:
    """All records as text columns (pyarrow Table), what finds their rows, and how messages name the export.

    Rows stand in the order in which their Patients, or Encounters, stand in the export, and count from 1.

    Raises:
        SiteError: if [data.fhir_columns] can't be made.
        DataError: if the export can't be read, or resources aren't what the columns want: how many, and the
            first places.
    """
    source = folder.file.data
    _check(source, str(folder.root / "site.toml"))
    export = Export(folder.data_path, source)
    assembly = _Assembly(export, source)
    for entry in export:
        assembly.take(entry)
    table = assembly.table()
    return table, "row", lambda positions: [p + 1 for p in positions], export.origin


def _check(source: DataSource, origin: str) -> None:
    rows = source.fhir_rows
    for name, column in source.fhir_columns.items():
        owner = f"{origin}: data.fhir_columns.{name}: "
        if column.value == "age" and rows == "patient" and source.fhir_date is None:
            raise SiteError(owner + "age on which date?", remedy="set fhir_date in [data]")
        if column.resource == "Encounter" and (column.value == "class") != (rows == "encounter"):
            raise SiteError(
                owner + f"an Encounter's {column.value} doesn't go with a row {rows}",
                remedy='take class with fhir_rows = "encounter", count or present with "patient"',
            )


@dataclass(frozen=True, slots=True, repr=False)
class _Fact:
    """What one resource adds to one column."""

    subject: str | None
    encounter: str | None
    at: datetime | None
    value: float | str | None
    file: int
    number: int


@dataclass(repr=False)
class _Found:
    """How often a problem was found, and where first."""

    count: int = 0
    places: list[str] = field(default_factory=list)


class _Assembly:
    """Facts by column while resources come, rows of them at the end."""

    def __init__(self, export: Export, source: DataSource) -> None:
        self._export, self._source = export, source
        self._columns = source.fhir_columns
        self._of: dict[str, dict[str, FhirColumn]] = {}
        for name, column in self._columns.items():
            self._of.setdefault(column.resource, {})[name] = column
        self._by_encounter = source.fhir_rows == "encounter"
        kinds = ("Patient", "Encounter") if self._by_encounter else ("Patient",)
        self._keys: dict[str, dict[str, Entry]] = {kind: {} for kind in kinds}
        self._references, self._persons = References(), Persons()
        self._facts: dict[str, list[_Fact]] = {name: [] for name in self._columns}
        self._seen: dict[str, bytes] = {}
        self._held = 0
        self._problems: dict[tuple[str, str], _Found] = {}
        self._dangling = _Found()

    def take(self, entry: Entry) -> None:
        """Note a resource: who it is, and what it adds to which columns."""
        resource, kind = entry.resource, entry.resource["resourceType"]
        mine = self._of.get(kind, {})
        if not mine and kind not in self._keys:
            return
        if self._repeated(entry, kind):
            self._named(f"{kind}/{identifier(resource)}", entry)  # each bundle may call it otherwise
            return
        if kind in self._keys and not self._noted(entry, kind):
            return
        for name, column in mine.items():
            if column.value in ("gender", "age", "deceased", "class") or not counts(resource):
                continue
            for part in matches(resource, column):
                self._add(name, column, part, entry)

    def _repeated(self, entry: Entry, kind: str) -> bool:
        """Whether the same resource came before, as it does where bundles overlap."""
        own = identifier(entry.resource)
        if own is None:
            return False
        try:
            text = json.dumps(entry.resource, sort_keys=True)
        except RecursionError:
            self._problem(f"resource {kind}", "nested too deeply", entry.file, entry.number)
            return True
        content = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        before = self._seen.setdefault(f"{kind}/{own}", content)
        if before is content:
            return False
        if before != content:
            self._problem(f"resource {kind}", "the same id with another content", entry.file, entry.number)
        return True

    def _noted(self, entry: Entry, kind: str) -> bool:
        own = identifier(entry.resource)
        if own is None:
            self._problem(f"resource {kind}", "no valid id", entry.file, entry.number)
            return False
        if entry.resource.get("modifierExtension"):
            self._problem(f"resource {kind}", _TURNED, entry.file, entry.number)
        name = f"{kind}/{own}"
        if kind == "Encounter" and not counts(entry.resource):
            return False
        kept = {key: value for key, value in entry.resource.items() if key in _KEPT}
        self._keys[kind][name] = replace(entry, resource=kept)
        self._named(name, entry)
        if kind == "Patient":
            self._persons.note(name, entry.resource)
        self._bound()
        return True

    def _named(self, name: str, entry: Entry) -> None:
        """How others may refer to a Patient or Encounter that counts."""
        kind = entry.resource["resourceType"]
        if name in self._keys.get(kind, {}) and not self._references.note(name, entry.url):
            problem = "the same fullUrl as another resource"
            self._problem(f"resource {kind}", problem, entry.file, entry.number)

    def _add(self, name: str, column: FhirColumn, part: Resource, entry: Entry) -> None:
        resource, value, at = entry.resource, None, None
        try:
            if resource.get("modifierExtension"):
                raise Unfit(_TURNED)
            if column.value not in ("count", "present"):
                value, at = observed(part, column), observed_at(resource)
                if value is None:
                    return
                if at is None and column.value in ("first", "last"):
                    raise Unfit("has no date, so that nobody knows first or last")
        except Unfit as unfit:
            self._problem(f"column {name}", str(unfit), entry.file, entry.number)
            return
        subject, encounter = reference(resource, "subject"), reference(resource, "encounter")
        self._facts[name].append(_Fact(subject, encounter, at, value, entry.file, entry.number))
        self._bound()

    def _bound(self) -> None:
        self._held += 1
        if self._held > self._source.max_records:
            raise DataError(
                f"{self._export.origin}: more than {self._source.max_records} resources that count",
                remedy="raise max_records in site.toml if the machine's memory allows it",
            )

    def _problem(self, owner: str, problem: str, file: int, number: int) -> None:
        _note(self._problems.setdefault((owner, problem), _Found()), self._export.place(file, number))

    def table(self) -> Any:
        """The rows.

        Raises:
            DataError: if there is none, or resources don't fit.
        """
        self._persons.join(self._references)
        owners = self._owners()
        columns: dict[str, list[str | None]] = {"patient_id": [_bare(owner) for owner in owners.values()]}
        if self._by_encounter:
            columns["encounter_id"] = [_bare(key) for key in owners]
        position = {key: i for i, key in enumerate(owners)}
        for name, column in self._columns.items():
            if column.value in ("gender", "age", "deceased", "class"):
                columns[name] = [self._said(name, column, key, owner) for key, owner in owners.items()]
            else:
                columns[name] = self._gathered(name, column, position, owners)
        self._refuse()
        if not owners:
            raise DataError(
                f"{self._export.origin}: no {self._source.fhir_rows.capitalize()} that counts",
                remedy="export Patient resources, and Encounters where a row is one",
            )
        return pa.table({name: self._array(name, cells) for name, cells in columns.items()})

    def _array(self, name: str, cells: list[str | None]) -> Any:
        try:
            return pa.array(cells, pa.string())
        except UnicodeEncodeError:  # JSON can spell half a character
            raise DataError(
                f"{self._export.origin}: column {name} holds text that isn't Unicode",
                remedy="export it again: FHIR R4 as JSON",
            ) from None

    def _owners(self) -> dict[str, str]:
        """Each row's resource → its patient's main record, in the order of the export."""
        if not self._by_encounter:
            return {p: p for p in self._keys["Patient"] if self._persons.main(p) == p}
        owners: dict[str, str] = {}
        for key, entry in self._keys["Encounter"].items():
            patient = self._patient(reference(entry.resource, "subject"))
            if patient is None:
                self._missing(entry.file, entry.number)
            else:
                owners[key] = patient
        return owners

    def _patient(self, told: str | None) -> str | None:
        found = self._references.find(told)
        return self._persons.main(found) if found in self._keys["Patient"] else None

    def _said(self, name: str, column: FhirColumn, key: str, owner: str) -> str | None:
        """What a Patient or an Encounter says of itself."""
        entry = self._keys[column.resource][key if column.resource == "Encounter" else owner]
        resource = entry.resource
        if column.value == "class":
            return _text(child(resource, "class").get("code"))
        if column.value == "gender":
            return _text(resource.get("gender"))
        if column.value == "deceased":
            dated = isinstance(resource.get("deceasedDateTime"), str)
            return str(int(dated or resource.get("deceasedBoolean") is True))
        if "birthDate" not in resource:
            return None
        at: Any = self._source.fhir_date
        if at is None:
            began = moment(child(self._keys["Encounter"][key].resource, "period").get("start"))
            at = began and began.date()
        born = moment(resource["birthDate"])
        if born is None:
            self._problem(f"column {name}", "the birthDate is no date", entry.file, entry.number)
            return None
        return None if at is None else str(years(born.date(), at))

    def _gathered(
        self, name: str, column: FhirColumn, position: dict[str, int], owners: dict[str, str]
    ) -> list[str | None]:
        """A column's facts by row, each row's brought to one value."""
        rows: list[list[_Fact]] = [[] for _ in position]
        for fact in self._facts[name]:
            patient = self._patient(fact.subject)
            key = patient
            if self._by_encounter and patient is not None:
                if fact.encounter is None:
                    continue
                key = self._references.find(fact.encounter)
                if key in owners and owners[key] != patient:
                    self._problem(
                        f"column {name}", "of another patient than its encounter", fact.file, fact.number
                    )
                    continue
            if key not in position:
                self._missing(fact.file, fact.number)
            else:
                rows[position[key]].append(fact)
        return [_brought(column, facts) for facts in rows]

    def _missing(self, file: int, number: int) -> None:
        _note(self._dangling, self._export.place(file, number))

    def _refuse(self) -> None:
        lines = [
            f"  {owner}: {problem}, {_where(found)}" for (owner, problem), found in self._problems.items()
        ]
        if self._dangling.count:
            told = f"refer to no patient or encounter that counts, {_where(self._dangling)}"
            if self._source.dangling == "refuse":
                lines.append(f"  resources {told}")
            else:
                _log.warning("%s: left out: resources %s", self._export.origin, told)
        if self._references.servers > 1:
            lines.append(
                f"  resources refer to {self._references.servers} servers by absolute addresses, where one "
                "id may mean two patients"
            )
        if not lines:
            return
        shown = lines[:VIOLATIONS_SHOWN] + (["  and more"] if len(lines) > VIOLATIONS_SHOWN else [])
        raise DataError(
            "\n".join([f"{self._export.origin}: the resources don't fit [data.fhir_columns]", *shown]),
            remedy='mend the export or these columns; dangling = "skip" leaves out resources of nobody here',
        )


def _note(found: _Found, place: str) -> None:
    found.count += 1
    if len(found.places) < PLACES_SHOWN:
        found.places.append(place)


def _where(found: _Found) -> str:
    times = "once" if found.count == 1 else f"{found.count} times"
    return f"{times} ({', '.join(found.places)}{', …' if found.count > len(found.places) else ''})"


def _bare(key: str) -> str:
    return key.split("/", 1)[1]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _brought(column: FhirColumn, facts: Sequence[_Fact]) -> str | None:
    """One value of a row's facts. Equal times are told apart by value, not by the order of the files."""
    if column.value == "count":
        return str(len(facts))
    if column.value == "present":
        return str(int(bool(facts)))
    if not facts:
        return None
    if column.value in ("first", "last"):
        ordered = sorted(facts, key=lambda fact: (fact.at, isinstance(fact.value, str), fact.value))
        return text_of(ordered[0 if column.value == "first" else -1].value)
    numbers = [float(fact.value) for fact in facts if fact.value is not None]
    if column.value == "mean":
        return text_of(math.fsum(numbers) / len(numbers))
    return text_of(min(numbers) if column.value == "min" else max(numbers))
