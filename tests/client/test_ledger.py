"""The ledger: spent is spent, asking twice spends once, and nothing is given back that was used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small import grant, policy_of, reservation, session_plan

from client import ledger as module
from client.account import Spending, read_account, spending
from client.ledger import KEPT_REPLIES, LARGEST_HELD, Ledger, check_head, head_path, read_head
from client.policy import Policy
from client.reservation import Reservation
from common import journal
from common.errors import BudgetExhausted, LedgerError, Refused
from common.journal import read_journal
from common.keys import SigningKey

STUDY, OTHER = "a" * 64, "b" * 64
KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
POLICY = policy_of()


def opened(root: Path, durable: bool = False) -> Ledger:
    return Ledger(path_of(root), root / "ledger" / "replies", key=KEY, durable=durable)


def path_of(root: Path) -> Path:
    return root / "ledger" / "ledger.jsonl"


def spent(root: Path, study: str = STUDY) -> Spending | None:
    return spending(path_of(root)).get(study)


def charged(book: Ledger) -> list[tuple[str, int]]:
    return sorted(book.account.reserved)


def answer(book: Ledger, wanted: Reservation, reply: bytes = b"reply") -> None:
    book.reserve(wanted, grant(9.0, 9e-3, wanted.study), POLICY)
    book.commit(wanted, reply, released="1" * 64)


# --- what a session costs


def test_spends_a_session_once(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for number in (1, 2, 2, 1, 3):
        book.reserve(reservation(number=number), grant(1.0, 1e-3), POLICY)
    book.close()
    assert spent(tmp_path) == Spending(sessions=1, epsilon=1.0, delta=1e-3, rounds=3)


def test_rounds_and_statistics_are_charged_apart_each_once(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for number in (0, 1, 0, 2, 0, 1):
        book.reserve(reservation(number=number, epsilon=1.0 if number else 0.5), grant(), POLICY)
    for _ in range(2):
        found = spent(tmp_path)
        assert found is not None
        assert (found.sessions, found.rounds, found.epsilon) == (1, 3, 1.5)
        assert found.delta == pytest.approx(1e-3 + 1e-4, rel=1e-12)
        book.close()
        book = opened(tmp_path)
    with pytest.raises(BudgetExhausted):
        book.reserve(reservation("two", 0, epsilon=0.5), grant(1.9, 1e-2), POLICY)
    book.close()


def test_refuses_the_session_too_many_also_after_a_restart(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for session in ("one", "two", "three"):
        book.reserve(reservation(session), grant(), POLICY)
    for _ in range(2):
        for number in (1, 0):
            with pytest.raises(BudgetExhausted):
                book.reserve(reservation("four", number), grant(), POLICY)
        book.reserve(reservation("two", 2), grant(), POLICY)  # what has begun goes on
        book.close()
        book = opened(tmp_path)
    book.close()


@pytest.mark.parametrize(("epsilon", "delta"), [(0.999, 0.9), (100.0, 0.9e-3)])
def test_both_epsilon_and_delta_are_bounds(tmp_path: Path, epsilon: float, delta: float) -> None:
    book = opened(tmp_path)
    with pytest.raises(BudgetExhausted):
        book.reserve(reservation(), grant(epsilon, delta), POLICY)
    assert charged(book) == []
    assert book.sequence == 0 or [e.kind for e in read_journal(path_of(tmp_path))] == ["policy"]
    book.close()


def test_an_approval_without_a_budget_buys_nothing_private(tmp_path: Path) -> None:
    book, nothing = opened(tmp_path), grant(None, None)
    for number in (0, 1):
        with pytest.raises(BudgetExhausted):
            book.reserve(reservation(number=number), nothing, POLICY)
    book.reserve(reservation("free", epsilon=None), nothing, POLICY)
    assert spent(tmp_path) == Spending(1, 0.0, 0.0, 1)
    book.close()


def test_a_lowered_approval_holds_from_the_next_round_on(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation("one"), grant(), POLICY)
    with pytest.raises(BudgetExhausted):
        book.reserve(reservation("one", 2), grant(0.5), POLICY)
    book.reserve(reservation("one", 2), grant(), POLICY)
    book.close()


def test_a_session_belongs_to_one_study(tmp_path: Path) -> None:
    for first, then in ((1, 2), (0, 1), (1, 0)):
        book = opened(tmp_path / f"{first}{then}")
        book.reserve(reservation(number=first), grant(), POLICY)
        with pytest.raises(Refused, match="another study"):
            book.reserve(reservation(number=then, study=OTHER), grant(study=OTHER), POLICY)
        book.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": session_plan(noise=4.1)},
        {"plan": session_plan(rounds=4)},
        {"plan": session_plan(statistics=9.0)},
        {"public_size": 60},
        {"epsilon": 0.9},
        {"epsilon": None},
        {"delta": 1e-4},
    ],
    ids=str,
)
def test_a_session_keeps_its_plan(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Half of one plan's rounds and half of another's may cost more than either plan."""
    book = opened(tmp_path)
    book.reserve(reservation(), grant(), POLICY)
    for _ in range(2):
        with pytest.raises(Refused, match="planned otherwise"):
            book.reserve(reservation(number=2, **changes), grant(), POLICY)
        book.close()
        book = opened(tmp_path)
    book.reserve(reservation(number=2), grant(), POLICY)
    book.close()


