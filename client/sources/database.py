"""Addresses, passwords and queries, checked before anything connects; what a database's errors may say."""

from __future__ import annotations

import os
import re
import sqlite3
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.pq import DiagnosticField, ExecStatus
from sqlalchemy.exc import ArgumentError, DBAPIError

from client.origins import SQLITE
from client.settings import DataSource, SiteFolder
from common.errors import SiteError
from common.files import read_bounded

_POSTGRESQL = "postgresql+psycopg"
# What else libpq takes could carry a password or undo what keeps the connection from writing.
_OPTIONS = frozenset({"host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey"})
_HERE = frozenset({"", "localhost", "127.0.0.1", "::1"})
_CONNECT_SECONDS = 10
_LARGEST_QUERY = 100_000  # bytes
_SELECT = re.compile(r"(?:\s+|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*(?:select|with)\b", re.IGNORECASE | re.DOTALL)
WRITES = "it would write"
# What PostgreSQL says to a statement that writes, where a cursor in a read-only transaction wants a SELECT.
WRITING = frozenset({"FeatureNotSupported", "SyntaxError", "ReadOnlySqlTransaction"})
# What of SQLite's words quotes nothing but the query.
_SQLITE_FAULTS = {
    "no such column: ": "no such column",
    "no such table: ": "no such table",
    "no such function: ": "no such function",
    "ambiguous column name: ": "ambiguous column name",
    "near ": "syntax error",
    "attempt to write a readonly database": WRITES,
    "You can only execute one statement at a time": "more than one statement",
}


@dataclass(frozen=True, repr=False)
class Server:
    """A PostgreSQL database that site.toml names."""

    url: sa.URL
    database: str

    @staticmethod
    def of(folder: SiteFolder) -> Server | None:
        """The server of `[data] sql`; None for an SQLite file, which is then known to be one by its name.

        Raises:
            SiteError: if the address is malformed, of another kind, or holds a password. It is never quoted.
        """
        text = folder.file.data.sql or ""
        origin = f"{folder.root / 'site.toml'}: data.sql"
        if text.startswith(SQLITE):
            _check_sqlite(folder, origin)
            return None
        try:
            url = sa.make_url(text)
        except (ArgumentError, ValueError):
            raise SiteError(
                f"{origin}: is no address of a database",
                remedy="write sqlite:///FILE or postgresql+psycopg://HOST/NAME",
            ) from None
        if url.drivername != _POSTGRESQL:
            raise SiteError(
                f"{origin}: neither sqlite:/// nor {_POSTGRESQL}://",
                remedy="others aren't read; let them export a Parquet file",
            )
        if url.password is not None or "password" in url.query:
            raise SiteError(
                f"{origin}: holds a password",
                remedy="take it out and change it; name a password_file, or use PGPASSWORD or ~/.pgpass",
            )
        strange = sorted({*url.query} - _OPTIONS)
        if strange:
            raise SiteError(
                f"{origin}: {len(strange)} of its options can't be used",
                remedy=f"of those behind the question mark, these may stand: {', '.join(sorted(_OPTIONS))}",
            )
        if not url.database:
            raise SiteError(f"{origin}: names no database", remedy=f"write {_POSTGRESQL}://HOST/NAME")
        return Server(url, url.database)


def _check_sqlite(folder: SiteFolder, origin: str) -> None:
    if "?" in str(folder.file.data.sql):
        raise SiteError(f"{origin}: SQLite takes no options here", remedy="write sqlite:///FILE")
    if folder.file.data.password_file is not None:
        raise SiteError(f"{origin}: SQLite takes no password", remedy="take password_file out")


