"""policy.toml: what a site's operator allows. Absent, nothing is allowed.

A person may edit the file; the vault reads it anew for each message, and writes every policy under which
it serves into the ledger.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AwareDatetime, Field

from client.settings import SiteFolder
from common.dictionary import Positive
from common.errors import NotApproved, PolicyForbids, Refused, SiteError, StudyError
from common.files import Strict, canonical_json, load_config, read_bounded, validated, write_atomic
from common.messages import Digest
from common.privacy.filter import PrivacyFilter, privacy_filter
from common.privacy.plan import Limits, StudyPlan
from common.study import Study, parse_study

Release = Literal["training", "evaluation", "statistics"]
EVERY_RELEASE: tuple[Release, ...] = ("training", "evaluation", "statistics")


class CohortBudget(Strict):
    """What all studies, statistics and evaluations together may ever cost a patient of this site."""

    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=0.1)]

    def filter(self) -> PrivacyFilter:
        """What enforces it."""
        return privacy_filter(self.epsilon, self.delta)


class Floors(Strict):
    """What no study may fall short of, whatever it asks.

    Attributes:
        noise_multiplier: a training step has at least so much noise; the site adds more by itself.
        clipping_norm: a patient's gradient is clipped to at most this norm.
        public_size: the site takes part only while it declares at least so many patients.
        patients_per_step: so many patients are expected in a training step.
        unit: what is protected.
        minimum_patients: statistics of fewer patients, by their noised count, stay.
    """

    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clipping_norm: Positive | None = None
    public_size: Annotated[int, Field(ge=1)] = 1
    patients_per_step: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    unit: Literal["patient"] = "patient"
    minimum_patients: Annotated[int, Field(ge=1)] = 10


class Approval(Strict):
    """One study that may run here.

    Attributes:
        epsilon, delta: the most that all sessions of this study together may spend per patient.
        session_epsilon, session_delta: the most for one session's rounds, and for its statistics, where
            that is less than the study asks: the site then adds more noise.
        public: the records that this study uses are published anyway, so exact metrics, and training
            without privacy, harm nobody. Never true for a hospital's own patients.
        approved_by: the role that answered for it.
        valid_from, valid_until: with time zone; None = from now on, for ever.
        revoked_at: from then on it counts no more.
    """

    study: str
    digest: Digest
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    session_epsilon: Annotated[float, Field(gt=0)] | None = None
    session_delta: Annotated[float, Field(gt=0, lt=0.1)] | None = None
    public: bool = False
    approved_by: str
    approved_at: AwareDatetime
    valid_from: AwareDatetime | None = None
    valid_until: AwareDatetime | None = None
    revoked_by: str | None = None
    revoked_at: AwareDatetime | None = None

    def refuse_unprotected(self, what: str) -> None:
        """Raises:
        Refused: unless the study's records are public anyway.
        """
        if not self.public:
            raise Refused(
                f"{what} is allowed on public cohorts only, and this one is not",
                remedy='use privacy.mode = "patient-dp" and private metrics',
            )


class Policy(Strict):
    """The content of policy.toml.

    Attributes:
        cohort: the lifetime budget; without one nothing private may be approved.
        releases: what may leave at all.
        secure_aggregation: `required` refuses updates that the coordinator could see singly.
    """

    cohort: CohortBudget | None = None
    floors: Floors = Floors()
    releases: tuple[Release, ...] = EVERY_RELEASE
    secure_aggregation: Literal["optional", "required"] = "optional"
    approved: tuple[Approval, ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical form."""
        return hashlib.sha256(canonical_json(self.content)).hexdigest()

    def standing(self, digest: str) -> Approval | None:
        """The approval of a study that nobody has revoked, whether or not its time has come."""
        return next((a for a in self.approved if a.digest == digest and a.revoked_at is None), None)

    def approval(self, digest: str, now: float | None = None, latest: float | None = None) -> Approval:
        """The approval of a study that counts now.

        Args:
            now: seconds since 1970; None looks at no dates.
            latest: the latest time that was seen, for what has ended; `now` if absent.

        Raises:
            NotApproved: if there is none.
        """
        found = self.standing(digest)
        if found is None:
            raise NotApproved(
                f"study {digest[:12]} is not approved at this site",
                remedy="its operator approves studies: fedward-site approve FOLDER STUDY",
            )
        if now is not None:
            moment = datetime.fromtimestamp(now, UTC)
            last = datetime.fromtimestamp(now if latest is None else latest, UTC)
            if moment < (found.valid_from or moment) or last > (found.valid_until or last):
                raise NotApproved(
                    f"the approval of study {digest[:12]} is not valid at this time",
                    remedy="its operator may approve it anew: fedward-site revoke, then approve",
                )
        return found

    def limits(self, approval: Approval) -> Limits:
        """What a plan must keep to."""
        return Limits(
            epsilon=approval.session_epsilon,
            delta=approval.session_delta,
            clipping_norm=self.floors.clipping_norm,
            noise_multiplier=self.floors.noise_multiplier,
        )

    def refuse_below_floors(self, study: Study, plan: StudyPlan, public_size: int) -> None:
        """Hold a study against the floors that more noise doesn't mend.

        Raises:
            PolicyForbids: naming the floor.
        """
        floors = self.floors
        if public_size < floors.public_size:
            self._forbid(f"a public size of {public_size}, and {floors.public_size} is the least")
        if study.private and plan.step.divisor < floors.patients_per_step:
            self._forbid(
                f"{plan.step.divisor:g} patients a step, and {floors.patients_per_step:g} is the least"
            )
        if self.secure_aggregation == "required":
            self._forbid("updates without secure aggregation")

    def refuse_release(self, release: Release) -> None:
        """Raises:
        PolicyForbids: if nothing of the kind may leave.
        """
        if release not in self.releases:
            self._forbid(f"the release of {release}")

    def _forbid(self, what: str) -> None:
        raise PolicyForbids(f"this site's policy forbids {what}", remedy="ask the site's privacy officer")


