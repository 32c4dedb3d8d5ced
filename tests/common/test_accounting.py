"""The accountant against three others: Google's PLD, Opacus's PRV, and integrals worked out with mpmath.

Never below what PLD proves to be spent; at most 2 % above what PLD can promise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import reduce
from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.privacy import accounting
from common.privacy.accounting import calibrate, epsilon, gaussian_delta, gaussian_epsilon
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian

Schedule = list[tuple[float, float, int]]  # noise multiplier, sample rate, steps

MOST_CELLS = 12_000  # of Google's grid for one release: its optimistic bound is a Python loop
SHARE = 0.05  # what its rounding of all releases together may add to ε


def events(schedule: Schedule) -> list[SubsampledGaussian]:
    return [SubsampledGaussian(noise_multiplier=s, sample_rate=q, steps=n) for s, q, n in schedule]


def google(schedule: Schedule, interval: float, pessimistic: bool) -> Any:
    """Google's distribution of the privacy loss; it rounds every release down or up."""
    parts = [
        from_gaussian_mechanism(
            sigma,
            sampling_prob=rate,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(steps)
        for sigma, rate, steps in schedule
    ]
    return reduce(lambda a, b: a.compose(b), parts)


def interval_for(schedule: Schedule, eps: float) -> tuple[float, bool]:
    """A grid for Google's accountant, and whether it is as fine as `SHARE` asks.

    Every release is rounded down by half an interval on average, in the optimistic bound.
    """
    wanted = min(SHARE * eps / sum(n for *_, n in schedule), eps / 200)
    ranges = []
    for sigma, rate, _ in schedule:
        x = np.array([-10.2 * sigma, 1 + 10.2 * sigma])
        with np.errstate(divide="ignore"):
            loss = np.logaddexp(np.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
        ranges.append(float(loss[1] - loss[0]))
    affordable = max(ranges) / MOST_CELLS
    return max(wanted, min(affordable, eps / 200)), wanted >= affordable


def single_settings() -> Iterator[tuple[Schedule, float]]:
    choices = product(
        (0.4, 0.6, 1.0, 2.0, 5.0, 15.0, 50.0), (0.001, 0.01, 0.1, 0.5, 1.0), (1, 30, 1000, 10_000)
    )
    for number, each in enumerate(choices):
        yield [each], 10.0 ** -(3 + number % 5)


def mixed_settings() -> Iterator[tuple[Schedule, float]]:
    """Two or three kinds together: several studies, training and full passes; drawn once and for all."""
    draw = random.Random(20)

    def between(low: float, high: float) -> float:
        return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.2g}")

    for number in range(190):
        yield (
            [
                (
                    between(0.4, 50),
                    1.0 if draw.random() < 0.3 else between(0.001, 1),
                    int(between(1, 10_000)),
                )
                for _ in range(2 + number % 2)
            ],
            10.0 ** -draw.randint(3, 7),
        )


def grid() -> list[tuple[Schedule, float, float]]:
    """Settings whose ε is of any practical size, with that ε."""
    found = []
    for schedule, delta in [*single_settings(), *mixed_settings()]:
        eps = epsilon(events(schedule), delta)
        if 0.015 <= eps <= 60:
            found.append((schedule, delta, eps))
    return found


GRID = grid()


def test_the_grid_is_wide() -> None:
    assert len(GRID) >= 200
    found = [eps for *_, eps in GRID]
    assert 0.025 > min(found) > 0
    assert max(found) > 45
    noises = {s for schedule, *_ in GRID for s, _, _ in schedule}
    rates = {q for schedule, *_ in GRID for _, q, _ in schedule}
    steps = {n for schedule, *_ in GRID for _, _, n in schedule}
    assert (min(noises), max(noises)) == (0.4, 50)
    assert (min(rates), max(rates)) == (0.001, 1)
    assert (min(steps), max(steps)) == (1, 10_000)
    assert {delta for _, delta, _ in GRID} == {10.0**-k for k in range(3, 8)}
    assert {len(schedule) for schedule, *_ in GRID} == {1, 2, 3}


@pytest.mark.parametrize(("schedule", "delta", "found"), GRID, ids=range(len(GRID)))
def test_between_what_is_spent_and_what_can_be_promised(
    schedule: Schedule, delta: float, found: float
) -> None:
    interval, fine = interval_for(schedule, found)
    optimistic, pessimistic = (google(schedule, interval, pessimistic=p) for p in (False, True))
    assert optimistic.get_delta_for_epsilon(found) <= delta  # found is at least its ε
    assert pessimistic.get_delta_for_epsilon(found / 1.02) >= delta
    if fine:  # the lower bound says something
        assert optimistic.get_delta_for_epsilon(found / (1 + 1.5 * SHARE)) >= delta


OTHER: list[tuple[Schedule, float]] = [
    ([(1.0, 0.01, 1000)], 1e-5),
    ([(2.0, 0.1, 200)], 1e-3),
    ([(4.0, 0.3, 400)], 1e-4),
    ([(0.6, 0.05, 20)], 1e-5),
    ([(1.0, 0.001, 10_000)], 1e-6),  # where PLD's optimistic bound says nothing
    ([(0.5, 0.003, 2000)], 1e-5),
    ([(20.0, 0.2, 1000)], 1e-4),
    ([(1.5, 0.999, 1)], 1e-3),
    ([(2.0, 0.1, 100), (8.0, 1.0, 5)], 1e-4),
    ([(1.5, 0.02, 300), (1.1, 0.01, 300), (10.0, 0.4, 30)], 1e-5),
]


@pytest.mark.filterwarnings("ignore")  # Opacus's, about its orders and at a rate of 1
@pytest.mark.parametrize(("schedule", "delta"), OTHER, ids=str)
def test_opacus_agrees(schedule: Schedule, delta: float) -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps) for sigma, rate, steps in schedule]
    upper = float(accountant.get_epsilon(delta, eps_error=0.005, delta_error=delta / 1000))
    assert epsilon(events(schedule), delta) == pytest.approx(upper - 0.005, abs=1e-3, rel=3e-4)


