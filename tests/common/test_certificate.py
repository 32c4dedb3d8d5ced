"""The signed form: one spelling, one algorithm, and no byte that can be changed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import certified
import pytest
from certified import base64url, claims, header_of, key, token
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CertificateError
from common.files import canonical_json
from common.keys import PublicKey
from common.messages import MAX_CERTIFICATE_CHARACTERS
from common.privacy.certificate import Claims, read_certificate, sign

CLAIMS = claims()
TOKEN = sign(Claims.model_validate(CLAIMS), key())
HEADER, PAYLOAD, SIGNATURE = TOKEN.split(".")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_what_is_signed_is_read_again() -> None:
    certificate = read_certificate(TOKEN)
    assert certificate.claims.model_dump(mode="json") == CLAIMS
    assert certificate.key == key().public
    assert certificate.token == TOKEN
    assert read_certificate(TOKEN.encode()) == certificate


def test_the_token_is_a_jws_as_the_standards_have_it() -> None:
    """RFC 7515 section 7.1 and RFC 8037 section 3.1, checked without the JWS library."""
    assert decoded(HEADER) == canonical_json(header_of(key()))
    assert decoded(PAYLOAD) == canonical_json(CLAIMS)
    assert PublicKey(key().public.raw).verifies(decoded(SIGNATURE), f"{HEADER}.{PAYLOAD}".encode())
    assert token(CLAIMS) == TOKEN  # Ed25519 signs deterministically


def test_nothing_in_it_depends_on_the_number_of_patients() -> None:
    """By its names: a new field must be looked at before this list takes it in."""
    assert set(Claims.model_fields) == {
        *("format", "site", "session", "study", "study_name", "public_size", "issued_at", "complete"),
        *("software", "plan", "releases", "delta", "statistics_delta", "epsilon", "accountant", "policy"),
        *("randomness", "ledger"),
    }


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(TOKEN) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, change: int) -> None:
    content = bytearray(TOKEN.encode())
    content[place] ^= change
    with pytest.raises(CertificateError):
        read_certificate(bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TOKEN)), st.sampled_from([*ALPHABET, ".", "=", "\n", " ", "\0", "é"]))
def test_no_character_can_be_added(place: int, character: str) -> None:
    with pytest.raises(CertificateError):
        read_certificate(TOKEN[:place] + character + TOKEN[place:])


def test_no_end_can_be_cut_off() -> None:
    for length in [*range(0, len(TOKEN), 97), *range(len(TOKEN) - 90, len(TOKEN))]:
        with pytest.raises(CertificateError):
            read_certificate(TOKEN[:length])


def test_every_other_spelling_of_a_part_is_refused() -> None:
    """Base64url leaves bits of the last character without a meaning: 64 bytes end in 4 of them."""
    twins = [c for c in ALPHABET if decoded(SIGNATURE[:-1] + c) == decoded(SIGNATURE) and c != SIGNATURE[-1]]
    assert len(twins) == 15
    for character in twins:
        with pytest.raises(CertificateError, match="not canonical base64url"):
            read_certificate(TOKEN[:-1] + character)


def hmac_token() -> str:
    """The old trick: the public key taken for a shared secret."""
    header = {**header_of(key()), "alg": "HS256"}
    content = f"{base64url(canonical_json(header))}.{PAYLOAD}"
    mac = hmac.new(key().public.pem(), content.encode(), hashlib.sha256).digest()
    return f"{content}.{base64url(mac)}"


def unsigned(algorithm: object) -> str:
    header = {**header_of(key()), "alg": algorithm}
    return f"{base64url(canonical_json(header))}.{PAYLOAD}.{SIGNATURE}"


def with_header(**changes: Any) -> str:
    return token(CLAIMS, header={**header_of(key()), **changes})


def with_claims(**changes: Any) -> str:
    return token({**CLAIMS, **changes})


def within(part: str, **changes: Any) -> str:
    return with_claims(**{part: {**CLAIMS[part], **changes}})


def spaced(header: bool) -> str:
    text = json.dumps(header_of(key()) if header else CLAIMS).encode()
    if not header:
        return token(text)
    content = f"{base64url(text)}.{PAYLOAD}"
    return f"{content}.{base64url(key().sign(content.encode()))}"


TWICE = canonical_json(CLAIMS).replace(b'"complete":true', b'"complete":false,"complete":true')
FOREIGN_JWK = {"kty": "OKP", "crv": "Ed448", "x": base64url(bytes(57))}
OTHER_X = header_of(key())["jwk"] | {"x": base64url(key().public.raw)[:-1]}
FORGED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "three base64url parts"),
    "no JWS": ("{}", "three base64url parts"),
    "padded": (TOKEN + "==", "three base64url parts"),
    "line end": (TOKEN + "\n", "three base64url parts"),
    "not ASCII": (TOKEN.encode() + b"\xff", "three base64url parts"),
    "oversize": ("A" * (MAX_CERTIFICATE_CHARACTERS + 1), "longer than"),
    "payload of another": (f"{HEADER}.{token(claims(site='south')).split('.')[1]}.{SIGNATURE}", "signature"),
    "other key's signature": (f"{HEADER}.{PAYLOAD}.{token(CLAIMS, key(2)).split('.')[2]}", "signature"),
    "short signature": (f"{HEADER}.{PAYLOAD}.{base64url(bytes(63))}", "instead of 64"),
    "no signature": (f"{HEADER}.{PAYLOAD}.", "three base64url parts"),
    "alg none": (unsigned("none"), "signed by none; only EdDSA"),
    "alg None": (unsigned(None), "only EdDSA"),
    "alg list": (unsigned(["EdDSA"]), "only EdDSA"),
    "alg RS256": (unsigned("RS256"), "signed by RS256; only EdDSA"),
    "alg in other letters": (unsigned("eddsa"), "signed by eddsa; only EdDSA"),
    "HS256 with the public key": (hmac_token(), "signed by HS256; only EdDSA"),
    "crit": (with_header(crit=["b64"], b64=False), "nothing else"),
    "kid": (with_header(kid="north"), "nothing else"),
    "jku": (with_header(jku="https://example.org/keys"), "nothing else"),
    "x5u": (with_header(x5u="https://example.org/keys"), "nothing else"),
    "no jwk": (token(CLAIMS, header={"alg": "EdDSA", "typ": "JWT"}), "nothing else"),
    "typ": (with_header(typ="JWT"), "token of another kind"),
    "jwk of Ed448": (with_header(jwk=FOREIGN_JWK), "not an Ed25519 public key"),
    "jwk is a text": (with_header(jwk="key"), "not an Ed25519 public key"),
    "jwk too short": (with_header(jwk=OTHER_X), "not an Ed25519 public key"),
    "jwk with a secret": (with_header(jwk={**header_of(key())["jwk"], "d": "A"}), "not an Ed25519 public"),
    "header with spaces": (spaced(header=True), "not an Ed25519 public key"),
    "header is no object": (f"{base64url(b'[]')}.{PAYLOAD}.{SIGNATURE}", "header: not a JSON object"),
    "header is deep": (f"{base64url(b'[' * 99999)}.{PAYLOAD}.{SIGNATURE}", "header: not a JSON object"),
    "claims are no object": (token(b"[]"), "claims: not a JSON object"),
    "claims are no JSON": (token(b"\xff"), "claims: not a JSON object"),
    "claims with spaces": (spaced(header=False), "not in canonical form"),
    "claims say it twice": (token(TWICE), "not in canonical form"),
    "whole number for a float": (with_claims(delta=0), "not in canonical form"),
    "text for a number": (with_claims(public_size="50"), "not in canonical form"),
    "NaN": (token(canonical_json(CLAIMS).replace(b'"delta":0.001', b'"delta":NaN')), "claims"),
    "infinity": (token(canonical_json(CLAIMS).replace(b'"delta":0.001', b'"delta":1e999')), "claims: delta"),
    "unknown field": (with_claims(patients=61), "claims: patients: Extra inputs"),
    "unknown field within": (within("plan", patients=61), "plan.patients: Extra inputs"),
    "missing field": (token({k: v for k, v in CLAIMS.items() if k != "policy"}), "claims: policy"),
    "another format": (with_claims(format=2), "claims: format"),
    "unit is the record": (within("plan", unit="record"), "claims: plan.unit"),
    "replacement": (within("plan", relation="replace-one"), "claims: plan.relation"),
    "negative ε": (within("epsilon", total=-1.0), "claims: epsilon.total"),
    "no time zone": (with_claims(issued_at="2026-01-31T12:00:00"), "claims: issued_at"),
    "another time zone": (with_claims(issued_at="2026-01-31T12:00:00+02:00"), "claims: issued_at"),
    "no date": (with_claims(issued_at="yesterday"), "claims: issued_at"),
    "control characters": (with_claims(accountant="\x1b[2J"), "claims: accountant"),
    "a site's name with a path": (with_claims(site="../north"), "claims: site"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_token_is_refused_with_its_reason(name: str) -> None:
    forged, reason = FORGED[name]
    with pytest.raises(CertificateError) as caught:
        read_certificate(forged)
    assert reason in caught.value.message
    assert caught.value.remedy
    assert caught.value.exit_status == 11


def test_a_refusal_quotes_nothing() -> None:
    with pytest.raises(CertificateError) as caught:
        read_certificate(with_claims(site="PATIENT ZEBRA"))
    assert "ZEBRA" not in str(caught.value)


def test_a_certificate_that_nobody_would_read_is_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.privacy.certificate.MAX_CERTIFICATE_CHARACTERS", 1000)
    with pytest.raises(CertificateError, match="longer than"):
        sign(Claims.model_validate(CLAIMS), key())


def test_size_of_a_round() -> None:
    """A session of 5,000 rounds fits; each takes some 750 characters."""
    many = certified.study(algorithm={"rounds": 100}, evaluation={"every": 1})
    few = certified.study(algorithm={"rounds": 50}, evaluation={"every": 1})
    each = (len(token(claims(many))) - len(token(claims(few)))) / 50
    assert each * 5000 < MAX_CERTIFICATE_CHARACTERS
