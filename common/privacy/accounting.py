"""From mechanisms to (ε, δ), and from a target to a noise multiplier, for a schedule fixed beforehand.

Gaussian releases without sampling compose exactly to one with μ² = Σ releases / noise_multiplier² (Dong,
Roth, Su 2022, "Gaussian differential privacy", cor. 3.3), and
δ(ε) = Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ) (Balle, Wang 2018, theorem 8).

With sampling, the distribution of the privacy loss is put on a grid, always rounded towards more ε, and
composed by Fourier transforms:
- a release is dominated by N(0, σ²) against the same moved to 1 with the sampling rate's probability, and
  pairs that dominate still do when composed (Zhu, Dong, Wang 2022, "Optimal accounting of differential
  privacy via characteristic function", theorems 11 and 10);
- a loss between two grid points is split between them so that both its probabilities are kept: the least
  pair on the grid that dominates (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, "Connect the dots",
  arXiv 2207.04380). Its error is of second order in the grid's width, which follows the losses' spread, so
  that the error is relative to ε; a preset absolute error, as Opacus's PRV accountant has, drowns a small ε;
- adding and removing a patient are composed apart, and the worse is taken (Lebeda, Regehr, Kamath, Steinke
  2024, "Avoiding pitfalls for privacy accounting of subsampled mechanisms under composition").

For studies that are chosen after seeing results use `filter`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr

from common.errors import StudyError
from common.privacy.filter import ORDERS, rdp_to_epsilon, step_rdp
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian, rate_and_steps

LARGEST_EPSILON = 1e6
NOISE_RANGE = (0.3, 1e5)
SIGNIFICANT_DIGITS = 5
SMALLEST_NOISE = 1e-3
RESOLUTION = 0.02  # grid's width / standard deviation of a release's loss; ε is up to 0.02 % too large
MOST_CELLS = 1 << 18  # of one release's grid, and of 20 standard deviations of the sum; coarser beyond
TAIL = 1e-4  # of δ, given up to losses beyond the grid
ROUNDING = 3e-16  # error of δ by Fourier transforms, per release; against wider floats, less than half of it

Array = npt.NDArray[np.float64]
Releases = tuple[tuple[tuple[float, float], int], ...]  # ((noise multiplier, sample rate), how many)


def epsilon(events: Iterable[SubsampledGaussian | GaussianRelease], delta: float) -> float:
    """The smallest known ε for which the composition of `events` is (ε, δ)-DP; 0 for no event.

    Raises:
        StudyError: if ε is beyond a million, or a noise multiplier below 0.001.
    """
    releases: defaultdict[tuple[float, float], int] = defaultdict(int)
    for event in events:
        rate, count = rate_and_steps(event)
        if event.noise_multiplier < SMALLEST_NOISE:
            raise StudyError(
                f"noise multiplier {event.noise_multiplier} protects nobody", remedy="ask for more noise"
            )
        releases[event.noise_multiplier, rate] += count
    return _epsilon(tuple(sorted(releases.items())), delta)


@lru_cache(maxsize=4096)
def _epsilon(releases: Releases, delta: float) -> float:
    if not releases:
        return 0.0
    whole = gaussian_epsilon(_mu(releases), delta)
    sampled = tuple(each for each in releases if each[0][1] < 1)
    # sampling costs no more than none, for which the closed form holds
    found = min(whole, _sampled_epsilon(releases, sampled, delta)) if sampled else whole
    if found > LARGEST_EPSILON:
        raise StudyError("ε is beyond a million: no privacy at all", remedy="ask for more noise")
    return found


def _sampled_epsilon(releases: Releases, sampled: Releases, delta: float) -> float:
    mu = _mu(each for each in releases if each[0][1] == 1)
    if mu == 0 and sum(n * rate for (_, rate), n in sampled) <= delta:
        return 0.0  # the patient takes part in nothing, but with probability δ
    together = (*sampled, ((1 / mu, 1.0), 1)) if mu > 0 else sampled
    if ROUNDING * (1000 + sum(n for _, n in together)) > 0.05 * delta:
        return _renyi_epsilon(together, delta)
    return _composed(together, delta)


def _mu(releases: Iterable[tuple[tuple[float, float], int]]) -> float:
    """Of one Gaussian release that costs as much as all of them without sampling."""
    return math.sqrt(sum(n / sigma**2 for (sigma, _), n in releases))


def gaussian_delta(mu: float, eps: float) -> float:
    """δ at `eps` of the Gaussian mechanism with sensitivity / standard deviation = `mu`."""
    first, second = mu / 2 - eps / mu, -mu / 2 - eps / mu
    return float(ndtr(first) - math.exp(min(700.0, eps + float(log_ndtr(second)))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at `delta` of the Gaussian mechanism with sensitivity / standard deviation = `mu`.

    Infinite if it is beyond a million.
    """
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
        if high > LARGEST_EPSILON:
            return math.inf
    return float(brentq(lambda e: gaussian_delta(mu, e) - delta, 0.0, high, xtol=1e-10)) + 1e-9


