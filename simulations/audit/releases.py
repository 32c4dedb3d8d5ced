"""Whether the releases that a certificate lists are whole, and what its plan says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

from common.messages import STATISTICS_ROUND, released
from common.privacy.certificate import Claims, Release
from common.privacy.mechanism import Event, rate_and_steps
from common.study import Study
from simulations.audit.checks import Reason

NOTHING = released({}, {})
LARGEST = 1e15


def release_reasons(claims: Claims, study: Study | None) -> Iterator[Reason]:
    """Whether the list of releases is whole, and each is what the plan says."""
    numbers = [r.round for r in claims.releases]
    if not numbers:
        yield Reason("releases", "nothing was released")
    for before, after in pairwise(numbers):
        if before == after:
            yield Reason("releases", f"round {after} is listed twice")
        elif before > after:
            yield Reason("releases", f"round {after} is listed after round {before}")
    if claims.complete:
        listed = set(numbers)
        missing = list(islice((n for n in _all_rounds(claims) if n not in listed), 6))
        if missing:
            shown = ", ".join(str(n) for n in missing[:5]) + (" …" if len(missing) > 5 else "")
            yield Reason("releases", f"called complete, but lacks round {shown}")
    if len({r.head for r in claims.releases}) != len(numbers):
        yield Reason("ledger", "two releases stand on one entry of the ledger")
    if claims.ledger.sequence < len(numbers):
        yield Reason("ledger", f"{len(numbers)} releases in a ledger of {claims.ledger.sequence} entries")
    evaluates = claims.plan.evaluation is not None or any(r.exact for r in claims.releases)
    for release in claims.releases:
        if release.purpose == "statistics":
            yield from _statistics_reasons(claims, release)
        else:
            yield from _round_reasons(claims, release, study, evaluates)


def _all_rounds(claims: Claims) -> range:
    training = claims.plan.training
    first = STATISTICS_ROUND if claims.plan.statistics or training is None else 1
    return range(first, training.rounds + 2 if training else 1)


def _statistics_reasons(claims: Claims, release: Release) -> Iterator[Reason]:
    plan = claims.plan.statistics
    if release.round != STATISTICS_ROUND or release.training or release.evaluation:
        yield Reason("releases", f"statistics in round {release.round}, or mixed with a round's events")
    if release.exact == (release.statistics is not None):
        yield Reason("releases", "statistics must have an event, or be flagged exact")
    yield from _event_reasons(
        "statistics", release.statistics, None if plan is None else (plan.noise_multiplier, 1.0, 1)
    )


def _round_reasons(claims: Claims, release: Release, study: Study | None, tells: bool) -> Iterator[Reason]:
    number, plan = release.round, claims.plan
    training, evaluation = plan.training, plan.evaluation
    if training is None or not 1 <= number <= training.rounds + 1 or release.statistics:
        yield Reason("releases", f"round {number} is none of the plan's")
        return
    final = number == training.rounds + 1
    noise = training.noise_multiplier
    if not final and noise is not None and release.training is None:
        yield Reason("releases", f"round {number} trained, but lists no event of training")
    trains = None if final or noise is None else (noise, training.sample_rate, training.steps_per_round)
    yield from _event_reasons(f"training in round {number}", release.training, trains)
    scale = None
    if evaluation is not None:
        scale = evaluation.final_noise_multiplier if final else evaluation.noise_multiplier
    yield from _event_reasons(
        f"evaluation in round {number}", release.evaluation, None if scale is None else (scale, 1.0, 1)
    )
    yield from _evaluation_reasons(release, final, study, tells)


def _evaluation_reasons(release: Release, final: bool, study: Study | None, tells: bool) -> Iterator[Reason]:
    """Args:
    tells: the session tells metrics at all; a site's policy may forbid them.
    """
    number, told = release.round, release.evaluation is not None
    expected = final or (study is not None and study.evaluates_in(number))
    if told and release.exact:
        yield Reason("releases", f"metrics of round {number} are both noised and exact")
    if (told or release.exact) and study is not None and not expected:
        yield Reason("releases", f"metrics in round {number}, where the study doesn't evaluate")
    if told or release.exact or not expected:
        return
    if tells:
        yield Reason("releases", f"round {number} evaluates, but lists neither noise nor exact metrics")
    elif final and release.released != NOTHING:
        yield Reason("releases", f"round {number} released what it lists neither as noised nor as exact")


def _event_reasons(
    what: str, event: Event | None, planned: tuple[float, float, int] | None
) -> Iterator[Reason]:
    """Args:
    planned: noise multiplier, sampling rate and steps by the plan; None if it has no such event.
    """
    if event is None:
        return
    if planned is None:
        yield Reason("releases", f"{what}, which is not in the plan")
        return
    told = (event.noise_multiplier, *rate_and_steps(event))
    for name, said, wanted in zip(("noise multiplier", "sampling rate", "steps"), told, planned, strict=True):
        if said != wanted:
            shown = f"{said:.6g}" if said < LARGEST else f"beyond {LARGEST:g}"
            yield Reason("releases", f"{what}: {name} {shown}, {wanted:.6g} by the plan")
