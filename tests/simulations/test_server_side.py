"""A malicious coordinator: a sound vault withstands every case, and a broken one is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from client.account import Spending, spending
from client.cohort import load_cohort
from client.door import Answer
from client.settings import SiteFolder
from client.site import open_vault, read_split_key
from client.vault import Vault
from common.messages import Job, Refusal, Reply, decode, encode
from common.models import study_model
from common.objectives import record_losses
from common.privacy.noise import Seeded
from common.privacy.plan import StudyPlan, plan_study
from common.study import Study
from simulations.audit.attempts import Case, Target
from simulations.audit.canaries import FAMILIES, Canaries, Family, admit, canaries, canary_study, make_site
from simulations.audit.isolation import isolating, isolation
from simulations.audit.server_side import against

EPSILON = 2.0
NOTHING = Spending(0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Site:
    folder: SiteFolder
    study: Study
    plan: StudyPlan
    who: Canaries
    vault: Vault

    def spent(self) -> Spending:
        return spending(self.folder.ledger_path).get(self.study.digest, NOTHING)

    def target(self, answer: Answer | None = None, session: str = "attack") -> Target:
        return Target(answer or self.vault.answer, self.study, self.plan, session, self.spent)


Opened = Callable[[Family], Site]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    vaults: list[Vault] = []

    def build(family: Family) -> Site:
        who = canaries(24, 0)
        study = canary_study(family, who.columns, epsilon=EPSILON, rounds=8)
        folder = make_site(tmp_path / f"site-{len(vaults)}", "attacked", who)
        plan = admit(folder, study)
        vaults.append(open_vault(folder, randomness=Seeded(len(vaults)), durable=False))
        return Site(folder, study, plan, who, vaults[-1])

    yield build
    for vault in vaults:
        vault.close()


def named(cases: tuple[Case, ...]) -> dict[str, Case]:
    found = {case.name: case for case in cases}
    assert len(found) == len(cases)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vault_withstands_everything(opened: Opened, family: Family) -> None:
    site = opened(family)
    cases = against(site.target(), site.who)
    assert [case for case in cases if not case.sound] == []
    found = named(cases)
    assert len(found) > 35
    outcomes = {name: case.outcome for name, case in found.items()}
    assert outcomes["garbage"] == outcomes["other-noise-multiplier"] == "refused: message-malformed"
    assert outcomes["reply"] == outcomes["other-epsilon"] == "refused: message-malformed"
    assert outcomes["another-study"] == "refused: not-approved"
    assert outcomes["parameters-of-nan"] == outcomes["parameters-of-inf"] == "refused: refused"
    assert outcomes["exact-metrics"] == outcomes["round-too-many"] == "refused: refused"
    assert outcomes["first-round"] == outcomes["skipping"] == outcomes["going-back"] == "within the claim"
    assert outcomes["replay"] == outcomes["replay-of-the-skipped"] == "stored reply"
    assert outcomes["same-round-other-parameters"] == "refused: refused"
    assert outcomes["forged-anchor"] == "refused: ledger-rolled-back"
    assert outcomes["isolation"] == "within the claim"
    assert outcomes["another-session"] == "refused: budget-exhausted"
    # all of it together cost one session
    assert found["no-bytes"].before == 0.0
    assert site.spent().epsilon == pytest.approx(site.plan.epsilon)
    assert site.spent().sessions == 1
    assert json.loads(json.dumps([case.as_json() for case in cases]))[0]["sound"] is True


def test_an_ordinary_study_is_attacked_from_outside(tmp_path: Path) -> None:
    """Without a look at the ledger, and on records that are no canaries."""
    folder = small.make_site(tmp_path / "north")
    wanted = small.study()
    small.allow(folder, wanted)
    vault = open_vault(folder, durable=False)
    plan = plan_study(wanted, folder.file.site.public_size)
    cases = against(Target(vault.answer, wanted, plan, "attack"))
    vault.close()
    assert [case for case in cases if not case.sound] == []
    assert "isolation" not in named(cases)
    assert all(case.before is case.after is None for case in cases)


def test_a_study_without_privacy_has_its_answers_too(tmp_path: Path) -> None:
    folder = small.make_site(tmp_path / "north")
    wanted = small.study(privacy={"mode": "none"})
    small.allow(folder, wanted, public=True)
    vault = open_vault(folder, durable=False)
    plan = plan_study(wanted, folder.file.site.public_size)

    def spent() -> Spending:
        return spending(folder.ledger_path).get(wanted.digest, NOTHING)

    cases = against(Target(vault.answer, wanted, plan, "attack", spent))
    vault.close()
    assert unsound(cases) == set()
    assert "exact-metrics" not in named(cases)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_victim_has_a_gradient(opened: Opened, family: Family) -> None:
    """Everybody else's loss has exact zeros, by torch's own derivatives."""
    site = opened(family)
    victim = int(np.flatnonzero(site.who.present)[0])
    people = load_cohort(site.folder, site.study, read_split_key(site.folder)).train
    network = study_model(site.study)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in isolating(site.study, victim).items()})
    moved = []
    for features, label in zip(people.features, people.labels, strict=True):
        network.zero_grad()
        record_losses(site.study.objective, network(features[None]), label[None]).sum().backward()
        if any(p.grad is not None and bool(p.grad.any()) for p in network.parameters()):
            moved.append(int(features.argmax()))
    assert set(moved) == {victim}
    site.vault.answer(site.target().job(1))
    case = isolation(site.target(), site.who, range(2, 9))
    assert case.sound
    assert "in 7 rounds" in case.told


# --- vaults that are broken


def altered(site: Site, change: Callable[[bytes, bytes], bytes]) -> Target:
    """What the coordinator reaches changes the vault's answers: (request, answer) → answer."""
    return site.target(lambda request: change(request, site.vault.answer(request)))


