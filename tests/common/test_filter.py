"""The Rényi filter against two other accountants, exact sums, and loops that count for themselves."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.privacy.accounting import epsilon, gaussian_epsilon
from common.privacy.filter import ORDERS, PrivacyFilter, privacy_filter, rdp, rdp_to_epsilon, step_rdp
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian

BUDGETS = [(0.1, 1e-6), (0.5, 1e-5), (1.0, 1e-5), (2.0, 1e-4), (4.0, 1e-6), (10.0, 1e-3), (50.0, 1e-7)]


def sampled(sigma: float, rate: float, steps: int = 1) -> SubsampledGaussian:
    return SubsampledGaussian(noise_multiplier=sigma, sample_rate=rate, steps=steps)


@pytest.mark.parametrize("order", [1.25, 2.0, 8.5, 300.0])
def test_what_a_full_release_costs(order: float) -> None:
    expected = order / (2 * 3.0**2)
    assert rdp(GaussianRelease(noise_multiplier=3.0), order) == expected
    assert rdp(GaussianRelease(noise_multiplier=3.0, releases=7), order) == 7 * expected
    assert rdp(sampled(3.0, 1.0, 7), order) == 7 * expected


@settings(deadline=None, max_examples=150, derandomize=True)
@given(sigma=st.floats(0.1, 100), rate=st.floats(1e-6, 0.9999), order=st.integers(2, 200))
def test_a_sampled_release_is_the_binomial_sum(sigma: float, rate: float, order: int) -> None:
    """Mironov, Talwar, Zhang 2019, section 3.3, in sixty digits."""
    with mpmath.workdps(60):
        q, variance = mpmath.mpf(rate), mpmath.mpf(sigma) ** 2
        moment = mpmath.fsum(
            mpmath.binomial(order, k)
            * q**k
            * (1 - q) ** (order - k)
            * mpmath.exp((k * k - k) / (2 * variance))
            for k in range(order + 1)
        )
        expected = float(mpmath.log(moment) / (order - 1))
    assert step_rdp(sigma, rate, float(order)) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(sigma=st.floats(0.3, 20), rate=st.floats(1e-4, 0.999), order=st.floats(1.02, 40))
def test_a_sampled_release_at_any_order_is_the_integral(sigma: float, rate: float, order: float) -> None:
    """And the other direction, which the sum says nothing about, costs no more."""
    with mpmath.workdps(30):
        s, q, a = mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.mpf(order)

        def ratio(x: mpmath.mpf) -> mpmath.mpf:
            return 1 + q * mpmath.expm1((2 * x - 1) / (2 * s**2))

        def removed(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.npdf(x, 0, s) * (ratio(x) ** a - 1 - a * (ratio(x) - 1))

        def added(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.npdf(x, 0, s) * (ratio(x) ** (1 - a) - 1 + (a - 1) * (ratio(x) - 1))

        points = [k * s for k in range(-14, 15, 2)]
        points += [a * k / 4 + 14 * s for k in range(1, 5)] + [a + 28 * s]
        expected = float(mpmath.log1p(mpmath.quad(removed, points)) / (a - 1))
        other = float(mpmath.log1p(mpmath.quad(added, points)) / (a - 1))
    found = step_rdp(sigma, rate, order)
    assert found == pytest.approx(expected, rel=1e-8)
    assert found >= other * (1 - 1e-8)


@pytest.mark.parametrize("order", [2.0, 5.0, 13.0, 32.5, 64.0, 256.0])
def test_dp_accounting_agrees(order: float) -> None:
    events = [sampled(1.1, 0.01, 300), sampled(5.0, 0.3, 40), sampled(20.0, 0.9, 7)]
    releases = [GaussianRelease(noise_multiplier=8.0, releases=3), GaussianRelease(noise_multiplier=30.0)]
    accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        accountant.compose(PoissonSampledDpEvent(event.sample_rate, gaussian), event.steps)
    for release in releases:
        accountant.compose(GaussianDpEvent(release.noise_multiplier), release.releases)
    expected = float(accountant._rdp[0])
    assert math.fsum(rdp(e, order) for e in [*events, *releases]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("order", [1.5, 3.3, 16.0, 120.0])
def test_opacus_agrees(order: float) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    for sigma, rate, steps in [(0.8, 0.02, 100), (2.0, 0.1, 200), (4.0, 0.5, 10), (3.0, 1.0, 5)]:
        expected = compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=order)
        assert rdp(sampled(sigma, rate, steps), order) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.filterwarnings("ignore:Optimal order is")
@pytest.mark.parametrize(("eps", "delta"), BUDGETS)
def test_the_conversion_is_that_of_others(eps: float, delta: float) -> None:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    chosen = privacy_filter(eps, delta)
    for share in (0.1, 0.5, 1.0):
        spent = share * chosen.capacity
        found = max(0.0, rdp_to_epsilon(spent, chosen.order, delta))
        assert found == chosen.epsilon_of(spent) or found == pytest.approx(eps)
        opacus, _ = get_privacy_spent(orders=[chosen.order], rdp=[spent], delta=delta)
        assert found == pytest.approx(max(0.0, opacus), rel=1e-12, abs=1e-12)
        google, _ = compute_epsilon([chosen.order], [spent], delta)
        assert found == pytest.approx(google, rel=1e-12, abs=1e-12)
    assert rdp_to_epsilon(chosen.capacity, chosen.order, delta) == pytest.approx(eps, rel=1e-8)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(eps=st.floats(0.01, 200), delta=st.floats(1e-12, 0.01))
def test_hardly_any_other_order_admits_more(eps: float, delta: float) -> None:
    """Gaussian releases that fit: at the chosen order, and at the best of ten thousand."""

    def releases(order: float) -> float:
        # Canonne, Kamath, Steinke 2020, proposition 12, as it is written there
        log_delta_at_zero = order * math.log1p(-1 / order) - math.log(order - 1)
        return (eps - (log_delta_at_zero - math.log(delta)) / (order - 1)) / order

    chosen = privacy_filter(eps, delta)
    best = max(releases(1 + 10 ** (k / 1000)) for k in range(-3000, 7000))
    if best <= 0:
        assert chosen.capacity <= 0
    else:
        assert (
            0.98 * best < chosen.capacity / chosen.order <= best * 1.0001
        )  # which lies between the ten thousand


def test_the_order_depends_on_the_budget_alone_and_is_public() -> None:
    assert list(ORDERS) == sorted(set(ORDERS))
    for eps, delta in BUDGETS:
        assert privacy_filter(eps, delta) is privacy_filter(eps, delta)
        assert privacy_filter(eps, delta).order in ORDERS


@pytest.mark.parametrize(("eps", "delta"), BUDGETS)
@pytest.mark.parametrize("sigma", [2.0, 11.0, 60.0])
def test_exactly_so_many_releases_fit(eps: float, delta: float, sigma: float) -> None:
    chosen = privacy_filter(eps, delta)
    event = GaussianRelease(noise_multiplier=sigma)
    spent, admitted = 0.0, 0
    while chosen.admits(spent, rdp(event, chosen.order)):
        spent += rdp(event, chosen.order)
        admitted += 1
    with mpmath.workdps(30):
        a = mpmath.mpf(chosen.order)
        capacity = mpmath.mpf(eps) - mpmath.log((a - 1) / a) + (mpmath.log(delta) + mpmath.log(a)) / (a - 1)
        expected = int(mpmath.floor(capacity / (a / (2 * mpmath.mpf(sigma) ** 2))))
    assert admitted == expected
    # what was admitted is within the budget by the exact accountant, and uses most of it
    exact = gaussian_epsilon(math.sqrt(admitted) / sigma, delta) if admitted else 0.0
    assert exact <= eps
    if admitted > 100:
        assert exact > 0.8 * eps


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    budget=st.sampled_from(BUDGETS),
    asked=st.lists(
        st.tuples(st.floats(0.5, 60), st.sampled_from([0.01, 0.2, 1.0]), st.integers(1, 400)),
        min_size=1,
        max_size=6,
    ),
)
def test_any_sequence_is_cut_off_where_an_exact_sum_says(
    budget: tuple[float, float], asked: list[tuple[float, float, int]]
) -> None:
    eps, delta = budget
    chosen = privacy_filter(eps, delta)
    spent, exact, admitted = 0.0, Fraction(0), []
    limit = Fraction(eps - rdp_to_epsilon(0.0, chosen.order, delta))
    for sigma, rate, steps in asked:
        cost = rdp(sampled(sigma, rate, steps), chosen.order)
        fits = exact + Fraction(cost) <= limit
        assume(abs(exact + Fraction(cost) - limit) > limit / 10**8)
        assert chosen.admits(spent, cost) == fits
        if fits:
            spent += cost
            exact += Fraction(cost)
            admitted.append(sampled(sigma, rate, steps))
    assert 0 <= chosen.epsilon_of(spent) <= eps
    assert epsilon(admitted, delta) <= eps  # as if it had been fixed beforehand


@settings(deadline=None, max_examples=200, derandomize=True)
@given(budget=st.sampled_from(BUDGETS), shares=st.lists(st.floats(0, 2), min_size=2, max_size=2))
def test_epsilon_rises_with_spending_and_says_what_was_admitted(
    budget: tuple[float, float], shares: list[float]
) -> None:
    chosen = privacy_filter(*budget)
    less, more = (share * chosen.capacity for share in sorted(shares))
    assert chosen.epsilon_of(0.0) == 0
    assert 0 <= chosen.epsilon_of(less) <= chosen.epsilon_of(more)
    for spent in (less, more):
        assert (chosen.epsilon_of(spent) <= chosen.epsilon) == chosen.admits(spent, 0.0)


@pytest.mark.parametrize(("eps", "delta"), BUDGETS)
def test_rounding_neither_refuses_the_last_event_nor_exceeds_the_budget(eps: float, delta: float) -> None:
    chosen = privacy_filter(eps, delta)
    for parts in (3, 7, 1000):
        cost = chosen.capacity / parts
        spent = 0.0
        for _ in range(parts):
            assert chosen.admits(spent, cost)
            spent += cost
        assert not chosen.admits(spent, cost / 1000)
        assert chosen.epsilon_of(spent) <= eps
    within = chosen.capacity * (1 + 0.99e-9)
    assert chosen.admits(within, 0.0)
    assert rdp_to_epsilon(within, chosen.order, delta) <= eps
    beyond = chosen.capacity * (1 + 1.01e-9)
    assert not chosen.admits(beyond, 0.0)
    assert chosen.epsilon_of(beyond) > eps


def test_a_budget_too_small_for_any_order_admits_nothing() -> None:
    chosen = privacy_filter(1e-6, 1e-9)
    assert chosen.capacity <= 0
    assert not chosen.admits(0.0, 0.0)
    assert not chosen.admits(0.0, rdp(GaussianRelease(noise_multiplier=1e6), chosen.order))


def test_what_is_no_cost_is_not_admitted() -> None:
    chosen = privacy_filter(1.0, 1e-5)
    assert chosen.admits(0.0, 0.0)
    for spent, cost in [(math.nan, 0.0), (0.0, math.nan), (0.0, math.inf), (0.1, -0.05), (-0.1, 0.05)]:
        assert not chosen.admits(spent, cost)
    # so little noise that no order bounds it
    assert rdp(GaussianRelease(noise_multiplier=1e-200), chosen.order) == math.inf


@pytest.mark.parametrize(
    ("eps", "delta", "name"),
    [(0.0, 1e-5, "epsilon"), (-1.0, 1e-5, "epsilon"), (math.inf, 1e-5, "epsilon"),
     (math.nan, 1e-5, "epsilon"), (1.0, 0.0, "delta"), (1.0, 1.0, "delta"), (1.0, math.nan, "delta")],
)  # fmt: skip
def test_a_budget_out_of_range_is_refused(eps: float, delta: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} of a budget is .*: give a"):
        privacy_filter(eps, delta)


@pytest.mark.parametrize("order", [1.0, 0.5, math.inf, math.nan])
def test_an_order_out_of_range_is_refused(order: float) -> None:
    with pytest.raises(ValueError, match="order"):
        rdp(sampled(1.0, 0.5), order)


def test_a_filter_is_a_frozen_value() -> None:
    chosen = privacy_filter(1.0, 1e-5)
    assert chosen == PrivacyFilter(1.0, 1e-5, chosen.order, chosen.capacity)
    with pytest.raises(AttributeError):
        chosen.capacity = 99.0  # type: ignore[misc]