@dataclass(frozen=True)
class _Losses:
    """A distribution of the privacy loss: `mass[i]` of a loss of (lowest + i) grid widths.

    Attributes:
        infinite: mass of an infinite loss.
    """

    lowest: int
    mass: Array
    infinite: float


def _composed(releases: Releases, delta: float) -> float:
    """ε of sampled releases, by privacy-loss distributions on one grid."""
    count = sum(n for _, n in releases)
    tail = TAIL * delta
    reach = math.sqrt(2 * math.log(count / tail))  # P(|N(0, 1)| > reach) < tail / count
    spread = math.sqrt(sum(n * _variance(sigma, rate) for (sigma, rate), n in releases) / count)
    width = spread * max(RESOLUTION, 20 * math.sqrt(count) / MOST_CELLS)
    for (sigma, rate), _ in releases:
        least, most = _loss(np.array([-reach * sigma, 1 + reach * sigma]), sigma, rate)
        width = max(width, float(most - least) / MOST_CELLS)
    counts = [n for _, n in releases]
    both = [_discretised(sigma, rate, width, reach) for (sigma, rate), _ in releases]
    rest = delta - ROUNDING * (1000 + count)
    return max(
        _least_epsilon(_composition(each, counts, tail), width, rest) for each in zip(*both, strict=True)
    )


def _loss(x: Array, sigma: float, rate: float) -> Array:
    """log of a density ratio at x: N(0, σ²), moved to 1 with probability `rate`, over N(0, σ²)."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))


def _variance(sigma: float, rate: float) -> float:
    """Roughly the variance of one release's loss, with the patient: it sets the grid, and nothing else."""
    z = np.linspace(-8, 8, 321)
    weight = np.exp(-(z**2) / 2)
    losses = np.stack([_loss(sigma * z, sigma, rate), _loss(1 + sigma * z, sigma, rate)])
    weights = np.stack([(1 - rate) * weight, rate * weight]) / weight.sum()
    mean = (weights * losses).sum()
    return float((weights * (losses - mean) ** 2).sum())


def _discretised(sigma: float, rate: float, width: float, reach: float) -> tuple[_Losses, _Losses]:
    """One release's loss when a patient is removed, and when one is added.

    Between grid points `u` lie outcomes x with mass `absent` under N(0, σ²) and `present` under the mixture.
    """
    least, most = _loss(np.array([-reach * sigma, 1 + reach * sigma]), sigma, rate)
    first, last = math.floor(least / width), math.floor(most / width) + 1
    u = np.arange(first, last + 1) * width
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        never = np.log1p(-rate)  # no loss is as small; -inf without sampling
        odds = np.where(u > never, u - math.log(rate) + np.log(-np.expm1(never - u)), -np.inf)
    x = sigma**2 * odds + 0.5
    below0, absent, above0 = _masses(x / sigma)
    below1, shifted, above1 = _masses((x - 1) / sigma)
    present = (1 - rate) * absent + rate * shifted
    below, above = (1 - rate) * below0 + rate * below1, (1 - rate) * above0 + rate * above1
    removed = _split(present, absent, u[:-1], width)
    removed[0] += below
    added = _split(absent[::-1], present[::-1], -u[:0:-1], width)
    added[0] += above0
    return _Losses(first, removed, above), _Losses(-last, added, below0)


