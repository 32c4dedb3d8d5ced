"""Budgets that outlive a study, statistics that scale, and certificates, in a simulation of three sites."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import small
from dp_accounting import GaussianDpEvent, NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from client.account import read_account
from client.policy_file import load_policy, set_policy
from client.settings import SiteFolder
from common.messages import STATISTICS_ROUND
from common.privacy.certificate import read_certificate
from common.privacy.plan import plan_study
from common.study import Study
from server.description import description_of
from simulations.engine import SimulationSettings, simulate

NAMES = ("east", "north", "west")
LIFETIME, DELTA = 1.7, 1e-3
STUDIES = 10


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of 120 patients."""
    root = tmp_path_factory.mktemp("hospitals")
    for number, name in enumerate(NAMES):
        small.make_site(root / name, name, public_size=100, count=120)
        small.write_rows(root / name, 120, seed=number)
    return root


def numbered(number: int) -> Study:
    """One of ten studies on the same cohort."""
    privacy = {"mode": "patient-dp", "epsilon": 0.6, "delta": 1e-4, "clipping_norm": 1.0}
    return small.study(title=f"Study {number}", algorithm={"rounds": 2}, privacy=privacy)


def fitting(order: float) -> int:
    """How many of these studies a lifetime has room for, by Google's Rényi accountant at that order."""
    plan = plan_study(numbered(0), 100)

    def cost(noise_multiplier: float, count: int) -> float:
        accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(GaussianDpEvent(noise_multiplier), count)
        return float(accountant._rdp[0])

    training = cost(plan.step.noise_multiplier, plan.steps_per_round * plan.rounds)
    each = max(training, cost(plan.final_histogram.noise_multiplier, 1))
    capacity = LIFETIME - math.log1p(-1 / order) + (math.log(DELTA) + math.log(order)) / (order - 1)
    return math.floor(capacity / each)


def test_ten_studies_on_one_cohort_stop_where_the_policy_says(hospitals: Path, tmp_path: Path) -> None:
    tight, *others = NAMES
    state = tmp_path / "state"
    for name in NAMES:
        folder = SiteFolder(hospitals / name, state / name)
        (state / name).mkdir(parents=True)
        set_policy(folder, {"cohort": {"epsilon": LIFETIME if name == tight else 100.0, "delta": DELTA}})
    folder = SiteFolder(hospitals / tight, state / tight)
    budget = load_policy(folder).cohort
    assert budget is not None
    last = fitting(budget.filter().order)
    assert 1 < last < STUDIES
    for number in range(1, STUDIES + 1):
        settings = SimulationSettings(seed=number, quorum=len(others), state=state)
        done = simulate(numbered(number), hospitals, tmp_path / f"run-{number}", settings)
        for each in done.store.rounds(done.session):
            outcomes = {a.site: a.outcome for a in each.answers}
            assert all(outcomes[name] == "reply" for name in others)
            assert outcomes[tight] == ("reply" if number <= last else "refusal"), (number, last)
            assert all("the lifetime budget" in a.detail for a in each.answers if a.outcome == "refusal")
    account = read_account(folder.ledger_path)
    assert len(account.studies()) == last
    order = budget.filter().order
    assert 0 < account.rdp(order) <= budget.filter().capacity * (1 + 1e-9)
    assert account.rdp(order) * (1 + 1 / last) > budget.filter().capacity


MOMENTS = small.study(
    data={"scaling": "moments"},
    statistics={"epsilon": 4.0, "delta": 1e-4, "bins": 4},
)


