"""Images and volumes: where they lie, and their numbers on the study's scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from common.errors import DataError
from common.modalities import ImageColumn
from common.table import Decoded

if TYPE_CHECKING:
    from client.sources.wide import Where

Floats = npt.NDArray[np.float32]


def read(column: ImageColumn, cells: Sequence[str | None], where: Where | None) -> Decoded:
    """Each record's image, resized and scaled to [-1, 1]."""
    if where is None:
        raise DataError(f"column {column.name}: its images are nowhere", remedy="name them in site.toml")
    with np.load(where.path, allow_pickle=False) as archive:
        stored = archive[where.files.array]
    values = np.full((len(cells), column.width), np.nan, dtype=np.float32)
    for i, cell in enumerate(cells):
        if cell is not None:
            values[i] = scaled(resized(stored[int(cell)][None].astype(np.float32), column), column).reshape(
                -1
            )
    return Decoded(values)


def resized(image: Floats, column: ImageColumn) -> Floats:
    """Channels first, at the study's size: by areas where it gets smaller, else linearly."""
    if image.shape[1:] == column.size:
        return image
    larger = any(new > old for new, old in zip(column.size, image.shape[1:], strict=True))
    mode = ("bilinear" if len(column.size) == 2 else "trilinear") if larger else "area"
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None]
    found = torch.nn.functional.interpolate(tensor, size=column.size, mode=mode)
    return np.asarray(found[0].numpy(), dtype=np.float32)


def scaled(image: Floats, column: ImageColumn) -> Floats:
    """The study's window to [-1, 1]."""
    low, high = column.range
    return np.asarray(((image - low) * (2.0 / (high - low)) - 1.0).clip(-1.0, 1.0), dtype=np.float32)
