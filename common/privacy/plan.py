"""A study's plan at one site: sampling, clipping, noise and accounting, bound into one value.

Nothing here derives from the site's private number of patients: only from the study and from the
public size that the site declared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from common.privacy.accounting import calibrate, epsilon
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from common.statistics import sensitivity as statistics_sensitivity
from common.study import Study


@dataclass(frozen=True)
class StepPlan:
    """One step of patient-level DP-SGD.

    Attributes:
        sample_rate: each patient's chance to take part.
        clipping_norm: L2 bound C on a patient's gradient; None without privacy.
        noise_multiplier: noise standard deviation / C; 0 without privacy.
        divisor: what the noised sum is divided by: the expected batch of the *public* size.
        max_records: a patient's records beyond this many sit the step out, chosen at random.
        average_records: a patient's gradient is the mean (else the sum) over its records.
    """

    sample_rate: float
    clipping_norm: float | None
    noise_multiplier: float
    divisor: float
    max_records: int
    average_records: bool


@dataclass(frozen=True)
class HistogramPlan:
    """One release of sums to which each patient adds an L2 norm of at most `sensitivity`.

    Attributes:
        noise_multiplier: noise standard deviation / sensitivity; 0 without privacy.
    """

    sensitivity: float
    noise_multiplier: float


@dataclass(frozen=True)
class Limits:
    """What a site's policy allows at most, whatever a study asks; None = as the study asks.

    Attributes:
        epsilon, delta: for the rounds of one session, and likewise for its statistics.
        clipping_norm: the largest.
        noise_multiplier: the smallest of a training step.
    """

    epsilon: float | None = None
    delta: float | None = None
    clipping_norm: float | None = None
    noise_multiplier: float = 0.0


NO_LIMITS = Limits()


@dataclass(frozen=True)
class StudyPlan:
    """Everything that a site will do for a study, and what it costs.

    Attributes:
        evaluations: how many, the final one included.
        histogram: of an evaluation between rounds; `final_histogram` of the last one.
        delta: of training and evaluation; `statistics_delta` of the statistics.
        statistics: None if the study asks for none.
    """

    step: StepPlan
    steps_per_round: int
    rounds: int
    evaluations: int
    histogram: HistogramPlan
    final_histogram: HistogramPlan
    delta: float
    statistics: HistogramPlan | None = None
    statistics_delta: float = 0.0

    @property
    def private(self) -> bool:
        return self.step.noise_multiplier > 0

    def histogram_of(self, round_number: int) -> HistogramPlan:
        """The histogram that leaves with a round."""
        return self.final_histogram if round_number == self.rounds + 1 else self.histogram

    def training_event(self, rounds: int = 1) -> SubsampledGaussian:
        """What `rounds` rounds of training cost a training patient."""
        return SubsampledGaussian(
            noise_multiplier=self.step.noise_multiplier,
            sample_rate=self.step.sample_rate,
            steps=self.steps_per_round * rounds,
        )

    def evaluation_event(self, round_number: int) -> GaussianRelease:
        """What the noised histograms of one round cost a test patient."""
        return GaussianRelease(noise_multiplier=self.histogram_of(round_number).noise_multiplier)

    def evaluation_events(self) -> tuple[GaussianRelease, ...]:
        """What all evaluations of a session cost a test patient."""
        final = GaussianRelease(noise_multiplier=self.final_histogram.noise_multiplier)
        if self.evaluations == 1:
            return (final,)
        between = GaussianRelease(
            noise_multiplier=self.histogram.noise_multiplier, releases=self.evaluations - 1
        )
        return between, final

    def statistics_event(self) -> GaussianRelease | None:
        """What the statistics cost every patient; None if the study asks for none."""
        if self.statistics is None:
            return None
        return GaussianRelease(noise_multiplier=self.statistics.noise_multiplier)

    @cached_property
    def epsilon(self) -> float:
        """ε of all rounds for any patient: training and test patients are disjoint."""
        if not self.private:
            return math.inf
        return max(
            epsilon([self.training_event(self.rounds)], self.delta),
            epsilon(self.evaluation_events(), self.delta),
        )

    def as_json(self) -> dict[str, Any]:
        """As plain values, which nobody changes; `StudyPlan.of` gives it back."""
        return self._plain

    @cached_property
    def _plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(value: dict[str, Any]) -> StudyPlan:
        """Raises:
        TypeError, KeyError: if the value is no plan.
        """
        parts: dict[str, Any] = dict(value)
        parts["step"] = StepPlan(**value["step"])
        for name in ("histogram", "final_histogram", "statistics"):
            parts[name] = HistogramPlan(**value[name]) if value[name] else None
        return StudyPlan(**parts)

    @property
    def statistics_epsilon(self) -> float:
        """ε of the statistics, at `statistics_delta`."""
        event = self.statistics_event()
        return 0.0 if event is None else epsilon([event], self.statistics_delta)


def histogram_sensitivity(study: Study) -> float:
    """The largest L2 norm of what one patient adds to the released histograms (common/histograms).

    A patient adds the weighted mean, with weights that sum to 1, of what its records would add alone; no
    mean is longer than the longest of its parts, so one record is the worst case.

    Binary: one unit in one histogram. Multi-class: one unit in the confidence histogram and one in
    each of the K one-against-the-rest histograms, so √(1 + K). Regression: one unit in the histogram of
    errors and, with u = |error| / width in [0, 1], the moments ±u, u² and 4 (u - u²). The four squares
    sum to at most 3: 1 + u² + u⁴ + 16 u² (1 - u)² ≤ 3, because 2 - u² - u⁴ = (1 - u)(1 + u)(2 + u²) and
    16 u² (1 - u) ≤ 64/27 wherever u is, which (1 + u)(2 + u²) exceeds from u = 0.2 on, and below that
    16 u² (1 - u) < 0.52. An error of the whole width reaches it: √3. Of two quantiles or more one unit if the
    label is within their interval, and its width, a share of the range, more: at most √(3 + 2). With
    `evaluation.tolerance` one unit more if the prediction is near: √(3 + 1), or √(5 + 1).

    Multi-label: one unit in each label's histogram, √L with L of them. Survival: one unit in one cell of time
    and risk, and one squared error, at most 1, for each of H horizons: √(1 + H).

    In each of n subgroup columns a record adds the same once more, to one group's block: √(1 + n) times
    as much.
    """
    if study.objective.task == "binary":
        whole = 1.0
    elif study.objective.task == "regression":
        squares = 5 if len(study.objective.quantiles) > 1 else 3
        whole = math.sqrt(squares + (study.evaluation.tolerance is not None))
    elif study.objective.task == "multi-label":
        whole = math.sqrt(study.outputs)
    elif study.objective.task == "survival":
        whole = math.sqrt(1 + len(study.horizons))
    else:
        whole = math.sqrt(1 + study.outputs)
    return whole * math.sqrt(1 + len(study.subgroup_columns))


class _ThisStudy:
    """A study as a key: this very object, because a changed copy of one may carry the digest of the first."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def __hash__(self) -> int:
        return id(self.study)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ThisStudy) and other.study is self.study


