"""Matrix products whose every row is the same bit for bit, whoever the other rows belong to.

The last bits of a matrix product depend on the matrix's size and on a row's place in it. Weights chosen for
it (sums that cancel, many times enlarged) turn such a bit into anything, so that one patient more would
change what others add. Here the rows go through in tiles of one size, and the outputs are as many as fill
the processor's vectors: then a row's result depends on nothing but the row and the weights (tests/client/
test_rowwise, on the machine at hand). oneDNN's kernels, for large layers, take each row alike by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from client.matrix import is_large, large_product

TILE = 32  # rows
VECTOR = 16  # float32 numbers in the widest register
PIECE = 1 << 14  # numbers that torch leaves to one thread

CLIPPING_MARGIN = 2.0**-8
"""Of C, what a patient is clipped below it: room for the rounding of norms and of sums in float32, so that
one patient more or less changes a sum by at most C all the same. Each engine says how much it needs."""


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias, [rows, outputs].

    Args:
        x: [rows, inputs].
        weight: [outputs, inputs].
        bias: [outputs].
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    if rows % TILE:
        x = functional.pad(x, (0, 0, 0, -rows % TILE))
    if rows and is_large(x, outputs):
        return large_product(x, weight, bias)[:rows]
    if outputs % VECTOR:
        weight = functional.pad(weight, (0, 0, 0, -outputs % VECTOR))
    tiles = x.reshape(-1, TILE, inputs)
    found = torch.bmm(tiles, weight.t().expand(len(tiles), inputs, len(weight)))
    found = found.view(-1, len(weight))[:rows, :outputs]
    return found if bias is None else found.add_(bias)


def each_number(function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """A function of each number, of tensors [rows, …] of one shape: a row's numbers are the same bit for bit
    however many rows there are, if all that are contiguous fill registers.

    Where torch shares out the numbers among threads it may begin and end anywhere, and takes what doesn't
    fill a register there in another way, which can differ in the last bit. So one thread takes a piece.
    """
    x = values[0]
    if x.numel() <= PIECE or x.device.type != "cpu" or torch.get_num_threads() == 1:
        return function(*values)
    if all(each.is_contiguous() for each in values):
        pieces = zip(*(each.view(-1).split(PIECE) for each in values), strict=True)
        return torch.cat([function(*some) for some in pieces]).view(x.shape)
    rows = max(1, PIECE * len(x) // x.numel())
    return torch.cat([function(*some) for some in zip(*(each.split(rows) for each in values), strict=True)])


def sigmoid_(rows: torch.Tensor) -> None:
    """In place; otherwise as `each_number`."""
    if rows.numel() <= PIECE or rows.device.type != "cpu" or torch.get_num_threads() == 1:
        rows.sigmoid_()
        return
    # Torch fills two registers at a time: an odd row of contiguous ones could end in half of that
    for some in rows.split(max(2, PIECE // rows.shape[1] // 2 * 2)):
        some.sigmoid_()
