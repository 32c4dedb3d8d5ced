"""Whatever the order of studies, sessions, repeats, crashes and threads: neither limit is ever exceeded."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from opacus.accountants.analysis.rdp import compute_rdp
from small import allow, grant, make_site, policy_of, reservation, session_plan, study

from client.account import read_account
from client.ledger import Ledger, check_head, read_head
from client.policy import approval_of
from client.policy_file import approve, set_policy
from client.reservation import STATISTICS, Reservation
from client.site import open_vault
from common.errors import BudgetExhausted, Refused
from common.journal import read_journal
from common.keys import SigningKey
from common.messages import Job, JobHeader, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from common.privacy.plan import StudyPlan, plan_study
from common.study import Study

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
STUDIES = ["a" * 64, "b" * 64, "c" * 64]
PLANS = [
    session_plan(),
    session_plan(noise=1.1, rate=0.05, rounds=2, statistics=3.0),
    session_plan(noise=7.0, evaluation=1.5, statistics=20.0),
    session_plan(noise=0.8, rate=1.0, rounds=1),
]


# --- an accountant of its own: Opacus, by closed form where nothing is sampled


@lru_cache
def oracle(plan: StudyPlan, part: str, order: float) -> float:
    """Rényi cost of one part of a session, at `order`."""

    def gaussian(noise: float) -> float:
        return order / (2 * noise**2)

    if part == STATISTICS:
        assert plan.statistics is not None
        return gaussian(plan.statistics.noise_multiplier)
    step = plan.step
    steps = plan.steps_per_round * plan.rounds
    training = compute_rdp(
        q=step.sample_rate, noise_multiplier=step.noise_multiplier, steps=steps, orders=order
    )
    between = (
        (plan.evaluations - 1) * gaussian(plan.histogram.noise_multiplier) if plan.evaluations > 1 else 0
    )
    return max(float(training), between + gaussian(plan.final_histogram.noise_multiplier))


def capacity(epsilon: float, delta: float, order: float) -> float:
    """What Rényi costs at `order` may add up to: Canonne, Kamath, Steinke 2020, proposition 12, solved."""
    return epsilon - math.log((order - 1) / order) + (math.log(delta) + math.log(order)) / (order - 1)


class AnyOrder(RuleBasedStateMachine):
    """Any interleaving of studies, sessions, rounds, statistics, retries, failures, restarts and crashes."""

    sessions = Bundle("sessions")
    open_reservations = Bundle("open_reservations")
    folders: Callable[[], Path]

    @initialize(
        lifetime=st.floats(0.5, 20),
        lifetime_delta=st.floats(1e-6, 1e-2),
        epsilons=st.lists(st.floats(0.01, 7), min_size=3, max_size=3),
        deltas=st.lists(st.floats(1e-5, 1e-2), min_size=3, max_size=3),
    )
    def begin(
        self, lifetime: float, lifetime_delta: float, epsilons: list[float], deltas: list[float]
    ) -> None:
        self.root = type(self).folders()
        self.granted = {s: grant(e, d, s) for s, e, d in zip(STUDIES, epsilons, deltas, strict=True)}
        self.policy = policy_of(*self.granted.values(), epsilon=lifetime, delta=lifetime_delta)
        assert self.policy.cohort is not None
        self.order = self.policy.cohort.filter().order
        self.most = capacity(lifetime, lifetime_delta, self.order)
        self.begun: dict[str, dict[str, Any]] = {}
        self.charged: dict[tuple[str, str], Reservation] = {}  # what must be paid for
        self.standing: dict[tuple[str, int], Reservation] = {}
        self.told: dict[tuple[str, int], bytes] = {}
        self.count = 0
        self.book = self.opened()

    def opened(self) -> Ledger:
        return Ledger(self.root / "l.jsonl", self.root / "replies", key=KEY, durable=False)

    @rule(
        target=sessions,
        number=st.sampled_from(STUDIES),
        plan=st.sampled_from(PLANS),
        epsilon=st.floats(0.001, 3),
        delta=st.floats(1e-6, 3e-3),
    )
    def new_session(self, number: str, plan: StudyPlan, epsilon: float, delta: float) -> str:
        name = f"s{len(self.begun)}"
        self.begun[name] = {"study": number, "plan": plan, "epsilon": epsilon, "delta": delta}
        return name

    def wanted(self, session: str, number: int) -> Reservation:
        return reservation(session, number, **self.begun[session])

    def fits(self, wanted: Reservation) -> bool:
        """By the test's own sums; True also for what began before."""
        if (wanted.session, wanted.part) in self.charged:
            return True
        charges = [*self.charged.values(), wanted]
        granted = self.granted[wanted.study]
        of_study = [r for r in charges if r.study == wanted.study]
        rdp = math.fsum(oracle(r.plan, r.part, self.order) for r in charges)
        return (
            math.fsum(r.epsilon or 0 for r in of_study) <= (granted.epsilon or 0)
            and math.fsum(r.delta or 0 for r in of_study) <= (granted.delta or 0)
            and rdp <= self.most
        )

    @rule(
        target=open_reservations,
        session=sessions,
        number=st.integers(0, 4),
        end=st.sampled_from(["answer", "leave open", "crash", "crash after the answer", "other content"]),
    )
    def ask(self, session: str, number: int, end: str) -> tuple[str, int] | None:
        wanted, key = self.wanted(session, number), (session, number)
        if key in self.told and not self.book._reply_path(*key).exists():
            with pytest.raises(Refused, match="no longer kept"):
                self.book.stored_reply(session, number, wanted.request)
            return None
        if end == "other content" and key in self.standing:
            with pytest.raises(Refused, match="another content"):
                self.book.stored_reply(session, number, "f" * 64)
        stored = self.book.stored_reply(session, number, wanted.request)
        assert stored == self.told.get(key)
        if stored is not None:
            return None
        fits = self.fits(wanted)
        try:
            self.book.reserve(wanted, self.granted[wanted.study], self.policy)
        except BudgetExhausted:
            assert not fits
            return None
        assert fits
        self.standing[key] = wanted
        self.charged.setdefault((session, wanted.part), wanted)
        if end == "crash":
            self.crash(b'{"torn')
        if end not in ("answer", "crash after the answer"):
            return key
        self.count += 1
        reply = b"reply %d" % self.count
        self.book.commit(wanted, reply, "1" * 64)
        assert key not in self.told
        self.told[key] = reply
        if end == "crash after the answer":
            self.crash(b"")
        return None

    @rule(key=consumes(open_reservations))
    def give_back(self, key: tuple[str, int] | None) -> None:
        """As a vault does whose work failed before it came near a row."""
        if key is None or key in self.told or key not in self.standing:
            return
        gone = self.standing.pop(key)
        self.book.abandon(gone)
        if not any((r.session, r.part) == (gone.session, gone.part) for r in self.standing.values()):
            del self.charged[gone.session, gone.part]

    @rule(torn=st.sampled_from([b"", b"{", b'{"torn', b"\xff\x00"]))
    def crash(self, torn: bytes) -> None:
        """The process ends without a word; a write may have been under way."""
        self.book._journal.close()  # its descriptor goes with the process, and the lock with it
        with (self.root / "l.jsonl").open("ab") as file:
            file.write(torn)
        self.book = self.opened()

    @invariant()
    def never_more_than_granted(self) -> None:
        if not hasattr(self, "book"):
            return
        account = read_account(self.root / "l.jsonl", KEY.public)
        for each in (account, self.book.account):
            assert each.reserved == self.standing
            assert set(each.committed) == set(self.told)
            spent = each.rdp(self.order)
            expected = math.fsum(oracle(r.plan, r.part, self.order) for r in self.charged.values())
            assert spent == pytest.approx(expected, rel=1e-6)
            assert spent <= self.most * (1 + 1e-6)
            for digest, found in each.studies().items():
                mine = [r for r in self.charged.values() if r.study == digest]
                granted = self.granted[digest]
                assert found.sessions == len({r.session for r in mine})
                assert found.epsilon == pytest.approx(math.fsum(r.epsilon or 0 for r in mine))
                assert found.epsilon <= (granted.epsilon or 0) * (1 + 1e-9)
                assert found.delta <= (granted.delta or 0) * (1 + 1e-9)

    def teardown(self) -> None:
        if hasattr(self, "book"):
            self.book.close()


