"""What a patient took part in, as the site's ledger and withdrawal lists tell; for the site's eyes only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from client.account import Committed, read_account
from client.policy_file import approved_study
from client.settings import SiteFolder
from client.withdrawal import list_of
from common.keys import read_public_key
from common.privacy.accounting import epsilon
from common.study import Study


@dataclass(frozen=True)
class Participation:
    """A session that a patient's records may have entered, if they were in the data then.

    Attributes:
        patient: keyed hash, hexadecimal.
        group: `training`, `test`, or `either` where the study splits by a column.
        rounds: of training before the withdrawal; `evaluations` likewise.
        epsilon, delta: of what left until then; None if some of it left without noise.
    """

    patient: str
    study: str
    session: str
    group: str
    rounds: int
    evaluations: int
    statistics: bool
    epsilon: float | None
    delta: float


def participations(folder: SiteFolder, key: bytes, patients: Iterable[bytes]) -> list[Participation]:
    """Every session in which these patients weren't withdrawn from the start.

    Args:
        key: the site's secret.
        patients: keyed hashes.

    Raises:
        LedgerError: if the ledger's chain is broken.
        SiteError: if a list or an approved study is gone.
    """
    account = read_account(folder.ledger_path, read_public_key(folder.signing_key_path.with_suffix(".pub")))
    answered = [c for c in account.committed.values() if c.released]
    lists = {d: list_of(folder, key, d) for d in {c.reservation.withdrawn for c in answered}}
    found = []
    answered.sort(key=lambda c: c.reservation.key)
    for session, rounds in groupby(answered, key=lambda c: c.reservation.session):
        told = list(rounds)
        study = approved_study(folder, told[0].reservation.study)
        for patient in patients:
            entered = [c for c in told if patient not in lists[c.reservation.withdrawn].patients]
            if entered:
                found.append(_participation(study, session, patient, entered))
    return found


def _participation(study: Study, session: str, patient: bytes, entered: list[Committed]) -> Participation:
    told = [c.reservation for c in entered]
    plan = told[-1].plan
    statistics = [r.statistics for r in told if r.statistics]
    group = "either"
    if study.data.split.column is None:
        tests = int.from_bytes(patient[:8], "big") < int(study.data.split.test_fraction * 2**64)
        group = "test" if tests else "training"
    trained = [r for r in told if 1 <= r.round <= plan.rounds] if group != "test" else []
    evaluated = [r for r in told if r.evaluation or r.exact] if group != "training" else []
    bare = any(r.training is None for r in trained) or any(r.exact for r in evaluated)
    paid = max(
        epsilon([r.training for r in trained if r.training], plan.delta),
        epsilon([r.evaluation for r in evaluated if r.evaluation], plan.delta),
    )
    return Participation(
        patient=patient.hex(),
        study=study.name,
        session=session,
        group=group,
        rounds=len(trained),
        evaluations=len(evaluated),
        statistics=bool(statistics),
        epsilon=None if bare else paid + epsilon(statistics, plan.statistics_delta),
        delta=plan.delta + (plan.statistics_delta if statistics else 0.0),
    )
