"""The SQL source: SQLite and a real PostgreSQL give the table that a CSV export would, and only read."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest
from malformed import ROWS, STUDY, csv_text
from postgres import PASSWORD, Cluster, cluster, rows
from typer.testing import CliRunner

from client.cli import app
from client.settings import SiteFolder
from client.site import make_site_keys
from client.sources import read_table
from client.sources.cells import text_of
from client.sources.database import Server, connect_arguments
from client.sources.version import data_version
from common.errors import DataError, FedwardError, SiteError
from common.study import parse_study
from common.table import Table

SECRETS = ("8675309", "Zebedee", PASSWORD)
SITE = '[site]\nname = "malformed"\npublic_size = 20\n\n[data]\n'
CREATE = "CREATE TABLE visit (patient_id TEXT, age INTEGER, sex INTEGER, pulse REAL, outcome TEXT)"
QUERY = "SELECT patient_id, age, sex, pulse, outcome FROM visit ORDER BY patient_id"


def site_with(root: Path, data: str) -> SiteFolder:
    root.mkdir(exist_ok=True)
    (root / "site.toml").write_text(SITE + data)
    return SiteFolder(root)


def emr(root: Path, *more: str, create: str = CREATE) -> Path:
    """An SQLite database with the twenty sound visits."""
    root.mkdir(exist_ok=True)
    path = root / "emr.db"
    with sqlite3.connect(path) as database:
        database.execute(create)
        database.executemany(
            "INSERT INTO visit VALUES (?, ?, ?, ?, ?)", [[c or None for c in r] for r in ROWS]
        )
        for statement in more:
            database.execute(statement)
    database.close()
    return path


def read(folder: SiteFolder, study: str = STUDY) -> Table:
    return read_table(folder, parse_study(study.encode(), "study"))


def column(table: Table, name: str) -> list[str | None]:
    return list(table.columns[name].to_pylist())


def lite(query: str = QUERY, more: str = "") -> str:
    return f"sql = 'sqlite:///emr.db'\nquery = '''{query}'''\n{more}"


def told(folder: SiteFolder, kind: type[FedwardError], study: str = STUDY) -> str:
    """What the reader refuses with; it quotes no secret."""
    with pytest.raises(kind) as refusal:
        read(folder, study)
    text = str(refusal.value)
    assert not any(secret in text for secret in SECRETS), text
    assert refusal.value.remedy
    return text


def test_a_query_gives_the_table_that_a_csv_file_would(tmp_path: Path) -> None:
    emr(tmp_path)
    table = read(site_with(tmp_path, lite()))
    (tmp_path / "patients.csv").write_text(csv_text(ROWS))
    plain = read(site_with(tmp_path, 'file = "patients.csv"\n'))
    assert column(table, "patient_id") == column(plain, "patient_id")
    assert column(table, "age") == column(plain, "age")
    assert column(table, "pulse")[:7] == ["61.0", "62.0", "63.0", "64.0", "65.0", "66.0", None]
    assert (table.place, list(table.locate([0, 19]))) == ("row", [1, 20])
    assert table.origin == str(tmp_path / "emr.db")


def test_a_query_file_and_the_mapping_on_top(tmp_path: Path) -> None:
    emr(tmp_path)
    (tmp_path / "cohort.sql").write_text(
        "-- the cohort; as it stands\n/* one row\na visit */\n"
        "WITH v AS (SELECT * FROM visit WHERE patient_id LIKE 'p%')\n"
        "SELECT patient_id AS mrn, age * 12 AS months, CASE sex WHEN 0 THEN 'F' ELSE 'M' END AS sex,\n"
        "pulse, outcome, '%s; :name 12:30' AS note FROM v;\n-- end;\n"
    )
    more = (
        "sql = 'sqlite:///emr.db'\nquery_file = 'cohort.sql'\n[data.columns.patient_id]\ncolumn = 'mrn'\n"
        "[data.columns.age]\ncolumn = 'months'\nunit = 'mo'\nmultiply = 0.08333333333333333\n"
        "[data.columns.sex.codes]\nF = '0'\nM = '1'\n"
    )
    table = read(site_with(tmp_path, more))
    assert [float(a or "nan") for a in column(table, "age")] == pytest.approx([float(r[1]) for r in ROWS])
    assert column(table, "sex") == [r[2] for r in ROWS]
    assert table.rows.column("note").to_pylist()[0] == "%s; :name 12:30"


def test_check_works_and_the_database_stays_as_it_is(tmp_path: Path) -> None:
    path = emr(tmp_path / "site")
    folder = site_with(tmp_path / "site", lite())
    make_site_keys(folder)
    (tmp_path / "study.toml").write_text(STUDY)
    before = hashlib.sha256(path.read_bytes()).digest()
    done = CliRunner().invoke(app, ["check", str(folder.root), str(tmp_path / "study.toml")])
    assert done.exit_code == 0, done.output
    assert "emr.db fits study broken-study" in done.output
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert sorted(p.name for p in folder.root.iterdir()) == ["emr.db", "keys", "site.toml"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (True, "1"),
        (False, "0"),
        (7, "7"),
        (0.1, "0.1"),
        (Decimal("1E+2"), "100"),
        (Decimal("7.10"), "7.10"),
        (date(2026, 2, 3), "2026-02-03"),
        (datetime(2026, 2, 3, 4, 5, tzinfo=UTC), "2026-02-03T04:05:00+00:00"),
        (time(4, 5), "04:05:00"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("as it is", "as it is"),
    ],
)
def test_every_value_becomes_text(value: object, text: str | None) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("value", [b"8675309", memoryview(b"x"), [1], {"a": 1}, timedelta(1), object()])
def test_what_is_no_single_value_has_no_text(value: object) -> None:
    with pytest.raises(TypeError) as failure:
        text_of(value)
    assert "8675309" not in str(failure.value)


BROKEN = {
    "unknown-column": (
        "SELECT patient_id,\nheight\nFROM visit",
        SiteError,
        "query: the database refuses it in line 2 (no such column)",
    ),
    "unknown-table": ("SELECT *\n\nFROM visits", SiteError, "in line 3 (no such table)"),
    "syntax": ("SELECT patient_id\nFORM visit", SiteError, "in line 2 (syntax error)"),
    "quoted": ('SELECT * FROM "Zebedee"', SiteError, "in line 1 (no such table)"),
    "two": ("SELECT 1; SELECT 2", SiteError, "query: the database refuses it (more than one statement)"),
    "hidden": (QUERY + ";\nDROP TABLE visit;", SiteError, "(more than one statement)"),
    "delete": ("DELETE FROM visit", SiteError, "doesn't begin with SELECT or WITH"),
    "pragma": ("PRAGMA user_version = 3", SiteError, "doesn't begin with SELECT or WITH"),
    "attach": ("ATTACH 'other.db' AS o", SiteError, "doesn't begin with SELECT or WITH"),
    "writes": ("WITH gone AS (SELECT 1) DELETE FROM visit", DataError, "the query fails (it would write)"),
    "empty": ("", SiteError, "doesn't begin with SELECT or WITH"),
    "no-rows": (QUERY.replace("ORDER", "WHERE age > 9000000 ORDER"), DataError, "the query gives no records"),
    "twice": (
        "SELECT patient_id, age, sex AS age FROM visit",
        DataError,
        "columns 2 and 3 of the query's result have the same name",
    ),
    "lacking": ("SELECT patient_id, age, sex, outcome FROM visit", DataError, "the table lacks column pulse"),
    "bytes": (
        QUERY.replace("pulse", "CAST('8675309' AS BLOB) AS pulse"),
        DataError,
        "column 4 of the query's result holds no single values",
    ),
    "not-utf8": (
        QUERY.replace("pulse", "CAST(x'ff' || '8675309' AS TEXT) AS pulse"),
        DataError,
        "the query fails (text that isn't UTF-8)",
    ),
    "fails": (
        QUERY.replace("pulse", "abs(-9223372036854775808) AS pulse"),
        DataError,
        "the query fails (SQLITE_ERROR)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_query_ends_in_one_clear_error(name: str, tmp_path: Path) -> None:
    query, kind, says = BROKEN[name]
    path = emr(tmp_path, "INSERT INTO visit VALUES ('Zebedee', 8675309, 0, 60, 'x')")
    before = hashlib.sha256(path.read_bytes()).digest()
    assert says in told(site_with(tmp_path, lite(query)), kind)
    assert hashlib.sha256(path.read_bytes()).digest() == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("max_records = 19\n", "the query gives more than 19 records"),
        ("max_bytes = 9000\n", "the query gives more than 9000 bytes"),
        ("max_bytes = 100\n", "bytes, more than 100"),
    ],
)
def test_a_result_is_bounded(more: str, says: str, tmp_path: Path) -> None:
    emr(tmp_path)
    query = QUERY.replace("outcome FROM", "outcome, hex(zeroblob(500)) AS more FROM")
    assert says in told(site_with(tmp_path, lite(query, more)), DataError)


def test_an_endless_query_is_ended(tmp_path: Path) -> None:
    emr(tmp_path)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    said = told(site_with(tmp_path, lite(endless, "max_seconds = 1\n")), DataError)
    assert "the query took longer than 1 s" in said


def test_what_does_not_fit_is_told_by_rows(tmp_path: Path) -> None:
    emr(tmp_path / "site", "UPDATE visit SET age = 8675309 WHERE patient_id = 'p03'")
    folder = site_with(tmp_path / "site", lite())
    make_site_keys(folder)
    (tmp_path / "study.toml").write_text(STUDY)
    done = CliRunner().invoke(app, ["check", str(folder.root), str(tmp_path / "study.toml")])
    assert done.exit_code == DataError.exit_status
    assert "range 0 to 120 a, once (row 3)" in " ".join(done.output.split())
    assert "8675309" not in done.output


def test_files_that_are_no_database(tmp_path: Path) -> None:
    folder = site_with(tmp_path, lite())
    assert "emr.db: cannot be read (No such file or directory)" in told(folder, DataError)
    (tmp_path / "emr.db").write_text("patient_id,age\nZebedee,8675309\n")
    assert "emr.db: is no SQLite database" in told(folder, DataError)
    (tmp_path / "emr.db").write_bytes(b"SQLite format 3\0" + b"8675309" * 1000)
    assert "emr.db: the query fails (SQLITE_NOTADB)" in told(folder, DataError)
    (tmp_path / "emr.db").unlink()
    (tmp_path / "emr.db").mkdir()
    assert "emr.db: is a folder, not a file" in told(folder, DataError)


HOST = "postgresql+psycopg://ward:sekret-of-the-ward@db.hospital/emr"
ADDRESSES = {
    "password": (HOST, "data.sql: holds a password"),
    "password-option": ("postgresql+psycopg://db/emr?password=sekret-of-the-ward", "holds a password"),
    "options": ("postgresql+psycopg://db/emr?options=-c%20x", "1 of its options can't be used"),
    "port": ("postgresql+psycopg://w:sekret-of-the-ward@db:8675309x/emr", "is no address of a database"),
    "no-url": ("emr.db", "is no address of a database"),
    "other": ("mysql://db/emr", "neither sqlite:/// nor postgresql+psycopg://"),
    "driver": ("postgresql://db/emr", "neither sqlite:/// nor postgresql+psycopg://"),
    "nameless": ("postgresql+psycopg://db", "names no database"),
    "sqlite-options": ("sqlite:///emr.db?mode=rwc", "SQLite takes no options here"),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_a_wrong_address_is_refused_before_anything_connects(name: str, tmp_path: Path) -> None:
    url, says = ADDRESSES[name]
    assert says in told(site_with(tmp_path, f'sql = "{url}"\nquery = "SELECT 1"\n'), SiteError)


def test_a_password_file_is_a_secret(tmp_path: Path) -> None:
    data = 'sql = "postgresql+psycopg://127.0.0.1:9/emr"\nquery = "SELECT 1"\npassword_file = "db.secret"\n'
    folder = site_with(tmp_path, data)
    assert "db.secret: cannot be read" in told(folder, SiteError)
    (tmp_path / "db.secret").write_text(PASSWORD)
    (tmp_path / "db.secret").chmod(0o644)
    assert "db.secret: others may read this secret" in told(folder, SiteError)
    (tmp_path / "db.secret").chmod(0o600)
    assert "database emr: cannot be opened (no answer)" in told(folder, DataError)


@pytest.mark.parametrize(
    ("address", "mode"),
    [
        ("db.hospital/emr", "require"),
        ("db.hospital/emr?sslmode=verify-full", None),
        ("localhost/emr", None),
        ("127.0.0.1:5433/emr", None),
        ("/emr", None),
        ("/emr?host=/run/postgresql", None),
        ("/emr?host=db.hospital", "require"),
    ],
)
def test_a_connection_only_reads_and_is_encrypted_off_the_machine(
    address: str, mode: str | None, tmp_path: Path
) -> None:
    data = f'sql = "postgresql+psycopg://ward@{address}"\nquery = "SELECT 1"\nmax_seconds = 7\n'
    folder = site_with(tmp_path, data)
    server = Server.of(folder)
    assert server is not None
    arguments = connect_arguments(folder, server)
    assert arguments.get("sslmode") == mode
    assert arguments["options"] == "-c default_transaction_read_only=on -c statement_timeout=7000"
    assert arguments["connect_timeout"] > 0


def test_what_is_read_has_a_version(tmp_path: Path) -> None:
    path = emr(tmp_path)
    folder = site_with(tmp_path, 'sql = "sqlite:///emr.db"\nquery_file = "cohort.sql"\n')
    (tmp_path / "cohort.sql").write_text(QUERY)
    first = data_version(folder)
    assert read(folder).records == 20
    assert data_version(folder) == first
    with sqlite3.connect(path) as database:
        database.execute("UPDATE visit SET age = 50")
    database.close()
    second = data_version(folder)
    assert second != first
    (tmp_path / "cohort.sql").write_text(QUERY + " DESC")
    assert data_version(folder) != second


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('sql = "sqlite:///emr.db"\n', "give query or query_file with sql, and only then"),
        ('file = "a.csv"\nquery = "SELECT 1"\n', "give query or query_file with sql, and only then"),
        ('file = "a.csv"\nsql = "sqlite:///e"\nquery = "SELECT 1"\n', "give one of file, sql and fhir"),
        ("", "give one of file, sql and fhir"),
        ('file = "a.csv"\npassword_file = "p"\n', "password_file belongs to sql"),
    ],
)
def test_site_toml_names_one_origin(data: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=says):
        site_with(tmp_path, data)


def test_a_query_file_may_be_absent_or_unreadable(tmp_path: Path) -> None:
    folder = site_with(tmp_path, 'sql = "sqlite:///emr.db"\nquery_file = "cohort.sql"\n')
    emr(tmp_path)
    assert "cohort.sql: cannot be read" in told(folder, SiteError)
    (tmp_path / "cohort.sql").write_bytes(b"SELECT '\xff8675309'")
    assert "cohort.sql: not UTF-8" in told(folder, SiteError)
    (tmp_path / "cohort.sql").write_text("SELECT *\nFROM visits")
    assert "cohort.sql: the database refuses it in line 2" in told(folder, SiteError)


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with cluster() as running:
        running.do(
            "CREATE TABLE visit (patient_id text, age int, sex bool, pulse numeric, outcome text, seen date)",
            "INSERT INTO visit SELECT p, age::int, sex::int::bool, nullif(pulse, '')::numeric, outcome, "
            f"'2026-02-03' FROM (VALUES {rows(ROWS)}) AS v(p, age, sex, pulse, outcome)",
            "GRANT SELECT, INSERT, DELETE ON visit TO ward",
        )
        yield running


@pytest.mark.deployment
class TestPostgreSQL:
    def remote(
        self, root: Path, server: Cluster, query: str = QUERY, url: str = "", more: str = ""
    ) -> SiteFolder:
        return site_with(root, f"sql = '{url or server.url}'\nquery = '''{query}'''\n{more}")

    def test_rows_are_text_as_a_csv_file_has_it(self, server: Cluster, tmp_path: Path) -> None:
        table = read(self.remote(tmp_path, server, QUERY.replace("outcome FROM", "outcome, seen FROM")))
        assert column(table, "sex") == [r[2] for r in ROWS]
        assert column(table, "pulse") == [r[3] or None for r in ROWS]
        assert set(table.rows.column("seen").to_pylist()) == {"2026-02-03"}
        assert table.origin == "database postgres"

    def test_many_rows_are_streamed(self, server: Cluster, tmp_path: Path) -> None:
        query = (
            "SELECT 'p' || i AS patient_id, 40 AS age, 1 AS sex, 60 AS pulse, 0 AS outcome "
            "FROM generate_series(1, 12345) AS i"
        )
        assert read(self.remote(tmp_path, server, query)).records == 12345
        assert "more than 7000 records" in told(
            self.remote(tmp_path, server, query, more="max_records = 7000\n"), DataError
        )

    def test_passwords_come_from_their_places(
        self, server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        folder = self.remote(tmp_path, server, url=server.remote)
        assert "database postgres: cannot be opened (no answer)" in told(folder, DataError)
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        assert read(folder).records == 20
        monkeypatch.setenv("PGPASSWORD", "wrong")
        told(folder, DataError)
        monkeypatch.delenv("PGPASSWORD")
        (tmp_path / ".pgpass").write_text(f"127.0.0.1:{server.port}:*:ward:{PASSWORD}\n")
        (tmp_path / ".pgpass").chmod(0o600)
        monkeypatch.setenv("PGPASSFILE", str(tmp_path / ".pgpass"))
        assert read(folder).records == 20
        monkeypatch.delenv("PGPASSFILE")
        (tmp_path / "db.secret").write_text(PASSWORD + "\n")
        (tmp_path / "db.secret").chmod(0o600)
        folder = self.remote(tmp_path, server, url=server.remote, more="password_file = 'db.secret'\n")
        assert read(folder).records == 20

    @pytest.mark.parametrize(
        ("query", "kind", "says"),
        [
            (
                "SELECT patient_id,\n  height FROM visit",
                SiteError,
                "query: the database refuses it in line 2 (UndefinedColumn)",
            ),
            ("SELECT *\n\nFROM visits", SiteError, "in line 3 (UndefinedTable)"),
            (QUERY + "; COMMIT; DELETE FROM visit", SiteError, "refuses it (SyntaxError)"),
            ("SELECT 1; SELECT 2", SiteError, "refuses it (SyntaxError)"),
            ("SELECT patient_id\nFORM visit x", SiteError, "in line 2 (SyntaxError)"),
            ("SELECT * FROM pg_authid", DataError, "the query fails (InsufficientPrivilege)"),
            (
                QUERY.replace("age", "'Zebedee'::text::int AS age"),
                DataError,
                "the query fails (InvalidTextRepresentation)",
            ),
            (QUERY.replace("age", "age / (age - 33) AS age"), DataError, "the query fails (DivisionByZero)"),
            (
                QUERY.replace("age", "ARRAY[age] AS age"),
                DataError,
                "column 2 of the query's result holds no single values",
            ),
            (
                QUERY.replace("age", "'8675309'::bytea AS age"),
                DataError,
                "column 2 of the query's result holds no single values",
            ),
            (
                QUERY.replace("age", "interval '8675309 s' AS age"),
                DataError,
                "column 2 of the query's result holds no single values",
            ),
            (QUERY.replace("age", "date 'infinity' AS age"), DataError, "the query fails (DataError)"),
            (
                "WITH d AS (DELETE FROM visit RETURNING *) SELECT * FROM d",
                DataError,
                "the query fails (it would write)",
            ),
            (
                "WITH d AS (SELECT 1) INSERT INTO visit VALUES ('x')",
                DataError,
                "the query fails (it would write)",
            ),
            ("SELECT 1 /* /* */ , 'x' */ , pg_sleep(0)", DataError, "lacks column"),
            ("SELECT pg_sleep(30)", DataError, "the query took longer than 1 s"),
        ],
    )
    def test_a_wrong_query_ends_in_one_clear_error(
        self, query: str, kind: type[FedwardError], says: str, server: Cluster, tmp_path: Path
    ) -> None:
        folder = self.remote(tmp_path, server, query, more="max_seconds = 1\n")
        assert says in told(folder, kind)
        assert server.ask("SELECT count(*) FROM visit") == [(20,)]

    def test_a_split_by_column_needs_a_file(self, server: Cluster, tmp_path: Path) -> None:
        study = STUDY.replace('by = "keyed-hash"\ntest_fraction = 0.2', 'by = "column"\ncolumn = "part"')
        said = told(self.remote(tmp_path, server), SiteError, study)
        assert "a server's rows may change within a session unseen" in said

    def test_nobody_listens(self, tmp_path: Path, server: Cluster) -> None:
        url = "postgresql+psycopg://ward@/postgres?host=/nowhere"
        assert "database postgres: cannot be opened (no answer)" in told(
            self.remote(tmp_path, server, url=url), DataError
        )
