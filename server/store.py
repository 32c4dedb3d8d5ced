"""The coordinator's memory: sessions, rounds and checkpoints, in SQLite and safetensors files.

A round is in the database only after its checkpoint is whole on disk, so a session always resumes from
a round that every reader agrees on.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load

from common.errors import StudyFailed
from common.files import write_atomic
from common.messages import Arrays, as_safetensors
from common.study import Study, parse_study

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, study TEXT NOT NULL, digest TEXT NOT NULL, settings TEXT NOT NULL,
    status TEXT NOT NULL, detail TEXT NOT NULL, created REAL NOT NULL, run TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    session TEXT NOT NULL REFERENCES sessions(id), round INTEGER NOT NULL, checkpoint TEXT NOT NULL,
    answers TEXT NOT NULL, finished REAL NOT NULL, PRIMARY KEY (session, round)
) STRICT;
CREATE TABLE IF NOT EXISTS heads (
    site TEXT PRIMARY KEY, head TEXT NOT NULL, sequence INTEGER NOT NULL
) STRICT;
"""
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"


@dataclass(frozen=True)
class Settings:
    """How a session is run; nothing scientific.

    Attributes:
        sites: how many sites to wait for before the first round.
        quorum: a round counts if at least so many answered.
        deadline: seconds that a site has for a round.
        patience: seconds to wait for `sites` (and for a quorum) before giving up.
        attempts: how often a round is asked in all, until it has a quorum.
        exact_metrics: ask for metrics without noise (public cohorts only).
        describe: ask for the cohorts' statistics only, and train nothing.
        seed: of the initial weights; they protect nobody.
        nodes: node id → the site enrolled with that key; a node may answer for no other. Empty in
            simulations.
    """

    sites: int
    quorum: int
    deadline: float = 600.0
    patience: float = 600.0
    attempts: int = 3
    exact_metrics: bool = False
    describe: bool = False
    seed: int = 0
    nodes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteAnswer:
    """What a site said in a round, besides arrays.

    Attributes:
        outcome: `reply`, `refusal`, `silence` or `malformed`.
        detail: the reason of anything but a reply.
        training, evaluation, statistics: privacy events as JSON values.
        exact: its metrics carry no noise.
        released: digest of the numbers that came (`common.messages.released`).
        head, sequence: of the site's ledger, as the reply tells it.
    """

    site: str
    outcome: str
    detail: str = ""
    weight: int = 0
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    statistics: dict[str, Any] | None = None
    exact: bool = False
    released: str = ""
    head: str = ""
    sequence: int = 0


@dataclass(frozen=True)
class Session:
    """A study being run, or that has been."""

    id: str
    study: Study
    settings: Settings
    status: str
    detail: str
    created: float
    run: str


@dataclass(frozen=True)
class Round:
    """A round that counts, the final evaluation, or (number 0) the cohorts' statistics."""

    number: int
    checkpoint: str
    answers: tuple[SiteAnswer, ...]
    finished: float


