"""Sound runs: the audit of a site that does what it claims, many times over. How often is it suspected?

Every run has fresh noise and other patients. Tests have a stated rate of false alarms, and bounds a stated
confidence; what goes beyond them here, as far as chance lets us tell, would be a fault of the audit itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scipy import stats

from common.errors import StudyError
from common.study import Study
from simulations.audit.conformance import FALSE_ALARM
from simulations.audit.lower_bound import CONFIDENCE, REFUTATION
from simulations.audit.run import SHORT, Audit, Size, audit

LEAST_P = 1e-3  # of a count; rarer, it is no chance


@dataclass(frozen=True)
class Count:
    """How often something happened that chance allows.

    Attributes:
        of: times that it could have happened.
        rate: at which it happens at most, if the site and the audit are sound.
    """

    what: str
    count: int
    of: int
    rate: float

    @property
    def p(self) -> float:
        """Probability of so many or more at this rate, independent of each other."""
        return float(stats.binom.sf(self.count - 1, self.of, self.rate))

    @property
    def sound(self) -> bool:
        return self.p >= LEAST_P


@dataclass(frozen=True)
class SoundRuns:
    """What came of many audits of one study.

    Attributes:
        alarms: each run's checks that raised one, `site: claim`.
        broken: claims that hold exactly or not at all (finite differences, the vault's answers to a malicious
            coordinator), and didn't.
        seconds: of each run.
    """

    study: Study
    counts: tuple[Count, ...]
    alarms: tuple[tuple[str, ...], ...]
    broken: tuple[str, ...]
    seconds: tuple[float, ...]

    @property
    def sound(self) -> bool:
        return not self.broken and all(count.sound for count in self.counts)

    def as_json(self) -> dict[str, Any]:
        return {
            "study": {"name": self.study.name, "digest": self.study.digest},
            "runs": len(self.seconds),
            "sound": self.sound,
            "least_p": LEAST_P,
            "counts": [{**vars(c), "p": c.p, "sound": c.sound} for c in self.counts],
            "alarms": [list(each) for each in self.alarms],
            "broken": list(self.broken),
            "seconds": [round(each, 1) for each in self.seconds],
        }


def sound_runs(
    study: Study,
    public_size: int,
    runs: int,
    *,
    size: Size = SHORT,
    done: Callable[[int, Audit], None] = lambda number, found: None,
) -> SoundRuns:
    """Audit a study again and again.

    Args:
        public_size: see `audit`.
        done: called after each run with its number, from 1.

    Raises:
        StudyError: if there is nothing to audit.
    """
    if runs < 1:
        raise StudyError(f"{runs} runs", remedy="ask for one at least")
    found = []
    for number in range(1, runs + 1):
        found.append(audit(study, public_size, size=size, seed=number))
        done(number, found[-1])
    return counted(study, found)


def counted(study: Study, found: list[Audit]) -> SoundRuns:
    """What happened in these audits of one study."""
    bounds = [bound for each in found for bound in each.bounds]
    exact = [(d.claim, d.sound) for each in found for d in each.differences]
    exact += [(case.name, case.sound) for each in found for case in each.cases]
    slack = 1 + 1e-3  # of the two accountants
    above = {
        name: sum(getattr(b, field) > b.claimed * slack for b in bounds)
        for name, field in (
            ("by trade-off", "by_trade_off"), ("by one run", "one_run"), ("by the noise", "by_noise"),
        )
    }  # fmt: skip
    unsure, alarmed = 1 - CONFIDENCE, sum(not each.conformance.sound for each in found)
    return SoundRuns(
        study=study,
        counts=(
            Count("audits with an alarm", alarmed, len(found), FALSE_ALARM),
            Count("claims refuted", sum(b.refuted for b in bounds), len(bounds), 1 - REFUTATION),
            *(Count(f"bounds {name} above ε", n, len(bounds), unsure) for name, n in above.items()),
            Count(
                "bounds from the final model above ε",
                sum(not each.final_model.sound for each in found), len(found), unsure,
            ),
        ),
        alarms=tuple(tuple(f"{c.site}: {c.name}" for c in each.conformance.alarms) for each in found),
        broken=tuple(sorted({name for name, sound in exact if not sound})),
        seconds=tuple(each.seconds for each in found),
    )  # fmt: skip
