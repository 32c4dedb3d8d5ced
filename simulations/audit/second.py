"""The second accountant: Google's privacy-loss distributions, which share no code with fedward's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from common.errors import FedwardError
from common.privacy.mechanism import Event, SubsampledGaussian, rate_and_steps

# A forged certificate must not keep the accountant busy for hours.
MOST_KINDS, MOST_STEPS = 64, 2 * 10**6
SMALLEST_NOISE, SMALLEST_SAMPLED_NOISE, LARGEST_NOISE = 0.05, 0.2, 1e6
LARGEST_LOSS = 600.0
FINE, COARSE, MUCH_LOSS, LITTLE_NOISE = 1e-4, 1e-3, 50.0, 0.25  # the grid, which rounds upwards
RESOLUTION, MOST_CELLS = 0.01, 1 << 20

Counts = tuple[tuple[tuple[float, float], int], ...]  # ((noise multiplier, sample rate), how many)


def second_epsilon(events: Iterable[Event], delta: float) -> float:
    """ε by Google's privacy-loss-distribution accountant (add/remove), rounded pessimistically; 0 for no
    event, infinity where there is no protection to speak of (ε > 500 or so) or no end of the work.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    counts: defaultdict[tuple[float, float], int] = defaultdict(int)
    for event in events:
        rate, steps = rate_and_steps(event)
        counts[min(LARGEST_NOISE, event.noise_multiplier), rate] += steps
    if not counts:
        return 0.0
    heavy = len(counts) > MOST_KINDS or sum(counts.values()) > MOST_STEPS
    least = {True: SMALLEST_SAMPLED_NOISE, False: SMALLEST_NOISE}
    if heavy or delta <= 0 or any(sigma < least[rate < 1] for sigma, rate in counts):
        return math.inf
    if math.fsum(steps * _loss(*kind) for kind, steps in counts.items()) > LARGEST_LOSS:
        return math.inf
    return _epsilon(tuple(sorted(counts.items())), delta)


def _loss(sigma: float, rate: float) -> float:
    """A cheap bound on the mean privacy loss of one release: its KL divergence is at most q / 2σ²
    (convexity), and at most q² (exp(1/σ²) - 1) (the χ² divergence)."""
    return min(rate / (2 * sigma**2), rate**2 * math.expm1(min(700.0, 1 / sigma**2)))


def _interval(counts: Counts) -> float:
    """Width of the accountant's grid: fine against one release's loss, as errors add up over releases;
    coarse where losses are so large that a fine grid would fill the memory."""
    loss = math.fsum(steps * _loss(*kind) for kind, steps in counts)
    least = min(sigma for (sigma, _), _ in counts)
    reach = loss + 10 * math.sqrt(loss) + 0.5 / least**2 + 10 / least
    usual = FINE if least >= LITTLE_NOISE and loss < MUCH_LOSS else COARSE
    spread = min(math.sqrt(2 * _loss(*kind)) for kind, _ in counts)
    return max(min(usual, RESOLUTION * spread), reach / MOST_CELLS)


@lru_cache(maxsize=1024)
def _epsilon(counts: Counts, delta: float) -> float:
    return float(_accountant(counts, _interval(counts)).get_epsilon(delta))


@lru_cache(maxsize=1024)
def second_deltas(event: SubsampledGaussian, losses: tuple[float, ...], interval: float) -> tuple[float, ...]:
    """δ(ε) of one kind of event at several ε.

    Args:
        interval: width of the accountant's grid.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    accountant = _accountant((((event.noise_multiplier, event.sample_rate), event.steps),), interval)
    return tuple(float(accountant.get_delta(loss)) for loss in losses)


def _accountant(counts: Counts, interval: float) -> Any:
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise FedwardError(
            "the second accountant is not installed", remedy="pip install 'fedward[audit]'"
        ) from None
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    for (sigma, rate), steps in counts:
        gaussian = GaussianDpEvent(sigma)
        accountant.compose(gaussian if rate == 1 else PoissonSampledDpEvent(rate, gaussian), steps)
    return accountant
