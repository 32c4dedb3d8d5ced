"""CSV files: strictly rectangular UTF-8, with the line numbers kept."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as arrow_csv

from client.settings import DataSource
from common.errors import DataError, SiteError
from common.table import PLACES_SHOWN, Place

Locate = Callable[[Sequence[int]], Sequence[int]]

_CHUNK = 1 << 20
_LARGEST_BLOCK = 64 << 20
_MAGICS = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "Parquet",
    b"SQLite format 3": "an SQLite database",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
}


def read_csv(file: BinaryIO, origin: str, source: DataSource) -> tuple[Any, Place, Locate]:
    """All records as text columns (pyarrow Table), and what finds their lines again.

    Raises:
        SiteError: if the delimiter cannot separate anything.
        DataError: if the file isn't UTF-8 text with a header line and equally long records.
    """
    delimiter = source.delimiter
    if not delimiter.isascii() or delimiter in '"\r\n\0':
        raise SiteError(
            f"{origin}: its delimiter in site.toml cannot be used", remedy="use a comma, semicolon or tab"
        )
    size = _survey(file, origin)
    names = _header(file, origin, delimiter)
    locate = _locator(origin, delimiter)
    ragged: list[int] = []

    def note(row: Any) -> str:
        ragged.append(row.number - 2)
        return "skip"

    file.seek(0)
    try:
        reader = arrow_csv.open_csv(
            file,
            arrow_csv.ReadOptions(use_threads=False, block_size=min(max(size, 1 << 10), _LARGEST_BLOCK)),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
            arrow_csv.ConvertOptions(
                column_types={n: pa.string() for n in names}, strings_can_be_null=False, check_utf8=False
            ),
        )
        batches, records = [], 0
        for batch in reader:
            batches.append(batch)
            records += batch.num_rows
            if records > source.max_records:
                raise DataError(
                    f"{origin}: more than {source.max_records} records",
                    remedy="raise max_records in site.toml",
                )
        rows = pa.Table.from_batches(batches, reader.schema)
    except pa.ArrowInvalid:  # its text quotes the record
        raise DataError(
            f"{origin}: is no readable CSV",
            remedy="export it again: UTF-8, one header line, one line a record",
        ) from None
    if ragged:
        places = ", ".join(str(line) for line in locate(ragged[:PLACES_SHOWN]))
        raise DataError(
            f"{origin}: {len(ragged)} records don't have the header's {len(names)} fields: line {places}"
            + (", …" if len(ragged) > PLACES_SHOWN else ""),
            remedy="quote fields that hold the delimiter, and give every record all its fields",
        )
    if rows.column_names != names:
        raise DataError(f"{origin}: its header line cannot be read", remedy="put plain column names there")
    if rows.num_rows == 0:
        raise DataError(f"{origin}: has a header but no records", remedy="export the table again")
    return rows.rename_columns([n.strip() for n in names]), "line", locate


def _survey(file: BinaryIO, origin: str) -> int:
    """Look through the bytes once; returns how many there are.

    Raises:
        DataError: at the first line that no text file has.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, quotes, size = 1, 0, 0
    while chunk := file.read(_CHUNK):
        if size == 0:
            for magic, kind in _MAGICS.items():
                if chunk.startswith(magic):
                    raise DataError(
                        f"{origin}: is {kind}, not CSV",
                        remedy="unpack or convert it, or name it as what it is",
                    )
        if b"\0" in chunk:
            line = lines + chunk[: chunk.index(b"\0")].count(b"\n")
            raise DataError(
                f"{origin}: holds a NUL byte in line {line}", remedy="export it again as UTF-8 text"
            )
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as failure:
            line = lines + chunk[: failure.start].count(b"\n")
            raise _not_utf8(origin, line) from None
        lines += chunk.count(b"\n")
        quotes += chunk.count(b'"')
        size += len(chunk)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(origin, lines) from None
    if quotes % 2:
        raise DataError(
            f"{origin}: a quote is opened and never closed", remedy="double the quotes inside of fields"
        )
    return size


def _not_utf8(origin: str, line: int) -> DataError:
    return DataError(f"{origin}: not UTF-8 in line {line}", remedy="save it as UTF-8")


def _header(file: BinaryIO, origin: str, delimiter: str) -> list[str]:
    """Names in the first line that isn't blank. Messages count columns and never quote a name: the first
    line of a file without a header is a patient."""
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        names = next((row for row in csv.reader(text, delimiter=delimiter) if row), [])
    except csv.Error:
        raise DataError(
            f"{origin}: its header line cannot be read", remedy="put plain column names there"
        ) from None
    finally:
        text.detach()
    if not names:
        raise DataError(f"{origin}: has no header line", remedy="export the table again")
    seen: dict[str, int] = {}
    for i, name in enumerate(names, start=1):
        first = seen.setdefault(name.strip(), i)
        if first != i:
            raise DataError(
                f"{origin}: columns {first} and {i} of the header have the same name",
                remedy="give every column its own name, and the file a header line",
            )
    return names


def _locator(path: str, delimiter: str) -> Locate:
    """Lines of records, found by reading the file again: only a complaint needs them."""

    def locate(positions: Sequence[int]) -> Sequence[int]:
        wanted = set(positions)
        if not wanted:
            return []
        found: dict[int, int] = {}
        with open(path, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter)
            record, start = -1, 1  # the header is record -1
            try:
                for row in reader:
                    if row:
                        if record in wanted:
                            found[record] = start
                        record += 1
                        if record > max(wanted) + 1:
                            break
                    start = reader.line_num + 1
            except csv.Error:
                pass  # a field beyond the csv module's limit: count plainly from here
        return [found.get(p, p + 2) for p in positions]

    return locate
