"""What certificates must fulfil together, and against what the coordinator received."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from common.keys import PublicKey
from common.privacy.certificate import Certificate, Claims, Release
from common.study import Study
from simulations.audit.checks import Reason
from simulations.audit.transcript import Received, Transcript

SHOWN = 16  # characters of a fingerprint


def key_reasons(
    certificate: Certificate, others: Sequence[Certificate], pinned: Sequence[PublicKey]
) -> Iterator[Reason]:
    """Args:
    others: all certificates given, this one included.
    pinned: keys that are known to be the site's.
    """
    site, key = certificate.claims.site, certificate.key
    if any(key != known for known in pinned):
        known = " or ".join(sorted({k.fingerprint[:SHOWN] for k in pinned}))
        yield Reason("key", f"signed with key {key.fingerprint[:SHOWN]}; {site}'s key is {known}")
    elif not pinned:
        keys = {c.key.fingerprint[:SHOWN] for c in others if c.claims.site == site}
        if len(keys) > 1:
            yield Reason("key", f"{site} signs with {len(keys)} keys: {', '.join(sorted(keys))}")
    sites = {c.claims.site for c in others if c.key == key}
    if len(sites) > 1:
        yield Reason("key", f"one key signs for {len(sites)} sites: {', '.join(sorted(sites))}")


def history_reasons(certificate: Certificate, others: Sequence[Certificate]) -> Iterator[Reason]:
    """Whether this site's ledger only grew, as far as its certificates show.

    Args:
        others: all certificates given, this one included.
    """
    claims = certificate.claims
    for other in (c.claims for c in others if c.claims.site == claims.site and c is not certificate):
        mine, its = claims.ledger, other.ledger
        if mine.sequence == its.sequence and mine.head != its.head:
            yield Reason("ledger", f"two ledgers: entry {mine.sequence} has two hashes")
        elif other.issued_at < claims.issued_at and its.sequence > mine.sequence:
            yield Reason(
                "ledger",
                f"{mine.sequence} entries at {claims.issued_at}, but {its.sequence} already at "
                f"{other.issued_at}: rolled back, or the site's clock was",
            )
        if other.session == claims.session and its.sequence <= mine.sequence:
            yield from _retold(claims, other)


def _retold(later: Claims, earlier: Claims) -> Iterator[Reason]:
    now = {r.round: r for r in later.releases}
    for release in earlier.releases:
        if release.round not in now:
            yield Reason("ledger", f"lacks round {release.round}, which an earlier certificate lists")
        elif now[release.round] != release:
            yield Reason("ledger", f"round {release.round} is told otherwise in an earlier certificate")


def transcript_reasons(
    claims: Claims, others: Sequence[Certificate], transcript: Transcript, study: Study | None
) -> Iterator[Reason]:
    """Whether the site signed for all that the coordinator received, number for number.

    What it lists besides came too late, or was lost on the way: it cost as much, and is no fault.

    Args:
        others: all certificates given, this one included: what a later one of the session lists, an
            earlier one need not.
    """
    if claims.study != transcript.study:
        yield Reason("transcript", f"the coordinator ran study {transcript.study[:12]} in this session")
    received = {r.round: r for r in transcript.received.get(claims.site, ())}
    listed = {r.round: r for r in claims.releases}
    known = set(listed)
    for other in (c.claims for c in others if c.claims.site == claims.site):
        if other.session == claims.session and other.ledger.sequence > claims.ledger.sequence:
            known |= {r.round for r in other.releases}
    for number in sorted(set(received) - known):
        yield Reason("transcript", f"the coordinator received round {number}, which is not listed")
    for number in sorted(set(listed) & set(received)):
        yield from _answer_reasons(listed[number], received[number])
    weights = {r.weight for r in received.values() if r.weight}
    if study is not None and weights - {study.public_training_size(claims.public_size)}:
        told = ", ".join(str(w) for w in sorted(weights))
        yield Reason(
            "transcript", f"weight {told} was told, which is not of a public size {claims.public_size}"
        )


def _answer_reasons(listed: Release, received: Received) -> Iterator[Reason]:
    number = listed.round
    pairs: Mapping[str, tuple[object, object]] = {
        "training": (listed.training, received.training),
        "evaluation": (listed.evaluation, received.evaluation),
        "statistics": (listed.statistics, received.statistics),
    }
    for name, (signed, told) in pairs.items():
        if signed != told:
            yield Reason("transcript", f"round {number} told another event of {name} than is listed")
    if listed.exact != received.exact:
        word = "exact" if received.exact else "not exact"
        yield Reason("transcript", f"round {number} came as {word}, and is listed otherwise")
    if received.released and listed.released != received.released:
        yield Reason("transcript", f"the numbers received in round {number} are not those listed (digest)")
    if received.head and listed.head != received.head:
        yield Reason("transcript", f"round {number} told another ledger head than is listed")
