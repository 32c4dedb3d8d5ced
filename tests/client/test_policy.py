"""What a site allows: nothing by itself, and never more than its policy says, whatever a study asks."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from small import allow, answered, epsilon_of_gaussians, grant, job, make_site, policy_of, refused, study

from client.account import read_account, spending
from client.policy import EVERY_RELEASE, Approval, Policy, approval_of
from client.policy_file import (
    PolicyReader,
    approve,
    approved_study,
    load_policy,
    revoke,
    save_policy,
    set_policy,
)
from client.settings import SiteFolder
from client.site import open_vault
from client.vault import Vault
from common import journal
from common.errors import NotApproved, PolicyForbids, Refused, SiteError, StudyError
from common.files import canonical_json
from common.journal import read_journal
from common.keys import read_public_key
from common.messages import HEADER, Reply, decode
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from common.privacy.plan import Limits, StudyPlan, plan_study
from common.study import Study

WANTED = study(statistics={"epsilon": 1.0, "delta": 1e-4, "bins": 4}, evaluation={"every": 1})
PLAIN = study()
BUDGET = {"epsilon": 100.0, "delta": 1e-2}


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return make_site(tmp_path / "site", count=400)


@pytest.fixture
def vault(folder: SiteFolder) -> Iterator[Vault]:
    opened = open_vault(folder, durable=False)
    yield opened
    opened.close()


def policies_in_the_ledger(folder: SiteFolder) -> list[dict[str, Any]]:
    entries = read_journal(folder.ledger_path, read_public_key(folder.signing_key_path.with_suffix(".pub")))
    return [e.body for e in entries if e.kind == "policy"]


# --- nothing by itself


def test_absent_nothing_is_allowed(folder: SiteFolder) -> None:
    found = load_policy(folder)
    assert found == Policy()
    assert (found.cohort, found.approved) == (None, ())
    with pytest.raises(NotApproved):
        found.approval(WANTED.digest)
    with pytest.raises(SiteError, match="no lifetime budget"):
        approve(folder, WANTED, approval_of(WANTED, "officer"), plan_study(WANTED, 50))
    assert not folder.policy_path.exists()
    assert not folder.approved.exists()


def test_a_lifetime_budget_allows_no_study(folder: SiteFolder, vault: Vault) -> None:
    set_policy(folder, {"cohort": BUDGET})
    assert refused(vault, job(WANTED)).code == "not-approved"


def test_an_approval_without_a_lifetime_budget_is_none(folder: SiteFolder, vault: Vault) -> None:
    """Written by hand: `approve` would not."""
    allow(folder, WANTED)
    policy = load_policy(folder)
    save_policy(folder, policy.model_copy(update={"cohort": None}))
    for number in (0, 1):
        header = refused(vault, job(WANTED, number))
        assert (header.code, "no lifetime budget" in header.message) == ("budget-exhausted", True)
    assert spending(folder.ledger_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        "[cohort]\nepsilon = 8\n",
        "[cohort]\nepsilon = 0\ndelta = 1e-4\n",
        "[cohort]\nepsilon = 8\ndelta = 0.5\n",
        "[cohort]\nepsilon = nan\ndelta = 1e-4\n",
        '[cohort]\nepsilon = "inf"\ndelta = 1e-4\n',
        '[floors]\nunit = "record"\n',
        "[floors]\nnoise_multiplier = -1\n",
        "[floors]\nnoise_multiplier = inf\n",
        "[floors]\nclipping_norm = 0\n",
        "[floors]\nclipping_norm = 1e-12\n",
        "[floors]\npublic_size = 0\n",
        "[floors]\nminimum_patients = 0\n",
        'releases = ["training", "rows"]\n',
        'secure_aggregation = "maybe"\n',
        "noise_multiplier = 1\n",
        '[[approved]]\nstudy = "s"\n',
        '[[approved]]\nstudy = "s"\ndigest = "ABC"\napproved_by = "o"\napproved_at = 2026-01-01T00:00:00Z\n',
        f'[[approved]]\nstudy = "s"\ndigest = "{"a" * 64}"\napproved_by = "o"\n'
        "approved_at = 2026-01-01T00:00:00\n",  # no time zone: nobody knows when
        f'[[approved]]\nstudy = "s"\ndigest = "{"a" * 64}"\napproved_at = 2026-01-01T00:00:00Z\n',
    ],
    ids=str,
)
def test_a_policy_that_means_nothing_allows_nothing(folder: SiteFolder, vault: Vault, text: str) -> None:
    folder.policy_path.write_text(text)
    with pytest.raises(SiteError) as error:
        load_policy(folder)
    assert str(folder.policy_path) in error.value.message
    assert error.value.remedy
    assert refused(vault, job(WANTED)).code == "unavailable"
    with pytest.raises(SiteError):
        set_policy(folder, {"releases": ["training"]})
    assert folder.policy_path.read_text() == text


# --- how it is written


moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
approvals = st.builds(
    Approval,
    study=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=9),
    digest=st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}"),
    epsilon=st.none() | st.floats(1e-3, 100),
    delta=st.none() | st.floats(1e-9, 0.9),
    session_epsilon=st.none() | st.floats(1e-3, 100),
    public=st.booleans(),
    approved_by=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
    approved_at=moments,
    valid_from=st.none() | moments,
    valid_until=st.none() | moments,
    revoked_by=st.none() | st.just("officer"),
    revoked_at=st.none() | moments,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    approved=st.lists(approvals, max_size=3),
    epsilon=st.floats(1e-3, 1000),
    releases=st.sets(st.sampled_from(EVERY_RELEASE)),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, approved: list[Approval], epsilon: float, releases: set[str]
) -> None:
    root = tmp_path_factory.mktemp("site")
    (root / "site.toml").write_text('[site]\nname = "n"\npublic_size = 9\n[data]\nfile = "p.csv"\n')
    site = SiteFolder(root)
    made = policy_of(*approved, epsilon=epsilon, releases=sorted(releases))
    save_policy(site, made)
    assert load_policy(site) == made
    assert load_policy(site).digest == made.digest
    assert site.policy_path.stat().st_mode & 0o077 == 0
    # as the ledger keeps it
    assert Policy.model_validate(json.loads(canonical_json(made.content))) == made


def test_the_digest_is_of_what_it_says_not_of_how(folder: SiteFolder) -> None:
    folder.policy_path.write_text("[cohort]\nepsilon = 8\ndelta = 1e-4\n")
    one = load_policy(folder).digest
    folder.policy_path.write_text("# spoken\n[cohort]\ndelta = 0.0001\nepsilon = 8.0\n")
    assert load_policy(folder).digest == one
    folder.policy_path.write_text("[cohort]\nepsilon = 8.5\ndelta = 1e-4\n")
    assert load_policy(folder).digest != one


def test_setting_changes_what_is_given_and_keeps_the_rest(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    approved = load_policy(folder).approved
    set_policy(folder, {"cohort": BUDGET, "floors": {"public_size": 20, "clipping_norm": 2.0}})
    set_policy(
        folder, {"cohort": {"epsilon": 50.0}, "floors": {"clipping_norm": 1.5}, "releases": ["training"]}
    )
    found = load_policy(folder)
    assert found.cohort is not None
    assert (found.cohort.epsilon, found.cohort.delta) == (50.0, 1e-2)
    assert (found.floors.public_size, found.floors.clipping_norm) == (20, 1.5)
    assert found.floors.minimum_patients == 10
    assert (found.releases, found.approved) == (("training",), approved)
    before = folder.policy_path.read_bytes()
    for wrong in (
        {"cohort": {"epsilon": -1.0}},
        {"floors": {"unit": "record"}},
        {"floors": {"noise": 1}},
        {"releases": ["rows"]},
        {"secure_aggregation": "no"},
        {"anything": 1},
    ):
        with pytest.raises(SiteError):
            set_policy(folder, wrong)
        assert folder.policy_path.read_bytes() == before


def test_a_reader_sees_every_edit(folder: SiteFolder) -> None:
    reader = PolicyReader(folder)
    assert reader.policy() == Policy()
    for epsilon in (8.0, 9.0, 7.5):
        set_policy(folder, {"cohort": {"epsilon": epsilon, "delta": 1e-4}})
        for _ in range(2):
            cohort = reader.policy().cohort
            assert cohort is not None
            assert cohort.epsilon == epsilon
    with folder.policy_path.open("a") as file:
        file.write("nonsense")
    for _ in range(2):
        with pytest.raises(SiteError):
            reader.policy()
    folder.policy_path.unlink()
    assert reader.policy() == Policy()


def test_the_study_is_the_sites_own_copy(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    path = folder.approved / f"{WANTED.digest}.json"
    assert approved_study(folder, WANTED.digest) == WANTED
    assert path.stat().st_mode & 0o077 == 0
    reader = PolicyReader(folder)
    assert reader.study(WANTED.digest) == WANTED
    path.write_bytes(study(algorithm={"rounds": 9}).canonical)
    for read in (reader.study, lambda digest: approved_study(folder, digest)):
        with pytest.raises(SiteError, match="not the study that was approved"):
            read(WANTED.digest)
    path.write_bytes(b"{")
    with pytest.raises(StudyError):
        reader.study(WANTED.digest)


# --- approving


def test_an_approval_lasts_for_so_many_sessions(folder: SiteFolder) -> None:
    scaled = study(statistics={"epsilon": 1.0, "delta": 1e-4}, data={**_data(), "scaling": "moments"})
    cases: list[tuple[Study, dict[str, Any], float, float]] = [
        (PLAIN, {}, 2.0, 1e-3),
        (PLAIN, {"sessions": 3}, 6.0, 3e-3),
        (PLAIN, {"sessions": 3, "descriptions": 9}, 6.0, 3e-3),  # it asks for none
        (PLAIN, {"sessions": 3, "session_epsilon": 0.5}, 1.5, 3e-3),
        (PLAIN, {"session_epsilon": 5.0, "session_delta": 1e-5}, 2.0, 1e-5),
        (WANTED, {}, 3.0, 1.1e-3),
        (WANTED, {"sessions": 2, "descriptions": 0}, 4.0, 2e-3),
        (WANTED, {"descriptions": 3, "session_epsilon": 0.5}, 2.0, 1.3e-3),
        (scaled, {}, 4.0, 1.2e-3),
        (scaled, {"sessions": 2, "descriptions": 0}, 6.0, 2.2e-3),
    ]
    for wanted, options, epsilon, delta in cases:
        made = approval_of(wanted, "officer", **options)
        assert made.epsilon == pytest.approx(epsilon), options
        assert made.delta == pytest.approx(delta), options
        assert (made.digest, made.approved_by, made.study) == (wanted.digest, "officer", wanted.name)
        assert abs(made.approved_at - datetime.now(UTC)) < timedelta(minutes=5)
    bare = approval_of(study(privacy={"mode": "none"}), "officer", public=True)
    assert (bare.epsilon, bare.delta) == (None, None)
    with pytest.raises(SiteError):
        approval_of(PLAIN, "officer", session_epsilon=-1.0)


def _data() -> dict[str, Any]:
    return WANTED.data.model_dump(mode="json")


def test_what_is_approved_is_refused_twice_and_after_that_needs_a_revocation(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    with pytest.raises(SiteError, match="approved already"):
        allow(folder, WANTED)
    revoke(folder, WANTED.digest, "dean")
    allow(folder, WANTED, sessions=2)
    first, second = load_policy(folder).approved
    assert (first.revoked_by, second.revoked_by) == ("dean", None)
    assert load_policy(folder).approval(WANTED.digest) == second


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"floors": {"public_size": 51}}, "a public size of 50"),
        ({"floors": {"patients_per_step": 41}}, "40 patients a step"),
        ({"secure_aggregation": "required"}, "without secure aggregation"),
    ],
    ids=str,
)
def test_what_the_floors_forbid_is_neither_approved_nor_run(
    folder: SiteFolder, vault: Vault, changes: dict[str, Any], reason: str
) -> None:
    set_policy(folder, {"cohort": BUDGET, **changes})
    with pytest.raises(PolicyForbids, match=reason):
        approve(folder, WANTED, approval_of(WANTED, "officer"), plan_study(WANTED, 50))
    assert load_policy(folder).approved == ()
    set_policy(
        folder, {"floors": {"public_size": 50, "patients_per_step": 40}, "secure_aggregation": "optional"}
    )
    allow(folder, WANTED)
    answered(vault, job(WANTED))
    set_policy(folder, changes)
    for number in (0, 1, 2):
        header = refused(vault, job(WANTED, number))
        assert header.code == "policy-forbids"
        assert reason in header.message
    assert len(read_account(folder.ledger_path).reserved) == 1


def test_what_protects_nobody_needs_a_public_cohort(folder: SiteFolder) -> None:
    bare = study(privacy={"mode": "none"})
    set_policy(folder, {"cohort": BUDGET})
    with pytest.raises(Refused, match="public cohorts only"):
        approve(folder, bare, approval_of(bare, "officer"), plan_study(bare, 50))
    approve(folder, bare, approval_of(bare, "officer", public=True), plan_study(bare, 50))


# --- dates


DAY = 86_400.0
NOON = datetime(2026, 6, 15, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("begin", "end", "days"),
    [(None, None, (-9, 0, 9)), (-1, None, (-0.9, 0, 9)), (None, 1, (-9, 0, 0.9)), (-1, 1, (-0.9, 0, 0.9))],
)
def test_an_approval_counts_between_its_dates(
    begin: float | None, end: float | None, days: tuple[float, ...]
) -> None:
    def moment(day: float | None) -> datetime | None:
        return None if day is None else NOON + timedelta(days=day)

    one = grant().model_copy(update={"valid_from": moment(begin), "valid_until": moment(end)})
    policy = policy_of(one)
    for day in days:
        assert policy.approval(one.digest, (NOON + timedelta(days=day)).timestamp()) == one
    for day in (begin, end):
        if day is not None:
            policy.approval(one.digest, (NOON + timedelta(days=day)).timestamp())  # to the second
            outside = NOON + timedelta(days=day, seconds=math.copysign(1, day))
            with pytest.raises(NotApproved, match="not valid at this time"):
                policy.approval(one.digest, outside.timestamp())
    assert policy.approval(one.digest) == one
    gone = one.model_copy(update={"revoked_at": NOON, "revoked_by": "dean"})
    with pytest.raises(NotApproved):
        policy_of(gone).approval(one.digest, NOON.timestamp())


def dated(folder: SiteFolder, wanted: Study, **days: float) -> None:
    """Approve between days counted from NOON."""
    set_policy(folder, {"cohort": BUDGET})
    made = approval_of(wanted, "officer", **{k: NOON + timedelta(days=v) for k, v in days.items()})
    approve(folder, wanted, made, plan_study(wanted, 50))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The machine's clock: what stands in the list, days from NOON."""
    now = [0.0]

    def read() -> float:
        return NOON.timestamp() + now[0] * DAY

    monkeypatch.setattr("client.vault.time.time", read)
    monkeypatch.setattr(journal.time, "time", read)
    return now


