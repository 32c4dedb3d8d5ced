"""What a site has spent: reserved on disk before any row is read, committed with the reply.

One reservation per (session, round). Asking again returns the stored reply and spends nothing. After a
crash between reserve and commit nothing has left the site, so the same request may run again on the
same reservation: one release, paid once. A session is charged its whole planned ε when it begins, so
the sum over an approval's sessions never exceeds what was granted, whatever order they come in; plain
addition of (ε, δ) holds for sessions chosen after seeing earlier results (Rogers, Roth, Ullman, Vadhan
2016, theorem 3.6 for the privacy filter by basic composition).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.policy import Approval
from common.errors import BudgetExhausted, LedgerError, Refused
from common.files import write_atomic
from common.journal import Journal, read_journal
from common.privacy.mechanism import SubsampledGaussian

KEPT_REPLIES = 2
ROUNDING = 1 + 1e-9  # of sums of floating-point numbers


@dataclass(frozen=True)
class Reservation:
    """Attributes:
    request: SHA-256 of the request's bytes.
    training, evaluation: what this round costs training and test patients; None if nothing.
    session_epsilon, session_delta: planned for the whole session; None without privacy.
    """

    session: str
    round: int
    study: str
    request: str
    training: SubsampledGaussian | None = None
    evaluation: SubsampledGaussian | None = None
    session_epsilon: float | None = None
    session_delta: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.session, self.round

    def body(self) -> dict[str, Any]:
        value = dict(vars(self))
        for name in ("training", "evaluation"):
            value[name] = value[name].model_dump(mode="json") if value[name] else None
        return value

    @staticmethod
    def of(body: dict[str, Any]) -> Reservation:
        value = dict(body)
        for name in ("training", "evaluation"):
            value[name] = SubsampledGaussian.model_validate(value[name]) if value[name] else None
        return Reservation(**value)


@dataclass(frozen=True)
class Spending:
    """Attributes:
    sessions: begun so far.
    epsilon, delta: reserved for them, added up.
    rounds: reserved so far.
    """

    sessions: int
    epsilon: float
    delta: float
    rounds: int


def spending(path: Path) -> dict[str, Spending]:
    """What each study (by digest) has spent, read beside a running vault.

    Raises:
        LedgerError: if the ledger's chain is broken.
    """
    reservations = [Reservation.of(e.body) for e in read_journal(path) if e.kind == "reserve"]
    studies = sorted({r.study for r in reservations})
    return {study: _spending([r for r in reservations if r.study == study]) for study in studies}


def _spending(reservations: Iterable[Reservation]) -> Spending:
    rounds = list(reservations)
    sessions = {r.session: r for r in rounds}.values()
    return Spending(
        sessions=len(sessions),
        epsilon=math.fsum(r.session_epsilon or 0.0 for r in sessions),
        delta=math.fsum(r.session_delta or 0.0 for r in sessions),
        rounds=len(rounds),
    )


def _planned_otherwise(wanted: Reservation, before: Reservation) -> bool:
    """Whether two rounds of a session don't come from one plan, whose ε was charged when it began."""
    pairs = ((wanted.training, before.training), (wanted.evaluation, before.evaluation))
    return (wanted.session_epsilon, wanted.session_delta) != (
        before.session_epsilon,
        before.session_delta,
    ) or any(a is not None and b is not None and a != b for a, b in pairs)


