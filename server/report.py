"""What a session came to: metrics by site and for all patients, and what each site spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from common.metrics import Measured, measure, merged
from common.privacy.accounting import epsilon
from common.privacy.mechanism import SubsampledGaussian
from server.coordinator import METRICS, part
from server.store import Round, Session, Store


@dataclass(frozen=True)
class SiteReport:
    """Attributes:
    rounds: that the site answered.
    epsilon: per patient, recomputed from the events of the replies that came in time; None without
        privacy. A reply that came too late has cost as much: the site's own ledger counts it.
    measured: the final model on the site's test patients; None if it didn't say.
    """

    site: str
    rounds: int
    epsilon: float | None
    measured: Measured | None


@dataclass(frozen=True)
class SessionReport:
    """Attributes:
    exact: the metrics carry no noise.
    measured: the final model on all sites' test patients.
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def report(store: Store, session: Session) -> SessionReport:
    """The report of a session, finished or not."""
    rounds = store.rounds(session.id)
    study = session.study
    by_site = _evaluated(store, session, rounds)
    names = sorted({a.site for r in rounds for a in r.answers if a.outcome == "reply"})
    evaluated = [r for r in rounds if study.evaluates_in(r.number)]
    return SessionReport(
        session=session.id,
        study=study.name,
        digest=study.digest,
        status=session.status,
        detail=session.detail,
        rounds=min(len(rounds), study.algorithm.rounds),
        delta=study.privacy.delta,
        exact=bool(evaluated) and any(a.exact for a in evaluated[-1].answers),
        sites=tuple(
            SiteReport(
                site=name,
                rounds=sum(a.outcome == "reply" for r in rounds for a in r.answers if a.site == name),
                epsilon=spent(rounds, name, study.privacy.delta) if study.privacy.delta else None,
                measured=measure(by_site[name]) if name in by_site else None,
            )
            for name in names
        ),
        measured=measure(merged(list(by_site.values()))) if by_site else None,
    )


def spent(rounds: Iterable[Round], site: str, delta: float) -> float:
    """ε that a site's answers cost a patient: the larger of training and test patients' (disjoint)."""
    answers = [a for r in rounds for a in r.answers if a.site == site]
    training = [SubsampledGaussian.model_validate(a.training) for a in answers if a.training]
    evaluation = [SubsampledGaussian.model_validate(a.evaluation) for a in answers if a.evaluation]
    return max(epsilon(training, delta), epsilon(evaluation, delta))


def _evaluated(store: Store, session: Session, rounds: tuple[Round, ...]) -> dict[str, Any]:
    """Histograms of the last round that evaluated, by site."""
    for each in reversed(rounds):
        if session.study.evaluates_in(each.number):
            arrays = store.checkpoint(session.id, each.number)
            names = {n.removeprefix(METRICS).split("/")[0] for n in arrays if n.startswith(METRICS)}
            return {name: part(arrays, f"{METRICS}{name}/") for name in sorted(names)}
    return {}
