"""Consent withdrawn: patients whose records take part in nothing from the next step on.

The list holds HMAC-SHA256(site secret, patient id), never an id: who reads it learns nothing, and the
vault finds the patients in it. Every list that was ever in force is kept by its digest, so that the
ledger can tell which releases a patient took part in.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from client.policy_file import Signature, signature
from client.settings import SiteFolder
from common.errors import SiteError
from common.features import normal_code
from common.files import read_bounded, write_atomic

MAX_LIST_BYTES = 1 << 30
_HEADING = (
    "# Consent withdrawn: HMAC-SHA256(keys/split.key, patient id), one a line. See fedward-site withdraw.\n"
)


@dataclass(frozen=True, repr=False)
class Withdrawn:
    """A list of withdrawn patients.

    Attributes:
        patients: their keyed hashes, 32 bytes each.
        digest: HMAC-SHA256 under the site's secret, so that nobody else can tell a list, be it the empty
            one, by its digest.
    """

    patients: frozenset[bytes]
    digest: str

    def __repr__(self) -> str:  # how many withdrew is private
        return "Withdrawn(…)"


NOBODY = Withdrawn(frozenset(), "")


def listing(key: bytes, patients: frozenset[bytes]) -> Withdrawn:
    """The list of these keyed hashes."""
    content = b"".join(sorted(patients))
    return Withdrawn(patients, hmac.digest(key, b"withdrawn" + content, "sha256").hex())


def patient_hash(key: bytes, patient: str) -> bytes:
    """A patient's keyed hash; ids read as the data's do (`12.0` is `12`)."""
    return hmac.digest(key, normal_code(patient).encode(), "sha256")


class WithdrawnReader:
    """Reads the list for each step, and parses it only when the file has changed."""

    def __init__(self, folder: SiteFolder, key: bytes) -> None:
        self._folder, self._key, self._path = folder, key, str(folder.withdrawn_path)
        self._known: tuple[Signature, Withdrawn] | None = None

    def __call__(self) -> Withdrawn:
        """As `load_withdrawn`."""
        now = signature(self._path)
        if self._known is None or self._known[0] != now:
            listed = load_withdrawn(self._folder, self._key)
            _archive(self._folder, listed, self._key)
            self._known = now, listed
        return self._known[1]


def load_withdrawn(folder: SiteFolder, key: bytes) -> Withdrawn:
    """The list in force; an empty one if there never was a file.

    Raises:
        SiteError: naming the first line that is no keyed hash; or if the file is gone.
    """
    path = folder.withdrawn_path
    if path.exists():
        return listing(key, _read(path, key))
    if any(folder.withdrawn_lists.glob("*.txt")):
        raise SiteError(
            f"{path}: gone, and patients have withdrawn their consent here",
            remedy=f"restore it: the lists so far are in {folder.withdrawn_lists}",
        )
    return listing(key, frozenset())


def key_line(key: bytes) -> str:
    return f"# key {hmac.digest(key, b'key of the list', 'sha256').hex()}"


def _read(path: Path, key: bytes) -> frozenset[bytes]:
    found = set()
    content = read_bounded(path, SiteError, MAX_LIST_BYTES)
    for number, line in enumerate(content.splitlines(), start=1):
        text = line.strip().decode("ascii", errors="replace")
        if text and not text.startswith("#"):
            if not re.fullmatch("[0-9a-f]{64}", text):
                raise SiteError(
                    f"{path}: line {number} is no keyed hash", remedy="add patients by fedward-site withdraw"
                )
            found.add(bytes.fromhex(text))
    if found and key_line(key).encode() not in content.splitlines():
        raise SiteError(
            f"{path}: made with another secret than keys/split.key, so its patients can't be found",
            remedy="restore the split key; or move the list away and name them again: fedward-site withdraw",
        )
    return frozenset(found)


def withdraw(folder: SiteFolder, key: bytes, patients: Iterable[str]) -> int:
    """Add patients to the list; returns how many were new.

    Raises:
        SiteError: if the list is wrong or can't be written.
    """
    before = load_withdrawn(folder, key)
    listed = listing(key, before.patients | {patient_hash(key, p) for p in patients if p.strip()})
    _write(folder.withdrawn_path, listed, key)
    _archive(folder, listed, key)
    return len(listed.patients) - len(before.patients)


def list_of(folder: SiteFolder, key: bytes, digest: str) -> Withdrawn:
    """A list that was in force once.

    Raises:
        SiteError: if it is gone or is another.
    """
    path = folder.withdrawn_lists / f"{digest}.txt"
    empty = listing(key, frozenset())
    listed = empty if digest == empty.digest else listing(key, _read(path, key))
    if listed.digest != digest:
        raise SiteError(f"{path}: not the list that was in force", remedy="restore the file from a copy")
    return listed


def _archive(folder: SiteFolder, listed: Withdrawn, key: bytes) -> None:
    path = folder.withdrawn_lists / f"{listed.digest}.txt"
    if listed.patients and not path.exists():
        _write(path, listed, key)


def _write(path: Path, listed: Withdrawn, key: bytes) -> None:
    content = f"{_HEADING}{key_line(key)}\n" + "".join(f"{each.hex()}\n" for each in sorted(listed.patients))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, content.encode())
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", remedy="check its permissions") from None
