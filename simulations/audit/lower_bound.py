"""Lower bounds on ε from one run with many canaries, at a stated confidence.

Each canary is one trial: whoever sees the updates scores it, and guesses whether it was there. Canaries in
orthogonal directions don't disturb each other, so the trials of one run are independent. A bound above the
claimed ε would prove the claim wrong; one close to it shows that the claim is not loose either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from common.privacy.mechanism import SubsampledGaussian
from simulations.audit.observe import Observed
from simulations.audit.second import second_deltas, second_epsilon

CONFIDENCE = 0.95
REFUTATION = 0.999  # of a bound that is taken to refute a claim
GUESSES = (20, 50, 100, 200, 400, 800, 1600, 3200)
_LEAST_NOISE, _MOST_NOISE = 0.3, 60.0
_HALVINGS = 12  # 0.13 % of the noise
_INTERVAL = 2e-3
_LOSSES = np.concatenate([np.linspace(0.0, 6.0, 61), np.linspace(6.2, 30.0, 60)])


@dataclass(frozen=True)
class LowerBound:
    """At `CONFIDENCE`, the mechanism spends at least so much.

    Attributes:
        claimed: ε of the session's training at `delta`, by the second accountant.
        by_trade_off: assumes that the mechanism is a subsampled Gaussian of the claimed q and number of
            steps, and asks for the least noise that the error rates allow.
        by_noise: assumes the mechanism, coins and clipping included, and measures the noise only.
        one_run: assumes nothing (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2).
        canaries: trials.
        refuted: the bound by trade-off is above the claim even at `REFUTATION`. (Of bounds at 95 %, one in
            twenty may be above a claim that is true.)
    """

    site: str
    delta: float
    claimed: float
    by_trade_off: float
    by_noise: float
    one_run: float
    canaries: int
    refuted: bool


def lower_bound(seen: Observed) -> LowerBound:
    """Both bounds for the rounds that were seen.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    scores = log_likelihood_ratio(seen)
    steps = seen.steps * len(seen.along)
    rate, delta = seen.plan.step.sample_rate, seen.plan.delta
    threshold = best_threshold(seen)
    rates = error_rates(scores, seen.who.present, threshold, CONFIDENCE)
    surer = error_rates(scores, seen.who.present, threshold, REFUTATION)
    claim = SubsampledGaussian(
        noise_multiplier=seen.plan.step.noise_multiplier, sample_rate=rate, steps=steps
    )
    claimed = second_epsilon([claim], delta)
    return LowerBound(
        site=seen.site,
        delta=delta,
        claimed=claimed,
        by_trade_off=_by_trade_off(rates, rate, steps, delta),
        by_noise=_by_noise(seen, rate, steps, delta),
        one_run=one_run(scores, seen.who.present, delta),
        canaries=len(scores),
        refuted=_impossible(surer, claim.noise_multiplier * (1 - 1e-3), rate, steps),
    )


def log_likelihood_ratio(seen: Observed) -> np.ndarray:
    """The strongest score: log of how much likelier a column's sums are if its canary is there, [columns].

    A round's sum is k C plus noise, with k of Binomial(steps, q), against noise alone.
    """
    taken = np.arange(seen.steps + 1)
    weights = stats.binom.logpmf(taken, seen.steps, seen.plan.step.sample_rate)
    amplitudes = taken * seen.amplitude
    variance = seen.noise**2
    total = np.zeros(seen.along.shape[1])
    for sums in seen.along:
        terms = weights[:, None] + (2 * amplitudes[:, None] * sums - amplitudes[:, None] ** 2) / (
            2 * variance
        )
        total += np.logaddexp.reduce(terms, axis=0)
    return total


def _upper(count: int, trials: int, level: float) -> float:
    """Clopper and Pearson's upper confidence bound on a rate."""
    return 1.0 if count >= trials else float(stats.beta.ppf(1 - level, count + 1, trials - count))


def error_rates(
    scores: np.ndarray, present: np.ndarray, threshold: float, confidence: float
) -> tuple[float, float]:
    """Upper bounds on (false positives, false negatives), both true at once with `confidence`.

    Args:
        threshold: chosen before the scores were seen.
    """
    above, level = scores >= threshold, (1 - confidence) / 2
    positives = _upper(int((above & ~present).sum()), int((~present).sum()), level)
    negatives = _upper(int((~above & present).sum()), int(present.sum()), level)
    return positives, negatives


