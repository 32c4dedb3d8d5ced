"""Tapped products of a batch with a weight, forward and back, whose rows don't depend on each other.

The tiles are those of client/rowwise: a row's result is the same bit for bit whoever the other rows belong
to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from client.matrix import is_large, large_product
from client.rowwise import TILE, VECTOR, product
from client.taps.tape import Tape, refuse_changed

Tensor = torch.Tensor


def rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias of x [records, …, inputs]; a tensor of its own, for no gradient is kept."""
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    if is_large(flat, outputs) and len(flat) and not len(flat) % TILE:
        found = large_product(flat, weight, bias)
        result: Tensor = torch.ops.aten._unsafe_view(found, [*x.shape[:-1], outputs])
        return result
    result = x.new_empty(*x.shape[:-1], outputs)
    rows = result.view(-1, outputs)
    if len(flat) % TILE or outputs % VECTOR or not len(flat):
        rows.copy_(product(flat, weight, bias))
        return result
    torch.bmm(tiles(flat), shared(weight.t(), len(flat)), out=tiles(rows))
    return result if bias is None else result.add_(bias)


def tiles(rows: Tensor) -> Tensor:
    """[tiles, TILE, width] of [rows, width]."""
    return rows.view(-1, TILE, rows.shape[1])


def shared(matrix: Tensor, rows: int, tile: int = TILE) -> Tensor:
    """The same matrix for every tile."""
    return matrix.expand(rows // tile, *matrix.shape)


class _Product(torch.autograd.Function):
    """Its backward pass hands the loss's gradient over, and forms none of the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        done: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.weight, ctx.done = weight, done
        return rows_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.done(gradients[0])
        found = rows_product(gradients[0], ctx.weight.t()) if ctx.needs_input_grad[1] else None
        return None, found, None, None, None


def tapped_product(
    tape: Tape,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Callable[[Tensor], None],
) -> Tensor:
    """x weightᵀ + bias of x [records, …, inputs], of which the backward pass hands the loss's gradient to
    `keep`. Weight and bias need no gradient.

    Raises:
        StudyError: as `Tape.tap`.
    """
    if not torch.is_grad_enabled():
        return rows_product(x, weight, bias)
    tape.check(name, x)
    version = x._version

    def done(gradient: Tensor) -> None:
        refuse_changed(name, x, version)
        keep(gradient)

    result: Tensor = _Product.apply(tape.anchor, x, weight, bias, done)
    return result
