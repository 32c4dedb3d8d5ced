"""What one certificate must fulfil by itself: against its own plan, the study, and the second accountant.

The plan is derived anew from the study file and the declared public size; the site's noise and clipping
norm may only be stricter than what the study needs. Nothing here asks the site's software.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from common.privacy.certificate import Claims, Release, TrainingClaims
from common.privacy.mechanism import Event, GaussianRelease, SubsampledGaussian
from common.privacy.plan import histogram_sensitivity
from common.statistics import sensitivity as statistics_sensitivity
from common.study import Study
from simulations.audit.second import second_epsilon

# Both accountants round upwards. Of 600 random settings that fedward calibrated to a target, the second
# one found none more than 2e-6 above it; at a million steps it may be 2e-4.
ROUNDING = 2e-4
MOST_COUNTED = 10**12  # steps that an event may have; a claim of more has no bound either way
TOLERANCE = 0.02  # of a claimed ε below the one found
CAUTION, SLACK = 0.12, 0.01  # above it: an honest site falls back to Rényi's looser bound where δ is tiny


@dataclass(frozen=True)
class Reason:
    """Why a certificate is refused.

    Attributes:
        check: what it failed, a stable name for programs.
        text: one sentence for people.
    """

    check: str
    text: str


@dataclass(frozen=True)
class Cost:
    """ε of the listed releases by the second accountant; None = no bound. See `EpsilonClaims`."""

    training: float | None
    evaluation: float | None
    statistics: float | None

    @property
    def total(self) -> float | None:
        if self.training is None or self.evaluation is None or self.statistics is None:
            return None
        return max(self.training, self.evaluation) + self.statistics


def cost_of(claims: Claims) -> Cost:
    """ε of what left, by the second accountant.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    rounds = [r for r in claims.releases if r.purpose == "round"]
    statistics = [r for r in claims.releases if r.purpose == "statistics"]
    training = claims.plan.training
    unprotected = training is not None and training.noise_multiplier is None
    return Cost(
        training=None if unprotected and rounds else _cost((r.training for r in rounds), claims.delta),
        evaluation=_unless_exact(rounds, _cost((r.evaluation for r in rounds), claims.delta)),
        statistics=_unless_exact(
            statistics, _cost((r.statistics for r in statistics), claims.statistics_delta)
        ),
    )


def _unless_exact(releases: list[Release], cost: float | None) -> float | None:
    return None if any(r.exact for r in releases) else cost


def _cost(events: Iterator[Event | None], delta: float) -> float | None:
    epsilon = second_epsilon([e for e in events if e is not None], delta)
    return epsilon if math.isfinite(epsilon) else None


def plan_reasons(claims: Claims, study: Study) -> Iterator[Reason]:
    """What doesn't follow from the study and the public size."""
    if claims.study != study.digest or claims.study_name != study.name:
        yield Reason("study", f"it is about study {claims.study[:12]}, not {study.name} {study.digest[:12]}")
        return
    training, evaluation, statistics = claims.plan.training, claims.plan.evaluation, claims.plan.statistics
    if training is not None:
        yield from _training_reasons(claims, training, study)
    if evaluation is not None:
        if evaluation.sensitivity < histogram_sensitivity(study) * (1 - 1e-9):
            yield _less("sensitivity of the evaluation", evaluation.sensitivity, histogram_sensitivity(study))
        if evaluation.noise_multiplier is None and study.evaluations > 1:
            yield Reason("plan", f"no noise for {study.evaluations - 1} evaluations between rounds")
    if statistics is not None:
        if study.statistics is None:
            yield Reason("plan", "statistics, which the study doesn't ask for")
        elif statistics.sensitivity < statistics_sensitivity(study) * (1 - 1e-9):
            yield _less(
                "sensitivity of the statistics", statistics.sensitivity, statistics_sensitivity(study)
            )


def _less(name: str, told: float, needed: float) -> Reason:
    return Reason("plan", f"{name} {told:.6g}, where the study needs {needed:.6g}")


