"""A study in plain words, for whoever must decide about it."""

from __future__ import annotations

from dataclasses import dataclass

from common.columns import CategoricalColumn, NumericColumn
from common.privacy.plan import NO_LIMITS, Limits, StudyPlan, plan_study
from common.study import Study


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
    number = data.label.number
    learnt = " / ".join(c.name for c in data.label.classes)
    if data.label.kind == "several":
        learnt = f"{len(data.label.columns)} labels, each yes or no"
    if data.label.kind == "survival":
        learnt = f"time until the event, {len(data.label.edges) - 1} intervals to {data.label.edges[-1]:g}"
        learnt += f" {data.label.unit}"
    if number is not None:
        learnt = f"a number, {number.range[0]:g} to {number.range[1]:g} {number.unit}".removesuffix(" 1")
    rule = {
        "refuse": "is an error",
        "indicator": "is replaced by a public default and flagged",
        "default": "is replaced by a public default",
        "exclude": "leaves its record out",
    }[data.missing]
    split = (
        f"by a secret of the site: {data.split.test_fraction:.0%} of patients test, the others train"
        if data.split.by == "keyed-hash"
        else f"by column {data.split.column!r} ({data.split.test_fraction:.0%} test)"
    )
    steps = _counted(training.local_steps, "step") or _counted(training.local_epochs, "epoch")
    lines = [
        f"Study {study.name} ({study.title}), digest {study.digest[:12]}.",
        f"Learns: {', '.join(data.label.sources[:10])} ({learnt}), with {study.model.name}, {parameters:,} "
        f"numbers.",
        *_beginning(study),
        _loss(study),
        f"From: {_columns(study)}.",
        f"A missing value {rule}, unless its column says otherwise.",
        f"Patients are split {split}.",
        f"Rounds: {study.algorithm.rounds}, each {steps} of {training.optimizer.name} at every site, "
        f"combined by {study.algorithm.name}.",
    ]
    return Explanation((*lines, *_privacy(study)))


def _beginning(study: Study) -> list[str]:
    named, frozen = study.model.initial_weights, study.model.frozen
    lines = []
    if named is not None:
        told = f"{named.label}, " if named.label else ""
        lines.append(f"Begins with weights of a file: {told}SHA-256 {named.sha256}.")
    if frozen:
        lines.append(f"Of these stay as they begin: {', '.join(frozen)}.")
    if lines:
        lines.append(
            "The coordinator sees to that: no site can check it, and its patients' privacy needs none of it."
        )
    return lines


def _counted(number: int | None, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""


def _loss(study: Study) -> str:
    objective, label = study.objective, study.data.label
    of = f" of {', '.join(f'{q:g}' for q in objective.quantiles)}" if objective.quantiles else ""
    scale = ", on the scale of the label's square root" if label.transform == "sqrt" else ""
    return f"Loss: {objective.loss}{of}{scale}."


def _columns(study: Study) -> str:
    parts = []
    for column in study.data.columns[:40]:
        if isinstance(column, CategoricalColumn):
            parts.append(f"{column.name} ({len(column.codes)} codes)")
        elif not isinstance(column, NumericColumn):
            parts.append(f"{column.name} ({column.kind}, {' x '.join(str(n) for n in column.shape)})")
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
    kind = study.data.label.kind
    of = {"number": "errors", "survival": "risks by time"}.get(kind, "scores")
    sums = {"number": ", with their sums", "survival": ", with sums of squared errors"}.get(kind, "")
    if len(study.objective.quantiles) > 1:
        sums += ", with how many lie in the predicted interval and its width"
    if study.evaluation.tolerance is not None:
        sums += f", with how many are predicted to within {study.evaluation.tolerance:.0%}"
    groups = [column.name for column in study.subgroup_columns]
    by = f", also by {' and '.join(groups)}" if groups else ""
    lines = [
        f"Privacy: (ε = {privacy.epsilon:g}, δ = {privacy.delta:g}) for each patient over a session, "
        f"whatever the others' data are; a patient's records count together.",
        f"How: a patient's gradient is clipped to norm {privacy.clipping_norm:g}; the site adds noise.",
        f"Leaves the site: {_counted(study.algorithm.rounds, 'noised update')} and "
        f"{_counted(study.evaluations, 'noised histogram')} of {of} "
        f"({study.evaluation.bins} bins{by}){sums}. Rows, ids and exact counts stay.",
    ]
    if study.statistics is not None:
        asked = study.statistics
        use = "to scale numbers by" if study.data.scaling == "moments" else "to describe the cohort, if asked"
        lines.append(
            f"Also leaves: noised counts, means, variances and histograms of numbers, codes and the label, "
            f"{use}, for (ε = {asked.epsilon:g}, δ = {asked.delta:g}) more."
        )
    return lines


def explain_cost(study: Study, public_size: int, limits: Limits = NO_LIMITS) -> str:
    """What one session costs at a site of that public size, in one sentence.

    Raises:
        StudyError: if no noise meets the study's target there.
    """
    plan: StudyPlan = plan_study(study, public_size, limits)
    step = plan.step
    batch = f"{step.divisor:.0f} patients a step (sampling rate {step.sample_rate:.3g})"
    if not plan.private:
        return f"{plan.rounds * plan.steps_per_round} steps of about {batch}, without privacy"
    final = plan.final_histogram
    cost = (
        f"ε = {plan.epsilon:.3f} at δ = {plan.delta:g}: {plan.rounds * plan.steps_per_round} steps of about "
        f"{batch}, clipping norm {step.clipping_norm:g}, noise multiplier {step.noise_multiplier:g}; "
        f"{_counted(plan.evaluations, 'evaluation')}, "
        f"noise {final.noise_multiplier * final.sensitivity:.3g} patients a histogram cell at the end"
    )
    if plan.statistics is None:
        return cost
    noise = plan.statistics.noise_multiplier * plan.statistics.sensitivity
    return (
        f"{cost}; statistics, once, ε = {plan.statistics_epsilon:.3f} at δ = {plan.statistics_delta:g}, "
        f"noise {noise:.3g} patients a cell"
    )
