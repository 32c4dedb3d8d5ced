"""`fedward-site`, what the site's books say: who took part in what, what was spent, and the proof of it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.officer import Folder
from common.console import JsonOption, speaking
from common.errors import SiteError

if TYPE_CHECKING:
    from client.policy import Approval

ledger = typer.Typer(help="The site's ledger.", no_args_is_help=True)


def withdrawals(
    folder: Folder,
    patient: Annotated[
        list[str] | None, typer.Option("--id", help="Only this patient, withdrawn or not; repeat it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """In which released models withdrawn patients took part, and at which ε. For the site's eyes only."""
    from client.participation import participations
    from client.settings import SiteFolder
    from client.site import read_split_key
    from client.withdrawal import load_withdrawn, patient_hash

    with speaking(json) as speaker:
        site = SiteFolder(folder)
        key = read_split_key(site)
        names = {patient_hash(key, each): each for each in patient or []}
        hashes = sorted(names) if patient else sorted(load_withdrawn(site, key).patients)
        found = participations(site, key, hashes)
        header = ["patient", "study", "session", "group", "rounds", "evaluations", "statistics", "ε", "δ"]
        rows = [
            [
                names.get(bytes.fromhex(p.patient), f"{p.patient[:12]}…"),
                p.study,
                p.session,
                p.group,
                str(p.rounds),
                str(p.evaluations),
                "yes" if p.statistics else "no",
                "no bound" if p.epsilon is None else f"{p.epsilon:.3f}",
                f"{p.delta:g}",
            ]
            for p in found
        ]
        speaker.table(f"What {len(hashes)} patients took part in, if the data held them then", header, rows)
        speaker.say(
            "Patients without a line took part in nothing. A model that has left can't be called back."
        )
        speaker.answer({"site": site.name, "patients": len(hashes), "took_part": [asdict(p) for p in found]})


def budget(folder: Folder, json: JsonOption = False) -> None:
    """What the cohort and each approved study may spend, and have spent. The vault may be running."""
    from client.account import read_account
    from client.policy_file import load_policy
    from client.settings import SiteFolder

    with speaking(json) as speaker:
        site = SiteFolder(folder)
        account, found = read_account(site.ledger_path), load_policy(site)
        spent = account.studies()
        rows: list[dict[str, Any]] = []
        for approval in found.approved:
            used = spent.get(approval.digest)
            rows.append(
                {
                    "study": approval.study,
                    "digest": approval.digest,
                    "sessions": used.sessions if used else 0,
                    "epsilon_reserved": used.epsilon if used else 0.0,
                    "epsilon_approved": approval.epsilon,
                    "delta_approved": approval.delta,
                    "revoked": approval.revoked_at is not None,
                    "standing": _standing(approval, datetime.now(UTC)),
                }
            )
        header = ["study", "digest", "sessions", "ε reserved", "ε approved", "δ approved", "standing"]
        table = [
            [r["study"], r["digest"][:12], str(r["sessions"]), f"{r['epsilon_reserved']:.3f}"]
            + [f"{r[k]:g}" if r[k] else "none" for k in ("epsilon_approved", "delta_approved")]
            + [r["standing"]]
            for r in rows
        ]
        speaker.table(f"Budget of {site.name}, per patient", header, table)
        lifetime = None
        if found.cohort is not None:
            limit = found.cohort.filter()
            share = account.rdp(limit.order) / limit.capacity if limit.capacity > 0 else 1.0
            lifetime = {"epsilon": limit.epsilon, "delta": limit.delta, "share_reserved": share}
            speaker.say(
                f"Lifetime of the cohort, ε = {limit.epsilon:g} at δ = {limit.delta:g} over all studies: "
                f"{share:.1%} of it is reserved."
            )
        speaker.answer({"site": site.name, "lifetime": lifetime, "studies": rows})


def _standing(approval: Approval, now: datetime) -> str:
    if approval.revoked_at is not None:
        return "revoked"
    if approval.valid_until is not None and approval.valid_until < now:
        return f"ended {approval.valid_until:%Y-%m-%d}"
    if approval.valid_from is not None and approval.valid_from > now:
        return f"from {approval.valid_from:%Y-%m-%d}"
    return "yes"


@ledger.command()
def verify(folder: Folder, json: JsonOption = False) -> None:
    """Check every entry's place and signature, and that no end was cut off. Exits with 7 if one is wrong."""
    from client.account import Account
    from client.ledger import certified_heads, check_certificates, check_head, read_head
    from client.settings import SiteFolder
    from common.journal import read_journal
    from common.keys import read_public_key

    with speaking(json) as speaker:
        site = SiteFolder(folder)
        key = read_public_key(site.signing_key_path.with_suffix(".pub"))
        remembered = read_head(site.ledger_path)  # before the ledger, which only grows
        certified = certified_heads(site.certificates)
        entries = read_journal(site.ledger_path, key)
        account = Account(entries, site.ledger_path)
        check_head(site.ledger_path, account, remembered)
        certificates = check_certificates(site.certificates, account, certified)
        head = entries[-1].hash if entries else None
        speaker.say(
            f"{site.ledger_path}: {len(entries)} entries, each in its place and signed by this site; the "
            f"heads of {certificates} certificates are in it."
        )
        speaker.say(f"head: {head or 'none yet'}")
        speaker.say("A copy that was put back as a whole, with this folder, only the coordinator notices.")
        speaker.answer(
            {"site": site.name, "entries": len(entries), "head": head, "certificates": certificates}
        )


def certificate(
    folder: Folder,
    session: Annotated[str, typer.Argument(help="The session's id.", show_default=False)],
    file: Annotated[Path | None, typer.Option("--out", help="Where to write it; else it is printed.")] = None,
    json: JsonOption = False,
) -> None:
    """Sign what has left in a session, finished or not, for whoever wants to recompute its cost."""
    from client.account import read_account
    from client.certify import Issuer
    from client.policy_file import approved_study
    from client.settings import SiteFolder
    from common.files import write_atomic
    from common.journal import read_journal
    from common.keys import read_signing_key
    from common.privacy.certificate import LedgerClaims

    with speaking(json) as speaker:
        site = SiteFolder(folder)
        kept = site.certificates / f"{session}.jws"
        if kept.exists():
            token = kept.read_text()
        else:
            key = read_signing_key(site.signing_key_path)
            account = read_account(site.ledger_path, key.public)
            answered = account.answered(session)
            if not answered:
                raise SiteError(
                    f"{site.ledger_path}: nothing has left in a session {session!r}",
                    remedy="give its id as the coordinator knows it",
                )
            last = read_journal(site.ledger_path)[-1]
            issuer = Issuer(site.name, key)
            study = approved_study(site, answered[0].reservation.study)
            token = issuer.issue(study, answered, LedgerClaims(sequence=last.sequence, head=last.hash))
        if file is not None:
            try:
                write_atomic(file, token.encode(), mode=0o644)
            except OSError as error:
                raise SiteError(f"{file}: {error.strerror}", remedy="give another path") from None
            speaker.say(f"{file}: check it with fedward-audit verify {file}")
        else:
            speaker.say(token)
        speaker.answer({"site": site.name, "session": session, "certificate": token})
