"""The second accountant against closed forms, against the first one, and against being kept busy."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from common.privacy.accounting import calibrate, epsilon
from common.privacy.mechanism import Event, GaussianRelease, SubsampledGaussian
from simulations.audit.checks import ROUNDING
from simulations.audit.second import second_epsilon


def sampled(noise: float, rate: float, steps: int) -> SubsampledGaussian:
    return SubsampledGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps)


def closed_form(mu: float, delta: float) -> float:
    """Balle, Wang 2018, theorem 8, solved for ε."""

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return float(brentq(excess, 0, 300, xtol=1e-12))


@pytest.mark.parametrize("delta", [1e-3, 1e-6])
@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (5.0, 4), (60.0, 1000), (0.3, 2), (0.12, 1)])
def test_gaussian_releases_compose_as_the_closed_form_says(noise: float, releases: int, delta: float) -> None:
    found = second_epsilon([GaussianRelease(noise_multiplier=noise, releases=releases)], delta)
    assert found == pytest.approx(closed_form(math.sqrt(releases) / noise, delta), rel=1e-5)
    assert found == second_epsilon([sampled(noise, 1.0, releases)], delta)


def test_unlike_events_add_up() -> None:
    events: list[Event] = [
        GaussianRelease(noise_multiplier=3.0),
        GaussianRelease(noise_multiplier=4.0, releases=2),
        GaussianRelease(noise_multiplier=3.0),
    ]
    assert second_epsilon(events, 1e-5) == pytest.approx(
        closed_form(math.sqrt(2 / 9 + 2 / 16), 1e-5), rel=1e-5
    )
    assert second_epsilon([], 1e-5) == 0


@pytest.mark.parametrize("target", [0.03, 0.3, 3.0, 30.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.01, 1000), (0.3, 10), (0.3, 3000), (1.0, 30)])
def test_honest_noise_is_never_found_wanting(target: float, rate: float, steps: int) -> None:
    event = sampled(calibrate(target, 1e-5, rate, steps), rate, steps)
    found, first = second_epsilon([event], 1e-5), epsilon([event], 1e-5)
    assert found <= target * (1 + ROUNDING)
    assert found == pytest.approx(first, rel=2e-3)


@pytest.mark.parametrize(
    "events",
    [
        [sampled(1e-300, 1.0, 1)],
        [sampled(0.04, 1.0, 1)],
        [sampled(0.1, 1e-9, 1)],
        [sampled(1.0, 1.0, 10**6)],
        [sampled(1.0, 0.5, 10**12)],
        [sampled(1.0 + i / 1000, 0.5, 1) for i in range(100)],
    ],
)
def test_what_would_take_hours_has_no_bound(events: list[Event]) -> None:
    assert second_epsilon(events, 1e-5) == math.inf


def test_no_delta_is_no_bound() -> None:
    assert second_epsilon([sampled(5.0, 0.1, 1)], 0.0) == math.inf


def test_noise_beyond_all_measure_is_cut_to_a_million() -> None:
    assert 0 <= second_epsilon([sampled(1e308, 0.1, 1)], 1e-5) < 1e-6
