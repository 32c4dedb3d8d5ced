"""FHIR resources out of bundles and NDJSON files, one by one, each with its place in the export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from client.settings import DataSource
from client.sources.bounded import opened
from client.sources.version import LISTED
from common.errors import DataError

Resource = dict[str, Any]

_LARGEST_BUNDLE = 512 << 20
_LARGEST_LINE = 16 << 20
_MOST_FILES = 100_000
# Exports name files after types; other names are often a patient's, and are told by number.
_TYPE_NAMED = re.compile(
    r"(AllergyIntolerance|Condition|Device|DiagnosticReport|Encounter|Group|Immunization|Location|Medication"
    r"|MedicationRequest|Observation|Organization|Patient|Practitioner|Procedure|bundle|export|resources)"
    r"([._-]?\d{1,6})*\.(json|ndjson)",
    re.IGNORECASE,
)
_REMEDY = "export it again: FHIR R4 as JSON, a bundle a .json file or a resource a line of .ndjson"


@dataclass(frozen=True, slots=True, repr=False)
class Entry:
    """A resource of the export.

    Attributes:
        url: its `fullUrl` in a bundle.
        file, number: which file of the export, and which line or entry of that; from 1.
    """

    resource: Resource
    url: str | None
    file: int
    number: int


class Export:
    """The files of `[data] fhir`.

    Raises:
        DataError: if there is nothing to read, or too much.
    """

    def __init__(self, path: Path, source: DataSource) -> None:
        self.origin, self._source = str(path), source
        self._folder = path.is_dir()
        self._files = _listed(path) if self._folder else [path]
        if not self._files or self._files[0].suffix.lower() not in LISTED:
            raise DataError(f"{path}: no .json or .ndjson file", remedy=_REMEDY)
        size = sum(_size(each) for each in self._files)
        if size > source.max_bytes:
            raise DataError(
                f"{path}: holds {size} bytes, more than {source.max_bytes}",
                remedy="raise max_bytes in site.toml if the machine's memory allows it",
            )

    def name(self, file: int) -> str:
        """How messages call a file: by its name, or by its number if the name may be a patient's."""
        path = self._files[file - 1]
        if not self._folder:
            return str(path)
        if _TYPE_NAMED.fullmatch(path.name):
            return str(path)
        return f"{self.origin} (file {file} by name)"

    def place(self, file: int, number: int) -> str:
        """`Observation.ndjson line 4`, or `file 3 entry 2` of a folder of bundles."""
        path = self._files[file - 1]
        named = not self._folder or _TYPE_NAMED.fullmatch(path.name)
        unit = "line" if path.suffix.lower() == ".ndjson" else "entry"
        return f"{path.name if named else f'file {file}'} {unit} {number}"

    def __iter__(self) -> Iterator[Entry]:
        """Raises:
        DataError: at the first file that is no JSON or holds no FHIR resources: its name and line.
        """
        for file, path in enumerate(self._files, start=1):
            with opened(path, self._source, self.name(file)) as stream:
                found = (
                    self._lines(stream, file)
                    if path.suffix.lower() == ".ndjson"
                    else self._bundle(stream, file)
                )
                yield from found

    def _lines(self, stream: BinaryIO, file: int) -> Iterator[Entry]:
        number = 0
        while line := stream.readline(_LARGEST_LINE + 1):
            number += 1
            if len(line) > _LARGEST_LINE:
                raise self._malformed(file, f"line {number} has more than {_LARGEST_LINE} bytes")
            if line.strip():
                yield self._entry(self._parsed(line, file, number), None, file, number)

    def _bundle(self, stream: BinaryIO, file: int) -> Iterator[Entry]:
        content = stream.read(_LARGEST_BUNDLE + 1)
        if len(content) > _LARGEST_BUNDLE:
            raise self._malformed(file, f"a bundle of more than {_LARGEST_BUNDLE} bytes")
        value = self._parsed(content, file)
        if not isinstance(value, dict) or value.get("resourceType") != "Bundle":
            yield self._entry(value, None, file, 1)
            return
        entries = value.get("entry", [])
        if not isinstance(entries, list):
            raise self._malformed(file, "its bundle's entry is no list")
        for number, entry in enumerate(entries, start=1):
            if not isinstance(entry, dict):
                raise self._malformed(file, f"entry {number} of its bundle is no object")
            if "resource" in entry:
                url = entry.get("fullUrl")
                yield self._entry(entry["resource"], url if isinstance(url, str) else None, file, number)

    def _parsed(self, content: bytes, file: int, number: int | None = None) -> Any:
        where = "" if number is None else f" in line {number}"
        try:
            return json.loads(content.decode("utf-8-sig"), parse_constant=_no_constant)
        except UnicodeDecodeError as failure:
            line = number or content[: failure.start].count(b"\n") + 1
            raise self._malformed(file, f"not UTF-8 in line {line}") from None
        except json.JSONDecodeError as failure:
            raise self._malformed(file, f"no JSON in line {number or failure.lineno}") from None
        except RecursionError:
            raise self._malformed(file, f"nested too deeply{where}") from None
        except ValueError:
            raise self._malformed(file, f"a number that JSON doesn't have{where}") from None

    def _entry(self, value: Any, url: str | None, file: int, number: int) -> Entry:
        if not isinstance(value, dict) or not isinstance(value.get("resourceType"), str):
            raise self._malformed(file, f"no FHIR resource at {self.place(file, number)}")
        return Entry(value, url, file, number)

    def _malformed(self, file: int, problem: str) -> DataError:
        return DataError(f"{self.name(file)}: {problem}", remedy=_REMEDY)


def _listed(path: Path) -> list[Path]:
    """Raises:
    DataError: if the folder can't be read, or has too many files.
    """
    try:
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in LISTED)
    except OSError as failure:
        raise DataError(
            f"{path}: cannot be read ({failure.strerror})", remedy="check its permissions"
        ) from None
    if len(found) > _MOST_FILES:
        raise DataError(f"{path}: more than {_MOST_FILES} files", remedy="export it as NDJSON")
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # opening it will say what is wrong


def _no_constant(name: str) -> float:
    raise ValueError
