"""policy.toml and the approved studies on disk: read for each message, changed by the site's officer.

A person may edit policy.toml; the vault reads it anew for each message, and writes every policy under which
it serves into the ledger.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomli_w

from client.policy import Approval, Policy
from client.settings import SiteFolder
from common.errors import NotApproved, SiteError, StudyError
from common.files import load_config, read_bounded, validated, write_atomic
from common.privacy.plan import StudyPlan
from common.study import Study, parse_study


class PolicyReader:
    """Reads a site's policy and approved studies for each message, and parses them only when changed."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._policy_path, self._approved = str(folder.policy_path), folder.approved
        self._digest, self._study_path = "", ""
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
        if self._digest != digest:
            self._digest, self._study_path = digest, str(self._approved / f"{digest}.json")
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
    refuse_unready(folder, policy, study)
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


def refuse_unready(folder: SiteFolder, policy: Policy, study: Study) -> None:
    """Raises:
    SiteError: if the study is approved already, or has privacy and finds no lifetime budget to be charged to.
    """
    if policy.standing(study.digest) is not None:
        raise SiteError(
            f"{folder.policy_path}: study {study.digest[:12]} is approved already",
            remedy="revoke it first to change its budget: fedward-site revoke",
        )
    if study.private and policy.cohort is None:
        raise SiteError(
            f"{folder.policy_path}: no lifetime budget of the cohort",
            remedy="set it first: fedward-site policy FOLDER --epsilon 8 --delta 1e-4",
        )


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
            remedy="give 6 characters or more of the digest: fedward-site budget lists them",
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
