"""An outsider's check: sound certificates hold, and each forged or inconsistent one has its own reason."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from certified import PUBLIC, STUDY, claims, digest, key, study, token, transcript
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CertificateError
from common.privacy.accounting import epsilon
from common.privacy.certificate import Certificate, Claims, read_certificate
from common.privacy.mechanism import EVENT
from common.privacy.plan import Limits
from common.study import Study
from simulations.audit.checks import plan_reasons
from simulations.audit.transcript import Received
from simulations.audit.verify import Evidence, Verdict, verify

Json = dict[str, Any]
NOW = datetime(2026, 2, 1, tzinfo=UTC)
LATER = "2026-01-31T13:00:00+00:00"
SOUND = claims()
EXACT = claims(exact=True)
MUTE = claims(evaluates=False)
HALF = claims(rounds=[0, 1, 2])
STATISTICS = claims(rounds=[0])
OPEN = claims(PUBLIC)
FIXED_RATE = study(training={"sample_rate": 0.2})
FIFTH = claims(FIXED_RATE)
PER_ROUND = {r["round"]: i for i, r in enumerate(SOUND["releases"])}
FINAL = len(SOUND["releases"]) - 1


@dataclass(frozen=True)
class Case:
    """Attributes:
    tokens: the last one is judged.
    check, text: the one check that it fails, and words of the reason.
    """

    tokens: tuple[str, ...]
    check: str
    text: str
    evidence: Evidence


def evidence(*studies: Study, **changes: Any) -> Evidence:
    return Evidence(studies=studies or (STUDY,), **{"now": NOW, **changes})


def judged(tokens: Iterable[str], by: Evidence) -> Verdict:
    found: dict[str, Certificate | CertificateError] = {}
    for number, each in enumerate(tokens):
        try:
            found[str(number)] = read_certificate(each)
        except CertificateError as error:
            found[str(number)] = error
    return verify(found, by)[-1]


def changed(start: Json, *paths: tuple[str, Any]) -> Json:
    """A copy with other values at `a.b.2.c`; a function is applied to the value that is there."""
    value = copy.deepcopy(start)
    for path, new in paths:
        *way, last = path.split(".")
        at: Any = value
        for name in way:
            at = at[int(name) if isinstance(at, list) else name]
        place: Any = int(last) if isinstance(at, list) else last
        at[place] = new(at[place]) if callable(new) else new
    return value


def consistent(value: Json) -> Json:
    """With ε as fedward's accountant has it for these events: a forger who can count."""
    costs = {}
    for part, delta in (("training", "delta"), ("evaluation", "delta"), ("statistics", "statistics_delta")):
        events = [EVENT.validate_python(r[part]) for r in value["releases"] if r[part]]
        costs[part] = epsilon(events, value[delta]) if events else 0.0
    total = max(costs["training"], costs["evaluation"]) + costs["statistics"]
    return {**value, "epsilon": {**costs, "total": total}}


def events(part: str, name: str, new: Any, start: Json = SOUND) -> tuple[tuple[str, Any], ...]:
    """The same change in the event of each release that has one."""
    numbers = [i for i, r in enumerate(start["releases"]) if r[part] is not None]
    return tuple((f"releases.{i}.{part}.{name}", new) for i in numbers)


def one(check: str, text: str, value: Json, *studies: Study, **by: Any) -> Case:
    """A single certificate, properly signed."""
    return Case((token(value),), check, text, evidence(*studies, **by))


def plan(text: str, *paths: tuple[str, Any], start: Json = SOUND) -> Case:
    return one("plan", text, consistent(changed(start, *paths)))


def releases(text: str, *paths: tuple[str, Any], start: Json = SOUND) -> Case:
    return one("releases", text, consistent(changed(start, *paths)))


def against(text: str, told: Json = SOUND, site: Json = SOUND, **changes: Any) -> Case:
    """What a site signed against a transcript of other claims."""
    received = replace(transcript(told), **changes)
    return one("transcript", text, site, transcripts={"one": received})


def pair(check: str, text: str, first: str, second: str, *studies: Study, **by: Any) -> Case:
    return Case((first, second), check, text, evidence(*studies, **by))


def later(start: Json = SOUND, sequence: int = 30, **changes: Any) -> Json:
    """A certificate of another session, an hour later."""
    ledger = {"sequence": sequence, "head": digest(f"entry {sequence}")}
    return {**start, "session": "two", "issued_at": LATER, "ledger": ledger, **changes}


