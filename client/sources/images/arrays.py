"""Images as the rows of one array in an NPZ file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from client.settings import Where
from client.sources.images.problems import NO_ROW
from client.sources.images.shaping import Floats, channels_first
from common.errors import DataError
from common.modalities import ImageColumn

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def rows(
    column: ImageColumn, cells: Sequence[str | None], where: Where
) -> Iterator[tuple[Sequence[int], Floats | str]]:
    """Of every record that names a row: its position, and the image or what is wrong.

    The array is [rows, *space] or [rows, *space, 1 or 3 channels].

    Raises:
        DataError: if the file can't be opened, lacks the array, or holds one of another form.
    """
    stored = _array(where.path, where.files.array, where.files.max_bytes)
    spatial = len(column.size)
    if stored.ndim != spatial + 1 and not (stored.ndim == spatial + 2 and stored.shape[-1] in (1, 3)):
        raise DataError(
            f"{where.path}: array {where.files.array} is {stored.ndim}-D; column {column.name} takes rows of "
            f"{spatial}-D images",
            remedy="store it as [rows, height, width], with depth first in 3-D and channels (1 or 3) last",
        )
    for i, cell in enumerate(cells):
        if cell is None:
            continue
        row = _row(cell)
        if row is None or row >= len(stored):
            yield [i], NO_ROW
        else:
            yield [i], channels_first(stored[row], spatial)


def _row(cell: str) -> int | None:
    """A whole number, also as `7.0`: so pandas writes a column with gaps."""
    text = cell.removesuffix(".0")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _array(path: Path, name: str, max_bytes: int) -> npt.NDArray[Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                raise DataError(
                    f"{path}: holds no array called {name}", remedy="name it in site.toml: array = …"
                )
            with archive.open(f"{name}.npy") as file:
                shape, _, kind = _HEADERS[npy.read_magic(file)](file)
            if min(shape, default=0) < 0:
                raise ValueError
            if kind.kind not in "buif":
                raise DataError(f"{path}: array {name} holds no numbers", remedy="store pixels as numbers")
            if math.prod(shape) * kind.itemsize > max_bytes:
                raise DataError(
                    f"{path}: array {name} unpacks to more than {max_bytes} bytes",
                    remedy="raise max_bytes in site.toml if the machine's memory allows it",
                )
            with archive.open(f"{name}.npy") as file:
                return np.asarray(npy.read_array(file, allow_pickle=False))
    except (DataError, MemoryError):
        raise
    except Exception as failure:  # numpy raises anything at a strange header
        reason = getattr(failure, "strerror", None) or "damaged, or no NPZ file"
        raise DataError(f"{path}: cannot be read ({reason})", remedy="save the arrays again") from None
