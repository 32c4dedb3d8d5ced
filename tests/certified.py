"""Sound certificates that the tests forge, and a way to sign what no honest site would."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small import study

from common.files import canonical_json
from common.keys import SigningKey
from common.messages import released
from common.privacy.accounting import epsilon
from common.privacy.certificate import Claims
from common.privacy.mechanism import EVENT
from common.privacy.plan import Limits, StudyPlan, plan_study
from common.study import Study
from simulations.audit.transcript import Received, Transcript

PUBLIC_SIZE = 50
STUDY = study(
    training={"sample_rate": None, "patients_per_step": 10},
    evaluation={"every": 1, "final_share": 0.5},
    statistics={"epsilon": 0.5, "delta": 1e-4},
)
PUBLIC = study(training={"sample_rate": None, "patients_per_step": 10}, privacy={"mode": "none"})


def key(number: int = 1) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def claims(
    wanted: Study = STUDY,
    rounds: Sequence[int] | None = None,
    *,
    site: str = "north",
    session: str = "one",
    exact: bool = False,
    evaluates: bool = True,
    size: int = PUBLIC_SIZE,
    limits: Limits | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """What an honest site claims, as JSON values.

    Args:
        rounds: answered; None: all, with the statistics if the study asks for them.
        exact: metrics leave without noise.
        evaluates: the site's policy lets metrics leave.
    """
    plan = plan_study(wanted, size, limits or Limits())
    if rounds is None:
        rounds = range(0 if wanted.statistics else 1, plan.rounds + 2)
    exact = exact or not plan.private
    releases = [_release(wanted, plan, n, session, exact=exact, evaluates=evaluates) for n in rounds]
    parts = [_plan(plan, releases), _epsilons(plan, releases)]
    value: dict[str, Any] = {
        "format": 1,
        "site": site,
        "session": session,
        "study": wanted.digest,
        "study_name": wanted.name,
        "public_size": size,
        "issued_at": "2026-01-31T12:00:00+00:00",
        "complete": set(rounds) >= set(range(1, plan.rounds + 2)),
        "software": {"version": "0.1.0", "package": digest("package")},
        "plan": parts[0],
        "releases": releases,
        "delta": plan.delta,
        "statistics_delta": plan.statistics_delta if 0 in rounds else 0.0,
        "epsilon": parts[1],
        "accountant": "exact composition of Gaussians, or privacy-loss distributions, upper bound",
        "policy": digest("policy"),
        "randomness": "operating-system",
        "ledger": {"sequence": 3 * len(releases), "head": digest(f"{site} {3 * len(releases)}")},
    }
    value.update(changes)
    return json.loads(canonical_json(Claims.model_validate(value).model_dump(mode="json")))


def _release(
    wanted: Study, plan: StudyPlan, number: int, session: str, *, exact: bool, evaluates: bool
) -> dict[str, Any]:
    tells = number > 0 and evaluates and wanted.evaluates_in(number)
    trains = 1 <= number <= plan.rounds
    nothing = not trains and not tells and number > 0
    event = {
        "training": plan.training_event() if trains and plan.private else None,
        "evaluation": plan.evaluation_event(number) if tells and not exact else None,
        "statistics": plan.statistics_event() if number == 0 else None,
    }
    return {
        "round": number,
        "purpose": "round" if number else "statistics",
        **{name: e.model_dump(mode="json") if e else None for name, e in event.items()},
        "exact": exact and tells,
        "released": released({}, {}) if nothing else digest(f"numbers {session} {number}"),
        "head": digest(f"head {session} {number}"),
    }


def _plan(plan: StudyPlan, releases: list[dict[str, Any]]) -> dict[str, Any]:
    step, statistics = plan.step, plan.statistics
    value: dict[str, Any] = {"unit": "patient", "relation": "add-remove"}
    value |= {"training": None, "evaluation": None, "statistics": None}
    if any(r["round"] for r in releases):
        value["training"] = {
            "sampler": "poisson" if plan.private else "shuffled",
            "sample_rate": step.sample_rate,
            "steps_per_round": plan.steps_per_round,
            "rounds": plan.rounds,
            "clipping_norm": step.clipping_norm,
            "noise_multiplier": step.noise_multiplier or None,
            "divisor": step.divisor,
            "max_records": step.max_records,
            "records": "mean" if step.average_records else "sum",
        }
    if any(r["evaluation"] for r in releases):
        value["evaluation"] = {
            "sensitivity": plan.histogram.sensitivity,
            "noise_multiplier": plan.histogram.noise_multiplier if plan.evaluations > 1 else None,
            "final_noise_multiplier": plan.final_histogram.noise_multiplier,
        }
    if statistics is not None and any(r["statistics"] for r in releases):
        value["statistics"] = {
            "sensitivity": statistics.sensitivity,
            "noise_multiplier": statistics.noise_multiplier,
        }
    return value


def _epsilons(plan: StudyPlan, releases: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [r["round"] for r in releases]
    trained = sum(1 <= n <= plan.rounds for n in numbers)
    training = epsilon([plan.training_event(trained)], plan.delta) if plan.private and trained else 0.0
    evaluations = [plan.evaluation_event(r["round"]) for r in releases if r["evaluation"]]
    evaluation = epsilon(evaluations, plan.delta)
    told = plan.statistics_epsilon if 0 in numbers else 0.0
    if not plan.private and any(numbers):
        return {"training": None, "evaluation": None, "statistics": told, "total": None}
    if any(r["exact"] for r in releases):
        return {"training": training, "evaluation": None, "statistics": told, "total": None}
    total = max(training, evaluation) + told
    return {"training": training, "evaluation": evaluation, "statistics": told, "total": total}


def base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def header_of(signer: SigningKey) -> dict[str, Any]:
    """RFC 7515 and 8037, written down anew."""
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": base64url(signer.public.raw)}
    return {"alg": "EdDSA", "typ": "fedward-certificate+jws", "jwk": jwk}


def token(
    value: dict[str, Any] | bytes, signer: SigningKey | None = None, header: dict[str, Any] | None = None
) -> str:
    """A compact JWS over any content, made without the library that reads it."""
    signer = signer or key()
    payload = value if isinstance(value, bytes) else canonical_json(value)
    first = canonical_json(header_of(signer) if header is None else header)
    content = f"{base64url(first)}.{base64url(payload)}"
    return f"{content}.{base64url(signer.native.sign(content.encode()))}"


def transcript(*values: dict[str, Any], wanted: Study = STUDY, **keys: SigningKey) -> Transcript:
    """What a coordinator received if these claims of one session are true."""
    return Transcript(
        session=values[0]["session"],
        study=wanted.digest,
        received={v["site"]: tuple(_received(r, wanted) for r in v["releases"]) for v in values},
        keys={site: frozenset({k.public}) for site, k in keys.items()},
    )


def _received(release: dict[str, Any], wanted: Study) -> Received:
    events = {n: release[n] for n in ("training", "evaluation", "statistics")}

    return Received(
        round=release["round"],
        **{n: EVENT.validate_python(e) if e else None for n, e in events.items()},
        exact=release["exact"],
        released=release["released"],
        head=release["head"],
        weight=wanted.public_training_size(PUBLIC_SIZE),
    )
