"""What a site has spent: reserved on disk before any row is read, committed with the reply.

One reservation per (session, round); round 0 is the session's statistics. Asking again returns the stored
reply and spends nothing. After a crash between reserve and commit nothing has left the site, so the same
request may run again on the same reservation: one release, paid once.

A session's rounds are charged as a whole when the first of them is asked, its statistics likewise. Two
limits hold, in whatever order sessions come:
- of a study: ε and δ of what its approval has charged add up to what was granted. Plain addition holds
  for sessions chosen after seeing earlier results (Rogers, Roth, Ullman, Vadhan 2016, theorem 3.6);
- of the cohort: every study, statistic and evaluation together pass the RDP filter of the policy's
  lifetime budget (common/privacy/filter says why that holds). A patient trains or tests in a session,
  never both, so it pays for the dearer of the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.account import Account, Head
from client.policy import Approval, Policy
from client.reservation import PART_OF, Reservation
from common.errors import BudgetExhausted, LedgerError, Refused
from common.files import write_atomic
from common.journal import Entry, Journal
from common.keys import SigningKey
from common.privacy.certificate import read_certificate

KEPT_REPLIES = 2
LARGEST_HELD = 1 << 20  # bytes of a reply that may wait in memory
ROUNDING = 1 + 1e-9  # of sums of floating-point numbers


class Ledger:
    """A site's spending, over every study and session.

    Args:
        path: the journal; its folder is made (mode 0700). The last head lies beside it.
        replies: folder of committed replies.
        key: signs the entries.
        durable: fsync (see `Journal`), and keep the head.
        prompt: write each entry, and each reply before its round counts as answered. Simulations may leave
            entries and small replies in memory until the ledger is closed: a crash then loses them.

    Raises:
        LedgerError: as `Journal`; or if a reply is kept, or a head is remembered, that the journal knows
            nothing of, because an older copy of it was put back.
    """

    def __init__(
        self,
        path: Path,
        replies: Path,
        *,
        key: SigningKey | None = None,
        durable: bool = True,
        prompt: bool = True,
    ) -> None:
        for folder in (path.parent, replies):  # with `parents`, mkdir gives its mode to the last one only
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._replies, self._durable = replies, durable
        self._prompt = durable or prompt
        self._held: dict[tuple[str, int], bytes] = {}  # replies that are not on disk yet
        self._noted: Policy | None = None  # the policy that was written down last
        self._journal = Journal(path, durable=durable, key=key, prompt=prompt)
        try:
            self.account = Account(self._journal.entries, path)
            self._check_replies()
            check_head(path, self.account, read_head(path))
        except BaseException:
            self.close()
            raise

    def _check_replies(self) -> None:
        for path in self._replies.glob(".*"):
            path.unlink(missing_ok=True)  # a crash while it was being written
        known = {self._reply_path(*key) for key in self.account.reserved}
        unknown = sorted(set(self._replies.glob("*.safetensors")) - known)
        if unknown:
            raise LedgerError(
                f"{unknown[0]}: a reply of a round that {self._journal.path} does not know",
                remedy="the ledger is older than its replies: restore the latest one",
            )

    @property
    def head(self) -> str:
        return self._journal.head

    @property
    def sequence(self) -> int:
        """Number of entries."""
        return len(self._journal.entries)

    def knows(self, head: str) -> bool:
        """Whether `head` was once this ledger's."""
        return self.account.knows(head)

    def stored_reply(self, session: str, round_number: int, request: str) -> bytes | None:
        """The reply that this very request has had; None if it never was answered.

        Raises:
            Refused: if the round was asked with another content, or its reply is no longer kept.
            LedgerError: if the stored reply isn't what was committed.
        """
        known = self.account.reserved.get((session, round_number))
        if known is None:
            return None
        if known.request != request:
            raise Refused(
                f"round {round_number} of session {session} was asked before, with another content",
                remedy="a round runs once; resume the session from its last checkpoint",
            )
        committed = self.account.committed.get(known.key)
        if committed is None:
            return None
        path = self._reply_path(session, round_number)
        try:
            reply = self._held.get(known.key) or path.read_bytes()
        except FileNotFoundError:
            raise Refused(
                f"round {round_number} of session {session} was answered; its reply is no longer kept",
                remedy="resume the session from its last checkpoint",
            ) from None
        if hashlib.sha256(reply).hexdigest() != committed.reply:
            raise LedgerError(f"{path}: not the reply that was committed", remedy="restore the file")
        return reply

    def has_reserved(self, wanted: Reservation) -> bool:
        """Whether this round was paid for, be it answered or not."""
        return wanted.key in self.account.reserved

    def note(self, policy: Policy) -> None:
        """Write down the policy in force, unless it is the one that was written down last.

        Raises:
            LedgerError: if it can't be written.
        """
        if policy is self._noted:
            return
        if policy.digest != (self.account.policy or Policy().digest):
            self._append("policy", {"digest": policy.digest, "content": policy.content})
        self._noted = policy

    def reserve(self, wanted: Reservation, approval: Approval, policy: Policy) -> Head:
        """Write down what a round will cost; when this returns, it is spent.

        Returns:
            Where the ledger stands with the round's entry.

        Raises:
            BudgetExhausted: if the approval, or the cohort's lifetime budget, has too little left for
                what the round begins, or less by now than what has been reserved.
            Refused: if the session belongs to another study, or was planned otherwise when it began.
            LedgerError: if it can't be written.
        """
        known = self.account.reserved.get(wanted.key)
        if known is not None:
            if replace(known, policy=wanted.policy, withdrawn=wanted.withdrawn) != wanted:
                raise _planned_otherwise(wanted.session)
            return self.account.head_of(wanted.key)
        if self.account.belongs_to(wanted.session) not in (None, wanted.study):
            raise Refused(
                f"session {wanted.session} belongs to another study", remedy="start a session of its own"
            )
        begun = self.account.charged(wanted.session, wanted.part)
        parts = [c for part in PART_OF if (c := self.account.charged(wanted.session, part))]
        if not all(wanted.planned_like(c) for c in parts):
            raise _planned_otherwise(wanted.session)
        self._admit(wanted, approval, policy, new=begun is None)
        self.note(policy)
        self._append("reserve", wanted.body(), wanted)
        return self.account.head_of(wanted.key)

    def _admit(self, wanted: Reservation, approval: Approval, policy: Policy, *, new: bool) -> None:
        before = self.account.charges(wanted.study)
        eps = before.epsilon + (wanted.epsilon or 0.0) * new
        delta = before.delta + (wanted.delta or 0.0) * new
        if eps > (approval.epsilon or 0.0) * ROUNDING or delta > (approval.delta or 0.0) * ROUNDING:
            raise BudgetExhausted(
                f"{before.sessions} sessions of this study leave too little of the approved budget",
                remedy="its privacy officer may grant more: fedward-site revoke, then approve --sessions N",
            )
        if wanted.epsilon is None:
            return
        if policy.cohort is None:
            raise BudgetExhausted(
                "this site has no lifetime budget for its cohort",
                remedy="its privacy officer sets one: fedward-site policy FOLDER --epsilon E --delta D",
            )
        budget = policy.cohort.filter()
        cost = wanted.rdp(budget.order) if new else 0.0
        if not budget.admits(self.account.rdp(budget.order), cost):
            raise BudgetExhausted(
                "the lifetime budget of this site's cohort leaves too little for this study",
                remedy="ask for a smaller ε; what the patients' lifetime budget was spent on stays spent",
            )

    def commit(self, reservation: Reservation, reply: bytes, released: str = "", withdrawn: str = "") -> None:
        """Keep a reply for whoever asks again, then mark its round as answered.

        Args:
            released: digest of the numbers in it; empty for a refusal.
            withdrawn: digest of the withdrawal list in force by now; as reserved if empty.

        Raises:
            LedgerError: if it can't be written; the round then counts as not answered.
        """
        if self._prompt or len(reply) > LARGEST_HELD:
            self._keep(reservation.key, reply)
        else:
            self._held[reservation.key] = reply
        body = {"session": reservation.session, "round": reservation.round}
        body |= {"reply": hashlib.sha256(reply).hexdigest(), "released": released}
        self._append("commit", {**body, "withdrawn": withdrawn or reservation.withdrawn})
        if reservation.round > KEPT_REPLIES:
            old = reservation.session, reservation.round - KEPT_REPLIES
            if self._held.pop(old, None) is None:
                self._reply_path(*old).unlink(missing_ok=True)

    def _keep(self, key: tuple[str, int], reply: bytes) -> None:
        path = self._reply_path(*key)
        try:
            if self._durable:
                write_atomic(path, reply)
            else:
                path.write_bytes(reply)
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}", remedy="free space on that disk") from None

    def abandon(self, reservation: Reservation) -> None:
        """Give a reservation back. Only for one before whose failure no row was read.

        Raises:
            LedgerError: if it was answered, or the entry can't be written; the reservation then stays.
        """
        if reservation.key in self.account.committed:
            raise LedgerError(f"round {reservation.round} was answered", remedy="it stays spent")
        self._append("abandon", {"session": reservation.session, "round": reservation.round})

    def _append(self, kind: str, body: dict[str, Any], wanted: Reservation | None = None) -> None:
        entry = self._journal.append(kind, body)
        self.account.add(entry, wanted)
        if self._durable:
            remember_head(self._journal.path, entry)

    def close(self) -> None:
        """Let the journal go; what was held back of replies is written.

        Raises:
            LedgerError: if that can't be.
        """
        try:
            for key, reply in self._held.items():
                self._keep(key, reply)
            self._held.clear()
        finally:
            self._journal.close()

    def _reply_path(self, session: str, round_number: int) -> Path:
        return self._replies / f"{session}.{round_number}.safetensors"


