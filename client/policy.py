"""policy.toml: what a site's operator allows. Absent, nothing is allowed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import Field

from client.settings import SiteFolder
from common.errors import NotApproved, Refused, SiteError
from common.files import Strict, load_config, read_bounded, write_atomic
from common.messages import Digest
from common.privacy.plan import StudyPlan
from common.study import Study, parse_study


class Approval(Strict):
    """One study that may run here.

    Attributes:
        epsilon, delta: the most that all sessions of this study together may spend per patient.
        public: the records that this study uses are published anyway, so exact metrics, and training
            without privacy, harm nobody. Never true for a hospital's own patients.
        approved_by: the role that answered for it.
    """

    study: str
    digest: Digest
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    public: bool = False
    approved_by: str
    approved_at: str

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
    """The content of policy.toml."""

    approved: tuple[Approval, ...] = ()

    def approval(self, digest: str) -> Approval:
        """The approval of a study.

        Raises:
            NotApproved: if there is none.
        """
        for approval in self.approved:
            if approval.digest == digest:
                return approval
        raise NotApproved(
            f"study {digest[:12]} is not approved at this site",
            remedy="its operator approves studies: fedward-site approve FOLDER STUDY",
        )


class PolicyReader:
    """Reads a site's policy and approved studies for each message, and parses them only when changed."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._policy: tuple[Signature, Policy] | None = None
        self._study: tuple[Signature, str, Study] | None = None

    def policy(self) -> Policy:
        """As `load_policy`."""
        now = signature(self._folder.policy_path)
        if self._policy is None or self._policy[0] != now:
            self._policy = now, load_policy(self._folder)
        return self._policy[1]

    def study(self, digest: str) -> Study:
        """As `approved_study`."""
        now = signature(self._folder.approved / f"{digest}.json")
        if self._study is None or self._study[:2] != (now, digest):
            self._study = now, digest, approved_study(self._folder, digest)
        return self._study[2]


Signature = tuple[int, int, int, int] | None


def signature(path: Path) -> Signature:
    """What changes when a file is replaced or written to; None if there is no file."""
    try:
        status = path.stat()
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
    study = parse_study(read_bounded(path, SiteError), str(path))
    if study.digest != digest:
        raise SiteError(f"{path}: not the study that was approved", remedy="approve the study again")
    return study


def approve(
    folder: SiteFolder, study: Study, plan: StudyPlan, by: str, sessions: int = 1, *, public: bool = False
) -> Approval:
    """Allow a study: its canonical form is kept at the site, its digest and budget enter policy.toml.

    Args:
        plan: what one session costs here.
        sessions: how many sessions the budget shall last for.
        public: the operator declares that the records which this study uses are published anyway.

    Raises:
        SiteError: if it is approved already or can't be written.
        Refused: if it runs without privacy and the cohort isn't public.
    """
    policy = load_policy(folder)
    if any(a.digest == study.digest for a in policy.approved):
        raise SiteError(
            f"{folder.policy_path}: study {study.digest[:12]} is approved already",
            remedy="revoke it first to change its budget: fedward-site revoke",
        )
    approval = Approval(
        study=study.name,
        digest=study.digest,
        epsilon=(study.privacy.epsilon or 0.0) * sessions if plan.private else None,
        delta=plan.delta * sessions if plan.private else None,
        public=public,
        approved_by=by,
        approved_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not study.private:
        approval.refuse_unprotected("a study without privacy")
    try:
        folder.approved.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(folder.approved / f"{study.digest}.json", study.canonical)
    except OSError as error:
        raise SiteError(f"{folder.approved}: {error.strerror}", remedy="check its permissions") from None
    save_policy(folder, policy.model_copy(update={"approved": (*policy.approved, approval)}))
    return approval


def revoke(folder: SiteFolder, digest: str) -> None:
    """Take an approval back; the vault honours it from the next message on.

    Args:
        digest: of the study, or its first characters (at least 6).

    Raises:
        NotApproved: if no approval, or more than one, begins so.
    """
    policy = load_policy(folder)
    found = [a for a in policy.approved if len(digest) >= 6 and a.digest.startswith(digest)]
    if len(found) != 1:
        raise NotApproved(
            f"{len(found)} approved studies begin with {digest!r}",
            remedy="give the digest as policy.toml has it",
        )
    save_policy(
        folder, policy.model_copy(update={"approved": tuple(a for a in policy.approved if a != found[0])})
    )


def save_policy(folder: SiteFolder, policy: Policy) -> None:
    """Replace policy.toml as a whole.

    Raises:
        SiteError: if it can't be written.
    """
    content = tomli_w.dumps(policy.model_dump(mode="json", exclude_none=True)).encode()
    try:
        write_atomic(folder.policy_path, content)
    except OSError as error:
        raise SiteError(f"{folder.policy_path}: {error.strerror}", remedy="check its permissions") from None
