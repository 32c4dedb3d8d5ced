"""Composition: a site's folder becomes a vault."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Callable
from typing import TypeVar

import torch

from client.certify import Issuer
from client.cohort import load_records
from client.device import Computing, resolve
from client.holdings import Holdings
from client.ledger import Ledger, check_certificates
from client.policy_file import PolicyReader, Signature, signature
from client.settings import SiteFolder
from client.sources.version import data_versions
from client.vault import Vault
from client.withdrawal import WithdrawnReader
from common.errors import SiteError
from common.files import read_bounded
from common.keys import make_signing_key, read_signing_key
from common.privacy.noise import OperatingSystem, Randomness
from common.study import Study

SPLIT_KEY_BYTES = 32
Read = TypeVar("Read")


def open_vault(
    folder: SiteFolder,
    *,
    randomness: Randomness | None = None,
    split_key: bytes | None = None,
    durable: bool = True,
    prompt: bool = True,
) -> Vault:
    """The vault of a site, not yet listening anywhere.

    It computes on one thread: results don't depend on the machine's cores, and a simulation runs its
    sites side by side.

    Args:
        randomness: the operating system's, unless a simulation says otherwise.
        split_key: instead of the site's own secret (simulations).
        durable: fsync the ledger and pad the time of answers (simulations do without).
        prompt: see `Ledger`.

    Raises:
        SiteError: if a key is absent or unsafe, or the device of site.toml is absent.
        LedgerError: if the ledger is corrupt, older than something else in the folder, or held by another
            vault.
    """
    torch.set_num_threads(1)
    computing = Computing(folder.file.device, folder.file.step_memory_mib << 20)
    resolve(computing.device)  # an operator learns now, not with the first round, that it is absent
    key, signing = split_key or read_split_key(folder), read_signing_key(folder.signing_key_path)
    reader, drawn = PolicyReader(folder), randomness or OperatingSystem()
    holdings = Holdings(
        site=folder.name,
        public_size=folder.file.site.public_size,
        policy=reader.policy,
        study=reader.study,
        records=lambda study: load_records(folder, study, key),
        version=data_versions(folder),
        split=_splits(key),
        withdrawn=_while_unchanged(str(folder.withdrawn_path), WithdrawnReader(folder, key)),
    )
    ledger = Ledger(folder.ledger_path, folder.replies, key=signing, durable=durable, prompt=prompt)
    try:
        check_certificates(folder.certificates, ledger.account)
    except BaseException:
        ledger.close()
        raise
    issuer = Issuer(folder.name, signing, folder.certificates, durable)
    return Vault(holdings, ledger, drawn, issuer, padded=durable, computing=computing)


def _while_unchanged(path: str, read: Callable[[], Read]) -> Callable[[], Read]:
    """`read`, but what it gave last as long as the file at `path` is the same."""
    known: tuple[Signature, Read] | None = None

    def current() -> Read:
        nonlocal known
        now = signature(path)  # looked at first: what changes meanwhile shows the next time
        if known is None or known[0] != now:
            known = now, read()
        return known[1]

    return current


def _splits(key: bytes) -> Callable[[Study, object], str]:
    """What gives the keyed digest of what decides who trains and who tests: the secret, or the data, by their
    version, with the column."""
    known: tuple[str | None, object, str] | None = None

    def split(study: Study, version: object) -> str:
        nonlocal known
        column = study.data.split.column
        if known is None or known[:2] != (column, version):
            decides = "" if column is None else f"{column} {version}"
            known = column, version, hmac.digest(key, f"split {decides}".encode(), "sha256").hex()
        return known[2]

    return split


def read_split_key(folder: SiteFolder) -> bytes:
    """The secret that decides who trains and who tests.

    Raises:
        SiteError: if it is absent, or readable by others.
    """
    path = folder.split_key_path
    key = read_bounded(path, SiteError, limit=1024) if path.exists() else None
    if key is None:
        raise SiteError(
            f"{path}: no such file",
            remedy="restore its copy: a new key forgets who withdrew. A new site: fedward-site init",
        )
    if path.stat().st_mode & 0o077:
        raise SiteError(f"{path}: others may read this secret", remedy=f"chmod 600 {path}")
    return key


def make_site_keys(folder: SiteFolder) -> None:
    """Make the split secret and the signing key, once; existing ones are left alone."""
    make_signing_key(folder.signing_key_path)
    folder.split_key_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder.split_key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(SPLIT_KEY_BYTES))
