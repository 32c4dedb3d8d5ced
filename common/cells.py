"""Sums over cells of which most stay empty, in the form in which they travel and are kept.

An exact histogram has tens of thousands of cells, and a site's test patients fall into a few of them. Which
histograms are packed depends on their shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from common.messages import Array, Arrays

PACKED_FROM = 1_000  # cells
CELLS, VALUES = "@cells", "@values"

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """What is to be added up.

    Attributes:
        shape: of the sums.
        index: int64 [n], flat, of the cell that each weight goes to.
        weights: float64 [n].
    """

    shape: tuple[int, ...]
    index: Index
    weights: Floats

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dense(self) -> Floats:
        """The sums, float64 of `shape`."""
        sums = np.bincount(self.index, weights=self.weights, minlength=self.size)
        return np.asarray(sums, dtype=np.float64).reshape(self.shape)

    def packed(self, name: str) -> dict[str, Array]:
        """The same sums bit for bit, as `packed` gives them."""
        if self.size < PACKED_FROM:
            return {name: self.dense()}
        cells, place = np.unique(self.index, return_inverse=True)
        sums = np.bincount(place, weights=self.weights, minlength=len(cells)).astype(np.float64)
        return _written(name, self.shape, cells, sums)

    def by_owner(self, owners: Index, count: int) -> Cells:
        """The same of each owner by itself: sums with one more axis of length `count` in front.

        Args:
            owners: int64 [n], whose weight it is.
        """
        return Cells((count, *self.shape), owners * self.size + self.index, self.weights)

    def packed_apart(self, name: str) -> list[dict[str, Array]]:
        """`packed` of each entry of the first axis, bit for bit."""
        shape = self.shape[1:]
        size = math.prod(shape)
        if size < PACKED_FROM:
            return [{name: sums.copy()} for sums in self.dense()]
        cells, place = np.unique(self.index, return_inverse=True)
        sums = np.bincount(place, weights=self.weights, minlength=len(cells)).astype(np.float64)
        ends = np.searchsorted(cells, np.arange(self.shape[0] + 1) * size).tolist()
        inner = cells % size
        return [_written(name, shape, inner[a:b], sums[a:b]) for a, b in pairwise(ends)]


def stacked(parts: Sequence[Cells]) -> Cells:
    """Sums of one shape, with one more axis in front."""
    size = parts[0].size
    return Cells(
        (len(parts), *parts[0].shape),
        np.concatenate([part.index + i * size for i, part in enumerate(parts)]),
        np.concatenate([part.weights for part in parts]),
    )


def packed(sums: Arrays) -> dict[str, Array]:
    """Small sums as they are; of one with `PACKED_FROM` cells or more those that aren't zero.

    Returns:
        For such a `name`: `name@cells`, int64: the number of axes, their lengths, and the flat indices in
        rising order; `name@values`, float64, of those cells.
    """
    found: dict[str, Array] = {}
    for name, array in sums.items():
        if array.size < PACKED_FROM:
            found[name] = array
        else:
            cells = np.flatnonzero(array)
            found |= _written(name, array.shape, cells, array.reshape(-1)[cells])
    return found


def _written(name: str, shape: tuple[int, ...], cells: Index, values: Floats) -> dict[str, Array]:
    return {name + CELLS: np.concatenate([_head(shape), cells], dtype=np.int64), name + VALUES: values}


@lru_cache(maxsize=64)
def _head(shape: tuple[int, ...]) -> Index:
    return np.array([len(shape), *shape], dtype=np.int64)


def dense(arrays: Arrays) -> dict[str, Array]:
    """What was `packed`, whole again; arrays of other names as they are."""
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        if name.endswith(CELLS):
            whole = name.removesuffix(CELLS)
            axes = int(array[0])
            shape = tuple(int(length) for length in array[1 : 1 + axes])
            sums = np.zeros(math.prod(shape))
            sums[array[1 + axes :]] = arrays[whole + VALUES]
            found[whole] = sums.reshape(shape)
        elif not name.endswith(VALUES):
            found[name] = array
    return found


def sound(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are `packed` sums of these shapes, and of no others."""
    names: set[str] = set()
    for name, shape in shapes.items():
        if math.prod(shape) < PACKED_FROM:
            names.add(name)
            array = arrays.get(name)
            if array is None or (array.shape, array.dtype) != (shape, np.dtype(np.float64)):
                return False
            continue
        names |= {name + CELLS, name + VALUES}
        cells, values = arrays.get(name + CELLS), arrays.get(name + VALUES)
        if cells is None or values is None or not _sound(cells, values, shape):
            return False
    return names == set(arrays)


def _sound(cells: Array, values: Array, shape: tuple[int, ...]) -> bool:
    head = [len(shape), *shape]
    if (cells.dtype, values.dtype) != (np.dtype(np.int64), np.dtype(np.float64)):
        return False
    if cells.ndim != 1 or values.shape != (len(cells) - len(head),):
        return False
    index = cells[len(head) :]
    inside = not len(index) or (index[0] >= 0 and index[-1] < math.prod(shape))
    rising = not np.count_nonzero(index[1:] <= index[:-1])
    return cells[: len(head)].tolist() == head and bool(inside) and rising
