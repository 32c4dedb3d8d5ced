"""A malicious coordinator against one vault: whatever it sends is refused, answered from what was stored, or
costs what the ledger says.

Only bytes go in and bytes come out, so the same attacks run against a vault in this process and against one
behind a socket. Where the site's ledger can be looked at, what it has spent is held against each claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from safetensors.numpy import save

from common.errors import MessageError, Refused
from common.files import canonical_json
from common.messages import (
    HEADER,
    STATISTICS_ROUND,
    Job,
    JobHeader,
    Refusal,
    RefusalHeader,
    Reply,
    ReplyHeader,
    encode,
)
from simulations.audit.attempts import (
    ANSWERED,
    STORED,
    Case,
    Target,
    epsilon_of,
    refused,
    sent,
    spending_of,
)
from simulations.audit.canaries import Canaries
from simulations.audit.isolation import isolation

ROUNDING = 1e-9  # of ε, relative
FIRST_FREE = 4  # the first round that `_rounds` leaves alone; the last one it doesn't


def against(target: Target, who: Canaries | None = None) -> tuple[Case, ...]:
    """Try everything; uses up `target.session`, and no more than it costs.

    Args:
        who: if the site's cohort is one of canaries (and a round one step, so that noise doesn't move the
            parameters meanwhile), also isolate one of them.
    """
    cases = [*_refusals(target), *_rounds(target)]
    if who is not None and target.plan.private and target.plan.steps_per_round == 1:
        cases.append(isolation(target, who, range(FIRST_FREE, target.study.algorithm.rounds)))
    if target.plan.private:  # without a price the number of sessions has no bound
        cases.append(another_session(target))
    return tuple(cases)


def _refusals(target: Target) -> Iterator[Case]:
    """Before anything is spent."""
    malformed, bad = MessageError.code, Refused.code
    for name, tried, request in _malformed(target):
        yield refused(target, name, tried, request, malformed)
    yield refused(
        target, "another-study", "a digest that nobody approved", target.job(1, study="f" * 64),
        "not-approved",
    )  # fmt: skip
    for value in (math.nan, math.inf, -math.inf):
        odd = {n: np.full_like(a, value) for n, a in target.parameters.items()}
        yield refused(
            target,
            f"parameters-of-{value}".replace("--", "-minus-"),
            "in every number",
            target.job(1, odd),
            bad,
        )
    one = {n: np.array(a) for n, a in target.parameters.items()}
    next(iter(one.values())).flat[0] = math.nan
    yield refused(target, "one-nan", "in one number", target.job(1, one), bad)
    yield refused(
        target, "round-too-many", "one after the final evaluation",
        target.job(target.study.algorithm.rounds + 2), bad,
    )  # fmt: skip
    if target.study.private:
        yield refused(
            target, "exact-metrics", "asked of a private study", target.job(1, metrics="exact"), bad
        )
    if target.study.statistics is None:
        yield refused(
            target, "statistics", "that the study doesn't ask for", target.job(STATISTICS_ROUND, {}), bad
        )
    unasked = {"mean": np.zeros(1), "deviation": np.ones(1)}
    told = JobHeader(session=target.session, round=1, study=target.study.digest)
    if target.study.data.scaling != "moments":
        yield refused(
            target, "scaling", "that the study doesn't ask for",
            encode(Job(told, target.parameters, unasked)), bad,
        )  # fmt: skip


def _malformed(target: Target) -> Iterator[tuple[str, str, bytes]]:
    """Name, what is tried, and bytes that are no job."""
    whole = target.job(1)
    random = np.random.default_rng(0)
    yield "no-bytes", "an empty message", b""
    yield "garbage", "random bytes", random.bytes(4096)
    yield "cut-message", "half of a sound one", whole[: len(whole) // 2]
    yield "huge-header", "its length says 2^63", (2**63).to_bytes(8, "little") + whole[8:]
    reply = ReplyHeader(session=target.session, round=1, study=target.study.digest, site="x", weight=1)
    yield "reply", "a message of the wrong kind", encode(Reply(reply, target.parameters, {}))
    refusal = RefusalHeader(site="x", code="refused", message="no")
    yield "refusal", "a message of the wrong kind", encode(Refusal(refusal))
    for field, value in (
        ("epsilon", 100.0), ("noise_multiplier", 0.0), ("clipping_norm", 1e9), ("sample_rate", 1.0),
        ("local_steps", 10**6), ("learning_rate", 1e9), ("seed", 0), ("patients", [0]),
    ):  # fmt: skip
        yield f"other-{field.replace('_', '-')}", "a field that no job has", target.forged({field: value})
    yield "metrics-of-another-kind", "neither private nor exact", target.forged({"metrics": "rows"})
    yield "negative-round", "round -1", target.forged({"round": -1})
    yield "session-name-with-a-path", "../../policy", target.forged({"session": "../../policy"})
    strange = {f"privacy/{n}": a for n, a in target.parameters.items()}
    head = canonical_json(
        {"kind": "job", "session": target.session, "round": 1, "study": target.study.digest}
    )
    yield "arrays-of-another-group", "privacy/…", save(strange, metadata={HEADER: head.decode()})


def _rounds(target: Target) -> Iterator[Case]:
    """What is answered: the session is charged once, and each round has one answer."""
    last = target.study.algorithm.rounds
    first = target.job(1)
    yield _answered(target, "first-round", "as an honest coordinator asks", first, charged=True)
    yield _again(target, "replay", "the first round, the same bytes", first)
    other = {n: a + np.float32(1) for n, a in target.parameters.items()}
    yield refused(
        target, "same-round-other-parameters", "the first round again, to see the same patients twice",
        target.job(1, other), "refused",
    )  # fmt: skip
    yield refused(
        target, "forged-anchor", "a head that the ledger never had",
        target.job(2, anchors={site_of(target, first): "e" * 64}), "ledger-rolled-back",
    )  # fmt: skip
    if last >= 3:
        skipping = target.job(last)
        yield _answered(target, "skipping", f"round {last} after round 1", skipping)
        yield _answered(target, "going-back", f"round 2 after round {last}", target.job(2))
        yield _again(target, "replay-of-the-skipped", f"round {last}, the same bytes", skipping)
    if last >= 4:
        vast = {n: np.full_like(a, 1e30) for n, a in target.parameters.items()}
        yield _answered(target, "parameters-of-1e30", "in every number", target.job(3, vast), may_refuse=True)


def another_session(target: Target) -> Case:
    """The study once more under another name, after its approved session is spent."""
    other = target.session[:60] + "-b"
    return refused(
        target, "another-session", "more sessions than were approved", target.job(1, session=other),
        "budget-exhausted", "refused",
    )  # fmt: skip


def _answered(
    target: Target, name: str, tried: str, request: bytes, *, charged: bool = False, may_refuse: bool = False
) -> Case:
    """A round that the site may answer.

    Args:
        charged: it begins the session, so its whole ε is spent; otherwise nothing more is.
        may_refuse: what diverges is refused, after it was charged.
    """
    before = epsilon_of(target)
    message, outcome = sent(target, request)
    after = epsilon_of(target)
    sound = isinstance(message, Reply) or (may_refuse and isinstance(message, Refusal))
    if isinstance(message, Reply):
        sound = _is_as_planned(target, message)
        outcome = ANSWERED if sound else "answered with numbers or events that the plan doesn't have"
    if before is not None and after is not None:
        cost = (target.plan.epsilon if target.plan.private else 0.0) if charged else 0.0
        sound &= math.isclose(after - before, cost, rel_tol=ROUNDING, abs_tol=ROUNDING)
    return Case(name, tried, outcome, sound, before, after)


def _is_as_planned(target: Target, reply: Reply) -> bool:
    """Whether a reply's numbers are finite and of the model's shapes, and its events those of the plan."""
    header, plan = reply.header, target.plan
    trains = header.round <= plan.rounds
    event = plan.training_event() if plan.private and trains else None
    shapes = {n: a.shape for n, a in target.parameters.items()} if trains else {}
    finite = all(np.isfinite(a).all() for a in (*reply.update.values(), *reply.metrics.values()))
    same = {n: a.shape for n, a in reply.update.items()} == shapes
    return finite and same and header.training == event and (not plan.private or not header.exact)


def _again(target: Target, name: str, tried: str, request: bytes) -> Case:
    """What was answered before: the same bytes, and nothing spent."""
    before = spending_of(target)
    first, second = target.answer(request), target.answer(request)
    after = spending_of(target)
    replied = isinstance(sent(replace(target, answer=lambda _: first), request)[0], Reply)
    same = first == second and replied and before == after
    outcome = STORED if same else "refused" if not replied else "another answer"
    return Case(
        name, tried, outcome, same, before.epsilon if before else None, after.epsilon if after else None
    )


def site_of(target: Target, request: bytes) -> str:
    message, _ = sent(target, request)
    return message.header.site if isinstance(message, Reply | Refusal) else "unknown"