def _log(mass: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(mass)


def _masses(z: Array) -> tuple[float, Array, float]:
    """Standard normal mass below z[0], between neighbours, and above z[-1]; exact in both tails."""
    outer = ndtr(-np.abs(z))
    between = np.where(z[:-1] > 0, outer[:-1] - outer[1:], outer[1:] - outer[:-1])
    astride = (z[:-1] <= 0) & (z[1:] > 0)
    between[astride] = (1 - outer[:-1] - outer[1:])[astride]
    return float(ndtr(z[0])), between, float(ndtr(-z[-1]))


def _split(upper: Array, lower: Array, left: Array, width: float) -> Array:
    """Move each cell's mass to its ends so that it keeps both its probabilities ("connect the dots").

    Args:
        upper, lower: [cells] mass under the numerator and the denominator of the loss.
        left: [cells] loss at the left end.

    Returns:
        [cells + 1] mass under the numerator.
    """
    with np.errstate(invalid="ignore"):
        to_right = np.expm1(left + _log(lower) - _log(upper)) / math.expm1(-width)
    to_right = upper * np.clip(np.nan_to_num(to_right, nan=1.0), 0.0, 1.0)
    mass = np.zeros(len(upper) + 1)
    mass[1:] += to_right
    mass[:-1] += upper - to_right
    return mass


def _composition(parts: Sequence[_Losses], counts: Sequence[int], tail: float) -> _Losses:
    """The sum of independent losses, `counts[i]` times `parts[i]`.

    Transforms are periodic: what lies above their window, at most `tail` by Chernoff's bound, counts as
    infinite; what lies below it comes out at the top, which is on the safe side.
    """
    logs = [_log(p.mass) for p in parts]
    steps = [np.arange(p.lowest, p.lowest + len(p.mass)) for p in parts]
    centres = [round(float((p.mass * s).sum())) for p, s in zip(parts, steps, strict=True)]
    offsets = [s - c for s, c in zip(steps, centres, strict=True)]
    # sums of products, because threads of a matrix library cost more than they save at this size
    variance = sum(
        n * float((p.mass * o.astype(float) ** 2).sum())
        for p, o, n in zip(parts, offsets, counts, strict=True)
    )
    # Chernoff's best rate lies between those of a normal sum and of a single largest loss
    normal = math.sqrt(2 * math.log(1 / tail) / variance)
    single = math.log(1 / tail) / max(float(np.abs(o).max()) for o in offsets)
    rates = np.geomspace(min(normal, single) / 8, 4 * max(normal, single), 12)
    ends = []
    for sign in (1, -1):
        exponents = np.full(len(rates), math.log(1 / tail))
        for log, o, n in zip(logs, offsets, counts, strict=True):
            exponents += n * logsumexp(sign * rates[:, None] * o + log, axis=1)
        ends.append(math.ceil(float((exponents / rates).min())) + 1)
    size = next_fast_len(ends[0] + ends[1] + 1, real=True)
    transform: npt.NDArray[np.complex128] = np.ones(size // 2 + 1, dtype=np.complex128)
    for p, o, n in zip(parts, offsets, counts, strict=True):
        transform *= rfft(np.bincount(o % size, weights=p.mass, minlength=size)) ** n
    mass = np.roll(irfft(transform, size), ends[1])
    lowest = sum(c * n for c, n in zip(centres, counts, strict=True)) - ends[1]
    infinite = -math.expm1(sum(n * math.log1p(-p.infinite) for p, n in zip(parts, counts, strict=True)))
    return _Losses(lowest, mass, infinite + tail)


def _least_epsilon(losses: _Losses, width: float, delta: float) -> float:
    """The smallest ε ≥ 0 with δ(ε) = Σ mass (1 - exp(ε - loss))⁺ + infinite ≤ delta."""
    first = max(0, 1 - losses.lowest)  # of a positive loss
    mass = losses.mass[first:]
    loss = (losses.lowest + first + np.arange(len(mass))) * width

    def excess(eps: float, start: int) -> float:
        return float((mass[start:] * -np.expm1(eps - loss[start:])).sum()) + losses.infinite - delta

    if excess(0.0, 0) <= 0:
        return 0.0
    low, high = 0, len(loss)
    while low < high:  # the first grid point where δ is small enough
        middle = (low + high) // 2
        if excess(float(loss[middle]), middle) <= 0:
            high = middle
        else:
            low = middle + 1
    if low == len(loss):
        return math.inf
    # between grid points δ is a line in exp(ε)
    above, scaled = float(mass[low:].sum()), float((mass[low:] * np.exp(loss[low] - loss[low:])).sum())
    return float(loss[low]) + math.log((above + losses.infinite - delta) / scaled)


def _renyi_epsilon(releases: Releases, delta: float) -> float:
    """An upper bound that is up to a tenth looser, and holds for any number of releases and any δ."""

    def at(order: float) -> float:
        return rdp_to_epsilon(sum(n * step_rdp(*each, order) for each, n in releases), order, delta)

    return max(0.0, min(at(order) for order in ORDERS[::4]))


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
        sigma = low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=2e-6 * low))
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
