"""What a site certifies of a session, from its ledger: public numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.account import Committed
from client.reservation import STATISTICS
from common.errors import SiteError
from common.files import write_atomic
from common.keys import SigningKey
from common.privacy.accounting import epsilon
from common.privacy.certificate import (
    Claims,
    EpsilonClaims,
    EvaluationClaims,
    LedgerClaims,
    PlanClaims,
    Release,
    SoftwareClaims,
    StatisticsClaims,
    TrainingClaims,
    sign,
)
from common.privacy.plan import StudyPlan
from common.software import software
from common.study import Study

ACCOUNTANT = "exact composition of Gaussians, or privacy-loss distributions, upper bound"


@dataclass(frozen=True)
class Issuer:
    """Who certifies.

    Attributes:
        folder: gets each certificate as `SESSION.jws`; None keeps none.
        durable: sync them to disk.
    """

    site: str
    key: SigningKey
    folder: Path | None = None
    durable: bool = True

    def issue(self, study: Study, answered: Sequence[Committed], ledger: LedgerClaims) -> str:
        """Sign what left in a session.

        Args:
            answered: the session's rounds that released something, at least one.
            ledger: where the site's ledger stands.

        Raises:
            SiteError: if nothing was released.
            CertificateError: if it would be too long.
        """
        if not answered:
            raise SiteError("nothing of this session has left the site", remedy="name another session")
        ordered = sorted(answered, key=lambda c: c.reservation.round)
        last = ordered[-1].reservation
        return sign(
            Claims(
                site=self.site,
                session=last.session,
                study=study.digest,
                study_name=study.name,
                public_size=last.public_size,
                issued_at=datetime.now(UTC).isoformat(timespec="seconds"),
                complete=_complete(study, ordered),
                software=SoftwareClaims(**vars(software())),
                plan=_plan(last.plan, ordered),
                releases=tuple(_release(c) for c in ordered),
                delta=last.plan.delta,
                statistics_delta=_statistics_delta(ordered),
                epsilon=_epsilon(ordered),
                accountant=ACCOUNTANT,
                policy=last.policy,
                randomness="operating-system" if all(c.reservation.protective for c in ordered) else "seeded",
                ledger=ledger,
            ),
            self.key,
        )

    def keep(self, session: str, token: str) -> None:
        """Write a certificate whose last release has been committed.

        Raises:
            SiteError: if the file can't be written.
        """
        if self.folder is None:
            return
        path = self.folder / f"{session}.jws"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.durable:
                write_atomic(path, token.encode(), mode=0o644)
            else:
                path.write_bytes(token.encode())
        except OSError as error:
            raise SiteError(f"{path}: {error.strerror}", remedy="check its permissions") from None


def _complete(study: Study, answered: Sequence[Committed]) -> bool:
    rounds = {c.reservation.round for c in answered}
    return rounds >= {*range(1, study.algorithm.rounds + 2)}


def _release(answered: Committed) -> Release:
    told = answered.reservation
    return Release(
        round=told.round,
        purpose="statistics" if told.part == STATISTICS else "round",
        training=told.training,
        evaluation=told.evaluation,
        statistics=told.statistics,
        exact=told.exact,
        released=answered.released,
        head=answered.head,
    )


def _plan(plan: StudyPlan, answered: Sequence[Committed]) -> PlanClaims:
    told = [c.reservation for c in answered]
    training = evaluation = statistics = None
    if any(r.part != STATISTICS for r in told):
        step = plan.step
        training = TrainingClaims(
            sampler="poisson" if plan.private else "shuffled",
            sample_rate=step.sample_rate,
            steps_per_round=plan.steps_per_round,
            rounds=plan.rounds,
            clipping_norm=step.clipping_norm,
            noise_multiplier=step.noise_multiplier or None,
            divisor=step.divisor,
            max_records=step.max_records,
            records="mean" if step.average_records else "sum",
        )
    if any(r.evaluation for r in told):
        evaluation = EvaluationClaims(
            sensitivity=plan.histogram.sensitivity,
            noise_multiplier=plan.histogram.noise_multiplier if plan.evaluations > 1 else None,
            final_noise_multiplier=plan.final_histogram.noise_multiplier,
        )
    if plan.statistics is not None and any(r.statistics for r in told):
        statistics = StatisticsClaims(
            sensitivity=plan.statistics.sensitivity, noise_multiplier=plan.statistics.noise_multiplier
        )
    return PlanClaims(
        unit="patient",
        relation="add-remove",
        training=training,
        evaluation=evaluation,
        statistics=statistics,
    )


def _statistics_delta(answered: Sequence[Committed]) -> float:
    told = any(c.reservation.statistics for c in answered)
    return answered[-1].reservation.plan.statistics_delta if told else 0.0


def _epsilon(answered: Sequence[Committed]) -> EpsilonClaims:
    """Of what left; see `EpsilonClaims`."""
    told = [c.reservation for c in answered]
    plan = told[-1].plan
    training = epsilon([r.training for r in told if r.training], plan.delta) if plan.private else None
    if not any(r.part != STATISTICS for r in told):
        training = 0.0
    exact = any(r.exact for r in told)
    evaluation = None if exact else epsilon([r.evaluation for r in told if r.evaluation], plan.delta)
    statistics = epsilon([r.statistics for r in told if r.statistics], plan.statistics_delta)
    total = None if training is None or evaluation is None else max(training, evaluation) + statistics
    return EpsilonClaims(training=training, evaluation=evaluation, statistics=statistics, total=total)
