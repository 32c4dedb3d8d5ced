"""What a site signs about one session: everything that an outsider needs to recompute its cost.

A certificate is a JWS (RFC 7515) in compact form, signed with EdDSA over Ed25519 (RFC 8037); its payload
is canonical JSON. There is one way to write a token down: any other encoding of the same content is
refused, and so is any header that would name another algorithm or tell where to find a key.

Nothing in it depends on the site's private number of patients, or on any patient.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from jwt import PyJWS
from jwt.exceptions import InvalidTokenError
from jwt.utils import base64url_decode, base64url_encode
from pydantic import AfterValidator, Field

from common.errors import CertificateError
from common.fields import Digest, Positive, Slug
from common.files import Strict, canonical_json, validated
from common.keys import PublicKey, SigningKey
from common.messages import MAX_CERTIFICATE_CHARACTERS, SessionId
from common.privacy.mechanism import Event, Noise

ALGORITHM = "EdDSA"
TYPE = "fedward-certificate+jws"
KEY_BYTES, SIGNATURE_CHARACTERS = 32, 86
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_REMEDY = "ask the site for its certificate again"


def _moment(text: str) -> str:
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() != timedelta(0) or moment.isoformat(timespec="seconds") != text:
        raise ValueError("must be a date and time in UTC, like 2026-01-31T12:00:00+00:00")
    return text


Count = Annotated[int, Field(ge=1, le=10**12)]
Moment = Annotated[str, Field(max_length=25), AfterValidator(_moment)]
Line = Annotated[str, Field(pattern=r"^[ -~]{1,200}$")]
Rate = Annotated[float, Field(gt=0, le=1)]
Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Delta = Annotated[float, Field(ge=0, lt=1)]


class SoftwareClaims(Strict):
    """Attributes:
    version: of fedward.
    package: digest of the installed package's files (common/software).
    """

    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!_-]{1,64}$")]
    package: Digest


class TrainingClaims(Strict):
    """The steps of a round, as in `common.privacy.plan.StepPlan`.

    Attributes:
        sampler: `poisson`: every patient takes part in a step independently with `sample_rate`;
            `shuffled`: ordinary mini-batches, which only a study without privacy uses.
        clipping_norm, noise_multiplier: None without privacy.
        divisor: what a noised sum is divided by.
    """

    sampler: Literal["poisson", "shuffled"]
    sample_rate: Rate
    steps_per_round: Count
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    clipping_norm: Positive | None
    noise_multiplier: Noise | None
    divisor: Positive
    max_records: Count
    records: Literal["mean", "sum"]


class EvaluationClaims(Strict):
    """Noised histograms of the test patients' scores.

    Attributes:
        sensitivity: L2 norm of what one patient adds to them.
        noise_multiplier: noise standard deviation / sensitivity, while the study trains; None if it
            evaluates at its end only.
        final_noise_multiplier: the same for the final model.
    """

    sensitivity: Positive
    noise_multiplier: Noise | None
    final_noise_multiplier: Noise


class StatisticsClaims(Strict):
    """The cohort's noised statistics, released once, as round 0.

    Attributes:
        sensitivity: L2 norm of what one patient adds to them.
        noise_multiplier: noise standard deviation / sensitivity.
    """

    sensitivity: Positive
    noise_multiplier: Noise


class PlanClaims(Strict):
    """What the session does; None for a part that it doesn't have.

    Attributes:
        training: None in a session that only describes cohorts.
        evaluation: None if nothing noised is told of the test patients.
        statistics: None if the session has none, or exact ones.
    """

    unit: Literal["patient"]
    relation: Literal["add-remove"]
    training: TrainingClaims | None
    evaluation: EvaluationClaims | None
    statistics: StatisticsClaims | None


class Release(Strict):
    """One answer that left the site.

    Attributes:
        round: 0 = statistics; 1 … rounds trains; rounds + 1 evaluates the final model only.
        training, evaluation, statistics: what it cost; None if nothing of that kind left, or without
            noise.
        exact: metrics or statistics left without noise, because the policy calls the cohort public.
        released: digest of the arrays that left.
        head: the ledger's head that was told with the answer.
    """

    round: Annotated[int, Field(ge=0, le=1_000_000)]
    purpose: Literal["round", "statistics"]
    training: Event | None
    evaluation: Event | None
    statistics: Event | None
    exact: bool
    released: Digest
    head: Digest


class EpsilonClaims(Strict):
    """ε of the releases by the site's accountant; None = no bound, as something left without noise.

    Attributes:
        training, evaluation: of training and of test patients, at `delta`.
        statistics: of any patient, at `statistics_delta`.
        total: max(training, evaluation) + statistics, at `delta` + `statistics_delta`: training and test
            patients are disjoint, and the statistics are of both (basic composition).
    """

    training: Bound | None
    evaluation: Bound | None
    statistics: Bound | None
    total: Bound | None


class LedgerClaims(Strict):
    """Attributes:
    sequence, head: number and hash of the last ledger entry that the certificate covers.
    """

    sequence: Count
    head: Digest


class Claims(Strict):
    """What a certificate says.

    Attributes:
        study: digest of the study file.
        public_size: patients that the site declared; sampling rate and divisor follow from it.
        complete: every round of the session has been answered.
        policy: digest of the site's policy in force.
        randomness: where noise and sampling came from; `seeded` noise can be recomputed, and protects
            nobody.
    """

    format: Literal[1] = 1
    site: Slug
    session: SessionId
    study: Digest
    study_name: Slug
    public_size: Count
    issued_at: Moment
    complete: bool
    software: SoftwareClaims
    plan: PlanClaims
    releases: tuple[Release, ...]
    delta: Delta
    statistics_delta: Delta
    epsilon: EpsilonClaims
    accountant: Line
    policy: Digest
    randomness: Literal["operating-system", "seeded"]
    ledger: LedgerClaims


@dataclass(frozen=True)
class Certificate:
    """Claims whose signature holds.

    Attributes:
        key: whose signature it is. That it is the site's key is not said by the certificate.
        token: as it was signed.
    """

    claims: Claims
    key: PublicKey
    token: str


def sign(claims: Claims, key: SigningKey) -> str:
    """A certificate as a compact JWS.

    Raises:
        CertificateError: if it is longer than a reader takes.
    """
    token = PyJWS(algorithms=[ALGORITHM]).encode(
        canonical_json(claims.model_dump(mode="json")),
        key.native,
        algorithm=ALGORITHM,
        headers={"typ": TYPE, "jwk": _jwk(key.public)},
    )
    if len(token) > MAX_CERTIFICATE_CHARACTERS:
        raise CertificateError(
            f"a certificate of {len(claims.releases)} releases is longer than a reader takes",
            remedy="split the study into sessions of fewer rounds",
        )
    return token


def read_certificate(token: str | bytes) -> Certificate:
    """Read a compact JWS and check its signature against the key that it carries.

    Raises:
        CertificateError: saying what is wrong: not such a token, another algorithm, an unknown header, a
            signature that doesn't hold, claims that are malformed. It quotes nothing of the claims.
    """
    text = _text(token)
    header, payload, signature = (_decoded(part) for part in text.split("."))
    key = _key(header)
    if len(text.rpartition(".")[2]) != SIGNATURE_CHARACTERS:
        raise CertificateError(f"a signature of {len(signature)} bytes instead of 64", remedy=_REMEDY)
    try:
        PyJWS(algorithms=[ALGORITHM]).decode_complete(text, key.native, algorithms=[ALGORITHM])
    except InvalidTokenError:
        raise CertificateError(
            "the signature does not hold: changed since, or signed with another key", remedy=_REMEDY
        ) from None
    return Certificate(_claims(payload), key, text)


def _text(token: str | bytes) -> str:
    if len(token) > MAX_CERTIFICATE_CHARACTERS:
        raise CertificateError(f"longer than {MAX_CERTIFICATE_CHARACTERS} characters", remedy=_REMEDY)
    text = token.decode("latin-1") if isinstance(token, bytes) else token
    if _COMPACT.fullmatch(text) is None:
        raise CertificateError("not a compact JWS: three base64url parts between dots", remedy=_REMEDY)
    return text


def _decoded(part: str) -> bytes:
    """The bytes of one part. The last character of base64url may hold bits that mean nothing: they must
    be zero, so that a token has one spelling."""
    try:
        content = base64url_decode(part)
    except ValueError:
        content = b""
    if base64url_encode(content) != part.encode():
        raise CertificateError("not a compact JWS: a part is not canonical base64url", remedy=_REMEDY)
    return content


def _jwk(key: PublicKey) -> dict[str, str]:
    """RFC 8037, section 2."""
    return {"crv": "Ed25519", "kty": "OKP", "x": base64url_encode(key.raw).decode()}


def _key(header: bytes) -> PublicKey:
    """The key that a header carries, once all else in the header is as it must be."""
    value = _json(header, "header")
    algorithm = value.get("alg")
    if algorithm != ALGORITHM:
        shown = algorithm if isinstance(algorithm, str) and algorithm.isalnum() else "something else"
        raise CertificateError(f"signed by {shown[:20]}; only {ALGORITHM} is accepted", remedy=_REMEDY)
    if set(value) != {"alg", "typ", "jwk"}:
        raise CertificateError("header: must have alg, typ and jwk and nothing else", remedy=_REMEDY)
    if value["typ"] != TYPE:
        raise CertificateError(f"header: typ is not {TYPE}: a token of another kind", remedy=_REMEDY)
    jwk = value["jwk"]
    raw = _raw_key(jwk["x"]) if isinstance(jwk, dict) and isinstance(jwk.get("x"), str) else b""
    try:
        key = PublicKey(raw)
    except ValueError:
        key = None
    if key is None or jwk != _jwk(key) or header != canonical_json(value):
        raise CertificateError("header: jwk is not an Ed25519 public key (OKP)", remedy=_REMEDY)
    return key


def _raw_key(text: str) -> bytes:
    try:
        return base64url_decode(text)[: KEY_BYTES + 1]
    except ValueError:
        return b""


def _claims(payload: bytes) -> Claims:
    claims = validated(Claims, _json(payload, "claims"), "claims", CertificateError)
    try:
        canonical = canonical_json(claims.model_dump(mode="json")) == payload
    except ValueError:  # NaN or infinity
        canonical = False
    if not canonical:
        raise CertificateError("claims: not in canonical form", remedy=_REMEDY)
    return claims


def _json(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CertificateError(f"{what}: not a JSON object", remedy=_REMEDY)
    return value
