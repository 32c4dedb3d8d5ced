"""`fedward-audit`: what an outsider checks."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import JsonOption, Speaker, speaking
from common.errors import CertificateError, FedwardError
from common.files import canonical_json, write_atomic
from common.keys import PublicKey, read_public_key
from common.privacy.certificate import Certificate
from common.study import load_study
from server.store import Store
from simulations.audit.recompute import recompute as opinions_of
from simulations.audit.transcript import transcript_of
from simulations.audit.verify import Evidence, Verdict, gather, missing_sites
from simulations.audit.verify import verify as verify_all

app = typer.Typer(
    help="An outsider's side: recompute what was promised.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def recompute(
    store: Annotated[Path, typer.Argument(help="Folder with store.db: RUN/store or COORDINATOR/store.")],
    session: Annotated[str | None, typer.Argument(help="Its id; the latest if absent.")] = None,
    json: JsonOption = False,
) -> None:
    """Recompute every site's ε from the events that it sent, with a second accountant.

    Exits with 1 if the accountants disagree by more than 2 %, or find more than the study promised.
    """
    with speaking(json) as speaker:
        opened = _opened(store)
        known = opened.sessions()
        if not known:
            raise FedwardError(f"{store}: no session in it", remedy="run a study first")
        chosen = opened.session(session) if session else known[-1]
        found = opinions_of(opened, chosen)
        rows = [
            [o.site, o.patients, f"{o.claimed:g}", f"{o.fedward:.4f}", f"{o.second:.4f}", _word(o.sound)]
            for o in found
        ]
        header = ["site", "patients", "ε promised", "ε (fedward)", "ε (Google PLD)", "holds"]
        delta = chosen.study.privacy.delta
        title = f"{chosen.id}, δ = {delta:g}" if delta else chosen.id
        speaker.table(title, header, rows)
        if any(a.exact for r in opened.rounds(chosen.id) for a in r.answers):
            speaker.say("Metrics were exact, on records declared public: test patients have no promise.")
        speaker.say("Trusted, not proven: that each site added the noise that its events say.")
        speaker.answer({"session": chosen.id, "opinions": [{**asdict(o), "sound": o.sound} for o in found]})
        if not found or not all(o.sound for o in found):
            raise FedwardError(
                "the privacy promise does not hold by these events", remedy="see the rows that say NO"
            )


@app.command()
def verify(
    certificates: Annotated[
        list[Path], typer.Argument(metavar="CERT...", help="Files with a certificate, or folders of *.jws.")
    ],
    study: Annotated[Path | None, typer.Option(help="The study file that they must be about.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Coordinator's folder with store.db: what it got.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(metavar="SITE=FILE", help="A site's public key (site.pub).")
    ] = None,
    software: Annotated[str | None, typer.Option(help="Package digest that sites ought to run.")] = None,
    allow_seeded: Annotated[
        bool, typer.Option("--allow-seeded", help="Take certificates of simulations.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check what sites signed, away from any site: signatures, plan, ε, and what the coordinator received.

    Exits with 0 only if every certificate holds, else with 11.
    """
    with speaking(json) as speaker:
        given = gather(certificates)
        sound = [c for c in given.values() if isinstance(c, Certificate)]
        transcripts = studies = None
        if store is not None:
            opened = _opened(store)
            sessions = {c.claims.session for c in sound}
            known = [s for s in opened.sessions() if s.id in sessions]
            transcripts = {s.id: transcript_of(opened, s.id) for s in known}
            studies = tuple({s.study.digest: s.study for s in known}.values())
        evidence = Evidence(
            studies=(load_study(study),) if study else studies or (),
            transcripts=transcripts,
            keys=_keys(key or [], {c.claims.site for c in sound}),
            software=software,
            allow_seeded=allow_seeded,
        )
        verdicts = verify_all(given, evidence)
        missing = missing_sites(sound, evidence)
        _tell(speaker, verdicts, missing)
        failed = [v for v in verdicts if not v.holds]
        answer: dict[str, Any] = {"holds": not failed, "certificates": [v.as_json() for v in verdicts]}
        answer["without_certificate"] = missing
        if not failed:
            speaker.answer(answer)
            return
        error = CertificateError(
            f"{len(failed)} of {len(verdicts)} certificates do not hold",
            remedy="see their reasons; ask the site, and the coordinator, about each",
        )
        if not json:
            raise error
        told = {"error": error.code, "message": error.message, "remedy": error.remedy}
        speaker.answer({**answer, **told})
        raise typer.Exit(error.exit_status)


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="The study file, or a ready study's name.")],
    out: Annotated[Path, typer.Option(help="Folder for audit.html, audit.json and audit.jws.")] = Path(
        "audit"
    ),
    public_size: Annotated[int, typer.Option(help="Patients that a site would declare.", min=1)] = 200,
    key: Annotated[
        Path | None, typer.Option(help="The auditor's secret key; made if absent. Default OUT/auditor.pem.")
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(help="Folder of sites whose records may be read: attack members and records too."),
    ] = None,
    shadows: Annotated[
        int | None, typer.Option(help="Shadow models of the attack on members; 128 if not said.", min=8)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More canaries and steps: tighter bounds.")] = False,
    deployed: Annotated[
        bool, typer.Option("--deployed", help="Through the sockets of served vaults, not in this process.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Attack a study's claim: canaries through the site's own software, tests of what it sends, and lower
    bounds on ε.

    Exits with 1 if anything contradicts the claim.
    """
    from common.keys import make_signing_key
    from simulations.audit.report import as_json, write_report
    from simulations.audit.run import FULL, SHORT, audit
    from simulations.engine.sites import find_sites
    from simulations.studies import ready_study

    with speaking(json) as speaker:
        logging.getLogger("fedward").setLevel(logging.CRITICAL)  # vaults refuse the attacks, and say so
        asked = load_study(study if study.exists() else ready_study(str(study)))
        cohorts = [place.folder() for place in find_sites(sites, out)] if sites else []
        size = FULL if full else SHORT
        if shadows is not None:
            size = replace(size, shadows=shadows)
        found = audit(asked, public_size, size=size, deployed=deployed, cohorts=cohorts)
        out.mkdir(parents=True, exist_ok=True)
        page = write_report(out, found, make_signing_key(key or out / "auditor.pem"))
        header = ["site", "ε claimed", "by trade-off", "by one run", "by the noise", "canaries"]
        rows = [
            [
                b.site,
                *(f"{e:.3f}" for e in (b.claimed, b.by_trade_off, b.one_run, b.by_noise)),
                str(b.canaries),
            ]
            for b in found.bounds
        ]
        speaker.table(
            f"Lower bounds on ε at 95 %, over {found.steps} steps, δ = {found.plan.delta:g}", header, rows
        )
        alarms = found.conformance.alarms
        speaker.say(f"{len(found.conformance.checks)} tests of what was sent, {len(alarms)} alarms.")
        for check in alarms:
            speaker.say(f"  {check.site}: {check.name}: p = {check.p:.2g}; {check.told}")
        failed = [case for case in found.cases if not case.sound]
        speaker.say(f"{len(found.cases)} attempts of a malicious coordinator, {len(failed)} not as promised.")
        for case in failed:
            speaker.say(f"  {case.name}: {case.outcome}")
        for line in found.untested:
            speaker.say(f"Not tested: {line}.")
        speaker.say(f"{page}: the report, signed in audit.jws.")
        if not found.sound:
            raise FedwardError("something contradicts the claim", remedy=f"see {page}")
        speaker.answer(as_json(found))


@app.command("sound-runs")
def sound_runs(
    study: Annotated[Path, typer.Argument(help="The study file, or a ready study's name.")],
    runs: Annotated[int, typer.Option(help="Audits, each with fresh noise and other patients.", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="Folder for sound-runs.json.")] = Path("audit"),
    public_size: Annotated[int, typer.Option(help="Patients that a site would declare.", min=1)] = 200,
    json: JsonOption = False,
) -> None:
    """Audit a sound site many times: how often do the tests suspect it, and are bounds above the claim?

    Exits with 1 if more often than the stated rates allow (a binomial test at 0.1 % for each).
    """
    from simulations.audit.run import Audit
    from simulations.audit.sound_runs import sound_runs as many
    from simulations.studies import ready_study

    with speaking(json) as speaker:
        logging.getLogger("fedward").setLevel(logging.CRITICAL)  # vaults refuse the attacks, and say so
        asked = load_study(study if study.exists() else ready_study(str(study)))

        def done(number: int, found: Audit) -> None:
            told = ", ".join(f"{c.site}: {c.name}" for c in found.conformance.alarms) or "no alarm"
            speaker.say(f"{number} of {runs}, {found.seconds:.0f} s: {told}")

        found = many(asked, public_size, runs, done=done)
        told = found.as_json()
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "sound-runs.json", canonical_json(told), mode=0o644)
        rows = [[c.what, f"{c.count} of {c.of}", f"{c.rate:.1%}", f"{c.p:.2g}"] for c in found.counts]
        speaker.table("What chance allows", ["what", "count", "rate at most", "p"], rows)
        for claim in found.broken:
            speaker.say(f"Not as promised: {claim}.")
        if not found.sound:
            raise FedwardError(
                "a sound site is suspected more often than is stated", remedy=f"see {out / 'sound-runs.json'}"
            )
        speaker.answer(told)


def _opened(store: Path) -> Store:
    if not (store / "store.db").exists():
        raise FedwardError(f"{store}: no store.db in it", remedy="give RUN/store or COORDINATOR/store")
    return Store(store)


def _keys(texts: list[str], sites: set[str]) -> dict[str, PublicKey]:
    keys = {}
    for text in texts:
        site, equals, file = text.partition("=")
        if not equals or site not in sites:
            raise FedwardError(
                f"--key {text}: not SITE=FILE with a site of these certificates",
                remedy=f"the sites are: {', '.join(sorted(sites)) or 'none'}",
            )
        keys[site] = read_public_key(Path(file))
    return keys


def _tell(speaker: Speaker, verdicts: tuple[Verdict, ...], missing: list[str]) -> None:
    header = ["certificate", "site", "session", "releases", "ε claimed", "ε (Google PLD)", "δ", "holds"]
    speaker.table("Certificates", header, [_row(v) for v in verdicts])
    for verdict in verdicts:
        parts = {
            "refused": [f"({r.check}) {r.text}" for r in verdict.reasons],
            "proven": verdict.proven,
            "trusted, not proven": verdict.trusted if verdict.holds else (),
            "not checked": verdict.unchecked if verdict.holds else (),
        }
        speaker.say(verdict.origin)
        for title, sentences in parts.items():
            for sentence in sentences:
                speaker.say(f"  {title}: {sentence}")
    for site in missing:
        speaker.say(f"No certificate was given of {site}, which answered the coordinator.")


def _row(verdict: Verdict) -> list[str]:
    if verdict.certificate is None or verdict.cost is None:
        return [verdict.origin, *[""] * 6, _word(verdict.holds)]
    claims = verdict.certificate.claims
    return [
        verdict.origin,
        claims.site,
        claims.session,
        str(len(claims.releases)),
        _epsilon(claims.epsilon.total),
        _epsilon(verdict.cost.total),
        f"{claims.delta + claims.statistics_delta:g}",
        _word(verdict.holds),
    ]


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.4f}"


def _word(sound: bool) -> str:
    return "yes" if sound else "NO"


def main() -> None:
    """Entry point of `fedward-audit`."""
    app()
