"""What a coordinator tries against a vault, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.numpy import save

from client.account import Spending
from client.door import Answer
from common.errors import MessageError
from common.files import canonical_json
from common.messages import HEADER, Arrays, Job, JobHeader, Refusal, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.privacy.plan import StudyPlan
from common.study import Study

Spent = Callable[[], Spending]

STORED, ANSWERED = "stored reply", "within the claim"


@dataclass(frozen=True)
class Case:
    """One thing that a coordinator tried.

    Attributes:
        name: stable, for programs.
        tried: for people.
        outcome: `refused: CODE`, `stored reply`, `within the claim`, or what else happened.
        sound: whether that is what the site promises.
        before, after: ε that the site's ledger has spent on the study; None if it can't be looked at.
        told: what was measured.
    """

    name: str
    tried: str
    outcome: str
    sound: bool
    before: float | None = None
    after: float | None = None
    told: str = ""

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Target:
    """A vault under attack.

    Attributes:
        answer: what a coordinator reaches.
        session: of its own; nobody may have begun it before.
        spent: what the site's ledger says of the study; None from outside.
    """

    answer: Answer
    study: Study
    plan: StudyPlan
    session: str
    spent: Spent | None = None

    @property
    def parameters(self) -> Arrays:
        """As the study starts."""
        return parameter_arrays(study_model(self.study))

    def job(self, number: int, parameters: Arrays | None = None, **header: Any) -> bytes:
        """A well-formed request, of this study and session unless `header` says otherwise."""
        told = {"session": self.session, "study": self.study.digest, **header}
        arrays = self.parameters if parameters is None else parameters
        return encode(Job(JobHeader(round=number, **told), arrays))

    def forged(self, header: Mapping[str, Any], arrays: Arrays | None = None) -> bytes:
        """A request with a header that `common.messages` would not write."""
        told = {"kind": "job", "session": self.session, "round": 1, "study": self.study.digest, **header}
        given = self.parameters if arrays is None else arrays
        named = {f"parameters/{name}": array for name, array in given.items()}
        return save(named, metadata={HEADER: canonical_json(told).decode()})


def refused(target: Target, name: str, tried: str, request: bytes, *codes: str) -> Case:
    """Send what must be refused, and must cost nothing.

    Args:
        codes: of which the refusal must have one; any if none is given.
    """
    before = epsilon_of(target)
    _, outcome = sent(target, request)
    after = epsilon_of(target)
    known = outcome.startswith("refused: ") and (not codes or outcome.removeprefix("refused: ") in codes)
    return Case(name, tried, outcome, known and before == after, before, after)


def sent(target: Target, request: bytes) -> tuple[Job | Reply | Refusal | None, str]:
    """The answer, and its name."""
    try:
        message = decode(target.answer(request))
    except MessageError:
        return None, "an answer that is no message"
    if isinstance(message, Refusal):
        return message, f"refused: {message.header.code}"
    return message, "answered"


def spending_of(target: Target) -> Spending | None:
    """What the site's ledger has spent on the study; None from outside."""
    return None if target.spent is None else target.spent()


def epsilon_of(target: Target) -> float | None:
    """The ε of it."""
    found = spending_of(target)
    return None if found is None else found.epsilon