def _training_reasons(claims: Claims, told: TrainingClaims, study: Study) -> Iterator[Reason]:
    size, asked = study.public_training_size(claims.public_size), study.training
    rate = asked.sample_rate or min(1.0, (asked.patients_per_step or size) / size)
    wanted = {
        "sampling rate": (told.sample_rate, rate),
        "steps per round": (
            told.steps_per_round,
            asked.local_steps or (asked.local_epochs or 1) * math.ceil(1 / rate - 1e-9),
        ),
        "rounds": (told.rounds, study.algorithm.rounds),
        "divisor": (told.divisor, max(1.0, rate * size)),
        "records of a patient": (told.max_records, asked.max_records_per_patient),
    }
    for name, (said, follows) in wanted.items():
        if not math.isclose(said, follows, rel_tol=1e-9):
            yield Reason(
                "plan",
                f"{name} {said:.6g}, where {follows:.6g} follows from the study and a public size of "
                f"{claims.public_size}",
            )
    if told.records != asked.records:
        yield Reason("plan", f"a patient's gradient is the {told.records}, not the {asked.records}")
    if (told.noise_multiplier is not None) != study.private:
        yield Reason("plan", "noise multiplier: given exactly if the study asks for privacy")
    bound = study.privacy.clipping_norm
    if bound is not None and told.clipping_norm is not None and told.clipping_norm > bound:
        yield Reason("plan", f"clipping norm {told.clipping_norm:.6g} above the study's {bound:.6g}")


def form_reasons(claims: Claims) -> Iterator[Reason]:
    """What contradicts itself in the training plan."""
    training = claims.plan.training
    if training is None:
        return
    private = training.noise_multiplier is not None
    if private != (training.clipping_norm is not None):
        yield Reason("plan", "noise multiplier and clipping norm: both or neither")
    if private and training.sampler != "poisson":
        yield Reason("plan", f"sampler {training.sampler}: its cost is known for poisson only")


def target_reasons(claims: Claims, study: Study) -> Iterator[Reason]:
    """Whether the planned noise keeps the study's targets, by the second accountant, were every round of
    the plan answered.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    privacy, asked, plan = study.privacy, study.statistics, claims.plan
    if privacy.epsilon is not None and privacy.delta is not None:
        if claims.delta > privacy.delta:
            yield Reason("delta", f"δ = {claims.delta:g}, more than the study's {privacy.delta:g}")
        for patients, events in (("training", _trainings(claims)), ("test", _evaluations(claims, study))):
            yield from _above(f"of {patients} patients", events, claims.delta, privacy.epsilon)
    if asked is not None and plan.statistics is not None:
        if claims.statistics_delta > asked.delta:
            told = claims.statistics_delta
            yield Reason("delta", f"δ = {told:g} of statistics, more than the study's {asked.delta:g}")
        event = GaussianRelease(noise_multiplier=plan.statistics.noise_multiplier)
        yield from _above("by statistics", [event], claims.statistics_delta, asked.epsilon)


def _trainings(claims: Claims) -> list[Event]:
    told = claims.plan.training
    if told is None or told.noise_multiplier is None:
        return []
    steps = told.steps_per_round * told.rounds
    return [
        SubsampledGaussian(
            noise_multiplier=told.noise_multiplier,
            sample_rate=told.sample_rate,
            steps=min(steps, MOST_COUNTED),
        )
    ]


def _evaluations(claims: Claims, study: Study) -> list[Event]:
    told = claims.plan.evaluation
    if told is None:
        return []
    events: list[Event] = [GaussianRelease(noise_multiplier=told.final_noise_multiplier)]
    if told.noise_multiplier is not None and study.evaluations > 1:
        count = study.evaluations - 1
        events.append(GaussianRelease(noise_multiplier=told.noise_multiplier, releases=count))
    return events


def _above(whose: str, events: list[Event], delta: float, target: float) -> Iterator[Reason]:
    epsilon = second_epsilon(events, delta)
    if epsilon > target * (1 + ROUNDING):
        yield Reason(
            "target", f"too little noise: the plan costs ε = {epsilon:.4g} {whose}, the study says {target:g}"
        )


def epsilon_reasons(claims: Claims, cost: Cost) -> Iterator[Reason]:
    """Whether the claimed ε is what the second accountant finds."""
    pairs = {
        "training": (claims.epsilon.training, cost.training),
        "evaluation": (claims.epsilon.evaluation, cost.evaluation),
        "statistics": (claims.epsilon.statistics, cost.statistics),
        "in total": (claims.epsilon.total, cost.total),
    }
    for name, (claimed, found) in pairs.items():
        if (claimed is None) != (found is None):
            yield Reason("epsilon", f"ε {name}: {_shown(claimed)} claimed, {_shown(found)} found")
        elif claimed is not None and found is not None:
            if claimed < found / (1 + TOLERANCE):
                yield Reason("epsilon", f"ε {name} understated: {claimed:.4g} claimed, {found:.4g} found")
            elif claimed > found * (1 + CAUTION) + SLACK:
                yield Reason("epsilon", f"ε {name} overstated: {claimed:.4g} claimed, {found:.4g} found")


def _shown(epsilon: float | None) -> str:
    return "no bound" if epsilon is None else f"{epsilon:.4g}"