def test_any_order_of_sessions_stays_within_both_limits(tmp_path_factory: pytest.TempPathFactory) -> None:
    AnyOrder.folders = lambda: tmp_path_factory.mktemp("ledger")
    AnyOrder.TestCase.settings = settings(
        max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
    )
    AnyOrder.TestCase("runTest").runTest()


# --- one formula at a time


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    plan=st.sampled_from(PLANS),
    noise=st.floats(0.7, 30),
    order=st.floats(1.05, 400),
    number=st.sampled_from([0, 1]),
)
def test_a_reservations_cost_is_the_oracles(plan: StudyPlan, noise: float, order: float, number: int) -> None:
    changed = dataclasses.replace(plan, step=dataclasses.replace(plan.step, noise_multiplier=noise))
    wanted = reservation(number=number, plan=changed)
    assert wanted.rdp(order) == pytest.approx(oracle(changed, wanted.part, order), rel=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    charges=st.lists(st.tuples(st.sampled_from(PLANS), st.sampled_from([0, 1])), min_size=1, max_size=8),
    lifetime=st.tuples(st.floats(0.5, 50), st.floats(1e-6, 1e-2)),
)
def test_epsilon_never_falls_when_something_is_spent(
    tmp_path_factory: pytest.TempPathFactory,
    charges: list[tuple[StudyPlan, int]],
    lifetime: tuple[float, float],
) -> None:
    policy = policy_of(epsilon=1000.0, delta=1e-2)
    shown = policy_of(epsilon=lifetime[0], delta=lifetime[1]).cohort
    assert shown is not None
    limit, granted = shown.filter(), grant(999.0, 0.9)
    root = tmp_path_factory.mktemp("ledger")
    book = Ledger(root / "l", root / "r", key=KEY, durable=False)
    before, rdp = limit.epsilon_of(0.0), 0.0
    assert before == 0.0
    for i, (plan, number) in enumerate(charges):
        book.reserve(reservation(f"s{i}", number, plan=plan), granted, policy)
        now = limit.epsilon_of(book.account.rdp(limit.order))
        assert now >= before
        assert book.account.rdp(limit.order) > rdp
        assert (now <= limit.epsilon) == limit.admits(book.account.rdp(limit.order), 0.0)
        before, rdp = now, book.account.rdp(limit.order)
        for _ in range(2):  # a repeat spends nothing
            book.reserve(reservation(f"s{i}", number, plan=plan), granted, policy)
            assert book.account.rdp(limit.order) == rdp
    book.close()


