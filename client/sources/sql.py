"""A database's table: the result of one SELECT, read without the right to write, as text."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from client.settings import DataSource, SiteFolder
from client.sources.bounded import opened
from client.sources.cells import text_of
from client.sources.database import (
    WRITES,
    WRITING,
    Server,
    connect_arguments,
    parse,
    query_text,
    sqlite_line,
    unsound,
)
from common.errors import DataError, FedwardError, SiteError
from common.study import Study
from common.table import Place

Locate = Callable[[Sequence[int]], Sequence[int]]

_CHUNK = 5_000
_BYTES_A_CELL = 16
_STEPS_A_LOOK = 100_000
_MAGIC = b"SQLite format 3\0"


def read_sql(folder: SiteFolder, study: Study) -> tuple[Any, Place, Locate, str]:
    """All records of the query's result as text columns (pyarrow Table), what finds their rows, counted
    from 1, and how messages name the database.

    SQLite is opened for reading only; a PostgreSQL server gets a read-only transaction.

    Raises:
        SiteError: if site.toml's address, query or password file is wrong, or the query is.
        DataError: if the database can't be reached or read, or its result is no table, or too large.
    """
    source = folder.file.data
    server = Server.of(folder)
    query = query_text(folder)
    if server is not None and study.data.split.column is not None:
        raise SiteError(
            f"{folder.root / 'site.toml'}: the study's split is a column, and a server's rows may change "
            "within a session unseen",
            remedy="export the query's result to a file for this study",
        )
    reading = _Reading(folder, server, query, source)
    rows = reading.rows()
    return rows, "row", lambda positions: [p + 1 for p in positions], reading.origin


class _Reading:
    """One query against one database.

    Attributes:
        origin: how messages name the database: a file by its path, a server's by its name.
    """

    def __init__(self, folder: SiteFolder, server: Server | None, query: str, source: DataSource) -> None:
        self._folder, self._server, self._query, self._source = folder, server, query, source
        self.origin = str(folder.data_path) if server is None else f"database {server.database}"
        named = source.query_file
        self._where = f"{folder.root / 'site.toml'} query" if named is None else str(folder.root / named)
        self._until = 0.0

    def rows(self) -> Any:
        """The result as a pyarrow Table of text."""
        self._until = time.monotonic() + self._source.max_seconds
        with self._connected() as connection:
            self._parsed(connection)
            with self._told():
                streamed = connection.execution_options(stream_results=True, max_row_buffer=_CHUNK)
                result = streamed.exec_driver_sql(self._query)
                try:
                    names = [str(name).strip() for name in result.keys()]  # noqa: SIM118 - no mapping
                    self._check_names(names)
                    return self._collected(names, result)
                finally:
                    with self._quietly():
                        result.close()

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        engine, failed = self._engine(), ""
        try:
            connection = engine.connect().execution_options(no_parameters=True)
        except DBAPIError as error:
            failed = unsound(error)
        except SQLAlchemyError:
            failed = "no connection"
        if failed:
            engine.dispose()
            raise DataError(
                f"{self.origin}: cannot be opened ({failed})",
                remedy="check the address in site.toml [data] sql, that the server runs, that this user may "
                "log in; the password comes from password_file, PGPASSWORD or ~/.pgpass",
            )
        try:
            yield connection
        finally:
            with self._quietly():
                connection.close()
            engine.dispose()

    def _engine(self) -> sa.Engine:
        """Raises:
        SiteError: if the password file is wrong.
        DataError: if the file is no SQLite database.
        """
        if self._server is not None:
            arguments = connect_arguments(self._folder, self._server)
            return sa.create_engine(
                self._server.url, poolclass=NullPool, connect_args=arguments, hide_parameters=True
            )
        with opened(self._folder.data_path, self._source) as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise DataError(
                    f"{self.origin}: is no SQLite database", remedy="name the database's own file"
                )
        return sa.create_engine("sqlite://", poolclass=NullPool, creator=self._sqlite, hide_parameters=True)

    def _sqlite(self) -> sqlite3.Connection:
        path = quote(str(self._folder.data_path.absolute()))
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        connection.set_progress_handler(lambda: time.monotonic() > self._until, _STEPS_A_LOOK)
        connection.execute("PRAGMA query_only = ON")
        return connection

    @contextmanager
    def _told(self, reads: bool = True) -> Iterator[None]:
        """What the database says is told by kind and line: its own words may quote a value.

        Args:
            reads: whether rows are looked at.
        """
        failure: FedwardError | None = None
        try:
            yield
        except DBAPIError as error:
            failure = self._failure(error, reads)
        except SQLAlchemyError:
            failure = DataError(f"{self.origin}: cannot be read", remedy="try the query in another client")
        except UnicodeDecodeError:
            failure = DataError(f"{self.origin}: holds text that isn't UTF-8", remedy="convert it")
        if failure is not None:
            raise failure from None

    def _parsed(self, connection: sa.Connection) -> None:
        """Have the database look at the query's words and at no row.

        Raises:
            SiteError: if they are wrong. Later failures are the data's, whatever the database calls them.
        """
        if self._server is not None:
            driver: Any = connection.connection.driver_connection
            wrong = parse(driver, self._query)
            if wrong is not None:
                raise self._wrong(*wrong)
            return
        with self._told(reads=False):
            connection.exec_driver_sql(f"EXPLAIN {self._query}").close()

    def _wrong(self, kind: str, line: str) -> SiteError:
        return SiteError(
            f"{self._where}: the database refuses it{line} ({kind})",
            remedy="give one SELECT there; names of tables and columns must be the database's",
        )

    def _failure(self, error: DBAPIError, reads: bool) -> FedwardError:
        kind = unsound(error)
        if kind in WRITING:
            kind = WRITES
        if kind in ("took too long", "QueryCanceled"):
            return self._late()
        line = None if reads else sqlite_line(error, self._query)
        if line is not None:
            return self._wrong(kind, line)
        return DataError(
            f"{self.origin}: the query fails ({kind})", remedy="run it in another client and mend it"
        )

    def _late(self) -> DataError:
        return DataError(
            f"{self.origin}: the query took longer than {self._source.max_seconds} s",
            remedy="make it faster, or raise max_seconds in site.toml",
        )

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """For what no longer matters: the rows are read, or the failure is told."""
        try:
            yield
        except SQLAlchemyError:
            return

    def _check_names(self, names: Sequence[str]) -> None:
        seen: dict[str, int] = {}
        for i, name in enumerate(names, start=1):
            first = seen.setdefault(name, i)
            if first != i:
                raise DataError(
                    f"{self.origin}: columns {first} and {i} of the query's result have the same name",
                    remedy="give every column its own name, with AS",
                )

    def _collected(self, names: Sequence[str], result: Any) -> Any:
        schema = pa.schema([(name, pa.string()) for name in names])
        batches: list[Any] = []
        records, size = 0, 0
        while chunk := result.fetchmany(_CHUNK):
            records += len(chunk)
            if records > self._source.max_records:
                raise DataError(
                    f"{self.origin}: the query gives more than {self._source.max_records} records",
                    remedy="narrow the query, or raise max_records in site.toml",
                )
            columns = [self._column(i, cells) for i, cells in enumerate(zip(*chunk, strict=True), start=1)]
            size += sum(column.nbytes for column in columns) + _BYTES_A_CELL * len(columns)
            if size > self._source.max_bytes:
                raise DataError(
                    f"{self.origin}: the query gives more than {self._source.max_bytes} bytes",
                    remedy="narrow the query, or raise max_bytes in site.toml if memory allows it",
                )
            if time.monotonic() > self._until:  # a server's own limit begins anew with every chunk
                raise self._late()
            batches.append(pa.record_batch(columns, schema=schema))
        if not records:
            raise DataError(f"{self.origin}: the query gives no records", remedy="check its conditions")
        return pa.Table.from_batches(batches, schema)

    def _column(self, number: int, cells: Sequence[object]) -> Any:
        try:
            return pa.array([text_of(cell) for cell in cells], pa.string())
        except TypeError:
            raise DataError(
                f"{self.origin}: column {number} of the query's result holds no single values",
                remedy="select numbers, text, dates or truth values; no bytes, lists, documents or intervals",
            ) from None
        except UnicodeEncodeError:
            raise DataError(f"{self.origin}: holds text that isn't UTF-8", remedy="convert it") from None
