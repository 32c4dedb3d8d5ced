"""Large products of float32 matrices by oneDNN, which ships with torch.

torch hands `mm` and `bmm` to MKL, which knows no AVX-512 on processors of other makers than its own: there
oneDNN's kernels are 2.2 times as fast (`fedward-sim benchmark steps`). torch calls them for linear layers of
networks that it has compiled; here they are called by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

LARGE = 1 << 13  # multiplications for a row, from which on a call's own cost doesn't matter
_MOST = 1 << 13  # inputs: threads share out longer sums, as the number of rows has it
_WORTH = 1 << 21  # multiplications of all rows together
_ROWS = 32


def _kernel() -> Callable[..., torch.Tensor] | None:
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:  # torch was built without
        return None


_linear = _kernel()


def is_large(x: torch.Tensor, outputs: int) -> bool:
    """Whether oneDNN computes x [rows, inputs] times a matrix [inputs, outputs]: other than the device, the
    shape of the matrix decides, never the number of rows."""
    inputs = x.shape[-1]
    return (
        _linear is not None
        and inputs * outputs >= LARGE
        and inputs <= _MOST
        and x.dtype == torch.float32
        and x.device.type == "cpu"
    )


def large_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias, [rows, outputs], of what `is_large`; no gradient passes through it.

    Args:
        x: [rows, inputs].
        weight: [outputs, inputs].
        bias: [outputs].
    """
    if _linear is None:
        raise RuntimeError("torch was built without oneDNN")
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # a part of something wider takes a thousand times as long
    with torch.no_grad():
        return _linear(x, weight, bias, "none", [], "")


def outer_sum(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gᵀ x, float32 [outputs, inputs], Σ over rows of g [rows, outputs] and x [rows, inputs]."""
    rows = len(g)
    if g.numel() * x.shape[1] < _WORTH or not is_large(g.t(), x.shape[1]):
        return torch.mm(g.t(), x)
    if rows % _ROWS:  # for each number of rows oneDNN makes code of its own, and keeps it
        g, x = (functional.pad(each, (0, 0, 0, -rows % _ROWS)) for each in (g, x))
    return large_product(g.t(), x.t())