def received(**changes: Any) -> dict[str, tuple[Received, ...]]:
    """The coordinator's side of SOUND, with other things in round 2."""
    answers = transcript(SOUND).received["north"]
    return {"north": tuple(replace(r, **changes) if r.round == 2 else r for r in answers)}


def drop(number: int, start: Json = SOUND, **changes: Any) -> Json:
    kept = [r for r in start["releases"] if r["round"] != number]
    return consistent({**start, "releases": kept, **changes})


def with_releases(value: list[Json], start: Json = SOUND) -> Json:
    return consistent({**start, "releases": value})


def understated(part: str) -> Json:
    """One ε of three, and the total, a tenth too small."""
    less = changed(SOUND, (f"epsilon.{part}", lambda e: 0.9 * e))
    told = less["epsilon"]
    return changed(less, ("epsilon.total", max(told["training"], told["evaluation"]) + told["statistics"]))


STEPS = ("plan.training.steps_per_round", 1), *events("training", "steps", 1)
RATE = ("plan.training.sample_rate", 0.1), *events("training", "sample_rate", 0.1)
NOISE = ("plan.training.noise_multiplier", 0.8), *events("training", "noise_multiplier", 0.8)
LOUD = ("plan.evaluation.final_noise_multiplier", 1.0), (f"releases.{FINAL}.evaluation.noise_multiplier", 1.0)
COUNT = ("plan.statistics.noise_multiplier", 3.0), ("releases.0.statistics.noise_multiplier", 3.0)
TWO, THREE = PER_ROUND[2], PER_ROUND[3]
TWICE = [*SOUND["releases"][:3], {**SOUND["releases"][2], "head": digest("x")}, *SOUND["releases"][3:]]
SWAPPED = [*SOUND["releases"][:2], SOUND["releases"][3], SOUND["releases"][2], *SOUND["releases"][4:]]
BEYOND = {**SOUND["releases"][TWO], "round": 5, "head": digest("x")}
ONE_HEAD = (f"releases.{THREE}.head", SOUND["releases"][TWO]["head"])
NOISY = {**SOUND["releases"][TWO]["training"], "noise_multiplier": 1.0}