# --- a whole vault


def job(wanted: Study, number: int = 1, session: str = "first") -> bytes:
    header = JobHeader(session=session, round=number, study=wanted.digest)
    return encode(Job(header, parameter_arrays(study_model(wanted)) if number else {}))


def event_of(events: list[SubsampledGaussian | GaussianRelease]) -> dp_event.DpEvent:
    """In Google's words."""
    found: list[dp_event.DpEvent] = []
    for each in events:
        gaussian = dp_event.GaussianDpEvent(each.noise_multiplier)
        if isinstance(each, GaussianRelease):
            found += [gaussian] * each.releases
        elif each.sample_rate == 1:
            found.append(dp_event.SelfComposedDpEvent(gaussian, each.steps))
        else:
            sampled = dp_event.PoissonSampledDpEvent(each.sample_rate, gaussian)
            found.append(dp_event.SelfComposedDpEvent(sampled, each.steps))
    return dp_event.ComposedDpEvent(found)


def dearer(plan: StudyPlan, order: float) -> dp_event.DpEvent:
    """What a session's rounds cost the patients who pay more, training or testing ones."""
    both = [event_of([plan.training_event(plan.rounds)]), event_of(list(plan.evaluation_events()))]
    rdp = []
    for each in both:
        accountant = RdpAccountant([order])
        rdp.append(accountant.compose(each)._rdp[0])
    return both[int(np.argmax(rdp))]


TEN = [
    study(
        name=f"study-{i}",
        algorithm={"rounds": 1 + i % 2},
        training={"sample_rate": 1.0 if i % 3 else 0.5},
        privacy={"mode": "patient-dp", "epsilon": 0.4 + 0.1 * (i % 4), "delta": 1e-3, "clipping_norm": 1.0},
        **({"statistics": {"epsilon": 0.3, "delta": 1e-4, "bins": 4}} if i % 2 else {}),
    )
    for i in range(10)
]


