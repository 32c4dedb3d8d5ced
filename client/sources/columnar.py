"""Parquet files: what the header claims is checked before a byte of data is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from client.settings import DataSource
from common.errors import DataError
from common.table import Place

Locate = Callable[[Sequence[int]], Sequence[int]]

_MAGIC = b"PAR1"
_LARGEST_FOOTER = 64 << 20
_BYTES_A_CELL = 8


def read_parquet(
    file: BinaryIO, origin: str, source: DataSource, wanted: Mapping[str, str]
) -> tuple[Any, Place, Locate]:
    """All records as text columns (pyarrow Table) and what finds their rows, counted from 1.

    `wanted`: dictionary name → table column; those must hold single values. Other columns that hold
    lists or bytes are left alone.

    Raises:
        DataError: if the file is damaged or claims more than site.toml allows.
    """
    _check_frame(file, origin)
    try:
        parquet = pq.ParquetFile(
            file, thrift_string_size_limit=_LARGEST_FOOTER, thrift_container_size_limit=1 << 20
        )
        schema = parquet.schema_arrow
    except (pa.ArrowException, OSError, ValueError):
        raise _damaged(origin) from None
    names = list(schema.names)
    seen: dict[str, int] = {}
    for i, name in enumerate(names, start=1):
        first = seen.setdefault(name, i)
        if first != i:
            raise DataError(
                f"{origin}: columns {first} and {i} have the same name",
                remedy="give every column its own name",
            )
    ours = {column: name for name, column in wanted.items()}
    plain = [name for name, kind in zip(names, schema.types, strict=True) if _is_plain(kind)]
    for name in {*names} - {*plain}:
        if name in ours:
            raise DataError(
                f"{origin}: column {ours[name]} holds no single values",
                remedy="export one value a record and column, and durations as numbers",
            )
    _check_claims(parquet.metadata, plain, origin, source)
    try:
        table = parquet.read(columns=plain, use_threads=False)
        rows = pa.table({name: _text(table.column(name)) for name in plain})
    except (pa.ArrowException, OSError, ValueError):
        raise _damaged(origin) from None
    if rows.num_rows != parquet.metadata.num_rows:
        raise _damaged(origin)
    if rows.num_rows == 0:
        raise DataError(f"{origin}: has no records", remedy="export the table again")
    return rows, "row", lambda positions: [p + 1 for p in positions]


def _check_frame(file: BinaryIO, origin: str) -> None:
    """Magic bytes at both ends, and a footer that fits between them."""
    size = os.fstat(file.fileno()).st_size
    if size < 12 or file.read(4) != _MAGIC:
        raise _damaged(origin)
    file.seek(size - 8)
    footer = int.from_bytes(file.read(4), "little")
    if file.read(4) != _MAGIC or footer > min(size - 12, _LARGEST_FOOTER):
        raise _damaged(origin)
    file.seek(0)


def _check_claims(metadata: Any, plain: Sequence[str], origin: str, source: DataSource) -> None:
    """Refuse by the header's own numbers, before they are allocated.

    Raises:
        DataError: naming the claim and the limit.
    """
    records = metadata.num_rows
    if not 0 <= records <= source.max_records:
        raise DataError(
            f"{origin}: claims {records} records, more than {source.max_records}",
            remedy="raise max_records in site.toml if that is true",
        )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if sum(g.num_rows for g in groups) != records or any(g.num_rows < 0 for g in groups):
        raise _damaged(origin)
    size = records * len(plain) * _BYTES_A_CELL
    ours = {*plain}
    for group in groups:
        for c in range(group.num_columns):
            chunk = group.column(c)
            if chunk.total_uncompressed_size < 0 or chunk.num_values < 0:
                raise _damaged(origin)
            if chunk.path_in_schema in ours and chunk.num_values != group.num_rows:
                raise _damaged(origin)
            size += chunk.total_uncompressed_size
    if size > source.max_bytes:
        raise DataError(
            f"{origin}: would unpack to about {size} bytes, more than {source.max_bytes}",
            remedy="raise max_bytes in site.toml if the machine's memory allows it",
        )


def _is_plain(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (
        pa.types.is_nested(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_duration(kind)  # as text a whole number of a unit that nobody sees
    )


def _text(column: Any) -> Any:
    """A column as text, as a CSV export would write it; true and false are 1 and 0."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return pc.cast(column, pa.string())


def _damaged(origin: str) -> DataError:
    return DataError(f"{origin}: is damaged or no Parquet file", remedy="export or copy it again")
