"""An append-only, hash-chained, signed, fsynced log: one JSON object a line.

Each entry holds the hash of the one before and a signature over its own, so that no entry can be changed,
dropped or moved without breaking the chain, nor made without the key. That its *end* is missing only shows
to who remembers a later head. A last line without its end is the trace of a crash during `append`: nobody
was told that it was written, so it is set aside. Any other damage is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import LedgerError
from common.files import canonical_json, sync_folder
from common.keys import PublicKey, SigningKey

GENESIS = "0" * 64
MOST_WAITING = 256  # entries that are not on disk yet


@dataclass(frozen=True)
class Entry:
    """Attributes:
    time: seconds since 1970 by the machine's clock; for people, nothing relies on it.
    hash: SHA-256 over the previous hash and this entry's canonical JSON.
    signature: Ed25519 over the hash, hexadecimal; empty in a journal without a key.
    """

    sequence: int
    time: float
    kind: str
    body: dict[str, Any]
    previous: str
    hash: str
    signature: str = ""

    def line(self) -> bytes:
        return canonical_json(vars(self)) + b"\n"


def _linked(sequence: int, at: float, kind: str, body: dict[str, Any], previous: str) -> Entry:
    content = {"sequence": sequence, "time": at, "kind": kind, "body": body, "previous": previous}
    return Entry(sequence, at, kind, body, previous, hashlib.sha256(canonical_json(content)).hexdigest())


@dataclass(frozen=True)
class _Draft:
    """An entry that is to be signed: what `_linked` gives.

    Attributes:
        start, end: of its line (see `Entry.line`), before the signature and after it.
    """

    entry: Entry
    start: bytes
    end: bytes

    def signed(self, key: SigningKey | None) -> tuple[Entry, bytes]:
        """The entry and its line."""
        if key is None:
            return self.entry, self.start + self.end
        signature = key.sign(bytes.fromhex(self.entry.hash)).hex()
        return replace(self.entry, signature=signature), self.start + signature.encode() + self.end


def _draft(sequence: int, at: float, kind: str, body: dict[str, Any], previous: str) -> _Draft:
    """As `_linked`, but the body is put into JSON only once for hash and line."""
    text, quoted = canonical_json(body), _quoted(kind)
    place = b'"previous":"%b","sequence":%d,' % (previous.encode(), sequence)
    moment = repr(at).encode()  # as json writes it
    content = b'{"body":%b,"kind":%b,%b"time":%b}' % (text, quoted, place, moment)
    entry = Entry(sequence, at, kind, body, previous, hashlib.sha256(content).hexdigest())
    start = b'{"body":%b,"hash":"%b","kind":%b,%b"signature":"' % (text, entry.hash.encode(), quoted, place)
    return _Draft(entry, start, b'","time":%b}\n' % moment)


@lru_cache(maxsize=16)
def _quoted(kind: str) -> bytes:
    return canonical_json(kind)


def read_journal(path: Path, key: PublicKey | None = None) -> list[Entry]:
    """The entries of a journal that another process may hold; none if there is no file.

    Args:
        key: whose signature every entry must have; None checks none.

    Raises:
        LedgerError: if its chain is broken, or a signature is wrong.
    """
    try:
        return chain(path.read_bytes(), path, key)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}", remedy="check its permissions") from None


def chain(content: bytes, path: Path, key: PublicKey | None = None) -> list[Entry]:
    """The entries of a journal's whole lines, each checked against the one before.

    Args:
        key: whose signature every entry must have; None checks none.

    Raises:
        LedgerError: naming the first line that is not what was written.
    """
    entries: list[Entry] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        previous = entries[-1].hash if entries else GENESIS
        try:
            entry = Entry(**json.loads(line))
            linked = _linked(number, entry.time, entry.kind, entry.body, previous)
            linked = replace(linked, signature=entry.signature)
            sound = entry == linked and linked.line() == line + b"\n" and _signed(entry, key)
        except (ValueError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise LedgerError(
                f"{path}: line {number} is not what was written",
                remedy="restore the latest file; an older copy is refused, and never edit it",
            )
        entries.append(entry)
    return entries


def _signed(entry: Entry, key: PublicKey | None) -> bool:
    if key is None:
        return True
    signature = bytes.fromhex(entry.signature)
    return signature.hex() == entry.signature and key.verifies(signature, bytes.fromhex(entry.hash))


class Journal:
    """The one open handle on a journal file.

    Args:
        path: created with mode 0600 if absent; its folder must exist.
        durable: fsync each entry. Simulations, whose budgets are nobody's, do without.
        key: signs each entry, and must have signed those that are there.
        prompt: sign and write each entry at once. Simulations may leave them to the journal's end, or until
            they are many: a crash then loses them.

    Raises:
        LedgerError: if another process holds it, its chain is broken, or it can't be read.
    """

    def __init__(
        self, path: Path, *, durable: bool = True, key: SigningKey | None = None, prompt: bool = True
    ) -> None:
        self.path = path
        self._prompt = durable or prompt
        self._waiting: list[_Draft] = []
        self._durable = durable
        self._key = key
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}", remedy="check the folder's permissions") from None
        try:
            self._lock()
            self.entries = self._read()
        except BaseException:
            os.close(self._descriptor)
            raise
        if durable:
            sync_folder(path.parent)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LedgerError(
                f"{self.path}: another vault holds this ledger",
                remedy="stop it first; a ledger has one vault",
            ) from None

    def _read(self) -> list[Entry]:
        content = self.path.read_bytes()
        torn = content[content.rfind(b"\n") + 1 :]
        if torn:
            self._set_aside(torn)
            os.ftruncate(self._descriptor, len(content) - len(torn))
        return chain(content, self.path, self._key.public if self._key else None)

    def _set_aside(self, torn: bytes) -> None:
        path = self.path.with_suffix(".torn")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(torn + b"\n")

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self.entries[-1].hash if self.entries else GENESIS

    def append(self, kind: str, body: dict[str, Any]) -> Entry:
        """Write one entry; it is on disk when this returns, unless it may wait.

        Raises:
            LedgerError: if it can't be written whole. The file is then as before; if not even that can
                be had, the journal takes nothing more until it is opened anew.
        """
        if self._descriptor < 0:
            raise LedgerError(f"{self.path}: closed", remedy="start the vault again")
        draft = _draft(len(self.entries) + 1, time.time(), kind, body, self.head)
        if self._prompt:
            entry, line = draft.signed(self._key)
            self._write(line)
        else:
            entry = draft.entry
            self._waiting.append(draft)
        self.entries.append(entry)
        if len(self._waiting) >= MOST_WAITING:
            self._write_waiting()
        return entry

    def _write(self, content: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, content) != len(content):
                raise OSError(28, "No space left on device")
            if self._durable:
                os.fsync(self._descriptor)
        except BaseException as error:
            self._restore(before)
            if not isinstance(error, OSError):
                raise
            raise LedgerError(
                f"{self.path}: cannot be written ({error.strerror})", remedy="free space on that disk"
            ) from None

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        signed = [draft.signed(self._key) for draft in waiting]
        try:
            self._write(b"".join(line for _, line in signed))
        except BaseException:
            self.close()  # what came next would chain to what is not there
            raise
        self.entries[len(self.entries) - len(signed) :] = [entry for entry, _ in signed]

    def _restore(self, size: int) -> None:
        """Cut off an entry that nobody was told of: the next one would not chain to it."""
        try:
            os.ftruncate(self._descriptor, size)
        except OSError:
            self.close()

    def close(self) -> None:
        """Let the file go; a second call does nothing.

        Raises:
            LedgerError: if what waits can't be written.
        """
        try:
            if self._descriptor >= 0 and self._waiting:
                self._write_waiting()
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
