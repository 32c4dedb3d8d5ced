"""The accountant against two others: Google's PLD, and integrals worked out with mpmath.

Never below what PLD proves to be spent; at most 2 % (and 0.01) above what PLD can promise.
"""

from __future__ import annotations

import math
from functools import reduce

import mpmath
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.privacy.accounting import calibrate, epsilon, gaussian_delta, gaussian_epsilon
from common.privacy.mechanism import SubsampledGaussian

Schedule = list[tuple[float, float, int]]  # noise multiplier, sample rate, steps


def events(schedule: Schedule) -> list[SubsampledGaussian]:
    return [SubsampledGaussian(noise_multiplier=s, sample_rate=q, steps=n) for s, q, n in schedule]


def google(schedule: Schedule, delta: float, pessimistic: bool) -> float:
    parts = [
        from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=5e-4, pessimistic_estimate=pessimistic
        ).self_compose(steps)
        for sigma, rate, steps in schedule
    ]
    return float(reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(delta))


GRID: list[tuple[Schedule, float]] = [
    ([(1.0, 0.01, 1000)], 1e-5),
    ([(0.8, 0.02, 500)], 1e-5),
    ([(2.0, 0.1, 200)], 1e-3),
    ([(4.0, 0.3, 400)], 1e-4),
    ([(5.0, 0.5, 100)], 1e-3),
    ([(3.0, 0.9, 30)], 1e-4),
    ([(0.6, 0.05, 20)], 1e-5),
    ([(20.0, 0.2, 1000)], 1e-4),
    ([(1.5, 0.999, 1)], 1e-3),
    ([(1.0, 0.2, 1)], 1e-6),
    ([(2.0, 1.0, 1)], 1e-5),
    ([(7.0, 1.0, 50)], 1e-3),
    ([(1.0, 1.0, 10)], 1e-6),
    ([(50.0, 1.0, 3)], 1e-4),
    # several kinds together: studies at one site, training and a full pass
    ([(2.0, 0.1, 100), (5.0, 0.5, 50)], 1e-4),
    ([(2.0, 0.1, 100), (8.0, 1.0, 5)], 1e-4),
    ([(1.5, 0.02, 300), (1.1, 0.01, 300), (10.0, 0.4, 30)], 1e-5),
    ([(4.0, 1.0, 3), (9.0, 1.0, 7)], 1e-3),
]


@pytest.mark.parametrize(("schedule", "delta"), GRID, ids=str)
def test_between_what_is_spent_and_what_can_be_promised(schedule: Schedule, delta: float) -> None:
    found = epsilon(events(schedule), delta)
    assert found >= google(schedule, delta, pessimistic=False)
    assert found <= google(schedule, delta, pessimistic=True) * 1.02 + 0.01


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
    assert sampled == pytest.approx(whole, abs=0.02)


def test_nothing_costs_nothing_and_parts_add_up() -> None:
    assert epsilon([], 1e-5) == 0
    halves = epsilon(events([(2.0, 0.1, 50), (2.0, 0.1, 50)]), 1e-4)
    assert halves == epsilon(events([(2.0, 0.1, 100)]), 1e-4)
    there, back = [(2.0, 0.1, 10), (3.0, 0.2, 10)], [(3.0, 0.2, 10), (2.0, 0.1, 10)]
    assert epsilon(events(there), 1e-4) == epsilon(events(back), 1e-4)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_more_steps_less_noise_or_larger_samples_cost_more(rate: float) -> None:
    by_steps = [epsilon(events([(3.0, rate, n)]), 1e-4) for n in (1, 5, 25, 125)]
    assert by_steps == sorted(by_steps)
    by_noise = [epsilon(events([(s, rate, 20)]), 1e-4) for s in (8.0, 4.0, 2.0, 1.0)]
    assert by_noise == sorted(by_noise)
    by_delta = [epsilon(events([(3.0, rate, 20)]), d) for d in (1e-2, 1e-4, 1e-6)]
    assert by_delta == sorted(by_delta)


def test_larger_samples_cost_more() -> None:
    by_rate = [epsilon(events([(3.0, q, 20)]), 1e-4) for q in (0.01, 0.1, 0.4, 0.8, 0.99)]
    assert by_rate == sorted(by_rate)
    assert by_rate[-1] <= epsilon(events([(3.0, 1.0, 20)]), 1e-4) + 0.01


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(1.0, 1e-3, 1.0, 10), (0.1, 1e-5, 1.0, 1), (50.0, 1e-5, 1.0, 100), (1.0, 1e-4, 0.1, 200),
     (4.0, 1e-5, 0.3, 50), (2.0, 1e-4, 0.5, 20), (20.0, 1e-4, 0.05, 20)],
)  # fmt: skip
def test_calibration_meets_its_target_and_is_the_smallest(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate(target, delta, rate, steps)
    assert epsilon(events([(sigma, rate, steps)]), delta) <= target
    assert epsilon(events([(sigma * 0.99, rate, steps)]), delta) > target
    assert float(f"{sigma:.5g}") == sigma
    # and the other accountant agrees that the target is kept
    assert google([(sigma, rate, steps)], delta, pessimistic=False) <= target


@settings(deadline=None, max_examples=60, derandomize=True)
@given(target=st.floats(0.01, 100), delta=st.floats(1e-9, 0.05), steps=st.integers(1, 100_000))
def test_calibration_of_full_passes(target: float, delta: float, steps: int) -> None:
    sigma = calibrate(target, delta, 1.0, steps)
    assert gaussian_delta(math.sqrt(steps) / sigma, target) <= delta
    assert gaussian_delta(math.sqrt(steps) / (sigma * 0.99), target) > delta


def test_what_no_accountant_can_bound_is_refused() -> None:
    with pytest.raises(StudyError):
        epsilon(events([(1e-4, 1.0, 1_000_000)]), 1e-5)
    with pytest.raises(StudyError):
        calibrate(1e-6, 1e-12, 0.9, 1_000_000)
