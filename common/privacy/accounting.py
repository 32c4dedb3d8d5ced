"""From mechanisms to (ε, δ), and from a target to a noise multiplier.

Two regimes, both tight for a schedule that is fixed beforehand:
- every `sample_rate` is 1: Gaussian mechanisms compose exactly to one with
  μ² = Σ steps / noise_multiplier² (Dong, Roth, Su 2022, "Gaussian differential privacy", cor. 3.3), and
  δ(ε) = Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ) (Balle, Wang 2018, theorem 8);
- otherwise Opacus's PRV accountant (Gopi, Lee, Wutschitz 2021), of which the upper bound is taken.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from common.errors import StudyError
from common.privacy.mechanism import Event, SubsampledGaussian

PRV_ERROR = 0.005
LARGEST_EPSILON = 1e6
_ONE_AT_A_TIME = threading.Lock()  # `catch_warnings` is not safe among threads
NOISE_RANGE = (0.3, 1e5)
SIGNIFICANT_DIGITS = 5


def epsilon(events: Iterable[Event], delta: float) -> float:
    """The smallest known ε for which the composition of `events` is (ε, δ)-DP; 0 for no event.

    Raises:
        StudyError: if the noise is too small for the accountant to bound ε.
    """
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for event in events:
        steps[event.noise_multiplier, event.sample_rate] += event.steps
    return _epsilon(tuple(sorted(steps.items())), delta)


@lru_cache(maxsize=4096)
def _epsilon(steps: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    if not steps:
        return 0.0
    if all(rate == 1 for (_, rate), _ in steps):
        return gaussian_epsilon(math.sqrt(sum(n / sigma**2 for (sigma, _), n in steps)), delta)
    from opacus.accountants import PRVAccountant  # takes seconds to import, and many commands do without

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, n) for (sigma, rate), n in steps]
    try:
        with _ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=delta / 1000))
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise StudyError(
            f"the accountant cannot bound ε for this little noise ({type(error).__name__})",
            remedy="ask for a smaller ε, or for fewer steps",
        ) from None


def gaussian_delta(mu: float, eps: float) -> float:
    """δ at `eps` of the Gaussian mechanism with sensitivity / standard deviation = `mu`."""
    first, second = mu / 2 - eps / mu, -mu / 2 - eps / mu
    return float(ndtr(first) - math.exp(min(700.0, eps + float(log_ndtr(second)))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at `delta` of the Gaussian mechanism with sensitivity / standard deviation = `mu`."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
        if high > LARGEST_EPSILON:
            raise StudyError("ε is beyond a million: no privacy at all", remedy="ask for more noise")
    return float(brentq(lambda e: gaussian_delta(mu, e) - delta, 0.0, high, xtol=1e-10)) + 1e-9


@lru_cache(maxsize=1024)
def calibrate(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier whose `steps` releases stay within (target, delta).

    Rounded up to five significant digits, so that it reads the same everywhere.

    Raises:
        StudyError: if no noise multiplier between 0.3 and 100,000 does.
    """

    def excess(sigma: float) -> float:
        event = SubsampledGaussian(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps)
        return epsilon([event], delta) - target

    if sample_rate == 1:
        mu = brentq(lambda m: gaussian_delta(m, target) - delta, 1e-9, 1e3)
        sigma = math.sqrt(steps) / float(mu)
    else:
        low, high = _bracket(excess, target, delta, sample_rate, steps)
        if excess(high) > 0:
            raise StudyError(
                f"no noise multiplier up to {NOISE_RANGE[1]:.0f} gives ε = {target} at δ = {delta}",
                remedy="raise epsilon or delta, or lower rounds, steps or sample_rate",
            )
        sigma = low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=1e-4 * low))
    for _ in range(100):
        sigma = _rounded_up(sigma)
        if excess(sigma) <= 0:
            return sigma
        sigma *= 1 + 1e-5
    raise StudyError(f"no noise found for ε = {target}", remedy="choose another epsilon")


def _bracket(
    excess: Callable[[float], float], target: float, delta: float, sample_rate: float, steps: int
) -> tuple[float, float]:
    """Around the central-limit estimate of the answer, because the accountant is slow.

    Many sampled Gaussian steps act like one Gaussian mechanism with
    μ = q √(T (exp(1/σ²) - 1)) (Bu, Dong, Long, Su 2020, "Deep learning with Gaussian differential
    privacy", corollary 4); solved for σ.
    """
    lowest, highest = NOISE_RANGE
    mu = float(brentq(lambda m: gaussian_delta(m, target) - delta, 1e-9, 1e3))
    guess = min(highest, max(lowest, 1 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / steps))))
    low = high = guess
    width = 0.02
    if excess(guess) > 0:
        while high < highest and excess(high) > 0:
            low, high, width = high, min(highest, high * (1 + width)), 2 * width
        return low, high
    while low > lowest and excess(low) <= 0:
        low, high, width = max(lowest, low / (1 + width)), low, 2 * width
    return low, high


def _rounded_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - SIGNIFICANT_DIGITS + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{SIGNIFICANT_DIGITS}g}")
