"""Does a site do what its events claim? Exact tests on what it sends; a false alarm is as rare as is said.

Each check is one p-value under the claimed mechanism; with Bonferroni's correction a sound site fails any of
them with probability at most `FALSE_ALARM`. Lower bounds on ε miss most faults (noise used again, coins that
are not coins); these tests look at the mechanism itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from simulations.audit.observe import Observed

FALSE_ALARM = 0.01  # of all checks together


@dataclass(frozen=True)
class Check:
    """One test.

    Attributes:
        name: what is claimed.
        p: probability of what was seen, or worse, if the claim is true.
        told: what was measured, and what was to be expected.
    """

    site: str
    name: str
    p: float
    told: str


@dataclass(frozen=True)
class Conformance:
    """All checks of one audit."""

    checks: tuple[Check, ...]

    @property
    def level(self) -> float:
        """What a p-value must fall below to be an alarm."""
        return FALSE_ALARM / max(1, len(self.checks))

    @property
    def alarms(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if not c.p >= self.level)

    @property
    def sound(self) -> bool:
        return not self.alarms


def conformance(sites: Sequence[Observed]) -> Conformance:
    """Test what was seen of one or more sites that were asked the same."""
    checks = [check for site in sites for check in _of_one(site)]
    for i, first in enumerate(sites):
        checks += [_apart(first, second) for second in sites[i + 1 :]]
    return Conformance(tuple(checks))


def _of_one(seen: Observed) -> Iterator[Check]:
    nobody = seen.along[:, ~seen.who.present] / seen.noise
    for name, values in {"empty columns": nobody, **_scaled(seen)}.items():
        yield from _noise(seen.site, name, values)
    yield _rounds_apart(seen, nobody)
    single, many = seen.who.records == 1, seen.who.records > 1
    yield _contribution(seen, single, "patients with one record")
    yield _contribution(seen, many, "patients with many records")
    yield _participation(seen)
    yield _together(seen)
    yield _capped(seen)
    told = ", ".join(seen.unasked) or "nothing else came"
    yield Check(seen.site, "only the model's parameters leave", float(not seen.unasked), told)
    if seen.histograms:
        yield from _evaluation(seen)


def _scaled(seen: Observed) -> dict[str, np.ndarray]:
    return {name: values / seen.noise for name, values in seen.beside.items()}


def _variance(site: str, name: str, values: np.ndarray) -> Check:
    """χ² on Σ z², two-sided."""
    count, total = values.size, float(np.square(values).sum())
    told = f"noise's standard deviation / claimed: {math.sqrt(total / count):.4f} ({count} numbers)"
    return Check(site, f"noise variance, {name}", _two_sided(total, count), told)


def _noise(site: str, name: str, values: np.ndarray) -> Iterator[Check]:
    """Variance in all and in the single numbers, and the normal law."""
    yield _variance(site, name, values)
    rounds = values.shape[0]
    each = np.square(values).sum(axis=0)
    low, high = stats.chi2.cdf(each, rounds), stats.chi2.sf(each, rounds)
    worst = float(min(1.0, 2 * values.shape[1] * min(low.min(), high.min())))
    yield Check(
        site, f"noise on every number, {name}", worst,
        f"smallest and largest standard deviation / claimed over {rounds} rounds: "
        f"{math.sqrt(each.min() / rounds):.3f}, {math.sqrt(each.max() / rounds):.3f}",
    )  # fmt: skip
    found = stats.kstest(values.ravel()[:200_000], "norm")
    yield Check(site, f"noise is normal, {name}", float(found.pvalue), f"KS distance {found.statistic:.4f}")


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """p-value of two independent normal rows' product sum, each known to have mean 0 and variance 1."""
    length = math.sqrt(float(np.square(first).sum()))
    z = float(first @ second) / max(length, 1e-300)  # normal, given the first
    return float(2 * stats.norm.sf(abs(z)))


def _rounds_apart(seen: Observed, nobody: np.ndarray) -> Check:
    """No noise is used twice: rows of different rounds don't correlate."""
    rows = np.hstack([nobody, *_scaled(seen).values()])
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    worst = min((_correlation(rows[i], rows[j]) for i, j in pairs), default=1.0)
    return Check(
        seen.site, "noise is new in each round", min(1.0, worst * max(1, len(pairs))),
        f"least p of {len(pairs)} pairs of rounds: {worst:.2g}",
    )  # fmt: skip


def _apart(first: Observed, second: Observed) -> Check:
    """Two sites' noise is not the same, round by round and number by number."""
    nobody = ~first.who.present & ~second.who.present
    one, other = first.along[:, nobody] / first.noise, second.along[:, nobody] / second.noise
    shared = _scaled(first).keys() & _scaled(second).keys()
    one = np.hstack([one, *(_scaled(first)[name] for name in sorted(shared))])
    other = np.hstack([other, *(_scaled(second)[name] for name in sorted(shared))])
    p = _correlation(one.ravel(), other.ravel())
    return Check(
        f"{first.site}, {second.site}", "noise is each site's own", p, f"p of the product sum: {p:.2g}"
    )