def _planned_otherwise(session: str) -> Refused:
    return Refused(
        f"session {session} was planned otherwise when it began",
        remedy="the site's public size, policy, split or software has changed: start a new session",
    )


def head_path(journal: Path) -> Path:
    """Beside the journal: the last head, so that a cut end shows."""
    return journal.with_name("head")


def remember_head(journal: Path, entry: Entry) -> None:
    """Raises:
    LedgerError: if it can't be written; the entry counts all the same.
    """
    try:
        write_atomic(head_path(journal), f"{entry.sequence} {entry.hash}\n".encode())
    except OSError as error:
        raise LedgerError(
            f"{head_path(journal)}: {error.strerror}", remedy="free space on that disk"
        ) from None


def read_head(journal: Path) -> str | None:
    """The head that lies beside the journal; None if there is none."""
    try:
        words = head_path(journal).read_bytes().split()
    except FileNotFoundError:
        return None
    return words[1].decode("latin-1") if len(words) == 2 else ""


def check_head(journal: Path, account: Account, remembered: str | None) -> None:
    """Args:
        remembered: see `read_head`.

    Raises:
        LedgerError: if it is none of the entries'.
    """
    if remembered is not None and not account.knows(remembered):
        raise LedgerError(
            f"{head_path(journal)}: a head that {journal} does not have: its end was cut, or an older copy "
            "put back",
            remedy="restore the latest ledger; if it is lost, count this cohort's budget as spent",
        )


def certified_heads(folder: Path) -> dict[Path, str]:
    """The heads that the site's own certificates name.

    Raises:
        CertificateError: if a certificate isn't as it was signed.
    """
    return {p: read_certificate(p.read_bytes()).claims.ledger.head for p in sorted(folder.glob("*.jws"))}


def check_certificates(folder: Path, account: Account, heads: Mapping[Path, str] | None = None) -> int:
    """Hold the heads in the site's own certificates against its ledger; returns how many there are.

    Args:
        heads: see `certified_heads`; read if absent.

    Raises:
        LedgerError: if the ledger lacks a certified head.
        CertificateError: if a certificate isn't as it was signed.
    """
    found = certified_heads(folder) if heads is None else heads
    for path, head in found.items():
        if not account.knows(head):
            raise LedgerError(
                f"{path}: certifies a head that the ledger does not have",
                remedy="restore the latest ledger; if it is lost, count this cohort's budget as spent",
            )
    return len(found)
