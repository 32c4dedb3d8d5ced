"""The ledger: spent is spent, asking twice spends once, and the sum never exceeds the approval."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from client import ledger as module
from client.ledger import KEPT_REPLIES, Ledger, Reservation, spending
from client.policy import Approval
from common.errors import BudgetExhausted, LedgerError, Refused
from common.privacy.mechanism import SubsampledGaussian

STUDY, OTHER = "a" * 64, "b" * 64


def approval(epsilon: float = 3.0, delta: float = 3e-3, study: str = STUDY) -> Approval:
    return Approval(
        study="s", digest=study, epsilon=epsilon, delta=delta, approved_by="officer", approved_at="today"
    )


def event(noise: float = 4.0) -> SubsampledGaussian:
    return SubsampledGaussian(noise_multiplier=noise, sample_rate=0.5, steps=2)


def reservation(session: str = "one", number: int = 1, study: str = STUDY, epsilon: float | None = 1.0,
                **changes: object) -> Reservation:  # fmt: skip
    request = hashlib.sha256(f"{session} {number}".encode()).hexdigest()
    delta = None if epsilon is None else 1e-3
    made = Reservation(session, number, study, request, event(), None, epsilon, delta)
    return dataclasses.replace(made, **changes)


def opened(root: Path) -> Ledger:
    return Ledger(root / "ledger" / "ledger.jsonl", root / "ledger" / "replies", durable=False)


def test_spends_a_session_once(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for number in (1, 2, 2, 1, 3):
        book.reserve(reservation(number=number), approval(1.0, 1e-3))
    book.close()
    spent = spending(tmp_path / "ledger" / "ledger.jsonl")[STUDY]
    assert (spent.sessions, spent.epsilon, spent.delta, spent.rounds) == (1, 1.0, 1e-3, 3)


def test_refuses_the_session_too_many_also_after_a_restart(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for session in ("one", "two", "three"):
        book.reserve(reservation(session), approval())
    for _ in range(2):
        with pytest.raises(BudgetExhausted):
            book.reserve(reservation("four"), approval())
        book.reserve(reservation("two", 2), approval())  # what has begun goes on
        book.close()
        book = opened(tmp_path)
    book.close()


@pytest.mark.parametrize(("epsilon", "delta"), [(0.999, 1.0), (100.0, 0.9e-3)])
def test_both_epsilon_and_delta_are_bounds(tmp_path: Path, epsilon: float, delta: float) -> None:
    book = opened(tmp_path)
    with pytest.raises(BudgetExhausted):
        book.reserve(reservation(), approval(epsilon, min(delta, 0.9)))
    assert book.reservations == ()
    book.close()


def test_an_approval_without_a_budget_buys_nothing_private(tmp_path: Path) -> None:
    book = opened(tmp_path)
    nothing = Approval(study="s", digest=STUDY, public=True, approved_by="o", approved_at="t")
    with pytest.raises(BudgetExhausted):
        book.reserve(reservation(), nothing)
    book.reserve(reservation("free", epsilon=None, training=None), nothing)
    book.close()


def test_a_lowered_approval_holds_from_the_next_round_on(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation("one"), approval())
    with pytest.raises(BudgetExhausted):
        book.reserve(reservation("one", 2), approval(0.5))
    book.reserve(reservation("one", 2), approval())
    book.close()


def test_a_session_belongs_to_one_study(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation(), approval())
    with pytest.raises(Refused, match="another study"):
        book.reserve(reservation(number=2, study=OTHER), approval(study=OTHER))
    book.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"training": event(4.1)},
        {"session_epsilon": 0.9},
        {"session_epsilon": None, "session_delta": None, "training": None},
        {"session_delta": 1e-4},
    ],
)
def test_a_session_keeps_its_plan(tmp_path: Path, changes: dict[str, object]) -> None:
    """Half of one plan's rounds and half of another's may cost more than either plan."""
    book = opened(tmp_path)
    book.reserve(reservation(), approval())
    with pytest.raises(Refused, match="planned otherwise"):
        book.reserve(reservation(number=2, **changes), approval())
    book.reserve(reservation(number=2, training=None, evaluation=event(9.0)), approval())
    with pytest.raises(Refused, match="planned otherwise"):
        book.reserve(reservation(number=3, evaluation=event(8.0)), approval())
    book.close()


def test_the_same_request_gets_the_same_reply(tmp_path: Path) -> None:
    book, asked = opened(tmp_path), reservation()
    assert book.stored_reply("one", 1, asked.request) is None
    book.reserve(asked, approval())
    assert book.stored_reply("one", 1, asked.request) is None  # paid, not yet answered
    book.commit(asked, b"reply")
    for _ in range(2):
        assert book.stored_reply("one", 1, asked.request) == b"reply"
        with pytest.raises(Refused, match="another content"):
            book.stored_reply("one", 1, "f" * 64)
        book.close()
        book = opened(tmp_path)
    book.close()


def test_another_content_is_refused_before_the_answer_too(tmp_path: Path) -> None:
    """Else a coordinator that breaks the line after `reserve` could ask two questions for one price."""
    book = opened(tmp_path)
    book.reserve(reservation(), approval())
    with pytest.raises(Refused, match="another content"):
        book.stored_reply("one", 1, "f" * 64)
    book.close()


def test_old_replies_go_and_stay_refused(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for number in range(1, KEPT_REPLIES + 2):
        book.reserve(reservation(number=number), approval())
        book.commit(reservation(number=number), b"%d" % number)
    with pytest.raises(Refused, match="no longer kept"):
        book.stored_reply("one", 1, reservation(number=1).request)
    assert book.stored_reply("one", 2, reservation(number=2).request) == b"2"
    assert len(list((tmp_path / "ledger" / "replies").iterdir())) == KEPT_REPLIES
    book.close()


def test_a_changed_reply_is_found(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation(), approval())
    book.commit(reservation(), b"reply")
    next((tmp_path / "ledger" / "replies").iterdir()).write_bytes(b"repli")
    with pytest.raises(LedgerError, match="not the reply"):
        book.stored_reply("one", 1, reservation().request)
    book.close()


def test_a_reply_that_cannot_be_kept_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    book = Ledger(tmp_path / "l" / "l", tmp_path / "l" / "r")
    book.reserve(reservation(), approval())
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomic", full)
        with pytest.raises(LedgerError, match="No space"):
            book.commit(reservation(), b"reply")
    assert book.stored_reply("one", 1, reservation().request) is None
    book.commit(reservation(), b"second")
    assert book.stored_reply("one", 1, reservation().request) == b"second"
    book.close()


def test_nothing_is_reserved_that_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = opened(tmp_path)

    def broken(kind: str, body: object) -> None:
        raise LedgerError("full")

    with monkeypatch.context() as patched:
        patched.setattr(book._journal, "append", broken)
        with pytest.raises(LedgerError):
            book.reserve(reservation(), approval())
    assert book.reservations == ()
    assert book.stored_reply("one", 1, "f" * 64) is None
    book.close()


def test_one_vault_a_ledger(tmp_path: Path) -> None:
    book = opened(tmp_path)
    with pytest.raises(LedgerError, match="another vault"):
        opened(tmp_path)
    assert spending(tmp_path / "ledger" / "ledger.jsonl") == {}  # reading is for anyone, at any time
    book.close()


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation(), approval())
    book.commit(reservation(), b"reply")
    book.close()
    assert (tmp_path / "ledger").stat().st_mode & 0o077 == 0
    assert (tmp_path / "ledger" / "replies").stat().st_mode & 0o077 == 0
    assert (tmp_path / "ledger" / "ledger.jsonl").stat().st_mode & 0o077 == 0


def test_a_fork_that_ends_does_not_let_go_of_the_ledger(tmp_path: Path) -> None:
    work = f"""