@pytest.mark.parametrize("side", [0, 1], ids=["removed", "added"])
@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.2, 20), (3.0, 0.5, 50), (0.7, 0.9, 3)])
def test_removing_and_adding_a_patient(sigma: float, rate: float, steps: int, side: int) -> None:
    """Each by itself: removing costs more wherever we looked, so that ε alone would not show the other."""
    width = 1e-3
    part = accounting._discretised(sigma, rate, width, 8.0)[side]
    whole = accounting._composition([part], [steps], 1e-12)
    expected = google([(sigma, rate, steps)], width, pessimistic=True)
    pmf = (expected._pmf_remove, expected._pmf_add)[side]
    for delta in (1e-2, 1e-4, 1e-6):
        found = accounting._least_epsilon(whole, width, delta)
        assert found == pytest.approx(pmf.get_epsilon_for_delta(delta), rel=1e-5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    sigma=st.floats(0.2, 100),
    rate=st.floats(1e-4, 1.0),
    width=st.sampled_from([1e-4, 3e-3, 0.2, 5.0]),
    eps=st.floats(-3, 20),
)
def test_the_grid_dominates_one_release(sigma: float, rate: float, width: float, eps: float) -> None:
    """At every ε, between grid points too, and either way round, against the closed form."""
    left = math.floor(eps / width) * width
    share = math.expm1(eps - left) / math.expm1(width)
    parts = accounting._discretised(sigma, rate, width, 8.5)
    exact, dots = (
        single_deltas(sigma, rate, eps),
        (single_deltas(sigma, rate, left), single_deltas(sigma, rate, left + width)),
    )
    for side, losses in enumerate(parts):
        loss = (losses.lowest + np.arange(len(losses.mass))) * width
        above = loss > eps
        found = float((losses.mass[above] * -np.expm1(eps - loss[above])).sum()) + losses.infinite
        assert losses.mass.min() >= 0
        assert losses.mass.sum() + losses.infinite == pytest.approx(1, abs=1e-12)
        assert found >= exact[side] - 1e-14
        # and no more than a line in exp(ε) through what is exact at the grid points
        assert found == pytest.approx((1 - share) * dots[0][side] + share * dots[1][side], abs=1e-12)