class PolicyReader:
    """Reads a site's policy and approved studies for each message, and parses them only when changed."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._policy_path, self._approved = folder.policy_path, folder.approved
        self._study_path = self._approved / "none"
        self._policy: tuple[Signature, Policy] | None = None
        self._study: tuple[Signature, str, Study] | None = None

    def policy(self) -> Policy:
        """As `load_policy`."""
        now = signature(self._policy_path)
        if self._policy is None or self._policy[0] != now:
            self._policy = now, load_policy(self._folder)
        return self._policy[1]

    def study(self, digest: str) -> Study:
        """As `approved_study`."""
        if self._study_path.stem != digest:
            self._study_path = self._approved / f"{digest}.json"
        now = signature(self._study_path)
        if self._study is None or self._study[:2] != (now, digest):
            self._study = now, digest, approved_study(self._folder, digest)
        return self._study[2]


Signature = tuple[int, int, int, int] | None


def signature(path: Path | str) -> Signature:
    """What changes when a file is replaced or written to; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load_policy(folder: SiteFolder) -> Policy:
    """The site's policy as it stands on disk now.

    Raises:
        SiteError: if the file is there but wrong.
    """
    if not folder.policy_path.exists():
        return Policy()
    return load_config(Policy, folder.policy_path, SiteError)


def approved_study(folder: SiteFolder, digest: str) -> Study:
    """The approved study, from the site's own copy.

    Raises:
        SiteError: if the copy is gone or isn't the study that was approved.
    """
    path = folder.approved / f"{digest}.json"
    content = read_bounded(path, SiteError)
    try:
        study = _parsed(content)
    except StudyError:
        study = parse_study(content, str(path))  # says which file
    if study.digest != digest:
        raise SiteError(f"{path}: not the study that was approved", remedy="approve the study again")
    return study


@lru_cache(maxsize=8)
def _parsed(content: bytes) -> Study:
    """A study for all sites of a process that keep the same copy of it."""
    return parse_study(content, "approved study")


def set_policy(folder: SiteFolder, changes: Mapping[str, Any], *, durable: bool = True) -> Policy:
    """Change what policy.toml says besides its approvals; the file is made if absent.

    Args:
        changes: `cohort` and `floors` as tables of which the given keys change, `releases`,
            `secure_aggregation`.
        durable: see `save_policy`.

    Raises:
        SiteError: if a value is wrong, or the file can't be written.
    """
    value = load_policy(folder).content
    for key, change in changes.items():
        value[key] = {**value.get(key, {}), **change} if isinstance(change, Mapping) else change
    policy = validated(Policy, value, str(folder.policy_path), SiteError)
    save_policy(folder, policy, durable=durable)
    return policy