def test_a_study_that_scales_by_moments(hospitals: Path, tmp_path: Path) -> None:
    done = simulate(MOMENTS, hospitals, tmp_path / "run", SimulationSettings(seed=3))
    rounds = done.store.rounds(done.session)
    assert [r.number for r in rounds] == [STATISTICS_ROUND, 1, 2, 3, 4]
    assert all(a.statistics for a in rounds[0].answers)
    assert not any(a.statistics for r in rounds[1:] for a in r.answers)
    plan = plan_study(MOMENTS, 100)
    for place in done.places:
        spent = read_account(place.folder().ledger_path).spending(MOMENTS.digest)
        assert spent.epsilon == pytest.approx(plan.epsilon + plan.statistics_epsilon)
        assert spent.delta == pytest.approx(plan.delta + plan.statistics_delta)
    tokens = done.store.certificates(done.session)
    assert tuple(tokens) == NAMES
    claims = read_certificate(tokens["north"]).claims
    assert [r.round for r in claims.releases] == [0, 1, 2, 3, 4]
    assert claims.complete
    assert claims.randomness == "seeded"
    assert claims.epsilon.total == pytest.approx(plan.epsilon + plan.statistics_epsilon)


def test_scaling_by_moments_is_what_the_statistics_say(hospitals: Path, tmp_path: Path) -> None:
    """With hardly any noise the scaling is the values' own mean and deviation, patients weighing one."""
    loud = small.study(data={"scaling": "moments"}, statistics={"epsilon": 100.0, "delta": 0.09, "bins": 4})
    done = simulate(loud, hospitals, tmp_path / "run", SimulationSettings(seed=3))
    found = description_of(done.store, done.session, 10).description.columns[0]
    assert found.mean is not None
    assert found.standard_deviation is not None
    assert abs(found.mean.value) < 0.1
    assert found.standard_deviation.value == pytest.approx(1 / math.sqrt(3), abs=0.1)  # uniform on ±1


def test_a_description_trains_nothing_and_is_charged(hospitals: Path, tmp_path: Path) -> None:
    wanted = small.study(statistics={"epsilon": 4.0, "delta": 1e-4, "bins": 4})
    settings = SimulationSettings(seed=1, describe=True, state=tmp_path / "state")
    done = simulate(wanted, hospitals, tmp_path / "run", settings)
    assert [r.number for r in done.store.rounds(done.session)] == [STATISTICS_ROUND]
    described = description_of(done.store, done.session, 10)
    assert described.sites == NAMES
    patients = described.description.patients
    assert patients is not None
    assert patients.low <= 360 <= patients.high
    spent = read_account(done.places[0].folder().ledger_path).spending(wanted.digest)
    assert spent.epsilon == pytest.approx(plan_study(wanted, 100).statistics_epsilon)


def test_a_cohort_that_may_be_too_small_tells_nothing(tmp_path: Path) -> None:
    for name in NAMES:
        small.make_site(tmp_path / "h" / name, name, public_size=5, count=8)
    wanted = small.study(statistics={"epsilon": 4.0, "delta": 1e-4, "bins": 4})
    settings = SimulationSettings(seed=1, describe=True, quorum=1)
    with pytest.raises(Exception, match="policy-forbids"):
        simulate(wanted, tmp_path / "h", tmp_path / "run", settings)


def test_noise_differs_between_rounds_when_the_final_evaluation_has_a_share(
    hospitals: Path, tmp_path: Path
) -> None:
    wanted = small.study(evaluation={"every": 1, "final_share": 0.7})
    plan = plan_study(wanted, 100)
    assert plan.final_histogram.noise_multiplier < plan.histogram.noise_multiplier
    done = simulate(wanted, hospitals, tmp_path / "run", SimulationSettings(seed=1))
    noises = {
        r.number: {a.evaluation["noise_multiplier"] for a in r.answers if a.evaluation}
        for r in done.store.rounds(done.session)
    }
    assert noises == {
        1: set(),
        2: {plan.histogram.noise_multiplier},
        3: {plan.histogram.noise_multiplier},
        4: {plan.final_histogram.noise_multiplier},
    }
    assert np.isclose(
        2 / plan.histogram.noise_multiplier**2 * 0.7, 0.3 / plan.final_histogram.noise_multiplier**2
    )
