"""`fedward-site`, what the privacy officer decides: policy, approvals, withdrawn consent."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import JsonOption, Speaker, speaking
from common.errors import Refused, SiteError

if TYPE_CHECKING:
    from client.policy import Policy
    from client.settings import SiteFolder
    from common.study import Study

Folder = Annotated[Path, typer.Argument(help="The site's folder: it holds site.toml.", show_default=False)]
StudyFile = Annotated[Path, typer.Argument(help="The study's file.", show_default=False)]
Role = Annotated[str, typer.Option(help="The role that answers for it.")]
OFFICER = "privacy officer"


def policy(
    folder: Folder,
    epsilon: Annotated[
        float | None, typer.Option(help="Lifetime ε of the cohort, over all studies for ever.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Lifetime δ of the cohort.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Least noise of a training step.")] = None,
    clipping_norm: Annotated[float | None, typer.Option(help="Largest norm of a patient's gradient.")] = None,
    public_size: Annotated[int | None, typer.Option(help="Least public size to take part with.")] = None,
    patients_per_step: Annotated[float | None, typer.Option(help="Least expected patients a step.")] = None,
    minimum_patients: Annotated[int | None, typer.Option(help="Statistics of fewer patients stay.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="training, evaluation, statistics: what may leave; repeat it.")
    ] = None,
    secure_aggregation: Annotated[
        str | None, typer.Option(help="required, or optional.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the site's policy, and change what is given. Studies are allowed by `approve`."""
    from client.policy_file import load_policy, set_policy
    from client.settings import SiteFolder

    with speaking(json) as speaker:
        site = SiteFolder(folder)
        floors = {
            "noise_multiplier": noise_multiplier,
            "clipping_norm": clipping_norm,
            "public_size": public_size,
            "patients_per_step": patients_per_step,
            "minimum_patients": minimum_patients,
        }
        wanted: dict[str, Any] = {
            "cohort": _given({"epsilon": epsilon, "delta": delta}),
            "floors": _given(floors),
            "releases": allow,
            "secure_aggregation": secure_aggregation,
        }
        changes = {name: value for name, value in wanted.items() if value}
        found = set_policy(site, changes) if changes else load_policy(site)
        _show_policy(speaker, site, found)
        speaker.answer({"site": site.name, "digest": found.digest, **found.content})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _show_policy(speaker: Speaker, site: SiteFolder, policy: Policy) -> None:
    budget, floors = policy.cohort, policy.floors
    speaker.say(f"Policy of {site.name}, {site.policy_path}:")
    lifetime = (
        f"ε = {budget.epsilon:g}, δ = {budget.delta:g}" if budget else "none, so nothing private may run"
    )
    speaker.say(f"  lifetime budget of a patient, over all studies: {lifetime}")
    speaker.say(f"  may leave: {', '.join(policy.releases) or 'nothing'}")
    clipping = f"{floors.clipping_norm:g}" if floors.clipping_norm else "as the study says"
    speaker.say(
        f"  floors: noise multiplier ≥ {floors.noise_multiplier:g}, clipping norm ≤ {clipping}, public size "
        f"≥ {floors.public_size}, patients a step ≥ {floors.patients_per_step:g}, statistics of ≥ "
        f"{floors.minimum_patients} patients; unit: {floors.unit}"
    )
    speaker.say(f"  secure aggregation: {policy.secure_aggregation}")
    speaker.say(f"  approved studies: {sum(a.revoked_at is None for a in policy.approved)}")


