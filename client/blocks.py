"""Records laid out so that what a network computes for one doesn't depend on who else is there.

The last bits of a matrix product depend on its size, and for narrow rows on where in memory a row begins,
which repeats with every fourth row. Weights chosen for it (sums that cancel, many times enlarged) turn such
a bit into anything, so that one patient more would change what others add. Therefore a network sees blocks
of one public size only, filled up with zeros, and a record stands in one of four lanes, row numbers equal
modulo 4, which follows from its own features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

LANES = 4
SMALLEST = 64  # records
SPARE = 1.25  # a block's size / the expected records, so that one block mostly does


def block_size(expected: float, most: int) -> int:
    """A public number of records: a multiple of 64, at most about `most`.

    Args:
        expected: public number of records.
    """
    wanted = SMALLEST * math.ceil(SPARE * expected / SMALLEST)
    return max(SMALLEST, min(wanted, most // SMALLEST * SMALLEST))


def layout(lanes: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks as pairs: which records are in it, and in which rows; both int64.

    Args:
        lanes: int64 [records]; counted modulo 4.
    """
    lane = lanes.remainder(LANES)
    order = torch.argsort(lane, stable=True)
    counts = torch.bincount(lane, minlength=LANES)
    rank = torch.arange(len(lane)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    block, place = rank.div(size // LANES, rounding_mode="floor"), rank.remainder(size // LANES)
    rows = place * LANES + lane[order]
    for number in range(int(block.max()) + 1 if len(block) else 0):
        chosen = block == number
        yield order[chosen], rows[chosen]


def filled(values: torch.Tensor, rows: torch.Tensor | slice, size: int) -> torch.Tensor:
    """A block with `values` in `rows`, and zeros in the others."""
    block = values.new_zeros((size, *values.shape[1:]))
    block[rows] = values
    return block
