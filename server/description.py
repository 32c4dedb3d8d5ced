"""A cohort's description, from the statistics that sites sent in a session."""

from __future__ import annotations

from dataclasses import dataclass

from common.console import Speaker
from common.errors import StudyFailed
from common.messages import STATISTICS_ROUND
from common.statistics import NOTE, Description, describe
from server.coordinator import noised_sums
from server.store import Store


@dataclass(frozen=True)
class Described:
    """Attributes:
    sites: who answered; `refused` says why others did not.
    """

    session: str
    sites: tuple[str, ...]
    refused: tuple[str, ...]
    description: Description


def description_of(store: Store, session: str, minimum_patients: int) -> Described:
    """All sites' statistics of a session, together.

    Raises:
        StudyFailed: if the session has none.
    """
    asked = next((r for r in store.rounds(session) if r.number == STATISTICS_ROUND), None)
    if asked is None:
        raise StudyFailed(f"session {session} has no statistics", remedy="run: fedward-server describe")
    study = store.session(session).study
    sums, noise = noised_sums(study, asked, store.checkpoint(session, STATISTICS_ROUND))
    return Described(
        session=session,
        sites=tuple(a.site for a in asked.answers if a.outcome == "reply"),
        refused=tuple(f"{a.site}: {a.detail}" for a in asked.answers if a.outcome != "reply"),
        description=describe(study, sums, noise, minimum_patients),
    )


def show_description(speaker: Speaker, store: Store, session: str, minimum_patients: int) -> None:
    """The combined table, for people and programs."""
    found = description_of(store, session, minimum_patients)
    study = store.session(session).study
    header, rows = found.description.rows()
    asked = study.statistics
    cost = f"ε = {asked.epsilon:g}, δ = {asked.delta:g} a patient" if asked else ""
    speaker.say(study.title)
    speaker.table(f"{len(found.sites)} sites together; cost at most {cost}", header, rows)
    speaker.say(f"{NOTE}.")
    for reason in found.refused:
        speaker.say(f"not in it: {reason}")
    speaker.answer(
        {
            "session": session,
            "sites": list(found.sites),
            "refused": list(found.refused),
            **found.description.as_json(),
        }
    )