def approve(
    folder: Folder,
    study: StudyFile,
    by: Role = OFFICER,
    sessions: Annotated[int, typer.Option(help="Sessions that the budget shall last for.", min=1)] = 1,
    descriptions: Annotated[
        int | None, typer.Option(help="Further sessions of statistics alone; one if absent.", min=0)
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Most ε a session, if less than the study asks: more noise.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Most δ a session, likewise.")] = None,
    valid_from: Annotated[str | None, typer.Option(help="First day, e.g. 2027-01-01 (UTC).")] = None,
    valid_until: Annotated[str | None, typer.Option(help="Last day (UTC).")] = None,
    public_cohort: Annotated[
        bool,
        typer.Option(help="The cohort's records are PUBLISHED anyway. Never for your own patients."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a study will learn, spend and leave, ask, and allow it."""
    from client.policy import approval_of
    from client.policy_file import approve as write_approval
    from client.policy_file import load_policy, refuse_unready
    from client.settings import SiteFolder
    from common.privacy.plan import plan_study
    from common.study import load_study

    with speaking(json) as speaker:
        site, wanted = SiteFolder(folder), load_study(study)
        found = load_policy(site)
        refuse_unready(site, found, wanted)
        approval = approval_of(
            wanted,
            by,
            sessions=sessions,
            descriptions=descriptions,
            public=public_cohort,
            session_epsilon=epsilon,
            session_delta=delta,
            valid_from=_moment(valid_from, "--valid-from", time.min),
            valid_until=_moment(valid_until, "--valid-until", time.max),
        )
        if approval.valid_until is not None and approval.valid_until < datetime.now(UTC):
            raise SiteError(
                f"--valid-until {valid_until}: is over", remedy="name today, or a later day (UTC)"
            )
        limits = found.limits(approval)
        _explain(speaker, site, wanted, found, limits)
        if public_cohort:
            speaker.say("You declare that these records are PUBLIC: this study may ask for exact metrics.")
        if not yes and (json or not typer.confirm(f"Approve for {sessions} session(s)?", err=True)):
            raise Refused("not approved", remedy="answer yes, or give --yes")
        write_approval(site, wanted, approval, plan_study(wanted, site.file.site.public_size, limits))
        speaker.say(f"Approved: {approval.study} {approval.digest[:12]}, by {approval.approved_by}.")
        speaker.answer(approval.model_dump(mode="json"))


def _moment(day: str | None, option: str, at: time) -> datetime | None:
    if day is None:
        return None
    try:
        return datetime.combine(date.fromisoformat(day), at.replace(microsecond=0), UTC)
    except ValueError:
        raise SiteError(f"{option} {day}: not a day", remedy="write it like 2027-01-31") from None


def _explain(speaker: Speaker, site: SiteFolder, study: Study, policy: Policy, limits: Any) -> None:
    from client.account import read_account
    from client.reservation import rounds_rdp
    from common.explain import explain, explain_cost
    from common.models import parameter_count
    from common.privacy.filter import rdp
    from common.privacy.plan import plan_study

    size = site.file.site.public_size
    for line in explain(study, parameter_count(study)).lines:
        speaker.say(line)
    speaker.say(f"One session costs a patient here {explain_cost(study, size, limits)}.")
    withheld = {"training", "evaluation", "statistics"} - set(policy.releases)
    if withheld:
        speaker.say(f"Your policy keeps here: {', '.join(sorted(withheld))}.")
    if policy.cohort is not None and policy.cohort.filter().capacity > 0:
        budget = policy.cohort.filter()
        before = read_account(site.ledger_path).rdp(budget.order)
        plan = plan_study(study, size, limits)
        session = rounds_rdp(plan, budget.order) if plan.private else 0.0
        statistics = plan.statistics_event()
        if statistics is not None and study.data.scaling == "moments":
            session += rdp(statistics, budget.order)
        speaker.say(
            f"Lifetime budget of a patient, ε = {budget.epsilon:g} at δ = {budget.delta:g}: "
            f"{before / budget.capacity:.1%} is reserved; one session takes {session / budget.capacity:.1%}."
        )
        if before + session > budget.capacity:
            speaker.say(
                "NO SESSION FITS into what is left; the vault will refuse each. --epsilon makes it cost less."
            )


def revoke(
    folder: Folder,
    digest: Annotated[str, typer.Argument(help="The study's digest, or its first characters (6 or more).")],
    by: Role = OFFICER,
    json: JsonOption = False,
) -> None:
    """Take an approval back, from the next message on. What was spent stays spent."""
    from client.policy_file import revoke as remove_approval
    from client.settings import SiteFolder

    with speaking(json) as speaker:
        remove_approval(SiteFolder(folder), digest, by)
        speaker.say(f"Revoked: {digest}.")
        speaker.answer({"revoked": digest})


def withdraw(
    folder: Folder,
    patient: Annotated[
        list[str] | None, typer.Option("--id", help="A patient's id as the data have it; repeat it.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="A file with one id a line.")] = None,
    json: JsonOption = False,
) -> None:
    """Honour that patients withdrew their consent, from the next training step on.

    Only keyed hashes of the ids are kept.
    """
    from client.settings import SiteFolder
    from client.site import read_split_key
    from client.withdrawal import MAX_LIST_BYTES
    from client.withdrawal import withdraw as write_list
    from common.files import read_bounded

    with speaking(json) as speaker:
        site = SiteFolder(folder)
        wanted = list(patient or [])
        if ids is not None:
            wanted += read_bounded(ids, SiteError, MAX_LIST_BYTES).decode("utf-8-sig", "replace").splitlines()
        if not any(each.strip() for each in wanted):
            raise SiteError("no patient is named", remedy="give --id ID, or --ids FILE")
        new = write_list(site, read_split_key(site), wanted)
        speaker.say(f"{new} patients more on the list {site.withdrawn_path}, honoured from the next step on.")
        speaker.say("Ids weren't looked up: `fedward-site check` says how many of the list the data hold.")
        speaker.answer({"site": site.name, "added": new, "list": str(site.withdrawn_path)})
