"""The gradient of convolutions per patient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from client.taps.groups import Groups
from client.taps.parts import (
    Factors,
    Held,
    Norms,
    Rows,
    Slot,
    Vectors,
    gram_is_cheaper,
    row_squares,
    silenced,
)

_BLOCK = 1 << 24  # bytes of per-record gradients at a time: what the allocator keeps


@dataclass(frozen=True)
class Geometry:
    """How a kernel meets its input; the padding is the same on both sides."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def weight_gradient(self, x: torch.Tensor, g: torch.Tensor, groups: int, like: torch.Tensor
                        ) -> torch.Tensor:  # fmt: skip
        """Summed over x's first dimension, in the shape of `like`."""
        found: torch.Tensor = torch.ops.aten.convolution_backward(
            g, x, like, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.kernel), groups, [False, True, False],
        )[1]  # fmt: skip
        return found

    def per_record(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """[records, numbers of the weight]: one convolution whose groups are the records'."""
        records, channels = x.shape[:2]
        shape = (records * g.shape[1], channels // self.groups, *self.kernel)
        like = x.new_empty(1).expand(shape)
        found = self.weight_gradient(
            x.reshape(1, -1, *x.shape[2:]), g.reshape(1, -1, *g.shape[2:]), records * self.groups, like
        )
        return found.view(records, -1)


class Convolution:
    """A convolution's weight [outputs, inputs / groups, kernel …]; its bias is another part.

    Args:
        inputs: [records, inputs, …], padded already where the padding isn't zeros.
        outputs: [records, outputs, …], the loss's gradient.
    """

    def __init__(self, weight: Slot, geometry: Geometry, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        self.weight, self._geometry, self.x, self.g = weight, geometry, inputs, outputs
        self._held: Held | None = None

    @property
    def slots(self) -> Sequence[Slot]:
        return (self.weight,)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.x, self.g)

    def norms(self, groups: Groups, norms: Norms) -> None:
        if self._gram_is_cheaper(groups, norms):
            rows = Rows(self.weight, (), self._unfolded(), self.g.flatten(2).transpose(1, 2))
            rows.gram_norms(groups, norms)
        elif norms.hold(groups.patients * self.weight.size, self.x.element_size()):
            self._held = Held(self.weight, self._gradients(groups))
            self._held.norms(groups, norms)
        else:
            self._norms_by_blocks(groups, norms)

    def _gram_is_cheaper(self, groups: Groups, norms: Norms) -> bool:
        """As in `Rows`; a position of the output is a row."""
        if self._geometry.groups > 1 or self.x.dim() > 4:
            return False
        outputs = self.weight.shape[0]
        holdable = norms.could_hold(groups.patients * self.weight.size, self.x.element_size())
        widths = (self.weight.size // outputs, outputs)
        return gram_is_cheaper(math.prod(self.g.shape[2:]), widths, groups, holdable)

    def _unfolded(self) -> torch.Tensor:
        """[records, positions, inputs · kernel]."""
        x, how = self.x, self._geometry
        kernel, dilation, padding, stride = how.kernel, how.dilation, how.padding, how.stride
        if x.dim() == 3:
            x = x[:, :, None]
            kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
        return functional.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)

    def _blocks(self) -> int:
        return max(1, _BLOCK // (self.weight.size * self.x.element_size()))

    def _gradients(self, groups: Groups) -> torch.Tensor:
        size = self._blocks()
        if groups.one_record_each and groups.records <= size:
            return self._geometry.per_record(self.x, self.g)
        result = self.x.new_empty(groups.patients, self.weight.size)
        for block in groups.blocks(size):
            result[block.patients] = self._block(block.records, block.groups)
        return result

    def _block(self, records: slice, groups: Groups) -> torch.Tensor:
        x, g = self.x[records], self.g[records]
        if groups.patients == 1:
            like = x.new_empty(1).expand(self.weight.shape)
            return self._geometry.weight_gradient(x, g, self._geometry.groups, like).view(1, -1)
        return groups.sum(self._geometry.per_record(x, g))

    def _norms_by_blocks(self, groups: Groups, norms: Norms) -> None:
        size = self._blocks()
        for block in groups.blocks(size):
            found = self._block(block.records, block.groups)
            norms.squares[block.patients] += row_squares(found)
        # |patch|² summed over positions is at most |x|² times the kernel's size
        bound = (row_squares(self.x) * row_squares(self.g) * math.prod(self._geometry.kernel)).sqrt()
        norms.doubts(groups.sum(bound[:, None])[:, 0])

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        if self._held is not None:
            self._held.write(factors, flat)
            return
        g = self.g * factors.records.view(-1, *[1] * (self.g.dim() - 1))
        target = self.weight.of(flat)
        target.copy_(self._geometry.weight_gradient(self.x, g, self._geometry.groups, target))

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        return [(self.weight, self._gradients(groups))]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        records = groups.spread(bad)
        self.x, self.g = silenced(self.x, records), silenced(self.g, records)
        if self._held is not None:
            self._held.silence(bad, groups)


def bias_part(slot: Slot, outputs: torch.Tensor) -> Vectors:
    """Of a convolution's bias: g [records, outputs, …] summed over positions."""
    return Vectors(slot, outputs.flatten(2).sum(dim=2))