def single_deltas(sigma: float, rate: float, eps: float) -> tuple[float, float]:
    """δ(ε) of one release when a patient is removed and added, from where the densities' ratio is exp(±ε)."""

    def tail(x: float, mean: float) -> mpmath.mpf:
        return mpmath.ncdf((mean - x) / sigma)

    with mpmath.workdps(40):
        e, q = mpmath.mpf(eps), mpmath.mpf(rate)

        def outcome(loss: mpmath.mpf) -> mpmath.mpf | None:
            inner = (mpmath.exp(loss) - 1 + q) / q
            return None if inner <= 0 else sigma**2 * mpmath.log(inner) + mpmath.mpf(1) / 2

        x = outcome(e)
        if x is None:
            removed = 1 - mpmath.exp(e)
        else:
            removed = q * tail(x, 1) + (1 - q) * tail(x, 0) - mpmath.exp(e) * tail(x, 0)
        x = outcome(-e)
        if x is None:
            added = mpmath.mpf(0)
        else:
            with_patient = q * (1 - tail(x, 1)) + (1 - q) * (1 - tail(x, 0))
            added = (1 - tail(x, 0)) - mpmath.exp(e) * with_patient
        return float(removed), float(added)


@pytest.mark.parametrize(("sigma", "releases"), [(2.0, 1), (10.0, 100), (0.5, 10), (50.0, 10_000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7, 1e-9])
def test_the_grid_is_the_closed_form_without_sampling(sigma: float, releases: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(releases) / sigma, delta)
    found = accounting._composed((((sigma, 1.0), releases),), delta)
    assert exact <= found <= exact * 1.0005


def test_fifty_kinds_of_noise() -> None:
    schedule = [(1.0 + 0.1 * k, 0.01 + 0.001 * k, 10 + k) for k in range(50)]
    found = epsilon(events(schedule), 1e-5)
    optimistic, pessimistic = (google(schedule, 2e-4, pessimistic=p) for p in (False, True))
    assert optimistic.get_delta_for_epsilon(found) <= 1e-5 <= pessimistic.get_delta_for_epsilon(found / 1.02)


def test_where_rounding_would_drown_delta() -> None:
    """Rényi's bound takes over; looser, and never below what a larger δ costs."""
    schedule = [(2.0, 0.1, 200)]
    reachable, beyond = epsilon(events(schedule), 1e-11), epsilon(events(schedule), 1e-13)
    assert reachable * 1.05 <= beyond <= reachable * 1.3
    # and where sampling changes nothing, the closed form holds for any δ
    exact = gaussian_epsilon(math.sqrt(20) / 3.0, 1e-13)
    assert epsilon(events([(3.0, 1 - 1e-9, 20)]), 1e-13) == pytest.approx(exact, rel=1e-9)


def test_a_patient_who_hardly_takes_part() -> None:
    assert epsilon(events([(0.5, 1e-9, 100)]), 1e-6) == 0
    assert epsilon(events([(0.5, 1e-6, 1)]), 1e-6) == 0
    assert epsilon(events([(0.5, 2e-6, 1)]), 1e-6) > 0


def test_releases_are_samples_of_everyone() -> None:
    release, full = GaussianRelease(noise_multiplier=3.0, releases=4), events([(3.0, 1.0, 4)])[0]
    steps = events([(2.0, 0.1, 50)])
    assert epsilon([release], 1e-5) == epsilon([full], 1e-5) == gaussian_epsilon(2 / 3, 1e-5)
    assert epsilon([release, *steps], 1e-5) == epsilon([*steps, full], 1e-5)
    assert epsilon([release, *steps], 1e-5) > max(epsilon([release], 1e-5), epsilon(steps, 1e-5))


def gaussian_delta_by_integral(mu: float, eps: float) -> mpmath.mpf:
    """The hockey-stick divergence of N(μ, 1) from N(0, 1), integrated."""
    with mpmath.workdps(40):
        mu_, eps_ = mpmath.mpf(mu), mpmath.mpf(eps)
        start = eps_ / mu_ + mu_ / 2  # where the ratio of densities is exp(ε)

        def excess(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.npdf(x, mu_) - mpmath.exp(eps_) * mpmath.npdf(x)

        return mpmath.quad(excess, [start, start + 1, start + 3, start + 8, start + 30])


@pytest.mark.parametrize("mu", [0.05, 0.4, 1.0, 2.5, 6.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0, 4.0])
def test_the_gaussian_mechanism_is_the_integral(mu: float, eps: float) -> None:
    expected = float(gaussian_delta_by_integral(mu, eps))
    assert gaussian_delta(mu, eps) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(mu=st.floats(0.01, 30), delta=st.floats(1e-10, 0.09))
def test_gaussian_epsilon_is_enough_and_no_more(mu: float, delta: float) -> None:
    eps = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, eps) <= delta
    if eps > 1e-3:
        assert gaussian_delta_by_integral(mu, eps * (1 - 1e-6) - 1e-8) >= delta * (1 - 1e-9)


def test_one_gaussian_by_both_ways() -> None:
    """A full pass is the limit of ever larger samples."""
    whole = epsilon(events([(3.0, 1.0, 20)]), 1e-4)
    sampled = epsilon(events([(3.0, 0.9999999, 20)]), 1e-4)
    assert sampled == pytest.approx(whole, rel=1e-4)


def test_nothing_costs_nothing_and_parts_add_up() -> None:
    assert epsilon([], 1e-5) == 0
    halves = epsilon(events([(2.0, 0.1, 50), (2.0, 0.1, 50)]), 1e-4)
    assert halves == epsilon(events([(2.0, 0.1, 100)]), 1e-4)
    there, back = [(2.0, 0.1, 10), (3.0, 0.2, 10)], [(3.0, 0.2, 10), (2.0, 0.1, 10)]
    assert epsilon(events(there), 1e-4) == epsilon(events(back), 1e-4)


sigmas, rates, counts = st.floats(0.5, 40), st.floats(0.001, 1), st.integers(1, 3000)
deltas = st.sampled_from([1e-7, 1e-5, 1e-3])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sigma=sigmas, rate=rates, steps=counts, delta=deltas, factor=st.floats(1.01, 3), what=st.integers(0, 4)
)
def test_spending_more_costs_more(
    sigma: float, rate: float, steps: int, delta: float, factor: float, what: int
) -> None:
    """More steps, less noise, larger samples, a smaller δ, or another event."""
    cheap = events([(sigma, rate, steps)])
    dear, smaller = [
        (events([(sigma, rate, math.ceil(steps * factor))]), delta),
        (events([(sigma / factor, rate, steps)]), delta),
        (events([(sigma, min(1.0, rate * factor), steps)]), delta),
        (cheap, delta / factor),
        ([*cheap, GaussianRelease(noise_multiplier=sigma * factor)], delta),
    ][what]
    before, after = epsilon(cheap, delta), epsilon(dear, smaller)
    assert after >= before
    if before > 1e-3 and not (what == 2 and rate == 1):
        assert after > before


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(1.0, 1e-3, 1.0, 10), (0.1, 1e-5, 1.0, 1), (50.0, 1e-5, 1.0, 100), (1.0, 1e-4, 0.1, 200),
     (4.0, 1e-5, 0.3, 50), (2.0, 1e-4, 0.5, 20), (20.0, 1e-4, 0.05, 20), (0.02, 1e-5, 0.01, 100)],
)  # fmt: skip
def test_calibration_meets_its_target_and_is_the_smallest(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate(target, delta, rate, steps)
    assert epsilon(events([(sigma, rate, steps)]), delta) <= target
    assert epsilon(events([(sigma * 0.999, rate, steps)]), delta) > target
    assert float(f"{sigma:.5g}") == sigma
    # and the other accountant agrees that the target is kept
    interval, _ = interval_for([(sigma, rate, steps)], target)
    assert google([(sigma, rate, steps)], interval, pessimistic=False).get_delta_for_epsilon(target) <= delta


@settings(deadline=None, max_examples=60, derandomize=True)
@given(target=st.floats(0.01, 100), delta=st.floats(1e-9, 0.05), steps=st.integers(1, 100_000))
def test_calibration_of_full_passes(target: float, delta: float, steps: int) -> None:
    sigma = calibrate(target, delta, 1.0, steps)
    assert gaussian_delta(math.sqrt(steps) / sigma, target) <= delta
    assert gaussian_delta(math.sqrt(steps) / (sigma * 0.99), target) > delta


def test_what_no_accountant_can_bound_is_refused() -> None:
    for schedule in ([(0.01, 1.0, 1_000_000)], [(0.01, 0.5, 1000)], [(1e-200, 1.0, 1)], [(1e-4, 0.001, 1)]):
        with pytest.raises(StudyError):
            epsilon(events(schedule), 1e-5)
    with pytest.raises(StudyError):
        calibrate(1e-6, 1e-12, 0.9, 1_000_000)