def _law(seen: Observed, values: np.ndarray, amplitude: float, noise: float) -> tuple[float, float, float]:
    """Whether sums of a round are Binomial(steps, q) amplitudes plus noise, by their distribution
    (Kolmogorov and Smirnov) and by their mean: p, and mean and its standard error over what is expected."""
    taken, rate = np.arange(seen.steps + 1), seen.plan.step.sample_rate
    weights = stats.binom.pmf(taken, seen.steps, rate)
    uniform = stats.norm.cdf((values.ravel()[:, None] - taken * amplitude) / noise) @ weights
    ks = float(stats.kstest(uniform, "uniform").pvalue)
    mean = seen.steps * rate * amplitude
    spread = math.sqrt(seen.steps * rate * (1 - rate) * amplitude**2 + noise**2)
    error = spread / math.sqrt(values.size)
    z = (float(values.mean()) - mean) / error
    return min(1.0, 2 * min(ks, float(2 * stats.norm.sf(abs(z))))), float(values.mean()) / mean, error / mean


def _contribution(seen: Observed, which: np.ndarray, name: str) -> Check:
    """A canary's amplitude is C, and it takes part by the claimed coins: the law of what it adds."""
    values = seen.along[:, seen.who.present & which]
    if not values.size:
        return Check(seen.site, f"clipping and sampling, {name}", 1.0, "none is there")
    p, mean, error = _law(seen, values, seen.amplitude, seen.noise)
    return Check(
        seen.site, f"clipping and sampling, {name}", p,
        f"mean contribution / expected: {mean:.4f} ± {error:.4f}",
    )  # fmt: skip


def _capped(seen: Observed) -> Check:
    """Of a wide patient, k records take part, k being the cap: C / √k in each of k columns, √k C in all."""
    taken = min(seen.plan.step.max_records, seen.wide.shape[2])
    amplitude, noise = seen.amplitude * math.sqrt(taken), seen.noise * math.sqrt(seen.wide.shape[2])
    p, mean, error = _law(seen, seen.wide.sum(axis=2), amplitude, noise)
    return Check(
        seen.site, "no more records of a patient than the cap", p,
        f"mean of a wide patient's columns together / expected: {mean:.3f} ± {error:.3f}",
    )  # fmt: skip


def _participation(seen: Observed) -> Check:
    """Over all rounds each canary takes part Binomial(steps · rounds, q) times: neither once an epoch
    (too even), nor some more than others (too uneven)."""
    values = seen.along[:, seen.who.present].sum(axis=0)
    count, rate = seen.steps * len(seen.along), seen.plan.step.sample_rate
    variance = count * rate * (1 - rate) * seen.amplitude**2 + seen.noise**2 * len(seen.along)
    total = float(np.square(values - count * rate * seen.amplitude).sum() / variance)
    return Check(
        seen.site, "each patient's coins are its own", _two_sided(total, len(values)),
        f"variance of what patients add over all rounds / expected: {total / max(1, len(values)):.3f}",
    )  # fmt: skip


def _together(seen: Observed) -> Check:
    """In a round the canaries together add Binomial(patients · steps, q): a batch of fixed size doesn't."""
    values = seen.along[:, seen.who.present].sum(axis=1)
    patients, rate = int(seen.who.present.sum()), seen.plan.step.sample_rate
    draws = patients * seen.steps
    variance = draws * rate * (1 - rate) * seen.amplitude**2 + patients * seen.noise**2
    total = float(np.square(values - draws * rate * seen.amplitude).sum() / variance)
    return Check(
        seen.site, "the batch's size is random", _two_sided(total, len(values)),
        f"variance of what all add in a round / expected: {total / len(values):.3f}",
    )  # fmt: skip


def _evaluation(seen: Observed) -> Iterator[Check]:
    """Histograms carry noise: cells are whole numbers plus it. All test patients have the same features and
    the same score of about 0 for each class, or of 1/2, so most cells are empty."""
    plan = seen.plan.final_histogram
    deviation = plan.noise_multiplier * plan.sensitivity
    for name, cells in seen.histograms.items():
        values = _empty(name, np.asarray(cells, dtype=np.float64)) / deviation
        if not values.size:
            continue
        total = float(np.square(values).sum())
        told = (
            f"standard deviation / claimed in {values.size} empty cells: {math.sqrt(total / values.size):.3f}"
        )
        yield Check(seen.site, f"evaluation's noise, {name}", _two_sided(total, values.size), told)


def _empty(name: str, cells: np.ndarray) -> np.ndarray:
    """Cells without a patient: of two classes all but those in which the patients of either label are, of
    many those above the lowest scores."""
    return np.sort(cells.ravel())[:-2] if name == "scores" else cells[..., 1:].ravel()


def _two_sided(total: float, count: int) -> float:
    """p-value of a sum of `count` squares of standard normals."""
    return float(min(1.0, 2 * min(stats.chi2.cdf(total, count), stats.chi2.sf(total, count))))
