"""A study in plain words, for whoever must decide about it."""

from __future__ import annotations

from dataclasses import dataclass

from common.privacy.plan import StudyPlan, plan_study
from common.study import CategoricalColumn, Study


@dataclass(frozen=True)
class Explanation:
    """Attributes:
    lines: one sentence each, in reading order: what is learnt, from what, how, and what leaves.
    """

    lines: tuple[str, ...]


def explain(study: Study, parameters: int) -> Explanation:
    """What a study learns, from what, at what privacy, and what leaves a hospital.

    Args:
        parameters: numbers in the model.
    """
    data, training = study.data, study.training
    classes = " / ".join(c.name for c in data.label.classes)
    rule = {
        "refuse": "is an error",
        "indicator": "is replaced by a public default and flagged",
        "exclude": "leaves its record out",
    }[data.missing]
    split = (
        f"by a secret of the site: {data.split.test_fraction:.0%} of patients test, the others train"
        if data.split.by == "keyed-hash"
        else f"by column {data.split.column!r} ({data.split.test_fraction:.0%} test)"
    )
    steps = f"{training.local_steps} steps" if training.local_steps else f"{training.local_epochs} epochs"
    lines = [
        f"Study {study.name} ({study.title}), digest {study.digest[:12]}.",
        f"Learns: {data.label.column} ({classes}), with {study.model.name}, {parameters:,} numbers.",
        f"From: {_columns(study)}.",
        f"A missing value {rule}, unless its column says otherwise.",
        f"Patients are split {split}.",
        f"Rounds: {study.algorithm.rounds}, each {steps} of {training.optimizer.name} at every site, "
        f"combined by {study.algorithm.name}.",
    ]
    return Explanation((*lines, *_privacy(study)))


def _columns(study: Study) -> str:
    parts = []
    for column in study.data.columns[:40]:
        if isinstance(column, CategoricalColumn):
            parts.append(f"{column.name} ({len(column.codes)} codes)")
        elif column.repeat > 1:
            parts.append(f"{column.name} (x{column.repeat})")
        else:
            parts.append(f"{column.name} [{column.unit}]")
    more = len(study.data.columns) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def _privacy(study: Study) -> list[str]:
    privacy = study.privacy
    if not study.private:
        return [
            "Privacy: NONE. The update of every round leaves as it is, and the metrics are exact.",
            "A deployed site refuses this, unless its policy says that its cohort is public anyway.",
        ]
    return [
        f"Privacy: (ε = {privacy.epsilon:g}, δ = {privacy.delta:g}) for each patient over a session, "
        f"whatever the others' data are; a patient's records count together.",
        f"How: a patient's gradient is clipped to norm {privacy.clipping_norm:g}; the site adds noise.",
        f"Leaves the site: {study.algorithm.rounds} noised updates and {study.evaluations} noised "
        f"histograms of scores ({study.evaluation.bins} bins). Rows, ids and exact counts stay.",
    ]


def explain_cost(study: Study, public_size: int) -> str:
    """What one session costs at a site of that public size, in one sentence.

    Raises:
        StudyError: if no noise meets the study's target there.
    """
    plan: StudyPlan = plan_study(study, public_size)
    step = plan.step
    batch = f"{step.divisor:.0f} patients a step (sampling rate {step.sample_rate:.3g})"
    if not plan.private:
        return f"{plan.rounds * plan.steps_per_round} steps of about {batch}, without privacy"
    return (
        f"ε = {plan.epsilon:.3f} at δ = {plan.delta:g}: {plan.rounds * plan.steps_per_round} steps of about "
        f"{batch}, noise multiplier {step.noise_multiplier:g}; {plan.evaluations} evaluations, noise "
        f"{plan.histogram.noise_multiplier * plan.histogram.sensitivity:.3g} patients a histogram cell"
    )