def best_threshold(seen: Observed, trials: int = 20_000) -> float:
    """The threshold whose bound ought to be the best, from made-up scores under the claim.

    Both error rates are turned into the μ of a Gaussian mechanism (Dong, Roth and Su 2022), as a ranking.
    """
    random = np.random.default_rng(0)
    shape = (len(seen.along), trials)
    noise = seen.noise * random.standard_normal(shape)
    taken = random.binomial(seen.steps, seen.plan.step.sample_rate, shape) * seen.amplitude
    absent = log_likelihood_ratio(replace(seen, along=noise))
    there = log_likelihood_ratio(replace(seen, along=noise + taken))
    half, level = seen.along.shape[1] // 2, (1 - CONFIDENCE) / 2
    thresholds = np.quantile(np.concatenate([absent, there]), np.linspace(0.001, 0.999, 400))

    def promise(threshold: float) -> float:
        positives = _upper(round(half * float((absent >= threshold).mean())), half, level)
        negatives = _upper(round(half * float((there < threshold).mean())), half, level)
        return float(stats.norm.isf(positives) - stats.norm.ppf(negatives))

    return float(max(thresholds, key=promise))


def _by_trade_off(rates: tuple[float, float], rate: float, steps: int, delta: float) -> float:
    """ε of the least noise at which the error rates are impossible (bisection over the noise).

    `_LEAST_NOISE` is not looked at: the accountant is slow there.
    """

    low, high = _LEAST_NOISE, _MOST_NOISE
    if not _impossible(rates, high, rate, steps):
        return 0.0
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _impossible(rates, middle, rate, steps) else (middle, high)
    return second_epsilon([SubsampledGaussian(noise_multiplier=high, sample_rate=rate, steps=steps)], delta)


def _impossible(rates: tuple[float, float], noise: float, rate: float, steps: int) -> bool:
    """Whether error rates lie below the trade-off curve of a mechanism."""
    event = SubsampledGaussian(noise_multiplier=round(noise, 6), sample_rate=rate, steps=steps)
    curve = np.array(second_deltas(event, tuple(_LOSSES.tolist()), _INTERVAL))
    return rates[1] < _least_negatives(curve, rates[0]) - 1e-6


def _by_noise(seen: Observed, rate: float, steps: int, delta: float) -> float:
    """ε of the most noise that the empty columns allow (χ²)."""
    empty = seen.along[:, ~seen.who.present]
    most = (
        math.sqrt(float(np.square(empty).sum() / stats.chi2.ppf(1 - CONFIDENCE, empty.size)) / seen.steps)
        / seen.amplitude
    )
    return second_epsilon([SubsampledGaussian(noise_multiplier=most, sample_rate=rate, steps=steps)], delta)


def _least_negatives(deltas: np.ndarray, positives: float) -> float:
    """The trade-off function of all (ε, δ(ε)) at once (Dong, Roth and Su 2022, proposition 2.5)."""
    one = 1 - deltas - np.exp(_LOSSES) * positives
    other = np.exp(-_LOSSES) * (1 - deltas - positives)
    return max(0.0, float(one.max()), float(other.max()))


def one_run(scores: np.ndarray, present: np.ndarray, delta: float) -> float:
    """The bound of Steinke, Nasr and Jagielski: the top k are guessed as there, the bottom k as absent.

    Args:
        scores: [columns]; the higher, the likelier that the canary is there.
        present: bool [columns], by fair coins.
    """
    order = np.argsort(-scores)
    kinds = [k for k in GUESSES if 2 * k <= len(scores)]
    best = 0.0
    for k in kinds:
        right = int(present[order[:k]].sum() + (~present[order[-k:]]).sum())
        level = (1 - CONFIDENCE) / len(kinds)
        if _chance(0.0, right, 2 * k, len(scores), delta) > level:
            continue
        low, high = 0.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            below = _chance(middle, right, 2 * k, len(scores), delta) <= level
            low, high = (middle, high) if below else (low, middle)
        best = max(best, low)
    return best


def _chance(loss: float, right: int, guesses: int, columns: int, delta: float) -> float:
    """An upper bound on the probability of so many right guesses under (loss, delta)."""
    p = 1 / (1 + math.exp(-loss))
    tail = float(stats.binom.sf(right - 1, guesses, p))
    counts = np.arange(1, right + 1)
    worst = float(np.max((stats.binom.sf(right - counts - 1, guesses, p) - tail) / counts, initial=0.0))
    return min(1.0, tail + worst * 2 * columns * delta)
