"""Images and volumes: files of a folder or an archive, or rows of an array, on the study's scale.

A file's kind follows from its first bytes, never from its name. A bad one is a problem of the records that
name it, in words of client/sources/images/problems. What becomes of one record depends on no other.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from client.settings import Where
from client.sources.images import arrays, nifti
from client.sources.images.problems import (
    EMPTY_FOLDER,
    MOST_NUMBERS,
    NOT_A_SLICE,
    TOO_MANY_NUMBERS,
    UNREADABLE,
    Unfit,
)
from client.sources.images.shaping import Floats, fitted
from client.sources.named import BROKEN_ARCHIVE, is_archive, named_files
from common.errors import DataError
from common.modalities import ImageColumn
from common.table import Decoded

if TYPE_CHECKING:
    from client.sources.images.dicom import Slice

_GZIP = b"\x1f\x8b"
_MOST_HELD = 4 * MOST_NUMBERS  # of slices whose volumes aren't complete
Found = Iterator[tuple[Sequence[int], Floats | str]]  # positions of records, and their image or its problem


def read(column: ImageColumn, cells: Sequence[str | None], where: Where | None) -> Decoded:
    """Each record's image, resized and scaled to [-1, 1].

    Args:
        where: a folder, a .tar or .tar.gz whose files cells name (or, in 3-D, folders of DICOM slices); or an
            .npz, where they are rows of an array.

    Raises:
        DataError: if what holds the images can't be opened at all.
    """
    if where is None:
        raise DataError(f"column {column.name}: its images are nowhere", remedy="name them in site.toml")
    source = arrays.rows if where.path.suffix.lower() == ".npz" else _files
    values = np.full((len(cells), column.width), np.nan, dtype=np.float32)
    problems: dict[str, list[int]] = {}
    for records, found in source(column, cells, where):
        block = found if isinstance(found, str) else _tried(partial(fitted, found, column))
        if isinstance(block, str):
            problems.setdefault(block, []).extend(records)
        else:
            values[records] = block
    return Decoded(
        values, {text: np.array(sorted(each), dtype=np.int64) for text, each in sorted(problems.items())}
    )


def _tried(work: Callable[[], Floats]) -> Floats | str:
    """An image, or what is wrong with it."""
    try:
        return work()
    except Unfit as problem:
        return str(problem)
    except Exception:  # parsers raise anything at damaged bytes, in words that quote them
        return UNREADABLE


# --- files


@dataclass
class _Stack:
    """The slices of one folder, as far as they were read."""

    count: int
    slices: list[Slice] = field(default_factory=list)
    problem: str | None = None
    seen: int = 0
    numbers: int = 0


def _files(column: ImageColumn, cells: Sequence[str | None], where: Where) -> Found:
    positions: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        if cell is not None:
            positions.setdefault(cell, []).append(i)
    folders = _folders(where.path, list(positions)) if len(column.size) == 3 else {}
    wanted = [(cell, name) for cell in positions for name in folders.get(cell, [cell])]
    stacks = {cell: _Stack(len(names)) for cell, names in folders.items()}
    for cell, names in folders.items():
        if not names:
            yield positions[cell], EMPTY_FOLDER
    accept, held = where.files.burned_in == "accept", 0
    for places, content in named_files(where.path, [name for _, name in wanted], where.files.max_bytes):
        for cell in [wanted[place][0] for place in places]:
            stack = stacks.get(cell)
            if stack is None:
                yield positions[cell], _decoded(content, column, accept)
                continue
            before = stack.numbers
            _add(stack, content, column, accept)
            held += stack.numbers - before
            if held > _MOST_HELD:
                raise DataError(
                    f"{where.path}: mixes the slices of many folders, more than can be held at a time",
                    remedy="pack one folder after the other",
                )
            if stack.seen == stack.count:
                held -= stack.numbers
                yield positions[cell], _volume(stacks.pop(cell))


def _decoded(content: bytes | str, column: ImageColumn, accept_burned_in: bool) -> Floats | str:
    return content if isinstance(content, str) else _tried(lambda: _image(content, column, accept_burned_in))


def _image(content: bytes, column: ImageColumn, accept_burned_in: bool) -> Floats:
    """One file's image or volume, [1 or 3, *space], in its own size."""
    if content[128:132] == b"DICM":
        from client.sources.images import dicom  # takes longer to import than most sites need it

        return dicom.picture(content, column, accept_burned_in)
    if content[:2] == _GZIP:
        content = nifti.unpacked(content)
        if nifti.version_of(content) is None:
            raise Unfit(UNREADABLE)
    if nifti.version_of(content) is not None:
        return nifti.volume(content, len(column.size))
    from client.sources.images import raster

    return raster.picture(content)


# --- folders of slices


def _add(stack: _Stack, content: bytes | str, column: ImageColumn, accept_burned_in: bool) -> None:
    stack.seen += 1
    if stack.problem is not None:
        return
    if isinstance(content, str):
        stack.problem = content
        return
    if content[128:132] != b"DICM":
        stack.problem = NOT_A_SLICE
        return
    from client.sources.images import dicom

    try:
        found = dicom.slices(content, column, accept_burned_in)
        stack.numbers += sum(each.image.size for each in found)
        if stack.numbers > MOST_NUMBERS:  # before all of them are held
            raise Unfit(TOO_MANY_NUMBERS)
        stack.slices += found
    except Unfit as problem:
        stack.problem = str(problem)
    except Exception:  # as in `_tried`
        stack.problem = UNREADABLE
    if stack.problem is not None:
        stack.slices.clear()
        stack.numbers = 0


def _volume(stack: _Stack) -> Floats | str:
    if stack.problem is not None:
        return stack.problem
    from client.sources.images import dicom

    return _tried(lambda: dicom.volume(stack.slices))


def _folders(path: Path, cells: Sequence[str]) -> Mapping[str, list[str]]:
    """Those of the cells that name folders, and the files straight in them (but hidden ones and DICOMDIR).

    Raises:
        DataError: if the archive can't be opened.
    """
    if is_archive(path):
        return _folders_of_archive(path, cells)
    root, found = path.resolve(), dict[str, list[str]]()
    for cell in cells:
        name = PurePosixPath(cell)
        if name.is_absolute() or ".." in name.parts or "\0" in cell:
            continue  # `named_files` says what is wrong with it
        folder = path / cell
        try:
            if folder.is_dir() and folder.resolve().is_relative_to(root):
                inside = sorted(each.name for each in folder.iterdir() if not each.is_dir())
                found[cell] = [f"{cell.rstrip('/')}/{each}" for each in inside if _is_slice(each)]
        except (OSError, ValueError):
            continue
    return found


def _folders_of_archive(path: Path, cells: Sequence[str]) -> Mapping[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for cell in cells:
        wanted.setdefault(str(PurePosixPath(cell)), []).append(cell)
    wanted.pop(".", None)
    found: dict[str, dict[str, None]] = {}  # a name that is there twice counts once
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                for cell in wanted.get(str(name.parent), ()):
                    if not member.isdir() and _is_slice(name.name):
                        found.setdefault(cell, {})[str(name)] = None
    except BROKEN_ARCHIVE as failure:
        reason = getattr(failure, "strerror", None) or "damaged, or no tar archive"
        raise DataError(f"{path}: cannot be read ({reason})", remedy="copy or pack it again") from None
    return {cell: list(names) for cell, names in found.items()}


def _is_slice(name: str) -> bool:
    return not name.startswith(".") and name.upper() != "DICOMDIR"