def unsound(cases: tuple[Case, ...]) -> set[str]:
    return {case.name for case in cases if not case.sound}


def test_too_little_noise_shows_when_one_is_isolated(opened: Opened) -> None:
    site = opened("mlp")

    def halved(request: bytes, answer: bytes) -> bytes:
        message = decode(answer)
        if not isinstance(message, Reply):
            return answer
        return encode(replace(message, update={n: a / 2 for n, a in message.update.items()}))

    assert unsound(against(altered(site, halved), site.who)) == {"isolation"}


def test_a_patient_who_is_not_clipped_shows_when_isolated(opened: Opened) -> None:
    site = opened("logistic-regression")
    victim = int(np.flatnonzero(site.who.present)[0])

    def more(request: bytes, answer: bytes) -> bytes:
        message = decode(answer)
        if not isinstance(message, Reply) or not message.update:
            return answer
        update = {n: np.array(a) for n, a in message.update.items()}
        update["0.weight"][0, victim] += 100.0
        return encode(replace(message, update=update))

    assert unsound(against(altered(site, more), site.who)) == {"isolation"}


def test_a_replay_that_draws_fresh_noise_shows(opened: Opened) -> None:
    site, asked = opened("logistic-regression"), set[bytes]()

    def fresh(request: bytes, answer: bytes) -> bytes:
        message, again = decode(answer), request in asked
        asked.add(request)
        if not again or not isinstance(message, Reply):
            return answer
        random = np.random.default_rng(len(answer) + int(message.update["0.weight"].sum() * 1e6) % 1000)
        noise = {n: a + random.normal(size=a.shape).astype(np.float32) for n, a in message.update.items()}
        asked.discard(request)  # the next one is the stored reply once more
        return encode(replace(message, update=noise))

    assert {"replay", "replay-of-the-skipped"} <= unsound(against(altered(site, fresh), site.who))


def test_a_vault_that_answers_what_it_must_refuse_shows(opened: Opened) -> None:
    site, last = opened("logistic-regression"), list[bytes]()

    def generous(request: bytes, answer: bytes) -> bytes:
        message = decode(answer)
        if isinstance(message, Refusal) and last:
            return last[-1]
        last.append(answer)
        return answer

    first = site.vault.answer(site.target(session="before").job(1))
    assert isinstance(decode(first), Reply)
    last.append(first)
    found = unsound(against(altered(site, generous), site.who))
    assert {"garbage", "other-epsilon", "parameters-of-nan", "exact-metrics", "another-session"} <= found


def test_a_refusal_that_costs_something_shows(opened: Opened) -> None:
    site, calls = opened("logistic-regression"), list[int]()

    def dearer() -> Spending:
        calls.append(1)
        return replace(NOTHING, epsilon=0.01 * len(calls))

    target = replace(site.target(), spent=dearer)
    found = unsound(against(target, site.who))
    assert {"garbage", "one-nan", "replay", "skipping", "isolation"} <= found


def test_metrics_that_lie_about_their_noise_show(opened: Opened) -> None:
    site = opened("logistic-regression")

    def exact(request: bytes, answer: bytes) -> bytes:
        message = decode(answer)
        if not isinstance(message, Reply):
            return answer
        return encode(replace(message, header=message.header.model_copy(update={"exact": True})))

    assert {"first-round", "skipping", "going-back"} <= unsound(against(altered(site, exact), site.who))


def test_jobs_are_as_a_coordinator_makes_them(opened: Opened) -> None:
    site = opened("mlp")
    job = decode(site.target().job(3))
    assert isinstance(job, Job)
    assert (job.header.session, job.header.round, job.header.study) == ("attack", 3, site.study.digest)
