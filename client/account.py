"""What a ledger's entries come to: what is reserved, answered and spent, by study and over all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from client.reservation import PART_OF, Reservation
from common.errors import LedgerError
from common.journal import Entry, read_journal
from common.keys import PublicKey
from common.messages import NO_HEAD


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


@dataclass(frozen=True)
class Committed:
    """A reservation that was answered.

    Attributes:
        reply: SHA-256 of the reply's bytes.
        released: digest of the numbers in it; empty if it was a refusal.
        withdrawn: digest of the withdrawal list in force when it ended.
        head: of the ledger when the round was reserved, as the reply tells it.
    """

    reservation: Reservation
    reply: str
    released: str
    withdrawn: str
    head: str


@dataclass(frozen=True)
class Head:
    """Where a ledger stands: number and hash of its last entry."""

    sequence: int
    hash: str


class Account:
    """What a ledger's entries come to.

    Raises:
        LedgerError: if an entry is of no known kind or form.
    """

    def __init__(self, entries: Iterable[Entry], path: Path) -> None:
        self.reserved: dict[tuple[str, int], Reservation] = {}
        self.committed: dict[tuple[str, int], Committed] = {}
        self.policy = ""
        self.last_time = 0.0
        self._heads: dict[tuple[str, int], Head] = {}
        self._charged: dict[tuple[str, str], Reservation] = {}
        self._known: set[str] = {NO_HEAD}
        self._rdp: dict[float, float] = {}  # order → sum over all charges
        self._charges: dict[str, Spending] = {}  # study → what its charges come to, its rounds left out
        self._rounds: Counter[str] = Counter()  # study → rounds reserved
        for entry in entries:
            try:
                self.add(entry)
            except (KeyError, TypeError, ValueError):
                raise LedgerError(
                    f"{path}: line {entry.sequence} is of no known form",
                    remedy="this ledger was written by another version of fedward",
                ) from None

    def add(self, entry: Entry, wanted: Reservation | None = None) -> None:
        """Take one more entry in.

        Args:
            wanted: the reservation that the entry was made of; read from it if absent.
        """
        body = entry.body
        if entry.kind == "reserve":
            self._reserve(wanted or Reservation.of(body), Head(entry.sequence, entry.hash))
        elif entry.kind == "commit":
            key = str(body["session"]), int(body["round"])
            self.committed[key] = Committed(
                self.reserved[key], body["reply"], body["released"], body["withdrawn"], self._heads[key].hash
            )
        elif entry.kind == "abandon":
            self._abandon((str(body["session"]), int(body["round"])))
        elif entry.kind == "policy":
            self.policy = str(body["digest"])
        else:
            raise ValueError(entry.kind)
        self._known.add(entry.hash)
        self.last_time = max(self.last_time, entry.time)

    def _reserve(self, wanted: Reservation, head: Head) -> None:
        before = self.reserved.get(wanted.key)
        if before is not None:
            self._rounds[before.study] -= 1
        self._rounds[wanted.study] += 1
        self.reserved[wanted.key] = wanted
        self._heads[wanted.key] = head
        part = wanted.session, wanted.part
        if part not in self._charged:
            self._charged[part] = wanted
            self._charges.pop(wanted.study, None)
            for order in self._rdp:
                self._rdp[order] += wanted.rdp(order)

    def _abandon(self, key: tuple[str, int]) -> None:
        gone = self.reserved.pop(key)
        self._rounds[gone.study] -= 1
        part = gone.session, gone.part
        if not any((r.session, r.part) == part for r in self.reserved.values()):
            self._charges.pop(self._charged.pop(part).study, None)
            self._rdp.clear()

    def knows(self, head: str) -> bool:
        """Whether some entry has this hash."""
        return head in self._known

    def head_of(self, key: tuple[str, int]) -> Head:
        """Where the ledger stood with a reservation's entry."""
        return self._heads[key]

    def answered(self, session: str) -> list[Committed]:
        """The session's rounds in which numbers left, in the order of rounds."""
        found = [c for c in self.committed.values() if c.reservation.session == session and c.released]
        return sorted(found, key=lambda c: c.reservation.round)

    def charged(self, session: str, part: str) -> Reservation | None:
        """The reservation by which a session's rounds, or statistics, were charged."""
        return self._charged.get((session, part))

    def belongs_to(self, session: str) -> str | None:
        """The study of a session."""
        return next((c.study for p in PART_OF if (c := self.charged(session, p))), None)

    def spending(self, study: str) -> Spending:
        """What a study (by digest) has spent."""
        return replace(self.charges(study), rounds=self._rounds[study])

    def charges(self, study: str) -> Spending:
        """What a study (by digest) has spent; its rounds are not counted."""
        if study not in self._charges:
            charges = [r for r in self._charged.values() if r.study == study]
            self._charges[study] = Spending(
                sessions=len({r.session for r in charges}),
                epsilon=math.fsum(r.epsilon or 0.0 for r in charges),
                delta=math.fsum(r.delta or 0.0 for r in charges),
                rounds=0,
            )
        return self._charges[study]

    def studies(self) -> Mapping[str, Spending]:
        """What every study has spent."""
        return {study: self.spending(study) for study in sorted({r.study for r in self._charged.values()})}

    def rdp(self, order: float) -> float:
        """Rényi divergence of that order which all charges together stand for."""
        if order not in self._rdp:
            self._rdp[order] = math.fsum(r.rdp(order) for r in self._charged.values())
        return self._rdp[order]


def read_account(path: Path, key: PublicKey | None = None) -> Account:
    """A ledger's account, read beside a running vault.

    Args:
        key: whose signature every entry must have.

    Raises:
        LedgerError: if the ledger's chain is broken.
    """
    return Account(read_journal(path, key), path)


def spending(path: Path) -> Mapping[str, Spending]:
    """What each study (by digest) has spent, read beside a running vault; as `read_account`."""
    return read_account(path).studies()
