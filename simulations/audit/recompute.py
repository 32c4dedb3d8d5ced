"""A second, independent opinion on what a session cost: Google's PLD accountant over the same events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import FedwardError
from common.privacy.accounting import epsilon
from common.privacy.mechanism import SubsampledGaussian
from server.store import Session, Store

ROUNDING = 1e-6
TOLERANCE = 0.02  # of two accountants that both round upwards


@dataclass(frozen=True)
class Opinion:
    """What one group of a site's patients paid.

    Attributes:
        patients: `training` or `test`; the groups are disjoint.
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
        agree = abs(self.fedward - self.second) <= TOLERANCE * max(self.fedward, self.second)
        return (
            agree and self.second <= self.claimed * (1 + 1e-6) and self.fedward <= self.claimed * (1 + 1e-6)
        )


def recompute(store: Store, session: Session) -> tuple[Opinion, ...]:
    """ε of every site from the events that it sent, by two accountants.

    Raises:
        FedwardError: if the study has no privacy target, or dp-accounting isn't installed.
    """
    privacy = session.study.privacy
    if privacy.epsilon is None or privacy.delta is None:
        raise FedwardError(f"study {session.study.name} promises no privacy", remedy="nothing to recompute")
    answers = [a for r in store.rounds(session.id) for a in r.answers if a.outcome == "reply"]
    opinions = []
    for site in sorted({a.site for a in answers}):
        own = [a for a in answers if a.site == site]
        groups = {"training": [a.training for a in own], "test": [a.evaluation for a in own]}
        for patients, told in groups.items():
            events = [SubsampledGaussian.model_validate(e) for e in told if e]
            if events:
                first, second = epsilon(events, privacy.delta), second_epsilon(events, privacy.delta)
                opinions.append(Opinion(site, patients, len(events), privacy.epsilon, first, second))
    return tuple(opinions)


def second_epsilon(events: Sequence[SubsampledGaussian], delta: float) -> float:
    """ε by Google's privacy-loss-distribution accountant (add/remove), rounded pessimistically.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise FedwardError(
            "the second accountant is not installed", remedy="pip install 'fedward[audit]'"
        ) from None
    accountant: Any = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        sampled = gaussian if event.sample_rate == 1 else PoissonSampledDpEvent(event.sample_rate, gaussian)
        accountant.compose(sampled, event.steps)
    return float(accountant.get_epsilon(delta))