@pytest.mark.parametrize("lifetime", [0.9, 1.7])
def test_ten_studies_on_one_cohort_stop_where_googles_accountant_says(
    tmp_path: Path, lifetime: float
) -> None:
    """Each study runs its statistics, if it has any, and then trains, until the lifetime budget is spent.

    Google's Rényi accountant, at the filter's order, is asked before each: would ε exceed the budget?
    """
    delta = 1e-3
    folder = make_site(tmp_path / "site", count=3000)  # so many that noise doesn't withhold statistics
    set_policy(folder, {"cohort": {"epsilon": lifetime, "delta": delta}})
    limit = policy_of(epsilon=lifetime, delta=delta).cohort
    assert limit is not None
    order = limit.filter().order
    spent: list[dp_event.DpEvent] = []

    def fits(event: dp_event.DpEvent) -> bool:
        accountant = RdpAccountant([order])
        accountant.compose(dp_event.ComposedDpEvent([*spent, event]))
        return bool(accountant.get_epsilon(delta) <= lifetime)

    stopped = []
    for wanted in TEN:
        plan = plan_study(wanted, 50)
        approve(folder, wanted, approval_of(wanted, "officer", sessions=5), plan)
        vault = open_vault(folder, durable=False)
        parts = [("rounds", 1, dearer(plan, order))]
        if plan.statistics is not None:
            event = event_of([GaussianRelease(noise_multiplier=plan.statistics.noise_multiplier)])
            parts.insert(0, ("statistics", 0, event))
        for part, number, event in parts:
            expected = fits(event)
            if expected:
                spent.append(event)
            else:
                stopped.append((wanted.name, part))
            message = decode(vault.answer(job(wanted, number, wanted.name)))
            assert isinstance(message, Reply) == expected, (wanted.name, part, message)
            if not expected:
                assert message.header.code == "budget-exhausted"  # type: ignore[union-attr]
                assert "lifetime" in message.header.message  # type: ignore[union-attr]
        vault.close()
    assert 1 <= len(stopped) < len(TEN) + 5
    account = read_account(folder.ledger_path)
    accountant = RdpAccountant([order])
    accountant.compose(dp_event.ComposedDpEvent(spent))
    assert account.rdp(order) == pytest.approx(accountant._rdp[0], rel=1e-6)
    assert limit.filter().epsilon_of(account.rdp(order)) == pytest.approx(
        accountant.get_epsilon(delta), rel=1e-6
    )


def together(work: list[Callable[[], None]]) -> None:
    """Run all at once, as nearly as threads can."""
    barrier, failures = threading.Barrier(len(work)), list[BaseException]()

    def run(each: Callable[[], None]) -> None:
        try:
            barrier.wait(30)
            each()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
    assert not failures, failures


def test_threads_spend_no_more_than_one_after_the_other(tmp_path: Path) -> None:
    """Sixteen requests at once, of which two sessions a study may begin; each asks twice."""
    folder = make_site(tmp_path / "site")
    both = [TEN[0], TEN[4]]
    for each in both:
        allow(folder, each, sessions=2)
    vault = open_vault(folder)
    replies: dict[tuple[str, str], set[bytes]] = {}

    def ask(wanted: Study, session: str) -> None:
        for _ in range(2):
            content = vault.answer(job(wanted, 1, session))
            replies.setdefault((wanted.name, session), set()).add(content)

    def work(wanted: Study, session: str) -> Callable[[], None]:
        return lambda: ask(wanted, session)

    together([work(s, f"{s.name}-{n}") for s in both for n in range(4) for _ in range(2)])
    vault.close()
    account = read_account(folder.ledger_path)
    for each in both:
        found = account.spending(each.digest)
        assert found.sessions == found.rounds == 2
        assert found.epsilon <= 2 * (each.privacy.epsilon or 0)
        told = [r for (name, _), r in replies.items() if name == each.name]
        assert all(len(r) == 1 for r in told)  # every repeat had the very same answer
        assert sum(isinstance(decode(next(iter(r))), Reply) for r in told) == 2
    kinds = [(e.kind, e.body.get("session")) for e in read_journal(folder.ledger_path)]
    assert len(set(kinds)) == len([k for k in kinds if k[0] != "policy"]) + 1
    check_head(folder.ledger_path, account, read_head(folder.ledger_path))


def test_threads_share_one_lifetime(tmp_path: Path) -> None:
    """Every study has budget of its own; the cohort's suffices for some of them only."""
    folder = make_site(tmp_path / "site")
    lifetime = {"cohort": {"epsilon": 1.6, "delta": 1e-3}}
    set_policy(folder, lifetime)
    for each in TEN:
        allow(folder, each)
    vault = open_vault(folder, durable=False)
    outcomes: list[bool] = []

    def ask(wanted: Study) -> None:
        outcomes.append(isinstance(decode(vault.answer(job(wanted, 1, wanted.name))), Reply))

    together([lambda w=w: ask(w) for w in TEN])  # type: ignore[misc]
    vault.close()
    limit = policy_of(epsilon=1.6, delta=1e-3).cohort
    assert limit is not None
    order = limit.filter().order
    spent = read_account(folder.ledger_path).rdp(order)
    assert 0 < sum(outcomes) < len(TEN)
    assert 0.5 * capacity(1.6, 1e-3, order) < spent <= capacity(1.6, 1e-3, order) * (1 + 1e-9)
