"""A PostgreSQL cluster of a test's own: in a folder under /tmp, on a Unix socket and a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

WAIT_SECONDS = 30.0
PASSWORD = "sekret-of-the-ward"


@dataclass(frozen=True)
class Cluster:
    """Attributes:
    socket: folder of the Unix socket, on which everybody of this machine may log in.
    port: also on 127.0.0.1, where a password is asked for.
    """

    socket: str
    port: int

    def do(self, *statements: str) -> None:
        """Run statements as the cluster's owner."""
        where = f"host={self.socket} port={self.port} user=owner dbname=postgres"
        with psycopg.connect(where, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def ask(self, query: str) -> list[Any]:
        where = f"host={self.socket} port={self.port} user=owner dbname=postgres"
        with psycopg.connect(where) as connection:
            return connection.execute(query.encode()).fetchall()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://ward@/postgres?host={self.socket}&port={self.port}"

    @property
    def remote(self) -> str:
        return f"postgresql+psycopg://ward@127.0.0.1:{self.port}/postgres"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster with the users `owner` and `ward`; the test is skipped where PostgreSQL is absent."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(programs[-1]) if programs else shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL is absent: make tools")
    user = _ordinary_user()
    home = Path(tempfile.mkdtemp(prefix="fedward-pg-", dir="/tmp"))
    running = None
    try:
        (home / "password").write_text(PASSWORD)
        if user is not None:
            shutil.chown(home, user, user)
            shutil.chown(home / "password", user, user)
        run_as: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        log = (home / "log").open("wb")
        with log:
            made = "--auth-local=trust --auth-host=scram-sha-256 --locale=C.UTF-8 -E UTF8 -N -U owner"
            subprocess.run(
                [found, *made.split(), f"--pwfile={home / 'password'}", "-D", str(home / "data")],
                **_options(run_as, home, log),
                check=True,
                timeout=120,
            )
            port = _free_port()
            server = str(Path(found).resolve().parent / "postgres")
            kept = "-c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=10"
            running = subprocess.Popen(
                [server, *kept.split(), "-D", str(home / "data"), "-k", str(home), "-p", str(port)],
                **_options(run_as, home, log),
            )
        started = Cluster(str(home), port)
        _wait(started, running)
        started.do(f"CREATE USER ward PASSWORD '{PASSWORD}'")
        yield started
    finally:
        if running is not None:
            running.send_signal(signal.SIGINT)  # "fast": it ends its sessions and then itself
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait(20)
        shutil.rmtree(home, ignore_errors=True)


def _ordinary_user() -> str | None:
    """Whom to run as, since root may not run a server; None for oneself."""
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("PostgreSQL doesn't run as root, and there is no user postgres")


def _options(run_as: dict[str, Any], home: Path, log: Any) -> dict[str, Any]:
    return {**run_as, "cwd": home, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(started: Cluster, running: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            started.do("SELECT 1")
            return
        except psycopg.OperationalError:
            if running.poll() is not None or time.monotonic() > until:
                log = (Path(started.socket) / "log").read_text(errors="replace")[-2000:]
                pytest.fail(f"PostgreSQL did not start:\n{log}")
            time.sleep(0.1)


def rows(cells: Sequence[Sequence[str]]) -> str:
    """Text cells as SQL values."""
    return ", ".join("(" + ", ".join(f"'{cell}'" for cell in row) + ")" for row in cells)