FORGED: dict[str, Case] = {
    # who signed
    "cut off": Case((token(SOUND)[:-9],), "token", "not a compact JWS", evidence()),
    "another key than is known": one("key", "north's key is", SOUND, keys={"north": key(2).public}),
    "another key than the coordinator holds": one(
        "key", "north's key is", SOUND, transcripts={"one": transcript(SOUND, north=key(2))}
    ),
    "two keys for a site": pair("key", "north signs with 2 keys", token(later(), key(2)), token(SOUND)),
    "one key for two sites": pair("key", "signs for 2 sites", token(later(site="south")), token(SOUND)),
    # what it is about, from when, from what
    "another study": one("study", "it is about study ffffffffffff", {**SOUND, "study": "f" * 64}),
    "a study changed since": one("study", "it is about study", SOUND, study(title="Another")),
    "another name of the study": one("study", "not small", {**SOUND, "study_name": "large"}),
    "issued in the future": one("date", "future", {**SOUND, "issued_at": "2026-02-01T00:06:00+00:00"}),
    "seeded noise": one("randomness", "nominal only", {**SOUND, "randomness": "seeded"}),
    "other software": one("software", "not ffff", SOUND, software="f" * 64),
    # the plan
    "public size changed": plan("public size of 500", ("public_size", 500)),
    "public size changed where the rate stays": one(
        "plan", "divisor 8, where 8.2", changed(FIFTH, ("public_size", 52)), FIXED_RATE
    ),
    "sampling rate understated": plan("sampling rate 0.1, where 0.25", *RATE),
    "steps understated": plan("steps per round 1, where 2", *STEPS),
    "fewer rounds": plan("rounds 2, where 3", ("plan.training.rounds", 2), start=HALF),
    "divisor": plan("divisor 20, where 10", ("plan.training.divisor", 20.0)),
    "more records of a patient": plan("records of a patient 80", ("plan.training.max_records", 80)),
    "sum for mean": plan("the sum, not the mean", ("plan.training.records", "sum")),
    "clipping above the study's": plan("clipping norm 1.5", ("plan.training.clipping_norm", 1.5)),
    "no clipping": plan("both or neither", ("plan.training.clipping_norm", None)),
    "shuffled batches": plan("sampler shuffled", ("plan.training.sampler", "shuffled")),
    "evaluation less sensitive": plan("the study needs 1", ("plan.evaluation.sensitivity", 0.5)),
    "statistics less sensitive": plan("the study needs 1.73", ("plan.statistics.sensitivity", 1.0)),
    # its targets
    "too little noise in training": one("target", "of training patients", consistent(changed(SOUND, *NOISE))),
    "too little noise in evaluation": one("target", "of test patients", consistent(changed(SOUND, *LOUD))),
    "too little noise in statistics": one("target", "by statistics", consistent(changed(SOUND, *COUNT))),
    "larger δ": one("delta", "more than the study's 0.001", consistent({**SOUND, "delta": 0.002})),
    "larger δ of statistics": one(
        "delta", "of statistics, more", consistent({**SOUND, "statistics_delta": 0.0002})
    ),
    # its releases
    "more noise in the plan than in the events": releases(
        "noise multiplier 1.2634, 2.5 by the plan", ("plan.training.noise_multiplier", 2.5)
    ),
    "less noise in one round": releases("noise multiplier 1, ", (f"releases.{TWO}.training", NOISY)),
    "more steps in one round": releases("steps 9, 2 by", (f"releases.{TWO}.training.steps", 9)),
    "a lower rate in one round": releases("rate 0.1,", (f"releases.{TWO}.training.sample_rate", 0.1)),
    "training that costs nothing": releases("no event of training", (f"releases.{TWO}.training", None)),
    "nothing released": one("releases", "nothing was released", drop(0, STATISTICS)),
    "a round is missing": one("releases", "lacks round 2", drop(2)),
    "the end is missing": one("releases", "lacks round 4", drop(4)),
    "statistics are missing": one("releases", "lacks round 0", drop(0)),
    "a round twice": one("releases", "round 2 is listed twice", with_releases(TWICE)),
    "rounds out of order": one("releases", "round 2 is listed after round 3", with_releases(SWAPPED)),
    "a round beyond the last": one(
        "releases", "round 5 is none of the plan's", with_releases([*SOUND["releases"], BEYOND])
    ),
    "an evaluation too many": releases(
        "where the study doesn't evaluate",
        (f"releases.{PER_ROUND[1]}.evaluation", SOUND["releases"][TWO]["evaluation"]),
    ),
    "a hidden evaluation": releases("neither noise nor exact", (f"releases.{TWO}.evaluation", None)),
    "noised and exact": one("releases", "both noised", changed(
        SOUND, (f"releases.{TWO}.exact", True), ("epsilon.evaluation", None), ("epsilon.total", None)
    )),
    "exact metrics hidden in one round": one("releases", "round 2 evaluates, but lists neither", changed(
        EXACT, (f"releases.{TWO}.exact", False)
    )),
    "exact metrics hidden everywhere": releases(
        "released what it lists neither", *((f"releases.{i}.exact", False) for i in PER_ROUND.values()),
        start=EXACT,
    ),
    "statistics not in the plan": releases("not in the plan", ("plan.statistics", None)),
    "statistics in a round": one("releases", "is none of the plan's", changed(
        SOUND, (f"releases.{TWO}.statistics", SOUND["releases"][0]["statistics"])
    )),
    "statistics without a cost": releases("must have an event", ("releases.0.statistics", None)),
    "statistics as round 1": releases("statistics in round 1", ("releases.0.round", 1), start=STATISTICS),
    # its ε
    "ε of training understated": one("epsilon", "ε training understated", understated("training")),
    "ε of evaluation understated": one("epsilon", "ε evaluation understated", understated("evaluation")),
    "ε of statistics understated": one("epsilon", "ε statistics understated", understated("statistics")),
    "total is the training's alone": one("epsilon", "ε in total understated", changed(
        SOUND, ("epsilon.total", SOUND["epsilon"]["training"])
    )),
    "ε overstated": one("epsilon", "ε training overstated", changed(
        SOUND, ("epsilon.training", 3.0), ("epsilon.total", 3.5)
    )),
    "ε of exact metrics": one("epsilon", "no bound found", changed(
        EXACT, ("epsilon.evaluation", 1.0), ("epsilon.total", 2.5)
    )),
    "ε withheld": one("epsilon", "no bound claimed", changed(SOUND, ("epsilon.training", None))),
    "ε without privacy": one("epsilon", "no bound found", changed(
        OPEN, ("epsilon.training", 1.0)
    ), PUBLIC),
    # its ledger
    "two releases on one entry": one("ledger", "on one entry", changed(SOUND, ONE_HEAD)),
    "too few entries": one("ledger", "a ledger of 2 entries", changed(SOUND, ("ledger.sequence", 2))),
    "another head at the same entry": pair(
        "ledger", "entry 15 has two hashes", token(SOUND), token(later(sequence=15))
    ),
    "a ledger that got shorter": pair(
        "ledger", "15 entries at 2026-01-31T13", token(later(SOUND, 30, issued_at=SOUND["issued_at"])),
        token(SOUND | {"issued_at": LATER}),
    ),
    "a round told otherwise before": pair(
        "ledger", "round 2 is told otherwise", token(HALF),
        token(changed(SOUND, (f"releases.{TWO}.released", digest("x")), ("issued_at", LATER))),
    ),
    "a round that it listed before": pair(
        "ledger", "lacks round 2", token(HALF), token(drop(2, complete=False, issued_at=LATER))
    ),
    # what the coordinator received
    "an update that is not listed": against("received round 2, which is not", site=drop(2, complete=False)),
    "other numbers": against("not those listed (digest)", received=received(released=digest("x"))),
    "another event": against("another event of training", received=received(
        training=EVENT.validate_python(NOISY)
    )),
    "no evaluation": against("another event of evaluation", received=received(evaluation=None)),
    "exact numbers came": against("round 2 came as exact", received=received(exact=True)),
    "another head": against("another ledger head", received=received(head=digest("x"))),
    "another weight": against("weight 39, 40 was told", received=received(weight=39)),
    "another study in the session": against("the coordinator ran study ffff", study="f" * 64),
    "a session that nobody ran": one("transcript", "knows no session one", SOUND, transcripts={}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_certificate_is_refused_with_its_reason(name: str) -> None:
    case = FORGED[name]
    verdict = judged(case.tokens, case.evidence)
    assert not verdict.holds
    assert not verdict.proven
    assert {r.check for r in verdict.reasons} == {case.check}, verdict.reasons
    assert any(case.text in r.text for r in verdict.reasons), verdict.reasons


# --- sound ones


@pytest.mark.parametrize("lost", [(1,), (1, 2)])
def test_answers_that_came_too_late_are_no_fault_and_count(lost: tuple[int, ...]) -> None:
    told = transcript(SOUND)
    came = tuple(r for r in told.received["north"] if r.round not in lost)
    late = replace(told, received={"north": came})
    verdict = judged([token(SOUND)], evidence(transcripts={"one": late}))
    assert verdict.holds, verdict.reasons
    assert any(f"{len(lost)} answers listed that the coordinator never" in u for u in verdict.unchecked)
    assert any(f"received {len(came)} of the" in p for p in verdict.proven)


TRANSCRIPT = {"one": transcript(SOUND, north=key())}
FULL = {"transcripts": TRANSCRIPT, "keys": {"north": key().public}, "software": digest("package")}
STRICT = Limits(epsilon=1.0, delta=1e-4, clipping_norm=0.5, noise_multiplier=8.0)
SEEDED = {**SOUND, "randomness": "seeded"}
ONCE = study(training={"sample_rate": 1.0}, evaluation={"every": 0})
TESTS_ONLY = claims(PUBLIC, rounds=[4])
HOLDS: dict[str, tuple[tuple[Json, ...], Evidence]] = {
    "private": ((SOUND,), evidence()),
    "with all that an auditor can have": ((SOUND,), evidence(**FULL)),
    "with none of it": ((SOUND,), Evidence(now=NOW)),
    "without sampling, evaluated once": ((claims(ONCE),), evidence(ONCE)),
    "statistics only": ((STATISTICS,), evidence()),
    "statistics only, against the transcript": (
        (STATISTICS,),
        evidence(transcripts={"one": transcript(STATISTICS)}),
    ),
    "exact metrics": ((EXACT,), evidence(transcripts={"one": transcript(EXACT)})),
    "without privacy": ((OPEN,), evidence(PUBLIC, transcripts={"one": transcript(OPEN, wanted=PUBLIC)})),
    "without privacy, the end only": ((TESTS_ONLY,), evidence(PUBLIC)),
    "a site stricter than the study": ((claims(limits=STRICT),), evidence()),
    "a site that tells no metrics": ((MUTE,), evidence(transcripts={"one": transcript(MUTE)})),
    "a site that missed rounds": ((claims(rounds=[2, 4]),), evidence()),
    "half a session": ((HALF,), evidence(transcripts={"one": transcript(HALF)})),
    "half a session, and then all of it": (
        ({**SOUND, "issued_at": LATER}, HALF),
        evidence(transcripts=TRANSCRIPT),
    ),
    "the same one twice": ((SOUND, SOUND), evidence()),
    "two sessions of a site": ((SOUND, later()), evidence()),
    "a simulation, where that is said": ((SEEDED,), evidence(allow_seeded=True)),
    "a clock slightly ahead": (({**SOUND, "issued_at": "2026-02-01T00:04:00+00:00"},), evidence()),
}


@pytest.mark.parametrize("name", HOLDS)
def test_a_sound_certificate_holds(name: str) -> None:
    values, by = HOLDS[name]
    verdict = judged([token(v) for v in values], by)
    assert verdict.reasons == ()
    assert verdict.proven
    assert verdict.trusted


def test_two_sites_hold_each_with_its_key() -> None:
    south = claims(site="south", session="two")
    for tokens in ([token(SOUND), token(south, key(2))], [token(south, key(2)), token(SOUND)]):
        assert judged(tokens, evidence()).holds


def test_half_a_certificate_hides_what_the_coordinator_received() -> None:
    verdict = judged([token(HALF)], evidence(transcripts=TRANSCRIPT))
    assert {r.check for r in verdict.reasons} == {"transcript"}
    assert len(verdict.reasons) == 2


def test_a_verdict_recomputes_the_numbers() -> None:
    verdict = judged([token(SOUND)], evidence())
    told = verdict.as_json()
    for part in ("training", "evaluation", "statistics", "total"):
        assert told["recomputed"][part] == pytest.approx(SOUND["epsilon"][part], rel=1e-3)
    assert 1.99 < told["recomputed"]["training"] <= 2
    assert "releases" not in told["claims"]
    assert f"{told['recomputed']['training']:.4f}" in " ".join(verdict.proven)


def test_what_is_not_known_is_said() -> None:
    bare, full = judged([token(SOUND)], Evidence(now=NOW)), judged([token(SOUND)], evidence(**FULL))
    assert "--study" in " ".join(bare.unchecked)
    assert "--key" in " ".join(bare.trusted)
    assert "--store" in " ".join(bare.trusted)
    assert full.unchecked == ()
    assert "--" not in " ".join(full.trusted)
    assert "5 answers listed and no other, number for number the same" in " ".join(full.proven)
    exact = judged([token(EXACT)], evidence())
    assert "To test patients nothing is promised" in " ".join(exact.proven)
    assert "public anyway" in " ".join(exact.trusted)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10**6),
    st.floats(1e-4, 1) | st.integers(1, 10**4),
    st.integers(1, 1000),
    st.booleans(),
    st.integers(1, 500),
    st.floats(0.01, 0.99),
)
def test_the_plan_derived_anew_is_the_site_s_own(
    size: int, rate: float, steps: int, epochs: bool, rounds: int, tested: float
) -> None:
    """Against `plan_study`, on studies that cost no calibration."""
    wanted = study(
        privacy={"mode": "none"},
        algorithm={"rounds": rounds},
        data={"split": {"test_fraction": tested}},
        training={
            "sample_rate": rate if isinstance(rate, float) else None,
            "patients_per_step": rate if isinstance(rate, int) else None,
            "local_steps": None if epochs else steps,
            "local_epochs": steps if epochs else None,
        },
    )
    value = claims(wanted, rounds=[1], size=size)
    assert not list(plan_reasons(Claims.model_validate(value), wanted))


LEAVES = ["public_size", "delta", "statistics_delta", "plan.training.steps_per_round", "ledger.sequence"]
LEAVES += [f"plan.training.{n}" for n in ("noise_multiplier", "sample_rate", "divisor", "rounds")]
LEAVES += [f"releases.{TWO}.training.{n}" for n in ("noise_multiplier", "sample_rate", "steps")]
LEAVES += [f"releases.{TWO}.evaluation.{n}" for n in ("noise_multiplier", "releases")]
EXTREMES = [0.0, 1e-300, 1e-9, 0.3, 1.0, 1e9, 1e300, 1, 2, 10**6, 10**12, 10**400]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(LEAVES), st.sampled_from(EXTREMES), min_size=1, max_size=3))
def test_whatever_is_claimed_there_is_a_verdict(extremes: dict[str, Any]) -> None:
    verdict = judged([token(changed(SOUND, *extremes.items()))], evidence())
    assert verdict.holds == (not verdict.reasons)
