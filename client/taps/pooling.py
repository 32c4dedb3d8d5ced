"""Max-pooling by halves.

torch's own goes from number to number: in the usual layout it takes ten times as long, and was a third of a
small network's step. Nothing here rounds, so that a record is the same in any company.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from client.taps.tape import Tape

_PLANES = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def max_pooling(name: str, layer: Any, slots: object, tape: Tape) -> Any:
    """Of windows two wide that don't overlap; others by torch's own."""
    planes = _PLANES[type(layer)]
    twos = all(_both(size, planes) == (2,) * planes for size in (layer.kernel_size, layer.stride))
    plain = _both(layer.padding, planes) == (0,) * planes and _both(layer.dilation, planes) == (1,) * planes
    halved = twos and plain and not layer.ceil_mode and not layer.return_indices

    def forward(input: torch.Tensor) -> torch.Tensor:
        if halved and input.dim() == planes + 2 and input.device.type == "cpu":
            return _MaxPool.apply(input)  # type: ignore[no-any-return]
        return type(layer).forward(layer, input)  # type: ignore[no-any-return]

    return forward


def _both(size: int | tuple[int, ...], planes: int) -> tuple[int, ...]:
    return (size,) * planes if isinstance(size, int) else tuple(size)


def _halves(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each window's first and second along a dimension; a last one that has no second isn't in any."""
    pairs = x.narrow(dim, 0, x.shape[dim] // 2 * 2).unflatten(dim, (-1, 2))
    return pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)


class _MaxPool(torch.autograd.Function):
    """The larger of two along the last dimension, then along the one before, …; of equal ones the gradient
    goes to the first in memory, as with torch's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.shapes, later = [], []
        for dim in reversed(range(2, x.dim())):
            ctx.shapes.append((dim, x.shape))
            first, second = _halves(x, dim)
            later.append(second > first)
            x = torch.maximum(first, second)
        ctx.save_for_backward(*later)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (g,) = gradients
        for later, (dim, shape) in reversed(list(zip(ctx.saved_tensors, ctx.shapes, strict=True))):
            wider = g.new_zeros(shape) if shape[dim] % 2 else g.new_empty(shape)
            first, second = _halves(wider, dim)
            torch.mul(g, later, out=second)
            torch.sub(g, second, out=first)
            g = wider
        return g
