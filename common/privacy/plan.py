"""A study's plan at one site: sampling, clipping, noise and accounting, bound into one value.

Nothing here derives from the site's private number of patients: only from the study and from the
public size that the site declared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.privacy.accounting import calibrate, epsilon
from common.privacy.mechanism import Event, SubsampledGaussian
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
    """One evaluation: a histogram to which each test patient adds an L2 norm of at most `sensitivity`.

    Attributes:
        noise_multiplier: noise standard deviation / sensitivity; 0 without privacy.
    """

    sensitivity: float
    noise_multiplier: float


@dataclass(frozen=True)
class StudyPlan:
    """Everything that a site will do for a study, and what it costs."""

    step: StepPlan
    steps_per_round: int
    rounds: int
    evaluations: int
    histogram: HistogramPlan
    delta: float

    @property
    def private(self) -> bool:
        return self.step.noise_multiplier > 0

    def training_event(self, rounds: int = 1) -> Event:
        """What `rounds` rounds of training cost a training patient."""
        return SubsampledGaussian(
            noise_multiplier=self.step.noise_multiplier,
            sample_rate=self.step.sample_rate,
            steps=self.steps_per_round * rounds,
        )

    def evaluation_event(self, evaluations: int = 1) -> Event:
        """What `evaluations` noised histograms cost a test patient."""
        return SubsampledGaussian(
            noise_multiplier=self.histogram.noise_multiplier, sample_rate=1.0, steps=evaluations
        )

    @property
    def epsilon(self) -> float:
        """ε of the whole study for any patient: training and test patients are disjoint."""
        if not self.private:
            return math.inf
        return max(
            epsilon([self.training_event(self.rounds)], self.delta),
            epsilon([self.evaluation_event(self.evaluations)], self.delta),
        )


def histogram_sensitivity(study: Study) -> float:
    """L2 norm of what one patient adds to the released histograms (common/metrics).

    Binary: one unit in one histogram. Multi-class: one unit in the confidence histogram and one in
    each of the K one-against-the-rest histograms, so √(1 + K). A patient's records share its unit.
    """
    return 1.0 if study.objective.task == "binary" else math.sqrt(1 + study.outputs)


def plan_study(study: Study, public_size: int) -> StudyPlan:
    """Calibrate a study at a site that declared `public_size` patients.

    Raises:
        StudyError: if no noise meets the target.
    """
    size = study.public_training_size(public_size)
    training, privacy = study.training, study.privacy
    rate = training.sample_rate or min(1.0, (training.patients_per_step or size) / size)
    steps = training.local_steps or (training.local_epochs or 1) * math.ceil(1 / rate - 1e-9)
    step_noise = histogram_noise = 0.0
    if privacy.epsilon is not None and privacy.delta is not None:
        step_noise = calibrate(privacy.epsilon, privacy.delta, rate, steps * study.algorithm.rounds)
        histogram_noise = calibrate(privacy.epsilon, privacy.delta, 1.0, study.evaluations)
    return StudyPlan(
        step=StepPlan(
            sample_rate=rate,
            clipping_norm=privacy.clipping_norm,
            noise_multiplier=step_noise,
            divisor=max(1.0, rate * size),
            max_records=training.max_records_per_patient,
            average_records=training.records == "mean",
        ),
        steps_per_round=steps,
        rounds=study.algorithm.rounds,
        evaluations=study.evaluations,
        histogram=HistogramPlan(histogram_sensitivity(study), histogram_noise),
        delta=privacy.delta or 0.0,
    )