def connect_arguments(folder: SiteFolder, server: Server) -> dict[str, Any]:
    """How to connect: for reading only, for a bounded time, and encrypted where it leaves the machine.

    Raises:
        SiteError: if the password file can't be read, or others may read it.
    """
    source: DataSource = folder.file.data
    limits = f"-c default_transaction_read_only=on -c statement_timeout={source.max_seconds * 1000}"
    arguments: dict[str, Any] = {
        "options": limits,
        "connect_timeout": _CONNECT_SECONDS,
        "client_encoding": "utf8",
        "application_name": "fedward",
    }
    host = str(server.url.query.get("host") or server.url.host or os.environ.get("PGHOST", ""))
    if "sslmode" not in server.url.query and host not in _HERE and not host.startswith("/"):
        arguments["sslmode"] = "require"
    if source.password_file is not None:
        path = folder.root / source.password_file
        secret = read_bounded(path, SiteError, limit=1024)
        if path.stat().st_mode & 0o077:
            raise SiteError(f"{path}: others may read this secret", remedy=f"chmod 600 {path}")
        try:
            arguments["password"] = secret.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise SiteError(f"{path}: not UTF-8", remedy="write the password alone there") from None
    return arguments


def query_text(folder: SiteFolder) -> str:
    """The site's SELECT. That it is one statement and no more, the database itself must find.

    Raises:
        SiteError: if its file can't be read, or it begins otherwise.
    """
    source = folder.file.data
    origin = f"{folder.root / 'site.toml'}: data.query"
    text = source.query or ""
    if source.query_file is not None:
        path = folder.root / source.query_file
        origin = str(path)
        try:
            text = read_bounded(path, SiteError, limit=_LARGEST_QUERY).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise SiteError(f"{origin}: not UTF-8", remedy="save it as UTF-8") from None
    if "\0" in text or not _SELECT.match(text):
        raise SiteError(f"{origin}: doesn't begin with SELECT or WITH", remedy="give one SELECT alone")
    return text


def unsound(error: DBAPIError) -> str:
    """The kind of a database's failure, in words that hold no value: the driver's own name for it."""
    cause = error.orig
    name, said = str(getattr(cause, "sqlite_errorname", "") or ""), str(cause)
    if name == "SQLITE_INTERRUPT":
        return "took too long"
    if isinstance(cause, sqlite3.Error):
        if said.startswith("Could not decode to UTF-8"):
            return "text that isn't UTF-8"
        return next((fault for words, fault in _SQLITE_FAULTS.items() if said.startswith(words)), name)
    kind = type(cause).__name__
    return "no answer" if kind == "OperationalError" and not getattr(cause, "sqlstate", None) else kind


def parse(connection: psycopg.Connection, query: str) -> tuple[str, str] | None:
    """Have PostgreSQL parse the query, which it does for exactly one statement, and looks at no row.

    Returns:
        What is wrong, and ` in line N` if it says where; None if it is sound.
    """
    result = connection.pgconn.prepare(b"", query.encode())
    if result.status != ExecStatus.FATAL_ERROR:
        return None
    state, position = (
        result.error_field(f) for f in (DiagnosticField.SQLSTATE, DiagnosticField.STATEMENT_POSITION)
    )
    try:
        kind = psycopg.errors.lookup((state or b"").decode()).__name__
    except KeyError:
        kind = "no such state"
    if position is None or not position.isdigit():
        return kind, ""
    return kind, f" in line {query[: int(position) - 1].count(chr(10)) + 1}"


def sqlite_line(error: DBAPIError, query: str) -> str | None:
    """` in line N`, or nothing, where SQLite refuses the query's words; None where it fails later.

    SQLite tells a word only: its line is known where the query has it once.
    """
    said = str(error.orig)
    words = next((words for words in _SQLITE_FAULTS if said.startswith(words)), None)
    if words is None:
        return None
    rest = said.removeprefix(words)
    named = rest.split('"')[1] if words == "near " and rest.count('"') >= 2 else rest
    places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(named)}(?!\w)", query)]
    return f" in line {query[: places[0]].count(chr(10)) + 1}" if named and len(places) == 1 else ""
