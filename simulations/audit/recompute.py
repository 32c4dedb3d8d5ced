"""A second, independent opinion on what a session cost, from the events that its sites sent."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import FedwardError
from common.privacy.accounting import epsilon
from common.privacy.mechanism import EVENT
from server.store import Session, Store
from simulations.audit.second import second_epsilon

ROUNDING = 2e-4  # of what the accountants' grids round upwards
TOLERANCE = 0.02  # of two accountants that both round upwards
CAUTION = 0.12  # fedward's may be above by so much where it falls back to Rényi's bound (tiny δ)


@dataclass(frozen=True)
class Opinion:
    """What one group of a site's patients paid.

    Attributes:
        patients: `training` or `test`, which are disjoint, or all of them.
        claimed: ε that the study promised.
        fedward: ε by fedward's accountant.
        second: ε by the second accountant.
    """

    site: str
    patients: str
    events: int
    claimed: float
    fedward: float
    second: float

    @property
    def sound(self) -> bool:
        """Whether the accountants agree, and neither finds more than was promised."""
        agree = self.second * (1 - CAUTION) <= self.second <= self.fedward * (1 + TOLERANCE) + ROUNDING
        agree &= self.fedward <= self.second * (1 + CAUTION) + 0.01
        return agree and max(self.second, self.fedward) <= self.claimed * (1 + ROUNDING)


def recompute(store: Store, session: Session) -> tuple[Opinion, ...]:
    """ε of every site from the events that it sent, by two accountants.

    Raises:
        FedwardError: if the session promises no privacy, or dp-accounting isn't installed.
    """
    privacy, statistics = session.study.privacy, session.study.statistics
    answers = [a for r in store.rounds(session.id) for a in r.answers if a.outcome == "reply"]
    opinions = []
    for site in sorted({a.site for a in answers}):
        own = [a for a in answers if a.site == site]
        groups = (
            ("training", [a.training for a in own], privacy),
            ("test", [a.evaluation for a in own], privacy),
            ("all, by statistics", [a.statistics for a in own], statistics),
        )
        for patients, told, target in groups:
            events = [EVENT.validate_python(e) for e in told if e]
            if events and target is not None and target.epsilon is not None and target.delta is not None:
                first, second = epsilon(events, target.delta), second_epsilon(events, target.delta)
                opinions.append(Opinion(site, patients, len(events), target.epsilon, first, second))
    if not opinions:
        raise FedwardError(
            f"session {session.id} of study {session.study.name} promises no privacy",
            remedy="nothing to recompute",
        )
    return tuple(opinions)
