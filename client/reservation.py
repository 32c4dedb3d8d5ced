"""What one round of a session will cost, as the ledger writes it down before any row is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from common.messages import STATISTICS_ROUND
from common.privacy.filter import rdp
from common.privacy.mechanism import EVENT, Event
from common.privacy.plan import StudyPlan

ROUNDS, STATISTICS = "rounds", "statistics"
PART_OF = (ROUNDS, STATISTICS)
_EVENTS = ("training", "evaluation", "statistics")


@dataclass(frozen=True)
class Reservation:
    """Attributes:
    request: what was asked (`common.messages.asked`).
    public_size: as the site declared it.
    plan: of the whole session.
    training, evaluation, statistics: what this round costs training, test and all patients; None if
        nothing.
    epsilon, delta: what the session's rounds (or its statistics, in round 0) cost in all; None without
        privacy.
    exact: metrics leave without noise.
    protective: noise and sampling come from the operating system, not from a simulation's seed.
    policy: digest of the policy in force.
    withdrawn: digest of the withdrawal list in force.
    split: keyed digest of what decides who trains and who tests.
    """

    session: str
    round: int
    study: str
    request: str
    public_size: int
    plan: StudyPlan
    training: Event | None = None
    evaluation: Event | None = None
    statistics: Event | None = None
    epsilon: float | None = None
    delta: float | None = None
    exact: bool = False
    protective: bool = True
    policy: str = ""
    withdrawn: str = ""
    split: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.session, self.round

    @property
    def part(self) -> str:
        """What the round belongs to: a session's `rounds` and `statistics` are charged apart."""
        return STATISTICS if self.round == STATISTICS_ROUND else ROUNDS

    def planned_like(self, begun: Reservation) -> bool:
        """Whether this round comes from the plan that was charged when a part of its session began."""
        ours = self.plan, self.public_size, self.split
        if ours != (begun.plan, begun.public_size, begun.split):
            return False
        return self.part != begun.part or (self.epsilon, self.delta) == (begun.epsilon, begun.delta)

    def rdp(self, order: float) -> float:
        """Rényi divergence of that order of all that the session's part costs a patient."""
        if self.epsilon is None:
            return 0.0
        if self.part == STATISTICS:
            event = self.plan.statistics_event()
            return rdp(event, order) if event else 0.0
        return rounds_rdp(self.plan, order)

    def body(self) -> dict[str, Any]:
        """As plain values; `Reservation.of` gives it back."""
        value = dict(vars(self))
        for name in _EVENTS:
            value[name] = value[name].model_dump(mode="json") if value[name] else None
        return {**value, "plan": self.plan.as_json()}

    @staticmethod
    def of(body: dict[str, Any]) -> Reservation:
        """Raises:
        KeyError, TypeError, ValueError: if the value is no reservation.
        """
        value = dict(body)
        for name in _EVENTS:
            value[name] = EVENT.validate_python(value[name]) if value[name] else None
        return Reservation(**{**value, "plan": StudyPlan.of(value["plan"])})


def rounds_rdp(plan: StudyPlan, order: float) -> float:
    """Rényi divergence of that order of all rounds of a private session: a patient trains or tests."""
    training = rdp(plan.training_event(plan.rounds), order)
    return max(training, math.fsum(rdp(e, order) for e in plan.evaluation_events()))
