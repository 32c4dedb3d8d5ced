"""What the coordinator received in a session: the other side of what sites certify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from common.errors import CertificateError, StudyFailed
from common.keys import PublicKey
from common.privacy.certificate import read_certificate
from common.privacy.mechanism import EVENT, Event
from server.store import SiteAnswer, Store


@dataclass(frozen=True)
class Received:
    """One answer of a site.

    Attributes:
        round: 0 = statistics.
        training, evaluation, statistics: what the answer said it cost.
        released: digest, made by the coordinator, of the arrays that came; empty if none was made.
        head: of the site's ledger, as it came with the answer; empty if none came.
        weight: training patients that the site's public size stands for; 0 if none was told.
    """

    round: int
    training: Event | None = None
    evaluation: Event | None = None
    statistics: Event | None = None
    exact: bool = False
    released: str = ""
    head: str = ""
    weight: int = 0


@dataclass(frozen=True)
class Transcript:
    """Attributes:
    study: digest.
    received: site → its answers in order of their rounds.
    keys: site → the keys of all certificates, of any session, that the coordinator holds of it.
    """

    session: str
    study: str
    received: Mapping[str, tuple[Received, ...]]
    keys: Mapping[str, frozenset[PublicKey]] = field(default_factory=dict)


def transcript_of(store: Store, session: str) -> Transcript:
    """What a coordinator's store tells of a session.

    Raises:
        StudyFailed: if there is no such session, or an answer in it isn't readable.
    """
    received: dict[str, list[Received]] = {}
    for each in store.rounds(session):
        for answer in each.answers:
            if answer.outcome == "reply":
                received.setdefault(answer.site, []).append(_received(session, each.number, answer))
    return Transcript(
        session=session,
        study=store.session(session).study.digest,
        received={site: tuple(answers) for site, answers in received.items()},
        keys=_keys(store),
    )


def _received(session: str, number: int, answer: SiteAnswer) -> Received:
    try:
        return Received(
            round=number,
            training=_event(answer.training),
            evaluation=_event(answer.evaluation),
            statistics=_event(answer.statistics),
            exact=answer.exact,
            released=answer.released,
            head=answer.head,
            weight=answer.weight,
        )
    except ValidationError:
        raise StudyFailed(
            f"session {session}, round {number}: the store holds no readable events of {answer.site}",
            remedy="read it with the version of fedward that wrote it",
        ) from None


def _event(value: dict[str, Any] | None) -> Event | None:
    return None if value is None else EVENT.validate_python(value)


def _keys(store: Store) -> dict[str, frozenset[PublicKey]]:
    keys: dict[str, frozenset[PublicKey]] = {}
    for session in store.sessions():
        for site, token in store.certificates(session.id).items():
            try:
                keys[site] = keys.get(site, frozenset()) | {read_certificate(token).key}
            except CertificateError:
                continue  # what is no certificate pins no key
    return keys
