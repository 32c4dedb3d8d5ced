"""The Rényi filter: a cohort's lifetime budget across studies that are chosen after seeing earlier results.

An order α and a capacity B are fixed from the lifetime (ε, δ) alone, before anything is released. An event
is admitted while the sum of the Rényi costs at α of everything charged, itself included, stays within B.

Theorem (Feldman & Zrnic 2021, "Individual privacy accounting via a Rényi filter", arXiv 2008.11193,
theorem 4.3; Lécuyer 2021, "Practical privacy filters and odometers with Rényi differential privacy",
arXiv 2103.01379). If every mechanism is (α, ρ_t)-RDP given all earlier outputs, where mechanism and ρ_t may
be chosen from those outputs, and no more is run once Σ ρ_t would exceed B, then all outputs together are
(α, B)-RDP: the same bound, with no loss, as if the events had been fixed beforehand. (α, B)-RDP implies
(ε, δ)-DP with

    ε = B + log((α - 1) / α) - (log δ + log α) / (α - 1)

(Canonne, Kamath, Steinke 2020, arXiv 2004.00010, proposition 12; Balle et al. 2020, arXiv 1905.09982,
theorem 21; Asoodeh et al. 2020), which is solved for B here. Sessions may also interleave: filters of a
fixed Rényi order hold for concurrent composition (Haney et al. 2023, arXiv 2309.05901).

Conditions:
- order and capacity are fixed before anything is seen. A budget that is raised after results were seen,
  because of them, is outside the theorem;
- the cost is charged before its event runs, and charged whole even if it is abandoned midway;
- each event's bound holds conditionally on the past: its noise and sampling are fresh, and its noise
  multiplier, rate and number of releases are fixed before its first release;
- the unit is the patient, neighbours differ by adding or removing one, in either direction.

Why not whichever order still fits, as accountants of fixed schedules take the best one afterwards? For each
order alone the chance that the loss exceeds ε is at most δ; if the order is picked after the outputs, any of
k orders may be the one that fails, and only a union bound, δ / k for each, is left (so for odometers, which
report a running ε: Rogers et al. 2016, arXiv 1605.08294). Nor do tighter accountants of fixed schedules
(`accounting.epsilon`) hold here: composing whole loss distributions needs a schedule that is fixed.

Not covered: patients who are in two cohorts or at two sites (their costs add up), groups of patients, and
what leaves without an event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from common.privacy.mechanism import GaussianRelease, SubsampledGaussian, rate_and_steps

ORDERS = tuple(1 + float(f"{0.01 * 1.05**k:.3g}") for k in range(331))  # 1.01 … 98,000
TOLERANCE = 1e-9  # relative; taken off the capacity, so that what rounding admits is within the budget
Values = npt.NDArray[np.float64]
REACH = 12.0  # standard deviations beyond the outermost peak of the integrand
MOST_NODES = 1 << 18
SMALLEST_NOISE = 1e-6


@dataclass(frozen=True)
class PrivacyFilter:
    """Attributes:
    epsilon, delta: the lifetime budget.
    order: the Rényi order α at which costs are added up; depends on epsilon and delta alone.
    capacity: what the costs at `order` may add up to; nothing is admitted unless it is positive.
    """

    epsilon: float
    delta: float
    order: float
    capacity: float

    def admits(self, spent: float, cost: float) -> bool:
        """Whether an event of `cost` fits when `spent` was charged before; both are RDP at `order`."""
        if not (spent >= 0 and cost >= 0 and self.capacity > 0):  # a NaN fits nowhere
            return False
        return spent + cost <= self.capacity * (1 + TOLERANCE)

    def epsilon_of(self, spent: float) -> float:
        """ε, at the filter's delta, that costs of `spent` stand for; at most `epsilon` if admitted.

        It says how much of a lifetime budget is used. As a privacy guarantee of what was released so far
        it holds if the events were fixed beforehand, or once the filter admits no more.
        """
        if spent == 0:
            return 0.0
        found = max(0.0, rdp_to_epsilon(spent, self.order, self.delta))
        if self.admits(spent, 0.0):
            return min(found, self.epsilon)
        return max(found, math.nextafter(self.epsilon, math.inf))


@lru_cache(maxsize=256)
def privacy_filter(epsilon: float, delta: float) -> PrivacyFilter:
    """The filter of a lifetime budget, at the order of `ORDERS` where most Gaussian releases fit.

    A Gaussian release costs α / (2 noise_multiplier²), so that most fit where capacity / α is largest. If
    the budget is too small for any order, the capacity isn't positive.

    Raises:
        ValueError: if epsilon or delta is out of range.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon of a budget is {epsilon}: give a positive, finite number")
    if not 0 < delta < 1:
        raise ValueError(f"delta of a budget is {delta}: give a number between 0 and 1, e.g. 1e-6")
    order = max(ORDERS, key=lambda alpha: _capacity(epsilon, delta, alpha) / alpha)
    return PrivacyFilter(epsilon, delta, order, _capacity(epsilon, delta, order) / (1 + TOLERANCE))


