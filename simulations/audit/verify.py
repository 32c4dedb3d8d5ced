"""An outsider's look at certificates, with no access to any site.

What a site signed is held against the study file, a second accountant, the coordinator's transcript, keys
known beforehand, and its other certificates. Every failure is a reason of its own; a certificate holds if
there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from common.errors import CertificateError
from common.files import read_bounded
from common.keys import PublicKey
from common.messages import MAX_CERTIFICATE_CHARACTERS
from common.privacy.certificate import Certificate, read_certificate
from common.study import Study
from simulations.audit.agreement import history_reasons, key_reasons, transcript_reasons
from simulations.audit.checks import (
    Cost,
    Reason,
    cost_of,
    epsilon_reasons,
    form_reasons,
    plan_reasons,
    target_reasons,
)
from simulations.audit.releases import release_reasons
from simulations.audit.transcript import Transcript
from simulations.audit.wording import Basis, proven, trusted, unchecked

CLOCKS = timedelta(minutes=5)  # that a site's may be ahead of the auditor's
MOST_REASONS = 20


@dataclass(frozen=True)
class Evidence:
    """What an auditor holds besides certificates.

    Attributes:
        studies: those that certificates may be about; empty: the study files are unknown.
        transcripts: session → what the coordinator received; None: no coordinator's store at hand.
        keys: site → its key, known from elsewhere.
        software: the package digest that sites ought to run; None: any.
        allow_seeded: take certificates of simulations.
        now: the auditor's clock.
    """

    studies: tuple[Study, ...] = ()
    transcripts: Mapping[str, Transcript] | None = None
    keys: Mapping[str, PublicKey] = field(default_factory=dict)
    software: str | None = None
    allow_seeded: bool = False
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    origin: the file's name.
    certificate, cost: None if the token isn't a certificate.
    reasons: why it is refused; none if it holds.
    proven, trusted, unchecked: sentences; nothing is proven by one that doesn't hold.
    """

    origin: str
    certificate: Certificate | None
    cost: Cost | None
    reasons: tuple[Reason, ...]
    proven: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.reasons

    def as_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; `claims` are as signed, releases left out."""
        value: dict[str, Any] = {"file": self.origin, "holds": self.holds}
        value["reasons"] = [asdict(r) for r in self.reasons]
        if self.certificate is not None and self.cost is not None:
            claims = self.certificate.claims
            value["key"] = self.certificate.key.fingerprint
            value["claims"] = claims.model_dump(mode="json", exclude={"releases"})
            value["releases"] = len(claims.releases)
            value["recomputed"] = {**asdict(self.cost), "total": self.cost.total}
            value["nominal"] = claims.randomness == "seeded"
        return {
            **value,
            "proven": list(self.proven),
            "trusted": list(self.trusted),
            "unchecked": list(self.unchecked),
        }


def gather(paths: Sequence[Path]) -> dict[str, Certificate | CertificateError]:
    """File name → certificate, or why it is none. A folder stands for its *.jws.

    Raises:
        CertificateError: if a file can't be read, or a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jws")) if path.is_dir() else [path]
        if not found:
            raise CertificateError(f"{path}: no *.jws in it", remedy="give certificates, or their folder")
        files += found
    return {str(file): _read(file) for file in files}


def _read(file: Path) -> Certificate | CertificateError:
    if not file.is_file():
        raise CertificateError(f"{file}: no such file", remedy="give certificates, or their folder")
    try:
        content = read_bounded(file, CertificateError, limit=MAX_CERTIFICATE_CHARACTERS + 1)
        return read_certificate(content.removesuffix(b"\n"))
    except CertificateError as error:
        return error


def verify(given: Mapping[str, Certificate | CertificateError], evidence: Evidence) -> tuple[Verdict, ...]:
    """One verdict per certificate, in the order given.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    sound = [c for c in given.values() if isinstance(c, Certificate)]
    return tuple(
        _verdict(origin, each, sound, evidence)
        if isinstance(each, Certificate)
        else Verdict(origin, None, None, (Reason("token", each.message),))
        for origin, each in given.items()
    )


def missing_sites(given: Sequence[Certificate], evidence: Evidence) -> list[str]:
    """Sites that answered in a session of these certificates, and of which none was given."""
    had = {(c.claims.session, c.claims.site) for c in given}
    told = {(t.session, site) for t in (evidence.transcripts or {}).values() for site in t.received}
    return sorted({site for _, site in told - had})


def _verdict(origin: str, certificate: Certificate, others: list[Certificate], evidence: Evidence) -> Verdict:
    claims = certificate.claims
    study = next((s for s in evidence.studies if s.digest == claims.study), None)
    transcript = (evidence.transcripts or {}).get(claims.session)
    cost = cost_of(claims)
    known = evidence.keys.get(claims.site)
    pinned = (known,) if known else tuple(transcript.keys.get(claims.site, ())) if transcript else ()
    reasons = [
        *_circumstances(certificate, evidence),
        *_study_reasons(certificate, study, evidence),
        *form_reasons(claims),
        *release_reasons(claims, study),
        *epsilon_reasons(claims, cost),
        *key_reasons(certificate, others, pinned),
        *history_reasons(certificate, others),
        *(transcript_reasons(claims, others, transcript, study) if transcript else ()),
    ]
    if len(reasons) > MOST_REASONS:
        more = Reason("more", f"and {len(reasons) - MOST_REASONS} more reasons")
        reasons = [*reasons[:MOST_REASONS], more]
    vouched = "auditor" if known else "coordinator" if pinned else ""
    basis = Basis(certificate, cost, study, transcript, vouched, evidence.software is not None)
    return Verdict(
        origin,
        certificate,
        cost,
        tuple(reasons),
        proven=() if reasons else proven(basis),
        trusted=trusted(basis),
        unchecked=unchecked(basis),
    )


def _circumstances(certificate: Certificate, evidence: Evidence) -> Iterator[Reason]:
    claims = certificate.claims
    if datetime.fromisoformat(claims.issued_at) > evidence.now + CLOCKS:
        yield Reason("date", f"issued at {claims.issued_at}, which is in the future")
    if claims.randomness == "seeded" and not evidence.allow_seeded:
        yield Reason(
            "randomness", "nominal only: its noise came from a seed and can be taken off (a simulation)"
        )
    if evidence.software is not None and claims.software.package != evidence.software:
        yield Reason("software", f"runs package {claims.software.package[:12]}, not {evidence.software[:12]}")
    if evidence.transcripts is not None and claims.session not in evidence.transcripts:
        yield Reason("transcript", f"the coordinator knows no session {claims.session}")


def _study_reasons(certificate: Certificate, study: Study | None, evidence: Evidence) -> Iterator[Reason]:
    claims = certificate.claims
    if study is not None:
        yield from plan_reasons(claims, study)
        yield from target_reasons(claims, study)
    elif evidence.studies:
        known = ", ".join(f"{s.name} {s.digest[:12]}" for s in evidence.studies[:3])
        yield Reason("study", f"it is about study {claims.study[:12]}, not {known}")
