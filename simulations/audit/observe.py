"""What a coordinator sees of a site, round after round, in the mechanism's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from client.door import Answer
from client.rowwise import CLIPPING_MARGIN
from common.errors import FedwardError
from common.messages import Arrays, Job, JobHeader, Reply, decode, encode
from common.privacy.plan import StudyPlan
from common.study import Study
from simulations.audit.canaries import WIDE, WIDE_PATIENTS, Canaries

CLIPPED = 1.0 - CLIPPING_MARGIN  # of C: what a clipped patient adds


class Gauge(Protocol):
    """Where in an update each canary shows.

    Attributes:
        parameters: the crafted model that is sent in each round.
        share: of a clipped canary's length that lies in its own column.
    """

    @property
    def parameters(self) -> Arrays: ...

    @property
    def share(self) -> float: ...

    def read(self, sums: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The part along each column's direction [columns], and everything else in which noise alone
        should be; `sums`, name → float64 as the parameter, may be used up."""


@dataclass(frozen=True)
class Observed:
    """A site's updates as noised sums over patients, in units of the clipping norm.

    Attributes:
        plan: that the site was approved for; the claim.
        who: in the cohort.
        amplitude: what a canary adds in its column for each step that it takes part in.
        along: float64 [rounds, columns]: the part along each canary's direction; noise has variance
            steps · noise_multiplier².
        beside: tensor → float64 [rounds, numbers]: everything else, where noise alone must be.
        wide: float64 [rounds, patients, columns]: of the wide patients, as `along`.
        unasked: names of arrays that no parameter of the model has.
        histograms: name → float64 [cells], of the final evaluation.
    """

    site: str
    plan: StudyPlan
    who: Canaries
    amplitude: float
    along: np.ndarray
    beside: dict[str, np.ndarray]
    wide: np.ndarray
    unasked: tuple[str, ...]
    histograms: dict[str, np.ndarray]

    @property
    def steps(self) -> int:
        return self.plan.steps_per_round

    @property
    def noise(self) -> float:
        """Standard deviation of a round's noise, in units of C."""
        return float(self.plan.step.noise_multiplier * np.sqrt(self.steps))


def observe(
    answer: Answer,
    study: Study,
    plan: StudyPlan,
    who: Canaries,
    gauge: Gauge,
    session: str,
    rounds: int | None = None,
) -> Observed:
    """Ask a vault for the rounds of a session, always from the same crafted parameters.

    Args:
        gauge: made for this study and these canaries.
        rounds: fewer than the study's; then without the final evaluation.

    Raises:
        FedwardError: if the site refuses.
    """
    parameters = gauge.parameters
    along, beside = list[np.ndarray](), dict[str, list[np.ndarray]]()
    clipping_norm = plan.step.clipping_norm or 1.0
    scale = plan.step.divisor / (study.training.optimizer.learning_rate * clipping_norm)
    count = study.algorithm.rounds if rounds is None else rounds
    site, unasked, wide = "", set[str](), list[np.ndarray]()
    for number in range(1, count + 1):
        reply = _asked(answer, study, session, number, parameters)
        site = reply.header.site
        sums = {name: -scale * array.astype(np.float64) for name, array in reply.update.items()}
        unasked |= sums.keys() - parameters.keys()
        columns, rest = gauge.read({name: array for name, array in sums.items() if name not in unasked})
        narrow = len(who.present)
        along.append(columns[:narrow])
        wide.append(columns[narrow:].reshape(WIDE_PATIENTS, WIDE))
        for name, array in rest.items():
            if array.size:
                beside.setdefault(name, []).append(array.ravel())
    histograms: dict[str, np.ndarray] = {}
    if rounds is None:
        reply = _asked(answer, study, session, count + 1, parameters)
        histograms = {name: np.asarray(array) for name, array in reply.metrics.items()}
    rows = {name: np.stack(found) for name, found in beside.items()}
    return Observed(
        site,
        plan,
        who,
        CLIPPED * gauge.share,
        np.stack(along),
        rows,
        np.stack(wide),
        tuple(sorted(unasked)),
        histograms,
    )


def _asked(answer: Answer, study: Study, session: str, number: int, parameters: Arrays) -> Reply:
    header = JobHeader(session=session, round=number, study=study.digest)
    message = decode(answer(encode(Job(header, parameters))))
    if not isinstance(message, Reply):
        told = getattr(message, "header", None)
        raise FedwardError(
            f"the site refuses to be audited: {getattr(told, 'message', 'no answer')}",
            remedy="approve the audit's study at that site",
        )
    return message