def approve(
    folder: SiteFolder, study: Study, approval: Approval, plan: StudyPlan, *, durable: bool = True
) -> Approval:
    """Allow a study: its canonical form is kept at the site, its digest and budget enter policy.toml.

    Args:
        approval: see `approval_of`.
        plan: what the study does here within the policy's limits.
        durable: see `save_policy`.

    Raises:
        SiteError: if it is approved already, no lifetime budget stands, or a file can't be written.
        Refused: if the policy forbids it, or it runs without privacy and the cohort isn't public.
    """
    policy = load_policy(folder)
    require_lifetime(folder, policy, study)
    if policy.standing(study.digest) is not None:
        raise SiteError(
            f"{folder.policy_path}: study {study.digest[:12]} is approved already",
            remedy="revoke it first to change its budget: fedward-site revoke",
        )
    if not study.private:
        approval.refuse_unprotected("a study without privacy")
    policy.refuse_below_floors(study, plan, folder.file.site.public_size)
    try:
        folder.approved.mkdir(mode=0o700, parents=True, exist_ok=True)
        _place(folder.approved / f"{study.digest}.json", study.canonical, durable)
    except OSError as error:
        raise SiteError(f"{folder.approved}: {error.strerror}", remedy="check its permissions") from None
    approved = (*policy.approved, approval)
    save_policy(folder, policy.model_copy(update={"approved": approved}), durable=durable)
    return approval


def require_lifetime(folder: SiteFolder, policy: Policy, study: Study) -> None:
    """Raises:
    SiteError: if a study with privacy finds no lifetime budget to be charged to.
    """
    if study.private and policy.cohort is None:
        raise SiteError(
            f"{folder.policy_path}: no lifetime budget of the cohort",
            remedy="set it first: fedward-site policy FOLDER --epsilon 8 --delta 1e-4",
        )


def approval_of(
    study: Study, by: str, *, sessions: int = 1, descriptions: int | None = None, **details: Any
) -> Approval:
    """An approval that lasts for so many sessions, as the study asks or as `details` cap them.

    Args:
        sessions: of training, with their statistics where the study scales by moments.
        descriptions: further sessions of statistics alone; None = one, if the study asks for statistics.
        details: fields of `Approval`.

    Raises:
        SiteError: if a value is wrong.
    """
    cap_epsilon, cap_delta = details.get("session_epsilon"), details.get("session_delta")
    scaled = sessions * (study.data.scaling == "moments")
    surveys = (scaled + (1 if descriptions is None else descriptions)) * (study.statistics is not None)
    parts = [(sessions, study.privacy), (surveys, study.statistics)]
    epsilon = sum(n * min(p.epsilon, cap_epsilon or p.epsilon) for n, p in parts if p and p.epsilon)
    delta = sum(n * min(p.delta, cap_delta or p.delta) for n, p in parts if p and p.delta)
    value = {
        "study": study.name,
        "digest": study.digest,
        "epsilon": epsilon or None,
        "delta": delta or None,
        "approved_by": by,
        "approved_at": datetime.now(UTC).replace(microsecond=0),
        **details,
    }
    return validated(Approval, value, "approval", SiteError)


def revoke(folder: SiteFolder, digest: str, by: str) -> None:
    """Take an approval back; the vault honours it from the next message on.

    Args:
        digest: of the study, or its first characters (at least 6).
        by: the role that answers for it.

    Raises:
        NotApproved: if no approval, or more than one, begins so.
    """
    policy = load_policy(folder)
    standing = [a for a in policy.approved if a.revoked_at is None]
    found = [a for a in standing if len(digest) >= 6 and a.digest.startswith(digest)]
    if len(found) != 1:
        raise NotApproved(
            f"{len(found)} approved studies begin with {digest!r}",
            remedy="give the digest as policy.toml has it",
        )
    ended = found[0].model_copy(
        update={"revoked_by": by, "revoked_at": datetime.now(UTC).replace(microsecond=0)}
    )
    approved = tuple(ended if a is found[0] else a for a in policy.approved)
    save_policy(folder, policy.model_copy(update={"approved": approved}))


def save_policy(folder: SiteFolder, policy: Policy, *, durable: bool = True) -> None:
    """Replace policy.toml as a whole.

    Args:
        durable: sync it to disk. Simulations do without.

    Raises:
        SiteError: if it can't be written.
    """
    try:
        _place(folder.policy_path, tomli_w.dumps(policy.content).encode(), durable)
    except OSError as error:
        raise SiteError(f"{folder.policy_path}: {error.strerror}", remedy="check its permissions") from None


def _place(path: Path, content: bytes, durable: bool) -> None:
    if durable:
        write_atomic(path, content)
    else:
        path.write_bytes(content)