def test_statistics_and_rounds_of_a_session_have_one_plan(tmp_path: Path) -> None:
    """A session's certificate states one plan, and the noise of its statistics stands there, too."""
    for first, then in ((0, 1), (1, 0)):
        book = opened(tmp_path / str(first))
        book.reserve(reservation(number=first), grant(), POLICY)
        for changes in ({"plan": session_plan(statistics=9.0)}, {"public_size": 60}):
            with pytest.raises(Refused, match="planned otherwise"):
                book.reserve(reservation(number=then, **changes), grant(), POLICY)
        book.reserve(reservation(number=then, epsilon=0.25), grant(), POLICY)
        book.close()


# --- the lifetime of the cohort


def test_without_a_lifetime_budget_nothing_private_runs(tmp_path: Path) -> None:
    book, nothing = opened(tmp_path), Policy()
    for number in (0, 1):
        with pytest.raises(BudgetExhausted, match="no lifetime budget"):
            book.reserve(reservation(number=number), grant(), nothing)
    book.reserve(reservation("free", epsilon=None), grant(None, None), nothing)
    book.close()


def test_the_lifetime_is_one_for_all_studies(tmp_path: Path) -> None:
    budget = policy_of(epsilon=3.0, delta=1e-3)
    assert budget.cohort is not None
    limit = budget.cohort.filter()
    fit = int(limit.capacity / reservation().rdp(limit.order))
    assert 2 <= fit < 100
    book = opened(tmp_path)
    for i in range(fit):
        study = f"{i:064x}"
        book.reserve(reservation(f"s{i}", study=study), grant(study=study), budget)
    for _ in range(2):
        with pytest.raises(BudgetExhausted, match="lifetime budget") as refused:
            book.reserve(reservation("more", study=OTHER), grant(study=OTHER), budget)
        assert refused.value.remedy
        book.reserve(reservation("s0", 2, f"{0:064x}"), grant(study=f"{0:064x}"), budget)
        book.close()
        book = opened(tmp_path)
    assert spending(path_of(tmp_path)).keys() == {f"{i:064x}" for i in range(fit)}
    book.close()


