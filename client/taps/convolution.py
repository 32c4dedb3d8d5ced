"""The gradient of convolutions per patient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from client.taps.groups import ALONE, Groups, Layout
from client.taps.parts import (
    Factors,
    Norms,
    Slot,
    Vectors,
    Where,
    add_weighted,
    chunks,
    record_lengths,
    row_squares,
    silenced,
)
from client.taps.rows import gram_is_cheaper

_BLOCK = 1 << 22  # bytes of per-record gradients at a time: what a cache keeps


@dataclass(frozen=True)
class Geometry:
    """How a kernel meets its input; the padding is the same on both sides."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def flat(self) -> Geometry:
        """Of one dimension, as two of which the first has one place."""
        return Geometry(
            (1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )

    def patches(self, pixels: torch.Tensor, outputs: Sequence[int]) -> torch.Tensor:
        """Products of patches [n, positions, positions] of those of pixels [n, pixels, records, high, wide]:
        the ones under each place of the kernel, added up. Two dimensions, padded already.

        Args:
            outputs: positions down and to the right.
        """
        records, high, wide = pixels.shape[2:]
        pixels = pixels.view(-1, records, high, wide, records, high, wide)
        result = pixels.new_zeros(len(pixels), records, *outputs, records, *outputs)
        down, right = (
            [slice(i * d, i * d + s * (n - 1) + 1, s) for i in range(k)]
            for k, d, s, n in zip(self.kernel, self.dilation, self.stride, outputs, strict=True)
        )
        for rows in down:
            for columns in right:
                result += pixels[:, :, rows, columns, :, rows, columns]
        positions = records * math.prod(outputs)
        return result.view(-1, positions, positions)

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
        like = x.new_empty(shape)
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
        self._held: list[tuple[slice, torch.Tensor]] = []  # of some patients each

    @property
    def slots(self) -> Sequence[Slot]:
        return (self.weight,)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.x, self.g)

    def take(self, rows: Where) -> None:
        self.x, self.g = self.x[rows], self.g[rows]

    def lengths(self, groups: Groups) -> torch.Tensor:
        # Cauchy–Schwarz over the positions; each number of x is in as many patches as the kernel has places
        found = record_lengths(self.x) * record_lengths(self.g) * math.prod(self._geometry.kernel) ** 0.5
        return groups.sum(found[:, None])[:, 0]

    def norms(self, groups: Groups, norms: Norms) -> None:
        if self._gram_is_cheaper(groups, norms):
            self._gram_norms(groups, norms)
            return
        held = norms.hold(self.weight.size, self.x.element_size())
        for block in groups.blocks(self._blocks()):
            found = self._block(block.records, block.groups)
            norms.squares[block.patients] += row_squares(found)
            if held:
                self._held.append((block.patients, found))

    def _gram_is_cheaper(self, groups: Groups, norms: Norms) -> bool:
        """As in `Rows`; a position of the output is a row."""
        if self._geometry.groups > 1 or self.x.dim() > 4:
            return False
        outputs = self.weight.shape[0]
        holdable = norms.could_hold(self.weight.size, self.x.element_size())
        widths = (self.weight.size // outputs, outputs)
        rows = groups.mean_records * math.prod(self.g.shape[2:])
        return gram_is_cheaper(rows, widths, norms.room, holdable)

    def _gram_norms(self, groups: Groups, norms: Norms) -> None:
        """Σ over pairs of positions of patches' and output gradients' products, in float64, because they may
        cancel; of patients with one record first in float32, where that may do."""
        for layout in groups.layouts():
            if layout.most == 1 and self.x.dtype == torch.float32:
                self._rough_norms(layout, groups.patients, norms)
            else:
                norms.squares[layout.who] += self._grams(self.x, self.g, layout, torch.float64)[0]

    def _rough_norms(self, layout: Layout, patients: int, norms: Norms) -> None:
        single = slice(None) if layout.records is None else layout.records[:, 0]
        own_x, own_g = self.x[single], self.g[single]
        # Lengths of 1, more or less, so that no square over- or underflows
        x, g = record_lengths(own_x), record_lengths(own_g)
        shape = [-1, *[1] * (self.x.dim() - 1)]
        found, lengths = self._grams(own_x / x.view(shape), own_g / g.view(shape), ALONE, torch.float32)
        # Each of two products of n numbers is off by at most n 2^-24 of their lengths (Higham 2002, section
        # 3.1), the roundings around them count as six numbers, and what does underflow is below 2^-50
        places, (outputs, channels) = math.prod(self._geometry.kernel), self.weight.shape[:2]
        terms = outputs + 6 + (channels + places if self._by_pixels else channels * places)
        squared = (x.double() * g.double()).square_()
        error = squared * (terms * 2.0**-24 * lengths.square_() + 2.0**-50)
        record = torch.full((patients,), -1, device=x.device)  # -1: has several
        record[layout.who] = torch.arange(len(self.x), device=x.device)[single]

        def exact(who: torch.Tensor) -> torch.Tensor:
            result, own = found.new_zeros(len(who)), record[who] >= 0
            of = record[who[own]]
            result[own] = self._grams(self.x[of], self.g[of], ALONE, torch.float64)[0]
            return result

        every = found.new_zeros(2, patients)
        every[:, layout.who] = torch.stack((found * squared, error))
        norms.add_rough(every[0], every[1], exact)

    @property
    def _by_pixels(self) -> bool:
        """Whether pixels' products are added up to patches', rather than patches multiplied."""
        how, sides = self._geometry, zip(self.x.shape[2:], self._geometry.padding, strict=True)
        pixels, positions = math.prod(n + 2 * p for n, p in sides), math.prod(self.g.shape[2:])
        return pixels**2 < positions**2 * math.prod(how.kernel)

    def _grams(
        self, x: torch.Tensor, g: torch.Tensor, layout: Layout, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By products in that type the squared norms of the layout's patients, and Σ over positions of
        |patch| |output gradient|; float64 [patients]."""
        how = self._geometry
        if x.dim() == 3:
            x, g, how = x[:, :, None], g[:, :, None], how.flat()
        x = functional.pad(x, (how.padding[1], how.padding[1], how.padding[0], how.padding[0]))
        sides = x.shape[2:]
        if not self._by_pixels:
            x = functional.unfold(x, how.kernel, how.dilation, 0, how.stride)
        inputs = _products(layout.columns(x.flatten(2), padded=False).to(dtype))
        if self._by_pixels:
            inputs = how.patches(inputs.unflatten(2, (-1, *sides)), g.shape[2:])
        found = inputs.double().mul_(_products(layout.columns(g.flatten(2)).to(dtype)))
        lengths = found.diagonal(dim1=1, dim2=2).sqrt().sum(dim=1)
        return found.sum(dim=(1, 2)).clamp_(min=0.0), lengths

    def _blocks(self) -> int:
        return max(1, _BLOCK // (self.weight.size * self.x.element_size()))

    def _gradients(self, groups: Groups) -> torch.Tensor:
        blocks = groups.blocks(self._blocks())
        return torch.cat([self._block(block.records, block.groups) for block in blocks])

    def _block(self, records: slice, groups: Groups) -> torch.Tensor:
        x, g = self.x[records], self.g[records]
        if groups.patients == 1:
            like = x.new_empty(self.weight.shape)
            return self._geometry.weight_gradient(x, g, self._geometry.groups, like).view(1, -1)
        return groups.sum(self._geometry.per_record(x, g))

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        if self._held:
            for patients, values in self._held:
                add_weighted(values, factors.patients[patients], self.weight.flat(flat))
            return
        g = self.g * factors.records.view(-1, *[1] * (self.g.dim() - 1))
        target = self.weight.of(flat)
        like = g.new_empty(target.shape)
        for some in chunks(len(g)):
            target += self._geometry.weight_gradient(self.x[some], g[some], self._geometry.groups, like)

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        return [(self.weight, self._gradients(groups))]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        records = groups.spread(bad)
        self.x, self.g = silenced(self.x, records), silenced(self.g, records)
        self._held = [(who, silenced(values, bad[who])) for who, values in self._held]


def _products(columns: torch.Tensor) -> torch.Tensor:
    """Of all pairs of columns [n, columns, columns], of [n, width, columns]."""
    return torch.bmm(columns.transpose(1, 2), columns)


def bias_part(slot: Slot, outputs: torch.Tensor) -> Vectors:
    """Of a convolution's bias: g [records, outputs, …] summed over positions."""
    return Vectors(slot, outputs.flatten(2).sum(dim=2))