def _capacity(epsilon: float, delta: float, order: float) -> float:
    return epsilon - rdp_to_epsilon(0.0, order, delta)


def rdp_to_epsilon(cost: float, order: float, delta: float) -> float:
    """ε at `delta` of a mechanism that is (order, cost)-RDP (see the module's text); may be negative."""
    return cost + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def rdp(event: SubsampledGaussian | GaussianRelease, order: float) -> float:
    """What an event costs: an upper bound on its Rényi divergence of `order`, in both directions.

    Raises:
        ValueError: if the order isn't finite and above 1.
    """
    rate, steps = rate_and_steps(event)
    return steps * step_rdp(event.noise_multiplier, rate, order)


@lru_cache(maxsize=65536)
def step_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """The Rényi cost of one Poisson-subsampled Gaussian release.

    log A / (α - 1) with A = E[(1 - q + q exp(Z))^α], Z = (2 X - 1) / (2σ²), X ~ N(0, σ²) (Mironov, Talwar,
    Zhang 2019, arXiv 1908.10530, section 3.3; theorem 5 for the other direction), for any α > 1. The
    expectation is the trapezoid rule's, whose error falls exponentially with the distance of the nearest
    singularity, πσ² from the real line, here to less than 1e-16. A library isn't asked because Opacus
    takes seconds to import and fails above order 1,000, and sums lose A - 1 where sampling is rare.
    """
    sigma, alpha = noise_multiplier, order
    if not 1 < alpha < math.inf:
        raise ValueError(f"the Rényi order is {order}: give a finite number above 1")
    if sigma < SMALLEST_NOISE:
        return math.inf
    whole = alpha / (2 * sigma**2)
    width = min(sigma / 8, sigma**2 / 2)
    nodes = (alpha + 2 * REACH * sigma) / width
    if sample_rate == 1 or nodes > MOST_NODES:  # without sampling it costs no less
        return whole
    x = width * np.arange(math.floor(-REACH * sigma / width), math.ceil((alpha + REACH * sigma) / width) + 1)
    z = (2 * x - 1) / (2 * sigma**2)
    log_weight = -0.5 * (x / sigma) ** 2 + math.log(width / (sigma * math.sqrt(2 * math.pi)))
    power = alpha * np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + z)
    if z[-1] > 300 or (log_weight + power).max() > 1:
        log_a = float(logsumexp(log_weight + power))
    else:
        log_a = math.log1p(
            _excess(np.exp(log_weight), np.exp(log_weight + power), sample_rate * np.expm1(z), alpha)
        )
    cost = log_a / (alpha - 1)
    return cost if 0 <= cost < whole else whole


def _excess(weight: Values, powered: Values, w: Values, alpha: float) -> float:
    """E[(1 + w)^α] - 1 where E[w] = 0: the mean of (1 + w)^α - 1 - α w, with no digit lost where w is small.

    Args:
        weight, powered: of each node, and times (1 + w)^α.
    """
    small = np.abs(alpha * w) < 1e-3
    v = np.where(small, w, 0.0)
    series = alpha * (alpha - 1) / 2 * v**2
    series *= 1 + (alpha - 2) / 3 * v * (1 + (alpha - 3) / 4 * v * (1 + (alpha - 4) / 5 * v))
    return float(np.where(small, weight * series, powered - weight * (1 + alpha * w)).sum())