def test_a_lowered_lifetime_holds_from_the_next_round_on(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.reserve(reservation(), grant(), policy_of())
    with pytest.raises(BudgetExhausted, match="lifetime"):
        book.reserve(reservation(number=2), grant(), policy_of(epsilon=0.01))
    book.close()


def test_a_patient_pays_for_the_dearer_of_training_and_testing(tmp_path: Path) -> None:
    plan = session_plan()
    book = opened(tmp_path)
    book.reserve(reservation(plan=plan), grant(), POLICY)
    book.reserve(reservation(number=0), grant(), POLICY)
    for order in (2.0, 11.0):
        alone = [reservation(plan=p).rdp(order) for p in (plan, session_plan(evaluation=1e4))]
        assert alone[0] == alone[1]  # training is dearer
        testing = reservation(plan=session_plan(evaluation=0.5)).rdp(order)
        assert testing == pytest.approx(order / (2 * 0.5**2))
        statistics = order / (2 * 8.0**2)
        assert book.account.rdp(order) == pytest.approx(alone[0] + statistics, rel=1e-12)
    book.close()


# --- asking twice


def test_the_same_request_gets_the_same_reply(tmp_path: Path) -> None:
    for number in (0, 1):
        book, asked = opened(tmp_path / str(number)), reservation(number=number)
        assert book.stored_reply("one", number, asked.request) is None
        book.reserve(asked, grant(), POLICY)
        assert book.stored_reply("one", number, asked.request) is None  # paid, not yet answered
        book.commit(asked, b"reply")
        for _ in range(2):
            assert book.stored_reply("one", number, asked.request) == b"reply"
            with pytest.raises(Refused, match="another content"):
                book.stored_reply("one", number, "f" * 64)
            book.close()
            book = opened(tmp_path / str(number))
        book.close()


def test_reserving_again_gives_the_same_head(tmp_path: Path) -> None:
    book = opened(tmp_path)
    head = book.reserve(reservation(), grant(), POLICY)
    assert (head.sequence, head.hash) == (book.sequence, book.head)
    book.reserve(reservation(number=2), grant(), POLICY)
    before = path_of(tmp_path).read_bytes()
    assert book.reserve(reservation(), grant(), POLICY) == head
    assert head.hash != book.head
    assert path_of(tmp_path).read_bytes() == before
    book.close()


def test_another_content_is_refused_before_the_answer_too(tmp_path: Path) -> None:
    """Else a coordinator that breaks the line after `reserve` could ask two questions for one price."""
    book = opened(tmp_path)
    book.reserve(reservation(), grant(), POLICY)
    with pytest.raises(Refused, match="another content"):
        book.stored_reply("one", 1, "f" * 64)
    book.close()


def test_old_replies_go_and_stay_refused(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for number in range(1, KEPT_REPLIES + 2):
        answer(book, reservation(number=number), b"%d" % number)
    with pytest.raises(Refused, match="no longer kept"):
        book.stored_reply("one", 1, reservation(number=1).request)
    assert book.stored_reply("one", 2, reservation(number=2).request) == b"2"
    assert len(list((tmp_path / "ledger" / "replies").iterdir())) == KEPT_REPLIES
    book.close()


def test_a_changed_reply_is_found(tmp_path: Path) -> None:
    book = opened(tmp_path)
    answer(book, reservation())
    next((tmp_path / "ledger" / "replies").iterdir()).write_bytes(b"repli")
    with pytest.raises(LedgerError, match="not the reply"):
        book.stored_reply("one", 1, reservation().request)
    book.close()


def test_only_rounds_whose_numbers_left_are_told(tmp_path: Path) -> None:
    book = opened(tmp_path)
    answer(book, reservation(number=2))
    answer(book, reservation(number=0))
    book.reserve(reservation(number=1), grant(), POLICY)
    book.commit(reservation(number=1), b"a refusal")
    book.reserve(reservation(number=3), grant(), POLICY)
    for _ in range(2):
        assert [c.reservation.round for c in book.account.answered("one")] == [0, 2]
        assert book.account.answered("two") == []
        book.close()
        book = opened(tmp_path)
    book.close()


def test_a_commit_tells_the_withdrawals_by_then(tmp_path: Path) -> None:
    book = opened(tmp_path)
    for number, withdrawn in ((1, ""), (2, "2" * 64)):
        book.reserve(reservation(number=number), grant(), POLICY)
        book.commit(reservation(number=number), b"r", "1" * 64, withdrawn)
    book.close()
    account = read_account(path_of(tmp_path), KEY.public)
    assert [c.withdrawn for c in account.answered("one")] == ["0" * 64, "2" * 64]
    assert {c.reservation.withdrawn for c in account.answered("one")} == {"0" * 64}


# --- giving back


def test_an_abandoned_reservation_is_given_back(tmp_path: Path) -> None:
    book, all_of_it = opened(tmp_path), grant(1.0, 1e-3)
    for i in range(3):
        book.reserve(reservation(f"s{i}"), all_of_it, POLICY)
        assert spent(tmp_path) == Spending(1, 1.0, 1e-3, 1)
        book.abandon(reservation(f"s{i}"))
        assert book.account.rdp(8.0) == 0.0
        book.close()
        book = opened(tmp_path)
        assert book.account.rdp(8.0) == 0.0
        assert spent(tmp_path) is None
        assert book.stored_reply(f"s{i}", 1, "f" * 64) is None
    book.reserve(reservation("s0"), all_of_it, POLICY)  # the very same may be asked again
    assert [e.kind for e in read_journal(path_of(tmp_path)) if e.kind != "policy"] == [
        "reserve", "abandon", "reserve", "abandon", "reserve", "abandon", "reserve",
    ]  # fmt: skip
    book.close()


def test_what_was_charged_with_an_abandoned_round_stays_while_another_stands(tmp_path: Path) -> None:
    """Rounds of a session are charged together, by whichever came first."""
    book = opened(tmp_path)
    for number in (1, 2, 0):
        book.reserve(reservation(number=number), grant(), POLICY)
    cost = book.account.rdp(8.0)
    book.abandon(reservation(number=1))
    assert book.account.rdp(8.0) == cost
    with pytest.raises(Refused, match="planned otherwise"):
        book.reserve(reservation(number=3, epsilon=0.5), grant(), POLICY)
    book.abandon(reservation(number=2))
    left = reservation(number=0)
    for _ in range(2):
        assert book.account.rdp(8.0) == pytest.approx(left.rdp(8.0))
        assert spent(tmp_path) == Spending(1, 1.0, 1e-4, 1)
        book.close()
        book = opened(tmp_path)
    book.close()


def test_what_was_answered_is_not_given_back(tmp_path: Path) -> None:
    book = opened(tmp_path)
    answer(book, reservation())
    with pytest.raises(LedgerError, match="was answered"):
        book.abandon(reservation())
    assert spent(tmp_path) == Spending(1, 1.0, 1e-3, 1)
    book.close()


# --- a disk that fails


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_reply_that_cannot_be_kept_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = opened(tmp_path, durable=True)
    book.reserve(reservation(), grant(), POLICY)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomic", full)
        with pytest.raises(LedgerError, match="No space"):
            book.commit(reservation(), b"reply")
    assert book.stored_reply("one", 1, reservation().request) is None
    book.commit(reservation(), b"second")
    assert book.stored_reply("one", 1, reservation().request) == b"second"
    book.close()


def test_a_head_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry is on disk and counts; nobody was told that it does, so no row was read."""
    book = opened(tmp_path, durable=True)
    book.note(POLICY)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomic", full)
        with pytest.raises(LedgerError, match=r"head: No space"):
            book.reserve(reservation(), grant(), POLICY)
    assert spent(tmp_path) == Spending(1, 1.0, 1e-3, 1)
    for _ in range(2):
        assert book.reserve(reservation(), grant(), POLICY).hash == book.head
        book.close()
        account = read_account(path_of(tmp_path), KEY.public)
        check_head(path_of(tmp_path), account, read_head(path_of(tmp_path)))
        book = opened(tmp_path, durable=True)
    book.close()


def test_nothing_is_reserved_that_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = opened(tmp_path)

    def broken(kind: str, body: object) -> None:
        raise LedgerError("full")

    with monkeypatch.context() as patched:
        patched.setattr(book._journal, "append", broken)
        with pytest.raises(LedgerError):
            book.reserve(reservation(), grant(), POLICY)
        with pytest.raises(LedgerError):
            book.note(POLICY)
    assert charged(book) == []
    assert book.account.policy == ""
    assert book.account.rdp(3.0) == 0.0
    assert book.stored_reply("one", 1, "f" * 64) is None
    book.close()


def test_a_reservation_that_cannot_be_given_back_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = opened(tmp_path)
    book.reserve(reservation(), grant(), POLICY)
    with monkeypatch.context() as patched:
        patched.setattr(journal.os, "write", full)
        with pytest.raises(LedgerError, match="No space"):
            book.abandon(reservation())
    for _ in range(2):
        assert charged(book) == [("one", 1)]
        assert book.account.rdp(8.0) > 0
        book.close()
        book = opened(tmp_path)
    book.close()


def test_what_a_crash_left_of_a_reply_is_cleared_away(tmp_path: Path) -> None:
    opened(tmp_path).close()
    torn = tmp_path / "ledger" / "replies" / ".one.1.safetensors.abc"
    torn.write_bytes(b"half a re")
    opened(tmp_path).close()
    assert not torn.exists()


# --- who holds it, who reads it


def test_one_vault_a_ledger(tmp_path: Path) -> None:
    book = opened(tmp_path)
    with pytest.raises(LedgerError, match="another vault"):
        opened(tmp_path)
    assert spending(path_of(tmp_path)) == {}  # reading is for anyone, at any time
    book.close()


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


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    book = opened(tmp_path, durable=True)
    answer(book, reservation())
    book.close()
    for path in (tmp_path / "ledger").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert head_path(path_of(tmp_path)).exists()
    assert (tmp_path / "ledger").stat().st_mode & 0o077 == 0


# --- policies in it


def test_every_change_of_the_policy_is_an_entry(tmp_path: Path) -> None:
    book = opened(tmp_path)
    book.note(Policy())  # nothing was ever allowed
    assert book.sequence == 0
    policies = [
        policy_of(),
        policy_of(grant()),
        policy_of(),
        policy_of(secure_aggregation="required"),
        Policy(),
    ]
    for each in policies:
        for _ in range(2):
            book.note(each)
        book.close()
        book = opened(tmp_path)
    book.reserve(reservation(), grant(), policies[1])
    book.reserve(reservation(number=2), grant(), policies[1])
    entries = read_journal(path_of(tmp_path), KEY.public)
    assert [e.kind for e in entries] == ["policy"] * 6 + ["reserve"] * 2
    assert [e.body["digest"] for e in entries[:6]] == [p.digest for p in [*policies, policies[1]]]
    assert [Policy.model_validate(e.body["content"]) for e in entries[:5]] == policies
    assert entries[1].body["content"]["approved"][0]["approved_by"] == "officer"
    assert entries[1].body["content"]["approved"][0]["approved_at"] == "2026-01-01T00:00:00Z"
    book.close()


# --- a clock that jumps


def test_a_clock_that_jumps_back_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = opened(tmp_path)
    for number, now in ((1, 1e9), (2, 5e8), (3, -3.0)):
        monkeypatch.setattr(journal.time, "time", lambda now=now: now)
        book.reserve(reservation(number=number), grant(), POLICY)
        assert book.account.last_time == 1e9
    book.close()
    account = read_account(path_of(tmp_path), KEY.public)
    assert account.last_time == 1e9
    assert [e.time for e in read_journal(path_of(tmp_path))] == [1e9, 1e9, 5e8, -3.0]


def test_an_entry_says_all_that_a_round_costs(tmp_path: Path) -> None:
    book = opened(tmp_path)
    wanted = [reservation(number=n, exact=n == 1, policy=POLICY.digest) for n in (0, 1, 4)]
    for each in wanted:
        book.reserve(each, grant(), POLICY)
    book.close()
    bodies = [e.body for e in read_journal(path_of(tmp_path)) if e.kind == "reserve"]
    assert [Reservation.of(json.loads(json.dumps(b))) for b in bodies] == wanted
    assert bodies[1]["training"]["noise_multiplier"] == 4.0
    assert {"policy", "withdrawn", "request", "public_size", "protective"} <= bodies[0].keys()


def test_replies_that_wait_are_there_and_kept_in_the_end(tmp_path: Path) -> None:
    def book() -> Ledger:
        return Ledger(
            path_of(tmp_path), tmp_path / "ledger" / "replies", key=KEY, durable=False, prompt=False
        )

    first = book()
    for number in (1, 2, 3):
        wanted = reservation("s", number)
        first.reserve(wanted, grant(), policy_of(grant()))
        first.commit(wanted, b"reply %d" % number, "0" * 64)
    assert first.stored_reply("s", 3, reservation("s", 3).request) == b"reply 3"
    assert list((tmp_path / "ledger" / "replies").iterdir()) == []
    with pytest.raises(Refused, match="no longer kept"):
        first.stored_reply("s", 1, reservation("s", 1).request)
    first.close()
    again = book()
    assert again.stored_reply("s", 2, reservation("s", 2).request) == b"reply 2"
    assert again.stored_reply("s", 3, reservation("s", 3).request) == b"reply 3"
    big = reservation("s", 4)
    again.reserve(big, grant(), policy_of(grant()))
    again.commit(big, bytes(LARGEST_HELD + 1), "0" * 64)
    assert len(list((tmp_path / "ledger" / "replies").iterdir())) == 2  # the large one, and that of round 3
    again.close()


def test_what_is_spent_follows_every_entry(tmp_path: Path) -> None:
    """The running sums are those of all reservations that stand."""
    book, policy = opened(tmp_path), policy_of(grant())
    for session in ("a", "b"):
        for number in (1, 2):
            book.reserve(reservation(session, number), grant(), policy)
    book.abandon(reservation("b", 1))
    two = book.account.spending(reservation("a", 1).study)
    assert (two.sessions, two.rounds) == (2, 3)
    book.abandon(reservation("b", 2))
    one = book.account.spending(reservation("a", 1).study)
    assert (one.sessions, one.rounds, one.epsilon) == (1, 2, reservation("a", 1).epsilon)
    book.close()
    assert read_account(path_of(tmp_path)).spending(reservation("a", 1).study) == one