class Store:
    """Args:
    root: folder, made if absent (mode 0700).
    durable: sync to disk; simulations do without.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.root = root
        self._durable = durable
        self._held: tuple[int, sqlite3.Connection] | None = None
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._database() as database:
            database.executescript(SCHEMA)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the context, this thread keeps one connection to the database instead of many."""
        with self._connected() as connection:
            self._held = threading.get_ident(), connection
            try:
                yield
            finally:
                self._held = None

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        held = self._held
        if held is not None and held[0] == threading.get_ident():
            with held[1]:
                yield held[1]
            return
        with self._connected() as connection, connection:
            yield connection

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.root / "store.db", timeout=30)) as connection:
            if not self._durable:
                connection.execute("PRAGMA synchronous=OFF")
                connection.execute("PRAGMA journal_mode=MEMORY")
            yield connection

    def create(self, session: str, study: Study, settings: Settings) -> None:
        """Write down a new session.

        Raises:
            StudyFailed: if its id is taken.
        """
        row = (session, study.canonical.decode(), study.digest, json.dumps(asdict(settings)), RUNNING, "")
        try:
            with self._database() as database:
                database.execute(
                    "INSERT INTO sessions (id, study, digest, settings, status, detail, created) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*row, time.time()),
                )
        except sqlite3.IntegrityError:
            raise StudyFailed(f"session {session} exists already", remedy="resume it instead") from None

    def keep_initial(self, session: str, content: bytes) -> None:
        """Keep the file of weights that a session begins with, so that it can begin again without it."""
        path = self._initial_path(session)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._durable:
            write_atomic(path, content)
        else:
            path.write_bytes(content)

    def initial(self, session: str) -> bytes | None:
        """The file that was kept; None if there is none."""
        path = self._initial_path(session)
        return path.read_bytes() if path.exists() else None

    def _initial_path(self, session: str) -> Path:
        return self.root / "initial" / f"{session}.safetensors"

    def session(self, session: str) -> Session:
        """Raises:
        StudyFailed: if there is none of that id.
        """
        with self._database() as database:
            row = database.execute(
                "SELECT id, study, settings, status, detail, created, run FROM sessions WHERE id = ?",
                (session,),
            ).fetchone()
        if row is None:
            raise StudyFailed(
                f"{self.root}: no session {session!r}", remedy="list them: fedward-server status FOLDER"
            )
        study = parse_study(row[1].encode(), f"session {session}")
        return Session(row[0], study, Settings(**json.loads(row[2])), row[3], row[4], row[5], row[6])

    def sessions(self) -> tuple[Session, ...]:
        """All sessions, the oldest first."""
        with self._database() as database:
            ids = [row[0] for row in database.execute("SELECT id FROM sessions ORDER BY created, id")]
        return tuple(self.session(each) for each in ids)

    def mark(self, session: str, status: str, detail: str = "") -> None:
        """Set a session's status."""
        with self._database() as database:
            database.execute(
                "UPDATE sessions SET status = ?, detail = ? WHERE id = ?", (status, detail, session)
            )

    def attach(self, session: str, run: str) -> None:
        """Remember which Flower run carries the session now."""
        with self._database() as database:
            database.execute("UPDATE sessions SET run = ? WHERE id = ?", (run, session))

    def record(self, session: str, number: int, arrays: Arrays, answers: tuple[SiteAnswer, ...]) -> None:
        """Keep a round: checkpoint first, then the row that makes it count."""
        path = self.checkpoint_path(session, number)
        content = as_safetensors(arrays)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._durable:
            write_atomic(path, content)
        else:
            path.write_bytes(content)
        told = json.dumps([vars(answer) for answer in answers])
        with self._database() as database:
            database.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", (session, number, path.name, told, time.time())
            )

    def rounds(self, session: str) -> tuple[Round, ...]:
        """The rounds that count so far, in order; round 0 are the statistics, if there are any."""
        with self._database() as database:
            rows = database.execute(
                "SELECT round, checkpoint, answers, finished FROM rounds WHERE session = ? ORDER BY round",
                (session,),
            ).fetchall()
        return tuple(
            Round(number, checkpoint, tuple(SiteAnswer(**a) for a in json.loads(told)), finished)
            for number, checkpoint, told, finished in rows
        )

    def rounds_done(self, session: str) -> int:
        """How many rounds count so far, statistics apart."""
        query = "SELECT COUNT(*) FROM rounds WHERE session = ? AND round > 0"
        with self._database() as database:
            return int(database.execute(query, (session,)).fetchone()[0])

    def remember(self, heads: Mapping[str, tuple[int, str]]) -> None:
        """Keep the furthest head of each site's ledger, over all sessions.

        Args:
            heads: site → number and hash of an entry.
        """
        rows = [(site, head, sequence) for site, (sequence, head) in heads.items()]
        with self._database() as database:
            database.executemany(
                "INSERT INTO heads VALUES (?, ?, ?) ON CONFLICT (site) DO UPDATE SET head = excluded.head, "
                "sequence = excluded.sequence WHERE excluded.sequence >= heads.sequence",
                rows,
            )

    def heads(self) -> dict[str, str]:
        """Site → the furthest head of its ledger that was seen."""
        with self._database() as database:
            return dict(database.execute("SELECT site, head FROM heads ORDER BY site").fetchall())

    def keep_certificate(self, session: str, site: str, token: str) -> None:
        """Keep what a site certifies of a session; a later one replaces it."""
        path = self._certificates(session) / f"{site}.jws"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._durable:
            write_atomic(path, token.encode(), mode=0o644)
        else:
            path.write_bytes(token.encode())

    def certificates(self, session: str) -> dict[str, str]:
        """Site → its certificate of a session (JWS, unchecked)."""
        paths = sorted(self._certificates(session).glob("*.jws"))
        return {path.stem: path.read_text(encoding="latin-1") for path in paths}

    def _certificates(self, session: str) -> Path:
        return self.root / "certificates" / session

    def checkpoint_path(self, session: str, number: int) -> Path:
        return self.root / "checkpoints" / session / f"round-{number:06d}.safetensors"

    def checkpoint(self, session: str, number: int) -> Arrays:
        """The arrays after round `number`.

        Raises:
            StudyFailed: if the file is gone or damaged.
        """
        path = self.checkpoint_path(session, number)
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError):
            raise StudyFailed(f"{path}: not a checkpoint", remedy="restore the file") from None