def plan_study(study: Study, public_size: int, limits: Limits = NO_LIMITS) -> StudyPlan:
    """Calibrate a study at a site that declared `public_size` patients and allows no more than `limits`.

    It is worked out once for all sites of a process that declare and allow the same.

    Raises:
        StudyError: if no noise meets the target.
    """
    return _plan_of(_ThisStudy(study), public_size, limits)


@lru_cache(maxsize=256)
def _plan_of(named: _ThisStudy, public_size: int, limits: Limits) -> StudyPlan:
    study = named.study
    size = study.public_training_size(public_size)
    training, privacy = study.training, study.privacy
    rate = training.sample_rate or min(1.0, (training.patients_per_step or size) / size)
    steps = training.local_steps or (training.local_epochs or 1) * math.ceil(1 / rate - 1e-9)
    clipping, delta, step_noise = privacy.clipping_norm, privacy.delta or 0.0, 0.0
    noises = (0.0, 0.0)
    if privacy.epsilon is not None and clipping is not None:
        target = _least(privacy.epsilon, limits.epsilon)
        delta = _least(delta, limits.delta)
        clipping = _least(clipping, limits.clipping_norm)
        step_noise = calibrate(target, delta, rate, steps * study.algorithm.rounds)
        step_noise = max(step_noise, limits.noise_multiplier)
        noises = _evaluation_noises(study, target, delta)
    sensitivity = histogram_sensitivity(study)
    return StudyPlan(
        step=StepPlan(
            sample_rate=rate,
            clipping_norm=clipping,
            noise_multiplier=step_noise,
            divisor=max(1.0, rate * size),
            max_records=training.max_records_per_patient,
            average_records=training.records == "mean",
        ),
        steps_per_round=steps,
        rounds=study.algorithm.rounds,
        evaluations=study.evaluations,
        histogram=HistogramPlan(sensitivity, noises[0]),
        final_histogram=HistogramPlan(sensitivity, noises[1]),
        delta=delta,
        **_statistics_plan(study, limits),
    )


def _least(asked: float, allowed: float | None) -> float:
    return asked if allowed is None else min(asked, allowed)


def _evaluation_noises(study: Study, target: float, delta: float) -> tuple[float, float]:
    """Noise multipliers of an evaluation between rounds and of the final one.

    Gaussian releases share out μ² = Σ 1 / noise_multiplier² (see `accounting`): in equal parts, or as
    `evaluation.final_share` says.
    """
    share, count = study.evaluation.final_share, study.evaluations
    if share is None or count == 1:
        return (calibrate(target, delta, 1.0, count),) * 2
    whole = calibrate(target, delta, 1.0, 1) * (1 + 1e-9)
    return whole * math.sqrt((count - 1) / (1 - share)), whole / math.sqrt(share)


def _statistics_plan(study: Study, limits: Limits) -> dict[str, Any]:
    asked = study.statistics
    if asked is None:
        return {}
    delta = _least(asked.delta, limits.delta)
    noise = calibrate(_least(asked.epsilon, limits.epsilon), delta, 1.0, 1)
    return {
        "statistics": HistogramPlan(statistics_sensitivity(study), noise),
        "statistics_delta": delta,
    }
