"""What an attack on membership reaches at small false-positive rates, and what privacy allows at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from common.messages import Array
from common.privacy.accounting import epsilon
from common.privacy.mechanism import Event

CONFIDENCE = 0.95  # of the intervals that are shown
CERTAIN = 0.999  # for saying that an attack is above the ceiling
LOW_RATES = (0.001, 0.01)
_DELTAS = np.logspace(-10, -0.05, 60)
_POINTS = 60  # of a curve in a report


@dataclass(frozen=True)
class Point:
    """An attack at one false-positive rate: the largest rate of the curve that is no larger than `asked`.

    Attributes:
        low, high: interval for `tpr`, `least` and `most` for `fpr`; see `Curve.at`.
    """

    asked: float
    fpr: float
    tpr: float
    low: float
    high: float
    least: float
    most: float


@dataclass(frozen=True, repr=False)
class Curve:
    """Receiver operating characteristic.

    Attributes:
        fpr, tpr: float64 [thresholds + 1], rising from 0 to 1.
        thresholds: float64 [thresholds + 1], falling from infinity; what is no lower is called a member.
        scores, member, model: of each trial.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray
    scores: np.ndarray
    member: np.ndarray
    model: np.ndarray

    @property
    def auc(self) -> float:
        return float(np.trapezoid(self.tpr, self.fpr))

    @property
    def members(self) -> int:
        return int(self.member.sum())

    @property
    def others(self) -> int:
        return int((~self.member).sum())

    def at(self, rate: float, confidence: float = CONFIDENCE) -> Point:
        """What is reached with at most `rate` false positives.

        Trials on one model share its noise, so they are not independent. The intervals are Clopper and
        Pearson's with as many trials as would vary as much (Korn and Graubard 1998, Survey Methodology 24).
        """
        index = self._index(rate)
        above = self.scores >= self.thresholds[index]
        low, high = self._interval(above, self.member, confidence)
        least, most = self._interval(above, ~self.member, confidence)
        return Point(rate, float(self.fpr[index]), float(self.tpr[index]), low, high, least, most)

    def _index(self, rate: float) -> int:
        return int(np.searchsorted(self.fpr, rate * (1 + 1e-12), side="right")) - 1

    def _interval(self, above: np.ndarray, kind: np.ndarray, confidence: float) -> tuple[float, float]:
        trials = np.bincount(self.model, weights=kind)
        found = np.bincount(self.model, weights=above & kind)
        whole = float(trials.sum())
        share = float(found.sum()) / whole
        if not 0 < share < 1:
            return interval(share * whole, whole, confidence)
        groups = int((trials > 0).sum())
        variance = float(np.square(found - share * trials).sum()) * groups / max(1, groups - 1)
        effective = whole / max(1.0, variance / (whole * share * (1 - share)))
        return interval(share * effective, effective, confidence)

    def as_json(self) -> dict[str, Any]:
        rates = np.geomspace(max(1e-4, 1 / max(1, self.others)), 1.0, _POINTS)
        return {
            "auc": self.auc,
            "members": self.members,
            "others": self.others,
            "points": [vars(self.at(rate)) for rate in LOW_RATES],
            "curve": [[float(rate), float(self.tpr[self._index(float(rate))])] for rate in rates],
        }


@dataclass(frozen=True)
class Ceiling:
    """The largest true-positive rate that any attack can have, whoever is attacked.

    Attributes:
        epsilon, delta: the claim.
        pairs: float64 [pairs, 2]: each (ε, δ) holds for the same mechanism; the claim is the first.
    """

    epsilon: float
    delta: float
    pairs: np.ndarray

    def of_claim(self, fpr: float) -> float:
        """By the claimed (ε, δ) alone."""
        return largest_tpr(self.epsilon, self.delta, fpr)

    def at(self, fpr: float) -> float:
        """By the mechanism's whole privacy profile: the trade-off function that its pairs imply together
        (Dong, Roth and Su 2022, proposition 2.5)."""
        return min(largest_tpr(eps, delta, fpr) for eps, delta in self.pairs)

    def exceeded_by(self, curve: Curve) -> bool:
        """Whether a curve is above the ceiling at `LOW_RATES` or at 0.1, though both rates are put in their
        best light (with `CERTAIN`)."""
        for rate in (*LOW_RATES, 0.1):
            point = curve.at(rate, CERTAIN)
            if point.low > self.at(point.most):
                return True
        return False

    def as_json(self) -> dict[str, Any]:
        rates = np.geomspace(1e-4, 1.0, _POINTS)
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "points": [
                {"fpr": rate, "by_claim": self.of_claim(rate), "by_profile": self.at(rate)}
                for rate in LOW_RATES
            ],
            "curve": [[float(rate), self.at(float(rate))] for rate in rates],
        }


def curve_of(scores: Array, member: Array) -> Curve:
    """Args:
    scores: float [models, patients]; member: bool, likewise.

    Raises:
        ValueError: if there are no members, or no others.
    """
    if member.all() or not member.any():
        raise ValueError("a curve needs members and others")
    model = np.repeat(np.arange(len(scores)), scores.shape[1])
    flat, truth = scores.ravel(), member.ravel()
    order = np.argsort(-flat, kind="stable")
    ordered, there = flat[order], truth[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each run of equal scores
    true = np.append(0, np.cumsum(there)[last]) / truth.sum()
    false = np.append(0, np.cumsum(~there)[last]) / (~truth).sum()
    return Curve(false, true, np.append(np.inf, ordered[last]), flat, truth, model)


def each_auc(scores: Array, member: Array) -> Array:
    """AUC of each column, float64 [patients]; 0.5 where one of the two kinds is missing.

    Args:
        scores: float [models, patients]; member: bool, likewise.
    """
    ranks = stats.rankdata(scores, axis=0)
    inside = member.sum(axis=0)
    outside = len(member) - inside
    wins = (ranks * member).sum(axis=0) - inside * (inside + 1) / 2
    pairs = inside * outside
    return np.where(pairs > 0, wins / np.maximum(1, pairs), 0.5)


def interval(count: float, trials: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper and Pearson's (1934) two-sided interval of a rate; numbers needn't be whole."""
    tail = (1 - confidence) / 2
    low = 0.0 if count <= 0 else float(stats.beta.ppf(tail, count, trials - count + 1))
    high = 1.0 if count >= trials else float(stats.beta.isf(tail, count + 1, trials - count))
    return low, high


def largest_tpr(epsilon: float, delta: float, fpr: float) -> float:
    """What (ε, δ) allows at most: min(e^ε FPR + δ, 1 - e^-ε (1 - δ - FPR)) (Kairouz, Oh and Viswanath 2015,
    theorem 2.1)."""
    one = math.exp(min(700.0, epsilon)) * fpr + delta
    other = 1 - math.exp(-epsilon) * (1 - delta - fpr)
    return min(1.0, one, other)


def ceiling_of(event: Event, delta: float) -> Ceiling:
    """The ceiling of a mechanism, claimed at `delta`; from the (ε, δ) that fedward's accountant finds."""
    claim = epsilon([event], delta)
    pairs = [(claim, delta)] + [(epsilon([event], float(d)), float(d)) for d in _DELTAS]
    return Ceiling(claim, delta, np.array(pairs))
