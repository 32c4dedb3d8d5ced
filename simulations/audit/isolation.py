"""One patient alone has a gradient: the strongest parameters that a coordinator can send.

Secure aggregation would not help against it: the others add exact zeros.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from common.messages import Arrays, Reply
from common.models import parameter_arrays, study_model
from common.study import Study
from simulations.audit.attempts import ANSWERED, Case, Target, epsilon_of, sent
from simulations.audit.canaries import FIRST, HUGE, Canaries

FALSE_ALARM = 1e-4  # of a test on noise
FAR = 1e4  # a logit at which no gradient is left in float32


def isolation(target: Target, who: Canaries, rounds: range) -> Case:
    """Isolate one patient in each of some rounds.

    What protects the patient is the clipping and the noise: the patient's part is C at most, and every
    other number is noise of the claimed deviation (χ², two-sided; a false alarm has probability
    `FALSE_ALARM`). Both together are what the session's ε was computed from.

    Args:
        target: of a study of canaries with one step a round; later ones would start from noise.
        who: in the cohort; the first column with a patient is the victim's.
        rounds: that the session, which has begun, has not used.
    """
    before = epsilon_of(target)
    victim = int(np.flatnonzero(who.present)[0])
    parameters = isolating(target.study, victim)
    tried = "parameters under which one patient alone has a gradient"
    parts, rest = list[np.ndarray](), list[np.ndarray]()
    for number in rounds:
        message, outcome = sent(target, target.job(number, parameters))
        if not isinstance(message, Reply):
            return Case("isolation", tried, outcome, False, before, epsilon_of(target))
        theirs, others = _apart(parameters, message, victim)
        parts.append(theirs)
        rest.append(others)
    after = epsilon_of(target)
    if not parts:
        return Case("isolation", tried, "not tried: no round is left", True, before, after)
    holds, told = _covered(target, np.stack(parts), np.concatenate(rest))
    sound = holds and before == after
    outcome = ANSWERED if sound else "more than the claim"
    return Case("isolation", tried, outcome, sound, before, after, told)


def _covered(target: Target, parts: np.ndarray, rest: np.ndarray) -> tuple[bool, str]:
    """Whether what was seen of an isolated patient is what the session's ε was paid for.

    Args:
        parts: [rounds, numbers], of updates, that the patient moves.
        rest: numbers of updates that nobody moves.
    """
    plan, study = target.plan, target.study
    clipping_norm = plan.step.clipping_norm or 1.0
    scale = plan.step.divisor / (study.training.optimizer.learning_rate * clipping_norm)
    noise = plan.step.noise_multiplier
    ratio = float(np.square(rest * scale / noise).sum()) / rest.size
    p = 2 * min(stats.chi2.cdf(ratio * rest.size, rest.size), stats.chi2.sf(ratio * rest.size, rest.size))
    lengths = np.linalg.norm(parts, axis=1) * scale
    # a vector of length C at most, and noise: the longest that chance allows in all rounds
    most = 1 + noise * math.sqrt(stats.chi2.isf(FALSE_ALARM / len(parts), parts.shape[1]))
    least, most_noise = (
        math.sqrt(float(stats.chi2.ppf(q, rest.size)) / rest.size)
        for q in (FALSE_ALARM / 2, 1 - FALSE_ALARM / 2)
    )
    told = (
        f"in {len(parts)} rounds the patient's part was {lengths.max():.2f} C at most (noise allows "
        f"{most:.2f} C); the noise of the {rest.size} other numbers is {math.sqrt(ratio):.4f} of what is "
        f"claimed (chance allows {least:.4f} to {most_noise:.4f})"
    )
    return bool(p >= FALSE_ALARM and lengths.max() <= most), told


def isolating(study: Study, victim: int) -> dict[str, np.ndarray]:
    """Under these, everybody's output is right beyond any gradient, but the victim's wrong.

    Args:
        study: one of canaries, whose patients all have label 0 and one feature `HUGE` each.
        victim: the patient's column.
    """
    found = {n: np.zeros_like(a) for n, a in parameter_arrays(study_model(study)).items()}
    if study.model.name == "mlp":
        # hidden units pass the victim only; together they lift its output from -FAR to FAR
        found[FIRST][:, victim] = 1 / HUGE
        found["2.weight"][0] = 2 * FAR / found["2.weight"].shape[1]
        found["2.bias"][:] = -FAR
        return found
    found[FIRST][0, victim] = 2 * FAR / HUGE
    found["0.bias"][:] = -FAR
    return found


def _apart(parameters: Arrays, reply: Reply, victim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of an update the numbers that the victim moves, and those that nobody moves, float64.

    Left out is what the victim moves but a millionth, and what float32 rounds off beside a large parameter.
    """
    theirs, others = np.empty(0), []
    for name, array in reply.update.items():
        numbers = array.astype(np.float64)
        if name == FIRST:
            theirs = numbers[:, victim]
            others.append(np.delete(numbers, victim, axis=1).ravel())
        elif name not in parameters or not parameters[name].any():
            others.append(numbers.ravel())
    return theirs, np.concatenate(others)
