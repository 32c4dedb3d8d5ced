"""What a session came to: metrics by site and for all patients, and what each site spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from common.histograms import merged
from common.messages import Arrays
from common.metrics import (
    CalibrationGroup,
    HorizonMetrics,
    LabelMetrics,
    Measured,
    OperatingPoint,
    at_horizons,
    by_label,
    calibration_curve,
    edges,
    operating_point,
)
from common.privacy.accounting import epsilon
from common.privacy.mechanism import EVENT
from common.privacy.plan import histogram_sensitivity
from common.study import Study
from common.subgroups import Gap, Subgroup, gaps, subgroups
from common.uncertainty import Intervals, estimate, merged_noise
from server.coordinator import METRICS, part
from server.store import Round, Session, SiteAnswer, Store


@dataclass(frozen=True)
class SiteReport:
    """Attributes:
    rounds: that the site answered.
    epsilon: per patient, recomputed from the events of the replies that came in time; None without
        privacy. A reply that came too late has cost as much: the site's own ledger counts it.
    measured: the final model on the site's test patients; None if it didn't say.
    intervals: the error bars of `measured`.
    """

    site: str
    rounds: int
    epsilon: float | None
    measured: Measured | None
    intervals: Intervals | None = None


@dataclass(frozen=True)
class Unanswered:
    """A site, or a node that has not said which it is, whose answers are missing from rounds that counted.

    Attributes:
        rounds: how many of them.
        outcome, detail: of the last one (`SiteAnswer`).
    """

    site: str
    rounds: int
    outcome: str
    detail: str


@dataclass(frozen=True)
class SessionReport:
    """Attributes:
    unanswered: who was asked in rounds that counted, and is missing from some of them.
    exact: the metrics carry no noise.
    measured: the final model on all sites' test patients.
    intervals: the error bars of `measured`.
    operating_points: binary: of all patients, at tenths of the score that are edges of its bins.
    calibration_curve: of all patients; empty unless the label is a class.
    labels: of all patients, each label by itself where there are several.
    horizons: of all patients in survival studies.
    subgroups, gaps: of all patients, in the columns that the study's evaluation names.
    """

    session: str
    study: str
    digest: str
    status: str
    detail: str
    rounds: int
    delta: float | None
    exact: bool
    sites: tuple[SiteReport, ...]
    measured: Measured | None
    intervals: Intervals | None = None
    operating_points: tuple[OperatingPoint, ...] = ()
    calibration_curve: tuple[CalibrationGroup, ...] = ()
    labels: tuple[LabelMetrics, ...] = ()
    horizons: tuple[HorizonMetrics, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()
    gaps: tuple[Gap, ...] = ()
    unanswered: tuple[Unanswered, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def report(store: Store, session: Session) -> SessionReport:
    """The report of a session, finished or not."""
    rounds = store.rounds(session.id)
    study = session.study
    by_site = _evaluated(store, session, rounds)
    names = sorted({a.site for r in rounds for a in r.answers if a.outcome == "reply"})
    evaluated = [r for r in rounds if study.evaluates_in(r.number)]
    noise = _noise(study, evaluated[-1].answers) if evaluated else {}
    together = merged(list(by_site.values())) if by_site else None
    return SessionReport(
        session=session.id,
        study=study.name,
        digest=study.digest,
        status=session.status,
        detail=session.detail,
        rounds=sum(1 <= r.number <= study.algorithm.rounds for r in rounds),
        delta=_delta(study, rounds),
        exact=bool(evaluated) and any(a.exact for a in evaluated[-1].answers),
        unanswered=_unanswered(rounds),
        sites=tuple(
            SiteReport(
                site=name,
                rounds=sum(a.outcome == "reply" for r in rounds for a in r.answers if a.site == name),
                epsilon=spent(rounds, name, study) if study.private else None,
                **_metrics(study, by_site.get(name), noise.get(name, 0.0)),
            )
            for name in names
        ),
        **_metrics(study, together, merged_noise([noise.get(name, 0.0) for name in by_site])),
        **_details(study, together, merged_noise([noise.get(name, 0.0) for name in by_site])),
    )


def _unanswered(rounds: Iterable[Round]) -> tuple[Unanswered, ...]:
    missing: dict[str, list[SiteAnswer]] = {}
    for answer in (a for r in sorted(rounds, key=lambda r: r.number) for a in r.answers):
        if answer.outcome != "reply":
            missing.setdefault(answer.site, []).append(answer)
    return tuple(
        Unanswered(site, len(answers), answers[-1].outcome, answers[-1].detail)
        for site, answers in sorted(missing.items())
    )


def _metrics(study: Study, sums: Arrays | None, noise: float) -> dict[str, Any]:
    if sums is None:
        return {"measured": None}
    found = estimate(study, sums, noise)
    return {"measured": found.measured, "intervals": found.intervals}


def _details(study: Study, sums: Arrays | None, noise: float) -> dict[str, Any]:
    if sums is None:
        return {}
    points = edges(sums["scores"].shape[-1]) if "scores" in sums else ()
    return {
        "operating_points": tuple(operating_point(sums, threshold) for threshold in points),
        "calibration_curve": calibration_curve(sums),
        "labels": by_label(study, sums, noise),
        "horizons": at_horizons(study, sums),
        "subgroups": subgroups(study, sums, noise),
        "gaps": gaps(study, sums, noise),
    }


def _noise(study: Study, answers: Iterable[SiteAnswer]) -> dict[str, float]:
    """Standard deviation of the noise in each cell of a site's histograms; a site without noise is absent."""
    events = {a.site: EVENT.validate_python(a.evaluation) for a in answers if a.evaluation and not a.exact}
    sensitivity = histogram_sensitivity(study)
    return {site: event.noise_multiplier * sensitivity for site, event in events.items()}


def spent(rounds: Iterable[Round], site: str, study: Study) -> float:
    """ε that a site's answers cost a patient: the larger of training and test patients' (disjoint), and
    that of the statistics, which are of all, at the sum of both δ."""
    answers = [a for r in rounds for a in r.answers if a.site == site]
    delta = study.privacy.delta or 0.0
    training = [EVENT.validate_python(a.training) for a in answers if a.training]
    evaluation = [EVENT.validate_python(a.evaluation) for a in answers if a.evaluation]
    paid = max(epsilon(training, delta), epsilon(evaluation, delta))
    statistics = [EVENT.validate_python(a.statistics) for a in answers if a.statistics]
    if study.statistics is None or not statistics:
        return paid
    return paid + epsilon(statistics, study.statistics.delta)


def _delta(study: Study, rounds: Iterable[Round]) -> float | None:
    """δ at which `spent` holds; None without privacy."""
    if study.privacy.delta is None:
        return None
    described = any(a.statistics for r in rounds for a in r.answers)
    return study.privacy.delta + (study.statistics.delta if study.statistics and described else 0.0)


def _evaluated(store: Store, session: Session, rounds: tuple[Round, ...]) -> dict[str, Any]:
    """Histograms of the last round that evaluated, by site."""
    for each in reversed(rounds):
        if session.study.evaluates_in(each.number):
            arrays = store.checkpoint(session.id, each.number)
            names = {n.removeprefix(METRICS).split("/")[0] for n in arrays if n.startswith(METRICS)}
            return {name: part(arrays, f"{METRICS}{name}/") for name in sorted(names)}
    return {}