def test_a_vault_keeps_to_the_dates(folder: SiteFolder, vault: Vault, clock: list[float]) -> None:
    dated(folder, PLAIN, valid_from=-1, valid_until=1)
    clock[0] = -2
    assert refused(vault, job(PLAIN)).code == "not-approved"
    clock[0] = 0
    answered(vault, job(PLAIN))
    clock[0] = 2
    for number in (1, 2):  # not even what was answered before
        assert refused(vault, job(PLAIN, number)).code == "not-approved"
    assert len(read_account(folder.ledger_path).reserved) == 1


def test_a_clock_that_is_put_back_revives_no_approval(
    folder: SiteFolder, vault: Vault, clock: list[float]
) -> None:
    dated(folder, PLAIN, valid_until=1)
    answered(vault, job(PLAIN))
    clock[0] = 2
    assert refused(vault, job(PLAIN, 2)).code == "not-approved"
    clock[0] = 0
    assert refused(vault, job(PLAIN, 2)).code == "not-approved"


def test_nor_does_it_after_a_restart_if_the_ledger_has_seen_later_days(
    folder: SiteFolder, clock: list[float]
) -> None:
    dated(folder, PLAIN, valid_until=1)
    dated(folder, WANTED)
    vault = open_vault(folder)
    answered(vault, job(PLAIN))
    clock[0] = 2
    answered(vault, job(WANTED, 1, "later"))
    vault.close()
    clock[0] = -100
    for _ in range(2):
        vault = open_vault(folder)
        assert refused(vault, job(PLAIN, 2)).code == "not-approved"
        answered(vault, job(WANTED, 2, "later"))
        vault.close()
    times = [
        e.time
        for e in read_journal(
            folder.ledger_path, read_public_key(folder.signing_key_path.with_suffix(".pub"))
        )
    ]
    assert times != sorted(times)  # and the ledger holds all the same


