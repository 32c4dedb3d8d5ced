"""Membership inference on a released model: how well can it be told whose records it was trained on?

Each shadow model is attacked in turn, with the others as the attacker's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from client.cohort import Patients
from common.privacy.noise import Randomness
from common.study import Study
from simulations.audit.roc import Ceiling, Curve, ceiling_of, curve_of, each_auc
from simulations.audit.shadows import Shadows, half_plan, train_shadows

OWN_SPREAD = 128  # models from which on each patient has a spread of its own (Carlini et al., figure 9)
POPULATION = 500  # patients that RMIA compares with


@dataclass(frozen=True)
class Attack:
    """What one attack reached.

    Attributes:
        name: `LiRA` or `RMIA`.
        scores: float64 [models, patients]; the higher, the likelier that the patient is a member.
        curve: over all patients, or over those that were asked for.
        vulnerable: float64 [patients], AUC over the models of each one's scores (0.5 = safe).
    """

    name: str
    scores: np.ndarray
    curve: Curve
    vulnerable: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Aggregates only: no number of a single patient."""
        middle, many = np.quantile(self.vulnerable, [0.5, 0.9])
        patients = {"median": float(middle), "90 %": float(many)}
        return {"name": self.name, **self.curve.as_json(), "auc_of_single_patients": patients}


@dataclass(frozen=True)
class Membership:
    """Attacks on a study's model, beside what its privacy allows at most.

    Attributes:
        epsilon, delta: of training, for the pool as one site; None without privacy.
        patients: attacked.
        ceiling: the largest TPR of any attack; None without privacy.
    """

    study: str
    epsilon: float | None
    delta: float | None
    models: int
    patients: int
    right: tuple[float, float] | None
    attacks: tuple[Attack, ...]
    ceiling: Ceiling | None

    @property
    def sound(self) -> bool:
        """Whether no attack is above the ceiling, as far as chance lets us tell."""
        return self.ceiling is None or not any(self.ceiling.exceeded_by(a.curve) for a in self.attacks)

    def as_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "models": self.models,
            "patients": self.patients,
            "right_of_members": self.right[0] if self.right else None,
            "right_of_others": self.right[1] if self.right else None,
            "attacks": [attack.as_json() for attack in self.attacks],
            "ceiling": self.ceiling.as_json() if self.ceiling else None,
            "sound": self.sound,
        }


def membership(
    study: Study,
    pool: Patients,
    *,
    models: int = 64,
    among: np.ndarray | None = None,
    coins: int = 0,
    randomness: Randomness | None = None,
) -> Membership:
    """Attack `models` models of a study, each trained on a random half of `pool`.

    Args:
        among: bool [patients]: whom to attack; everybody if absent.
        coins: seed of who is in which half.
        randomness: of the trainers; the operating system's if absent.

    Raises:
        FedwardError: if there are too few models or patients.
    """
    plan = half_plan(study, pool)
    shadows = train_shadows(study, pool, plan, models=models, coins=coins, randomness=randomness)
    chosen = np.ones(len(pool), dtype=np.bool_) if among is None else among
    attacks = []
    for name, scores in (("LiRA", lira(shadows)), ("RMIA", rmia(shadows))):
        asked, member = scores[:, chosen], shadows.member[:, chosen]
        attacks.append(Attack(name, scores, curve_of(asked, member), each_auc(asked, member)))
    training = plan.training_event(plan.rounds) if plan.private else None
    ceiling = ceiling_of(training, plan.delta) if training else None
    return Membership(
        study=study.name,
        epsilon=ceiling.epsilon if ceiling else None,
        delta=ceiling.delta if ceiling else None,
        models=models,
        patients=int(chosen.sum()),
        right=shadows.right,
        attacks=tuple(attacks),
        ceiling=ceiling,
    )


def lira(shadows: Shadows) -> np.ndarray:
    """The likelihood-ratio attack (Carlini et al. 2022, arXiv 2112.03570, algorithm 1, online), float64
    [models, patients].

    A patient's confidence is taken as normal, with one mean over models that it trained and one over the
    others; below `OWN_SPREAD` models all patients share a spread. The attacked model has no part in these.
    """
    found = np.empty_like(shadows.confidence)
    for target, confidence in enumerate(shadows.confidence):
        others = np.arange(len(found)) != target
        known, member = shadows.confidence[others], shadows.member[others]
        log = []
        for there in (member, ~member):
            mean, spread = _normal(known, there, own=len(found) >= OWN_SPREAD)
            log.append(norm.logpdf(confidence, mean, spread))
        found[target] = log[0] - log[1]
    return found


def _normal(values: np.ndarray, taken: np.ndarray, *, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [patients] of those values [models, patients] that are taken."""
    count = np.maximum(1, taken.sum(axis=0))
    mean = (values * taken).sum(axis=0) / count
    squares = np.square((values - mean) * taken).sum(axis=0)
    free = np.maximum(1, count - 1)
    shared = squares.sum() / free.sum()
    variance = squares / free if own else np.full(len(mean), shared)
    return mean, np.sqrt(variance) + 1e-6 + 1e-3 * math.sqrt(shared)


def rmia(shadows: Shadows, threshold: float = 1.0) -> np.ndarray:
    """The relative attack (Zarifzadeh, Liu and Shokri 2024, arXiv 2312.03262, equation 5 with online
    reference models), float64 [models, patients].

    A patient's score is the share of other patients whose likelihood under the attacked model, relative to
    that under the reference models, is smaller than its own by the factor `threshold`.
    """
    found = np.empty_like(shadows.likelihood)
    patients = found.shape[1]
    for target, likelihood in enumerate(shadows.likelihood):
        others = np.arange(len(found)) != target
        known, member = shadows.likelihood[others], shadows.member[others]
        halves = [(known * m).sum(axis=0) / np.maximum(1, m.sum(axis=0)) for m in (member, ~member)]
        ratio = likelihood / np.maximum((halves[0] + halves[1]) / 2, 1e-300)
        people = np.random.default_rng(target).permutation(patients)[:POPULATION]
        below = np.searchsorted(np.sort(ratio[people]), ratio / threshold, side="right")
        # where two have as many below them, the ratio itself decides
        found[target] = (below + ratio / (1.0 + ratio)) / len(people)
    return found
