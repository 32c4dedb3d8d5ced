"""What a verdict says in plain words: what is proven, what must be trusted, what was not looked at."""

from __future__ import annotations

from dataclasses import dataclass

from common.privacy.certificate import Certificate
from common.study import Study
from simulations.audit.checks import Cost
from simulations.audit.transcript import Transcript

_VOUCHED = {
    "auditor": "known to be the site's",
    "coordinator": "the only one that the coordinator has seen of this site",
    "": "that nobody vouched for",
}


@dataclass(frozen=True)
class Basis:
    """What a verdict rests on.

    Attributes:
        study, transcript: None if the auditor has none.
        pinned: who knew the site's key from elsewhere: `auditor`, `coordinator`, or nobody.
        software: the package digest was compared.
    """

    certificate: Certificate
    cost: Cost
    study: Study | None
    transcript: Transcript | None
    pinned: str
    software: bool


def proven(basis: Basis) -> tuple[str, ...]:
    """What follows for whoever trusts what `trusted` lists."""
    claims, key = basis.certificate.claims, basis.certificate.key.fingerprint[:16]
    said = [f"It was signed with key {key}, {_VOUCHED[basis.pinned]}, and is unchanged since."]
    if basis.study is not None:
        said.append(
            f"Sampling, steps, divisor and rounds follow from study {basis.study.name} and a public size of "
            f"{claims.public_size}; noise and clipping keep the study's ε and δ, were every round answered."
        )
    said += [
        _bound("training patients", claims.epsilon.training, basis.cost.training, claims.delta),
        _bound("test patients", claims.epsilon.evaluation, basis.cost.evaluation, claims.delta),
    ]
    if claims.plan.statistics is not None or basis.cost.statistics != 0:
        told = claims.epsilon.statistics, basis.cost.statistics
        said.append(_bound("all patients, by statistics,", *told, claims.statistics_delta))
    if basis.transcript is not None:
        received = basis.transcript.received.get(claims.site, ())
        same = ", number for number the same" if all(r.released for r in received) else ""
        count = f"{len(received)} of " * (len(received) < len(claims.releases))
        said.append(
            f"The coordinator received {count}the {len(claims.releases)} answers listed and no other{same}."
        )
    if basis.software:
        said.append(f"It names the expected software, package {claims.software.package[:16]}.")
    return tuple(said)


def _bound(whose: str, claimed: float | None, found: float | None, delta: float) -> str:
    if found is None or claimed is None:
        return f"To {whose.rstrip(',')} nothing is promised: numbers left without noise."
    if found == 0 and claimed == 0:
        return f"Nothing was told of {whose.rstrip(',')}."
    return (
        f"The listed releases cost {whose} ε = {found:.4f} at δ = {delta:g} by the second accountant; "
        f"claimed: {claimed:.4f}."
    )


def trusted(basis: Basis) -> tuple[str, ...]:
    """What no certificate can prove."""
    claims = basis.certificate.claims
    said = [
        f"That the site runs fedward {claims.software.version} unmodified (package "
        f"{claims.software.package[:16]}, by its own word) on sound libraries, and that nothing leaves it "
        "by another way.",
        "That each patient's records carry one patient id, and that no patient both trains and tests.",
        f"That the public size of {claims.public_size} is not above the cohort. A wrong one costs accuracy "
        "and no privacy.",
        "That noise is what the mechanisms say: floating-point arithmetic is mitigated, and timing and "
        "other side channels are not proven (common/PRIVACY.md).",
        "That costs of other sessions, studies and sites are looked at as well: they add up.",
    ]
    if basis.pinned != "auditor":
        key = basis.certificate.key.fingerprint[:16]
        said.append(f"That key {key} is the site's: compare it with the site by another way (--key).")
    if basis.transcript is None:
        said.append("That the list of releases is whole: no coordinator's store was given (--store).")
    else:
        said.append(
            "That the coordinator's store is whole: it and the site together could leave out answers."
        )
    if any(r.exact for r in claims.releases) or basis.cost.total is None:
        said.append("That the cohort is public anyway, as the site's operator declared.")
    if claims.randomness == "seeded":
        said.append("Nobody should trust this noise: it came from a seed (a simulation).")
    return tuple(said)


def unchecked(basis: Basis) -> tuple[str, ...]:
    """What more evidence would have allowed to check."""
    said = []
    if basis.study is None:
        said.append("Whether plan and noise follow from the study: its file was not given (--study).")
    if not basis.software:
        said.append("The software's digest: none was given to compare (--software).")
    site = basis.certificate.claims.site
    if basis.transcript is not None and not all(r.released for r in basis.transcript.received.get(site, ())):
        said.append("The digests of what was received: the coordinator's store holds none for some rounds.")
    if basis.transcript is not None:
        came = {r.round for r in basis.transcript.received.get(site, ())}
        late = len({r.round for r in basis.certificate.claims.releases} - came)
        if late:
            said.append(
                f"{late} answers listed that the coordinator never recorded: late, or lost. They count."
            )
    return tuple(said)