import os
from pathlib import Path
from client.ledger import Ledger
from common.errors import LedgerError
def opened(): return Ledger(Path({str(tmp_path / "l")!r}), Path({str(tmp_path / "r")!r}), durable=False)
book = opened()
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
try:
    opened()
except LedgerError:
    print("held")
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert done.stdout == "held\n"


def test_an_older_ledger_beside_newer_replies_is_found(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for session in ("one", "two"):
        book.reserve(reservation(session), approval())
        book.commit(reservation(session), b"reply")
    book.close()
    path = tmp_path / "ledger" / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    for _ in range(2):
        with pytest.raises(LedgerError, match="older than its replies"):
            opened(tmp_path)


def test_what_a_crash_left_of_a_reply_is_cleared_away(tmp_path: Path) -> None:
    opened(tmp_path).close()
    torn = tmp_path / "ledger" / "replies" / ".one.1.safetensors.abc"
    torn.write_bytes(b"half a re")
    opened(tmp_path).close()
    assert not torn.exists()


@pytest.mark.xfail(reason="a whole folder put back from an old copy has a sound chain; nothing outside knows")
def test_an_older_state_folder_is_found(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation("one"), approval(1.0))
    book.commit(reservation("one"), b"reply")
    book.close()
    shutil.rmtree(tmp_path / "ledger")
    book = opened(tmp_path)
    try:
        with pytest.raises((BudgetExhausted, LedgerError)):
            book.reserve(reservation("two"), approval(1.0))
    finally:
        book.close()


class AnyOrder(RuleBasedStateMachine):
    """Any interleaving of sessions, rounds, retries, restarts and crashes."""

    sessions = Bundle("sessions")

    @initialize(epsilon=st.floats(0.01, 7), delta=st.floats(1e-5, 1e-2))
    def begin(self, epsilon: float, delta: float) -> None:
        self.root = Path(self.folder.mkdtemp())
        self.granted = {STUDY: approval(epsilon, delta), OTHER: approval(1.0, 1e-3, OTHER)}
        self.plans: dict[str, Reservation] = {}
        self.told: dict[tuple[str, int], bytes] = {}
        self.count = 0
        self.book = opened(self.root)

    @rule(
        target=sessions,
        study=st.sampled_from([STUDY, OTHER]),
        epsilon=st.floats(0.001, 3),
        delta=st.floats(1e-6, 3e-3),
    )
    def new_session(self, study: str, epsilon: float, delta: float) -> str:
        name = f"s{len(self.plans)}"
        self.plans[name] = reservation(name, 1, study, epsilon, session_delta=delta)
        return name

    @rule(session=sessions, number=st.integers(1, 4), crash=st.sampled_from(["no", "before", "after"]))
    def ask(self, session: str, number: int, crash: str) -> None:
        wanted = dataclasses.replace(self.plans[session], round=number)
        begun = any(r.session == session for r in self.book.reservations)
        if (session, number) in self.told and not self.book._reply_path(session, number).exists():
            with pytest.raises(Refused, match="no longer kept"):
                self.book.stored_reply(session, number, wanted.request)
            return
        stored = self.book.stored_reply(session, number, wanted.request)
        assert stored == self.told.get((session, number))
        if stored is not None:
            return
        try:
            self.book.reserve(wanted, self.granted[wanted.study])
        except BudgetExhausted:
            assert not begun
            return
        if crash == "before":
            self.restart()
            return
        self.count += 1
        reply = b"reply %d" % self.count
        self.book.commit(wanted, reply)
        assert (session, number) not in self.told
        self.told[session, number] = reply
        if crash == "after":
            self.restart()

    @rule()
    def restart(self) -> None:
        self.book.close()
        with (self.root / "ledger" / "ledger.jsonl").open("ab") as file:
            file.write(b'{"torn')
        self.book = opened(self.root)

    @invariant()
    def never_more_than_granted(self) -> None:
        if not hasattr(self, "book"):
            return
        for study, spent in spending(self.root / "ledger" / "ledger.jsonl").items():
            granted = self.granted[study]
            begun = {r.session for r in self.book.reservations if r.study == study}
            assert spent.sessions == len(begun)
            assert spent.epsilon == pytest.approx(
                math.fsum(self.plans[s].session_epsilon or 0 for s in begun)
            )
            assert spent.epsilon <= (granted.epsilon or 0) * (1 + 1e-9)
            assert spent.delta <= (granted.delta or 0) * (1 + 1e-9)

    def teardown(self) -> None:
        if hasattr(self, "book"):
            self.book.close()


def test_any_order_of_sessions_stays_within_the_approval(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Folder:
        @staticmethod
        def mkdtemp() -> Path:
            return tmp_path_factory.mktemp("ledger")

    AnyOrder.folder = Folder  # type: ignore[attr-defined]
    AnyOrder.TestCase.settings = settings(
        max_examples=30, stateful_step_count=25, deadline=None, derandomize=True
    )
    AnyOrder.TestCase("runTest").runTest()