# --- caps: the site adds noise


@lru_cache
def epsilon_by_google(events: tuple[SubsampledGaussian | GaussianRelease, ...], delta: float) -> float:
    """Google's privacy-loss accountant; it never says too much by more than its grid's width."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for event in events:
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        if isinstance(event, SubsampledGaussian):
            sampled = dp_event.PoissonSampledDpEvent(event.sample_rate, gaussian)
            accountant.compose(sampled, event.steps)
        else:
            accountant.compose(gaussian, event.releases)
    return float(accountant.get_epsilon(delta))


def noises_of(plan: StudyPlan) -> list[float]:
    return [e.noise_multiplier for e in plan.evaluation_events() for _ in range(e.releases)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    cap=st.floats(0.3, 5.0),
    rate=st.sampled_from([1.0, 0.25]),
    delta=st.none() | st.floats(1e-5, 1e-2),
    share=st.none() | st.sampled_from([0.3, 0.7]),
)
def test_a_sessions_epsilon_is_the_least_of_study_and_policy(
    cap: float, rate: float, delta: float | None, share: float | None
) -> None:
    wanted = study(
        training={"sample_rate": rate},
        statistics={"epsilon": 1.0, "delta": 1e-4, "bins": 4},
        evaluation={"every": 1, "final_share": share},
    )
    made = approval_of(wanted, "officer", session_epsilon=cap, session_delta=delta)
    policy = policy_of(made)
    plan, free = plan_study(wanted, 50, policy.limits(made)), plan_study(wanted, 50)
    least, least_delta = min(2.0, cap), min(1e-3, delta or 1e-3)
    assert plan.delta == least_delta
    assert plan.statistics_delta == min(1e-4, delta or 1e-4)
    training = epsilon_by_google((plan.training_event(plan.rounds),), plan.delta)
    assert least * 0.97 < training <= least * 1.001 + 2e-3
    evaluation = epsilon_of_gaussians(noises_of(plan), plan.delta)
    assert least * 0.999 < evaluation <= least * (1 + 1e-6)
    assert plan.statistics is not None
    statistics = epsilon_of_gaussians([plan.statistics.noise_multiplier], plan.statistics_delta)
    assert min(1.0, cap) * 0.999 < statistics <= min(1.0, cap) * (1 + 1e-6)
    if cap <= 2.0:
        assert plan.step.noise_multiplier >= free.step.noise_multiplier
        assert min(noises_of(plan)) >= min(noises_of(free)) * (1 - 1e-9)
    elif delta is None or delta >= 1e-3:
        assert plan.step == free.step  # a cap above what the study asks changes nothing


def test_a_vault_adds_the_noise_that_its_policy_asks(tmp_path: Path) -> None:
    """The same study, the same request: only the site's policy differs."""
    told = {}
    for cap in (None, 0.5):
        site = make_site(tmp_path / str(cap))
        set_policy(site, {"cohort": BUDGET})
        made = approval_of(WANTED, "officer", session_epsilon=cap)
        approve(site, WANTED, made, plan_study(WANTED, 50, load_policy(site).limits(made)))
        vault = open_vault(site, durable=False)
        told[cap] = answered(vault, job(WANTED, 2)).header
        spent = spending(site.ledger_path)[WANTED.digest]
        assert spent.epsilon <= (cap or 2.0)
        assert refused(vault, job(WANTED, 1, "second")).code == "budget-exhausted"
        vault.close()
    for name in ("training", "evaluation"):
        events = [getattr(told[cap], name).noise_multiplier for cap in (None, 0.5)]
        assert events[1] > 2 * events[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(noise=st.floats(0, 40), clipping=st.none() | st.floats(0.01, 5))
def test_floors_of_a_step(noise: float, clipping: float | None) -> None:
    plan = plan_study(PLAIN, 50, Limits(noise_multiplier=noise, clipping_norm=clipping))
    free = plan_study(PLAIN, 50)
    assert plan.step.noise_multiplier == max(noise, free.step.noise_multiplier)
    assert plan.step.clipping_norm == min(1.0, clipping or 1.0)
    assert plan.epsilon <= free.epsilon
    assert plan.final_histogram == free.final_histogram  # the floor is one of training steps


def test_floors_of_a_step_in_a_vault(folder: SiteFolder, vault: Vault) -> None:
    set_policy(folder, {"cohort": BUDGET, "floors": {"noise_multiplier": 33.0, "clipping_norm": 0.25}})
    allow(folder, PLAIN)
    event = answered(vault, job(PLAIN)).header.training
    assert event is not None
    assert event.noise_multiplier == 33.0
    (reserved,) = read_account(folder.ledger_path).reserved.values()
    assert reserved.plan.step.clipping_norm == 0.25
    assert reserved.epsilon is not None
    assert reserved.epsilon < 2.0
    set_policy(folder, {"floors": {"noise_multiplier": 40.0}})
    header = refused(vault, job(PLAIN, 2))  # half of one plan and half of another
    assert "planned otherwise" in header.message


def test_few_patients_statistics_stay(tmp_path: Path) -> None:
    """By the noised count, so that the refusal is not about the patients' exact number."""
    loud = study(statistics={"epsilon": 100.0, "delta": 1e-2, "bins": 4})
    for count, least, stays in ((8, 60, True), (400, 60, False), (8, 1, False)):
        site = make_site(tmp_path / f"{count}-{least}", count=count)
        set_policy(
            site, {"cohort": {"epsilon": 1000.0, "delta": 1e-2}, "floors": {"minimum_patients": least}}
        )
        allow(site, loud)
        vault = open_vault(site, durable=False)
        first = vault.answer(job(loud, 0))
        message = decode(first)
        assert isinstance(message, Reply) != stays, (count, least)
        if stays:
            assert refused(vault, job(loud, 0)).code == "policy-forbids"
            assert f"fewer than {least}" in refused(vault, job(loud, 0)).message
        assert vault.answer(job(loud, 0)) == first  # final, either way: a second look costs a second time
        assert spending(site.ledger_path)[loud.digest].epsilon == pytest.approx(100.0, rel=1e-3)
        vault.close()


# --- what may leave


def test_evaluation_that_is_kept(folder: SiteFolder, vault: Vault) -> None:
    allow(folder, WANTED)
    set_policy(folder, {"releases": ["training", "statistics"]})
    for number in range(1, 5):
        told = answered(vault, job(WANTED, number))
        assert told.metrics == {}
        assert told.header.evaluation is None
        assert (told.header.training is not None) == (number < 4)
    assert told.header.certificate is not None
    assert not told.update
    answered(vault, job(WANTED, 0))
    reserved = read_account(folder.ledger_path).reserved
    assert all(r.evaluation is None for r in reserved.values())


def test_exact_evaluation_that_is_kept(folder: SiteFolder, vault: Vault) -> None:
    """A public cohort's, too, if the policy says so."""
    bare = study(privacy={"mode": "none"})
    allow(folder, bare, public=True)
    set_policy(folder, {"releases": ["training"]})
    told = answered(vault, job(bare, 4, metrics="exact"))
    assert (told.metrics, told.header.exact) == ({}, False)


@pytest.mark.parametrize(
    ("releases", "forbidden"),
    [
        (["evaluation", "statistics"], {1: "training"}),
        (["training", "evaluation"], {0: "statistics"}),
        (["training"], {0: "statistics"}),
        ([], {0: "statistics", 1: "training"}),
    ],
    ids=str,
)
def test_what_may_not_leave_costs_nothing(
    folder: SiteFolder, vault: Vault, releases: list[str], forbidden: dict[int, str]
) -> None:
    allow(folder, WANTED)
    save_policy(folder, load_policy(folder).model_copy(update={"releases": tuple(releases)}))
    for number, what in forbidden.items():
        header = refused(vault, job(WANTED, number))
        assert header.code == "policy-forbids"
        assert f"the release of {what}" in header.message
        assert header.remedy
    assert spending(folder.ledger_path) == {}
    for number in {0, 1} - set(forbidden):
        answered(vault, job(WANTED, number))


# --- taking back


def test_revoking_counts_at_the_next_message_and_is_kept(folder: SiteFolder, vault: Vault) -> None:
    allow(folder, PLAIN)
    answered(vault, job(PLAIN))
    before = datetime.now(UTC).replace(microsecond=0)
    revoke(folder, PLAIN.digest[:6], "medical director")
    for number in (1, 2):
        assert refused(vault, job(PLAIN, number)).code == "not-approved"
    (kept,) = load_policy(folder).approved
    assert kept.revoked_by == "medical director"
    assert kept.revoked_at is not None
    assert before <= kept.revoked_at <= datetime.now(UTC)
    assert (kept.approved_by, kept.digest) == ("officer", PLAIN.digest)
    # the ledger has it since that message, though it was refused
    told = policies_in_the_ledger(folder)[-1]["content"]["approved"][0]
    assert told["revoked_by"] == "medical director"
    assert told["revoked_at"]
    assert told["approved_by"] == "officer"
    assert spending(folder.ledger_path)[PLAIN.digest].epsilon > 1.9


@pytest.mark.parametrize(
    "digest", ["", PLAIN.digest[:5], "0" * 64, PLAIN.digest + "0", PLAIN.digest[:7] + "g"]
)
def test_revoking_needs_one_standing_approval(folder: SiteFolder, digest: str) -> None:
    allow(folder, PLAIN)
    before = folder.policy_path.read_bytes()
    with pytest.raises(NotApproved):
        revoke(folder, digest, "dean")
    assert folder.policy_path.read_bytes() == before
    revoke(folder, PLAIN.digest, "dean")
    with pytest.raises(NotApproved):
        revoke(folder, PLAIN.digest, "dean")


def test_two_studies_that_begin_alike(folder: SiteFolder) -> None:
    first, second = "abcdef" + "0" * 58, "abcdef" + "1" * 58
    save_policy(folder, policy_of(grant(study=first), grant(study=second)))
    with pytest.raises(NotApproved, match="2 approved studies"):
        revoke(folder, "abcdef", "dean")
    revoke(folder, "abcdef1", "dean")
    assert load_policy(folder).standing(second) is None
    assert load_policy(folder).standing(first) is not None


# --- in the ledger


def test_every_policy_in_force_is_in_the_ledger(folder: SiteFolder) -> None:
    """Also one that was edited by hand, that only refused, or that was gone in between."""
    vault = open_vault(folder)
    assert refused(vault, job(PLAIN)).code == "not-approved"
    assert policies_in_the_ledger(folder) == []  # nothing was ever allowed
    seen = []

    def look(*numbers: int) -> None:
        for number in numbers:
            vault.answer(job(PLAIN, number))
        seen.append(load_policy(folder).digest)

    set_policy(folder, {"cohort": BUDGET})
    look(1)
    allow(folder, PLAIN)
    look(1, 2, 1)
    text = folder.policy_path.read_text()
    folder.policy_path.write_text(text.replace("epsilon = 100.0", "epsilon = 99.0"))
    look(2, 3)
    folder.policy_path.write_text(
        "# the same in other words\n" + text.replace("epsilon = 100.0", "epsilon = 99")
    )
    vault.answer(job(PLAIN, 3))
    folder.policy_path.unlink()
    look(3)
    folder.policy_path.write_text(text)
    look(3)
    revoke(folder, PLAIN.digest, "dean")
    look(3)
    told = policies_in_the_ledger(folder)
    assert [t["digest"] for t in told] == seen
    assert len(set(seen)) == 5
    for each in told:
        assert Policy.model_validate(each["content"]).digest == each["digest"]
    vault.close()
    reserved = read_account(folder.ledger_path).reserved
    assert [reserved["first", n].policy for n in (1, 2, 3)] == [seen[1], seen[1], seen[2]]
    assert told[-1]["content"]["approved"][0]["revoked_by"] == "dean"


# --- what a coordinator cannot send


@pytest.mark.parametrize(
    "field",
    [
        "noise_multiplier",
        "epsilon",
        "delta",
        "clipping_norm",
        "sample_rate",
        "steps",
        "limits",
        "privacy",
        "plan",
    ],
)
def test_a_coordinator_cannot_send_a_privacy_parameter(folder: SiteFolder, vault: Vault, field: str) -> None:
    allow(folder, PLAIN)
    request = job(PLAIN)
    length = int.from_bytes(request[:8], "little")
    table = json.loads(request[8 : 8 + length])
    header = json.loads(table["__metadata__"][HEADER])
    for value in (0.0, 1e-9, None, {}):
        table["__metadata__"][HEADER] = json.dumps({**header, field: value})
        text = json.dumps(table).encode()
        forged = struct.pack("<Q", len(text)) + text + request[8 + length :]
        assert refused(vault, forged).code == "message-malformed"
    assert spending(folder.ledger_path) == {}
    plan = plan_study(PLAIN, 50)
    event = answered(vault, request).header.training
    assert event == plan.training_event()


def test_nor_a_number_of_patients(folder: SiteFolder, vault: Vault) -> None:
    """Sampling and divisor follow from what the site declared, not from who is there."""
    wanted = study(training={"sample_rate": None, "patients_per_step": 10})
    allow(folder, wanted)
    told = answered(vault, job(wanted))
    assert told.header.training is not None
    assert told.header.training.sample_rate == pytest.approx(10 / 40)
    assert told.header.weight == 40
    assert np.isfinite([a.sum() for a in told.update.values()]).all()
