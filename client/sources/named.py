"""Files that a table's cells name, out of a folder or a tar archive, and no others.

A file that can't be had is a problem of its records, told in words that don't quote its name: the name came
from a cell.
"""

from __future__ import annotations

import errno
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from common.errors import DataError

ABSENT = "the file that it names is absent"
UNREADABLE = "the file that it names cannot be read"
NOT_PLAIN = "what it names is a link or a folder, not a file"
OUTSIDE = "what it names lies outside of the files' folder"
_AMBIGUOUS = "it names several files of the archive"

Named = tuple[Sequence[int], "bytes | str"]
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
BROKEN_ARCHIVE = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, OverflowError)


def too_large(max_bytes: int) -> str:
    return f"the file that it names is larger than {max_bytes} bytes (max_bytes in site.toml)"


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(_SUFFIXES)


def named_files(
    path: Path, cells: Sequence[str | None], max_bytes: int, endings: Sequence[str] = ("",)
) -> Iterator[Named]:
    """Every distinct file that cells name, once: positions of its records, and its bytes or what is wrong.

    Args:
        path: a folder; or a .tar, .tar.gz or .tgz, where a name without its folder will do if it fits one
            file only.
        cells: each record's name of a file, relative and with `/`; None where it names none.
        max_bytes: of one file.
        endings: that a cell may leave away, tried in this order.

    Raises:
        DataError: if the folder or the archive can't be opened at all, or a name fits several files.
    """
    positions: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        if cell is not None:
            positions.setdefault(cell, []).append(i)
    if is_archive(path):
        yield from _from_archive(path, positions, max_bytes, endings)
    elif path.is_dir():
        root = path.resolve()
        for cell, records in positions.items():
            yield records, _from_folder(root, cell, max_bytes, endings)
    else:
        raise DataError(
            f"{path}: is no folder and no archive of files",
            remedy="name a folder, a .tar or a .tar.gz as `at` in site.toml",
        )


def _inside(cell: str) -> bool:
    name = PurePosixPath(cell)
    return not name.is_absolute() and ".." not in name.parts and "\0" not in cell and "\\" not in cell


def _from_folder(root: Path, cell: str, max_bytes: int, endings: Sequence[str]) -> bytes | str:
    if not _inside(cell):
        return OUTSIDE
    problem = ABSENT
    for ending in endings:
        found = _content(root, root / (cell + ending), max_bytes)
        if not isinstance(found, str):
            return found
        problem = found if problem == ABSENT else problem
    return problem


def _content(root: Path, path: Path, max_bytes: int) -> bytes | str:
    try:
        if not path.resolve().is_relative_to(root):
            return OUTSIDE
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # no pipe keeps us waiting
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return NOT_PLAIN
            if status.st_size > max_bytes:
                return too_large(max_bytes)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(max_bytes)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT
    except (OSError, ValueError, RuntimeError) as failure:
        return NOT_PLAIN if getattr(failure, "errno", None) == errno.ELOOP else UNREADABLE


def _from_archive(
    path: Path, positions: Mapping[str, Sequence[int]], max_bytes: int, endings: Sequence[str]
) -> Iterator[Named]:
    try:
        with tarfile.open(path, "r:*") as archive:
            members = archive.getmembers()
            find = _finder(members, endings)
            found = {cell: find(cell) for cell in positions}
            _refuse_ambiguous(path, found)
            place = {member.name: i for i, member in enumerate(members)}
            # in the archive's order: a compressed one can't go back cheaply
            for cell in sorted(found, key=lambda c: _order(found[c], place)):
                member = found[cell]
                content = member if isinstance(member, str) else _member(archive, member, max_bytes)
                yield positions[cell], content
    except BROKEN_ARCHIVE as failure:
        reason = getattr(failure, "strerror", None) or "damaged, or no tar archive"
        raise DataError(f"{path}: cannot be read ({reason})", remedy="copy or pack it again") from None


def _refuse_ambiguous(path: Path, found: Mapping[str, tarfile.TarInfo | str]) -> None:
    """No problem of single records: which are left out would hang on other patients' files."""
    count = sum(member == _AMBIGUOUS for member in found.values())
    if count:
        names = "1 name in the table fits" if count == 1 else f"{count} names in the table fit"
        raise DataError(f"{path}: {names} several files of it", remedy="name their folders, too")


def _order(member: tarfile.TarInfo | str, place: Mapping[str, int]) -> int:
    return -1 if isinstance(member, str) else place[member.name]


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> bytes | str:
    if not member.isreg():
        return NOT_PLAIN
    if member.size > max_bytes:
        return too_large(max_bytes)
    file = archive.extractfile(member)
    return UNREADABLE if file is None else file.read()


def _finder(
    members: Sequence[tarfile.TarInfo], endings: Sequence[str]
) -> Callable[[str], tarfile.TarInfo | str]:
    """What finds a cell's member: by its whole name, else by its last parts if they occur once."""
    whole = {str(PurePosixPath(m.name)): m for m in members}  # a later one replaces an earlier, as tar does
    last: dict[str, list[tarfile.TarInfo]] = {}
    for name, member in whole.items():
        if not member.isdir():
            parts = name.split("/")
            for first in range(1, len(parts)):
                last.setdefault("/".join(parts[first:]), []).append(member)

    def find(cell: str) -> tarfile.TarInfo | str:
        if not _inside(cell):
            return OUTSIDE
        names = [str(PurePosixPath(cell + ending)) for ending in endings]
        for name in names:
            if name in whole:
                return whole[name]
        for name in names:
            same = last.get(name, [])
            if same:
                return same[0] if len(same) == 1 else _AMBIGUOUS
        return ABSENT

    return find
