"""Public files, from their publisher or a local mirror, never accepted without their SHA-256."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from common.errors import DatasetError
from common.files import sync_folder
from simulations.datasets.registry import RemoteFile, find

Progress = Callable[[str, int, int], None]

_CHUNK = 1 << 18
_TIMEOUT_SECONDS = 30


def fetch(name: str, destination: Path, mirror: Path | None = None, progress: Progress | None = None) -> Path:
    """Bring a data set's files to `destination/FOLDER`; files that are there already are kept.

    Args:
        mirror: a folder that holds the data set's folder (or is it); nothing is downloaded then.
        progress: called with file name, bytes so far and bytes in all.

    Returns:
        The folder with the raw files; empty for data that a library ships.

    Raises:
        DatasetError: naming the file, and on a wrong checksum the expected and the found digest. A file
            of wrong content is removed; an interrupted download stays as `.part` and is resumed.
    """
    dataset = find(name)
    folder = destination / dataset.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise DatasetError(
            f"{folder}: cannot be made ({failure.strerror})", remedy="choose another folder"
        ) from None
    for file in dataset.files:
        target = folder / file.name
        if target.is_file() and digest_of(target) == file.sha256:
            continue
        if mirror is None and file.packed:
            raise DatasetError(
                f"{file.name}: was packed of the files at {file.url}, and cannot be downloaded as it is",
                remedy="give --mirror DIR with a copy",
            )
        if mirror is None:
            _download(file, target, progress)
        else:
            _copy(file, _mirrored(mirror, dataset.folder, file), target)
    return folder


def digest_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits.

    Raises:
        DatasetError: if it can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as failure:
        raise DatasetError(f"{path}: cannot be read ({failure.strerror})", remedy="fetch it again") from None


def _mirrored(mirror: Path, folder: str, file: RemoteFile) -> Path:
    for candidate in (mirror / folder / file.name, mirror / file.name):
        if candidate.is_file():
            return candidate
    raise DatasetError(
        f"{mirror / folder / file.name}: is not in the mirror", remedy="check --mirror, or fetch without it"
    )


def _copy(file: RemoteFile, origin: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    try:
        with origin.open("rb") as source, part.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
    except OSError as failure:
        part.unlink(missing_ok=True)
        raise DatasetError(
            f"{origin}: cannot be copied ({failure.strerror})", remedy="check the mirror"
        ) from None
    _accept(file, part, target, str(origin))


def _download(file: RemoteFile, target: Path, progress: Progress | None) -> None:
    """Download into `.part`, going on where an earlier attempt stopped."""
    part = target.with_name(target.name + ".part")
    try:
        have = part.stat().st_size if part.is_file() else 0
        if have > file.size:
            part.unlink()
            have = 0
        if have < file.size:
            headers = {"User-Agent": "fedward"} | ({"Range": f"bytes={have}-"} if have else {})
            request = urllib.request.Request(file.url, headers=headers)  # noqa: S310 (registry URLs only)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:  # noqa: S310
                resumed = reply.status == 206
                with part.open("ab" if resumed else "wb") as sink:
                    _pour(reply, sink, file, have if resumed else 0, progress)
    except (OSError, HTTPException) as failure:
        if isinstance(failure, urllib.error.HTTPError):
            failure.close()
        reason = (
            getattr(failure, "reason", None) or getattr(failure, "strerror", None) or type(failure).__name__
        )
        raise DatasetError(
            f"{file.name}: cannot be downloaded from {file.url} ({reason})",
            remedy="run it again to resume, or give --mirror DIR with a copy",
        ) from None
    have = part.stat().st_size
    if have < file.size:
        raise DatasetError(
            f"{file.name}: the download of {file.url} stopped after {have} of {file.size} bytes",
            remedy="run it again to resume",
        )
    _accept(file, part, target, file.url)


def _pour(reply: BinaryIO, sink: BinaryIO, file: RemoteFile, have: int, progress: Progress | None) -> None:
    # One byte beyond the expected size is enough to know that the content is wrong.
    while have <= file.size and (chunk := reply.read(min(_CHUNK, file.size + 1 - have))):
        sink.write(chunk)
        have += len(chunk)
        if progress is not None:
            progress(file.name, have, file.size)


def _accept(file: RemoteFile, part: Path, target: Path, origin: str) -> None:
    """Give a complete `.part` its name if its content is right, else remove it."""
    found = digest_of(part)
    if found != file.sha256:
        part.unlink()
        raise DatasetError(
            f"{file.name}: {origin} has SHA-256 {found}, expected {file.sha256}",
            remedy="fetch it again, or from another mirror; don't use this copy",
        )
    os.replace(part, target)
    sync_folder(target.parent)