class Ledger:
    """A site's spending, over every study and session.

    Args:
        path: the journal; its folder is made (mode 0700).
        replies: folder of committed replies.
        durable: fsync (see `Journal`).

    Raises:
        LedgerError: as `Journal`; or if a reply is kept that the journal knows nothing of, because an
            older copy of it was put back.
    """

    def __init__(self, path: Path, replies: Path, *, durable: bool = True) -> None:
        for folder in (path.parent, replies):  # with `parents`, mkdir gives its mode to the last one only
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._replies = replies
        self._journal = Journal(path, durable=durable)
        self._durable = durable
        self._reserved: dict[tuple[str, int], Reservation] = {}
        self._committed: dict[tuple[str, int], str] = {}
        for entry in self._journal.entries:
            if entry.kind == "reserve":
                reservation = Reservation.of(entry.body)
                self._reserved[reservation.key] = reservation
            elif entry.kind == "commit":
                self._committed[entry.body["session"], entry.body["round"]] = entry.body["reply"]
        self._check_replies()

    def _check_replies(self) -> None:
        for path in self._replies.glob(".*"):
            path.unlink(missing_ok=True)  # a crash while it was being written
        known = {self._reply_path(*key) for key in self._reserved}
        unknown = sorted(set(self._replies.glob("*.safetensors")) - known)
        if unknown:
            self.close()
            raise LedgerError(
                f"{unknown[0]}: a reply of a round that {self._journal.path} does not know",
                remedy="the ledger is older than its replies: restore the latest one",
            )

    @property
    def head(self) -> str:
        return self._journal.head

    @property
    def reservations(self) -> tuple[Reservation, ...]:
        return tuple(self._reserved.values())

    def stored_reply(self, session: str, round_number: int, request: str) -> bytes | None:
        """The reply that this very request has had; None if it never was answered.

        Raises:
            Refused: if the round was asked with another content, or its reply is no longer kept.
            LedgerError: if the stored reply isn't what was committed.
        """
        known = self._reserved.get((session, round_number))
        if known is None:
            return None
        if known.request != request:
            raise Refused(
                f"round {round_number} of session {session} was asked before, with another content",
                remedy="a round runs once; resume the session from its last checkpoint",
            )
        digest = self._committed.get(known.key)
        if digest is None:
            return None
        path = self._reply_path(session, round_number)
        try:
            reply = path.read_bytes()
        except FileNotFoundError:
            raise Refused(
                f"round {round_number} of session {session} was answered; its reply is no longer kept",
                remedy="resume the session from its last checkpoint",
            ) from None
        if hashlib.sha256(reply).hexdigest() != digest:
            raise LedgerError(f"{path}: not the reply that was committed", remedy="restore the file")
        return reply

    def reserve(self, wanted: Reservation, approval: Approval) -> None:
        """Write down what a round will cost; when this returns, it is spent.

        Raises:
            BudgetExhausted: if the approval has too little left for a new session, or less by now
                than what has been reserved.
            Refused: if the session belongs to another study, or was planned otherwise when it began.
            LedgerError: if it can't be written.
        """
        if wanted.key in self._reserved:
            return
        session = [r for r in self._reserved.values() if r.session == wanted.session]
        if session and session[0].study != wanted.study:
            raise Refused(
                f"session {wanted.session} belongs to another study", remedy="start a session of its own"
            )
        if any(_planned_otherwise(wanted, r) for r in session):
            raise Refused(
                f"session {wanted.session} was planned otherwise when it began",
                remedy="the site's public size or software has changed: start a new session",
            )
        self._admit(wanted, approval, new=not session)
        self._journal.append("reserve", wanted.body())
        self._reserved[wanted.key] = wanted

    def _admit(self, wanted: Reservation, approval: Approval, *, new: bool) -> None:
        before = _spending(r for r in self._reserved.values() if r.study == wanted.study)
        eps = before.epsilon + (wanted.session_epsilon or 0.0) * new
        delta = before.delta + (wanted.session_delta or 0.0) * new
        if eps > (approval.epsilon or 0.0) * ROUNDING or delta > (approval.delta or 0.0) * ROUNDING:
            raise BudgetExhausted(
                f"{before.sessions} sessions of this study leave too little of the approved budget",
                remedy="its privacy officer may grant more: fedward-site revoke, then approve --sessions N",
            )

    def commit(self, reservation: Reservation, reply: bytes) -> None:
        """Keep a reply for whoever asks again, then mark its round as answered.

        Raises:
            LedgerError: if it can't be written; the round then counts as not answered.
        """
        digest = hashlib.sha256(reply).hexdigest()
        path = self._reply_path(*reservation.key)
        try:
            if self._durable:
                write_atomic(path, reply)
            else:
                path.write_bytes(reply)
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}", remedy="free space on that disk") from None
        self._journal.append(
            "commit", {"session": reservation.session, "round": reservation.round, "reply": digest}
        )
        self._committed[reservation.key] = digest
        old = self._reply_path(reservation.session, reservation.round - KEPT_REPLIES)
        old.unlink(missing_ok=True)

    def close(self) -> None:
        self._journal.close()

    def _reply_path(self, session: str, round_number: int) -> Path:
        return self._replies / f"{session}.{round_number}.safetensors"
