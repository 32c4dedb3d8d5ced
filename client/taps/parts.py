"""What a tapped layer leaves for the sum: squared norms per patient, and the weighted gradient.

A part whose per-patient gradients are held takes norms and sum from the same numbers. Otherwise the two are
computed in different ways, and their rounding differs: then `Norms.doubt` keeps a bound, for the clipping
to allow for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from client.taps.groups import Groups

# Cost of touching one number in a cache, or in memory if there are many, in multiplications of a matrix
# product (measured on one core: 0.15 ns and 0.4 ns against 0.02 ns); a double costs two floats.
_TOUCH, _TOUCH_FAR = 7.0, 20.0
_FAR = 1 << 22  # numbers
_TINY = 1e-32  # squares below are not told from zero in float32; see `Rows`


@dataclass(frozen=True)
class Slot:
    """A trainable parameter's (or a part of one's) place in the flat sum."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.size

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.end].view(self.shape)

    def flat(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.end]


@dataclass(frozen=True)
class Factors:
    """What each patient [patients], and each of its records [records], is multiplied by."""

    patients: torch.Tensor
    records: torch.Tensor


class Norms:
    """Squared norms of the patients' gradients over all parts.

    Attributes:
        squares: float64 [patients].
        doubt: float64 [patients], the square of what rounding may amount to if taken 2^-22 times (see
            `engine`): Σ |output gradient| |input| over a patient's rows. None: nothing to doubt.
        held: bytes that gradients of patients may take up.
    """

    def __init__(self, groups: Groups, like: torch.Tensor, held: int) -> None:
        self.squares = like.new_zeros(groups.patients, dtype=torch.float64)
        self.doubt: torch.Tensor | None = None
        self.held = held

    def could_hold(self, count: int, itemsize: int) -> bool:
        """Whether so many numbers may be held."""
        return count * itemsize <= self.held

    def hold(self, count: int, itemsize: int) -> bool:
        """The same; if so, they count as held from here on."""
        if not self.could_hold(count, itemsize):
            return False
        self.held -= count * itemsize
        return True

    def doubts(self, bound: torch.Tensor) -> None:
        squared = bound.double().square()
        self.doubt = squared if self.doubt is None else self.doubt + squared


class Part(Protocol):
    """One use of a layer by a batch."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        """What it holds."""

    def norms(self, groups: Groups, norms: Norms) -> None:
        """Add the squared norms of the patients' gradients."""

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        """Put Σ factor · gradient into the slots."""

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        """The patients' gradients [patients, slot's size]."""

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        """Make the patients where `bad` [patients] zero."""


def row_squares(values: torch.Tensor) -> torch.Tensor:
    """Σ values² over all but the first dimension."""
    flat = values if values.dim() == 2 else values.flatten(1)
    return (flat * flat).sum(dim=1)


def silenced(values: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """`values` with zeros where `bad` [first dimension]."""
    return values.masked_fill(bad.view(-1, *[1] * (values.dim() - 1)), 0.0)


def gram_is_cheaper(rows: int, widths: tuple[int, int], groups: Groups, holdable: bool) -> bool:
    """Whether a patient's norm comes cheaper from Gram matrices than from its gradient, sum included.

    In multiplications: the Gram matrices (in float64) and the weighted sum, against the patient's gradient
    and its passage through memory (written, squared, summed), or two products if it can't be held.

    Args:
        rows: of a record.
        widths: of an input and of an output.
    """
    each, size, width = rows * groups.mean_records, widths[0] * widths[1], sum(widths)
    touch = _TOUCH_FAR if groups.patients * size > _FAR else _TOUCH
    gram = 2 * each * each * width + 3 * each * width * _TOUCH + each * size
    gradient = each * size + 3 * size * touch if holdable else 2 * each * size + 2 * size * touch
    return gram < gradient


class Held:
    """The patients' gradients of one slot, [patients, slot's size]."""

    def __init__(self, slot: Slot, gradients: torch.Tensor) -> None:
        self.slot, self.values = slot, gradients

    @property
    def slots(self) -> Sequence[Slot]:
        return (self.slot,)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.values,)

    def norms(self, groups: Groups, norms: Norms) -> None:
        norms.squares += row_squares(self.values)

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        torch.mv(self.values.t(), factors.patients, out=self.slot.flat(flat))

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        return [(self.slot, self.values)]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        self.values = silenced(self.values, bad)


class Vectors:
    """A gradient per record, [records, slot's size]: of biases and of scales."""

    def __init__(self, slot: Slot, records: torch.Tensor) -> None:
        self.slot, self.values = slot, records
        self._held: Held | None = None

    @property
    def slots(self) -> Sequence[Slot]:
        return (self.slot,)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.values,)

    def norms(self, groups: Groups, norms: Norms) -> None:
        self._held = Held(self.slot, groups.sum(self.values))
        self._held.norms(groups, norms)

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        if self._held is not None:
            self._held.write(factors, flat)
        else:
            torch.mv(self.values.t(), factors.records, out=self.slot.flat(flat))

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        return [(self.slot, groups.sum(self.values))]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        self.values = silenced(self.values, groups.spread(bad))
        if self._held is not None:
            self._held.silence(bad, groups)


class Rows:
    """A matrix whose gradient is Σ over rows of g aᵀ, with biases whose gradient is Σ g.

    Args:
        weight: [outputs, inputs], or None if it is frozen.
        biases: [outputs] each.
        inputs: a [records, rows, inputs] or [records, inputs].
        outputs: g [records, rows, outputs] or [records, outputs], the loss's gradient.
    """

    def __init__(
        self, weight: Slot | None, biases: Sequence[Slot], inputs: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        self.weight, self.biases = weight, tuple(biases)
        self.a, self.g = inputs, outputs
        self._held: list[Held] = []

    @property
    def slots(self) -> Sequence[Slot]:
        return self.biases if self.weight is None else (self.weight, *self.biases)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.a, self.g)

    @property
    def _size(self) -> int:
        return self.a.shape[-1] * self.g.shape[-1]

    def norms(self, groups: Groups, norms: Norms) -> None:
        if self.weight is None:
            self._hold(groups)
        elif self.g.dim() == 2 and groups.one_record_each:
            # One row: |g aᵀ| = |g| |a|. Squares that underflow must not hide a long other factor.
            a, g = row_squares(self.a), row_squares(self.g).clamp_(min=_TINY)
            norms.squares += g * (a + len(self.biases) if self.biases else a.clamp_(min=_TINY))
            return
        elif self._gram_is_cheaper(groups, norms):
            self.gram_norms(groups, norms)
            return
        elif norms.hold(groups.patients * self._size, self.a.element_size()):
            self._hold(groups)
        else:
            self._norms_by_blocks(groups, norms)
            return
        for held in self._held:
            held.norms(groups, norms)

    def _gram_is_cheaper(self, groups: Groups, norms: Norms) -> bool:
        rows = self.g.shape[1] if self.g.dim() == 3 else 1
        holdable = norms.could_hold(groups.patients * self._size, self.a.element_size())
        return gram_is_cheaper(rows, (self.a.shape[-1], self.g.shape[-1]), groups, holdable)

    def _three(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.a, self.g) if self.g.dim() == 3 else (self.a[:, None], self.g[:, None])

    def gram_norms(self, groups: Groups, norms: Norms) -> None:
        """Σ over pairs of rows (aᵢ·aⱼ + biases)(gᵢ·gⱼ); in float64, because rows may cancel."""
        a, g = self._three()
        squares, bounds = torch.zeros_like(norms.squares), torch.zeros_like(norms.squares)
        for layout in groups.layouts():
            rows = layout.rows(a, padded=False).double()
            inputs = torch.bmm(rows, rows.transpose(1, 2))
            rows = layout.rows(g).double()
            outputs = torch.bmm(rows, rows.transpose(1, 2))
            inputs += len(self.biases)
            lengths = inputs.diagonal(dim1=1, dim2=2) * outputs.diagonal(dim1=1, dim2=2)
            found = (inputs * outputs).sum(dim=(1, 2)).clamp_(min=0.0)
            bound = lengths.sqrt().sum(dim=1)
            if layout.patients is None:
                squares, bounds = found, bound
            else:
                squares[layout.patients], bounds[layout.patients] = found, bound
        norms.squares += squares
        norms.doubts(bounds)

    def _gradients(self, groups: Groups, records: slice = slice(None)) -> torch.Tensor:
        """The weight's gradient of each patient, [patients, size], of those records."""
        a, g = self._three()
        a, g = a[records], g[records]
        layouts = groups.layouts()
        if layouts[0].patients is None:
            return torch.bmm(layouts[0].rows(g).transpose(1, 2), layouts[0].rows(a)).flatten(1)
        result = a.new_empty(groups.patients, self._size)
        for layout in layouts:
            found = torch.bmm(layout.rows(g).transpose(1, 2), layout.rows(a, padded=False))
            result[layout.patients] = found.flatten(1)
        return result

    def _hold(self, groups: Groups) -> None:
        self._held = [Held(slot, values) for slot, values in self.gradients(groups)]

    def _norms_by_blocks(self, groups: Groups, norms: Norms) -> None:
        """Patients' gradients made and dropped, some patients at a time."""
        patients = max(1, norms.held // (self._size * self.a.element_size()))
        for block in groups.blocks(max(1, int(patients * groups.mean_records))):
            norms.squares[block.patients] += row_squares(self._gradients(block.groups, block.records))
        for held in self._bias_gradients(groups):
            held.norms(groups, norms)
        a, g = self._three()
        lengths = (row_squares(a.flatten(0, 1)) + len(self.biases)) * row_squares(g.flatten(0, 1))
        norms.doubts(groups.sum(lengths.sqrt().view(len(a), -1).sum(dim=1, keepdim=True))[:, 0])

    def _bias_gradients(self, groups: Groups) -> list[Held]:
        if not self.biases:
            return []
        summed = groups.sum(self.g.sum(dim=1) if self.g.dim() == 3 else self.g)
        return [Held(slot, summed) for slot in self.biases]

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        if self._held:
            for held in self._held:
                held.write(factors, flat)
            return
        scale = factors.records if self.g.dim() == 2 else factors.records[:, None]
        g = self.g * scale[..., None]
        if self.weight is not None:
            torch.mm(g.flatten(0, -2).t(), self.a.flatten(0, -2), out=self.weight.of(flat))
        if self.biases:
            first = self.biases[0].flat(flat)
            torch.sum(g.flatten(0, -2), dim=0, out=first)
            for slot in self.biases[1:]:
                slot.flat(flat).copy_(first)

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        biases = [(held.slot, held.values) for held in self._bias_gradients(groups)]
        return biases if self.weight is None else [(self.weight, self._gradients(groups)), *biases]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        records = groups.spread(bad)
        self.a, self.g = silenced(self.a, records), silenced(self.g, records)
        for held in self._held:
            held.silence(bad, groups)


class Lookups:
    """A table whose gradient is Σ of g into the rows that were looked up.

    Args:
        table: [entries, width].
        indices: int64 [records, rows].
        outputs: g [records, rows, width].
        ignored: an entry without gradient.
    """

    def __init__(
        self, table: Slot, indices: torch.Tensor, outputs: torch.Tensor, ignored: int | None
    ) -> None:
        self.table, self._indices, self.g, self._ignored = table, indices, outputs, ignored
        self._found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def slots(self) -> Sequence[Slot]:
        return (self.table,)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self._indices, self.g)

    def _rows(self, patient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patients [pairs], entries [pairs] and gradients [pairs, width] of each patient's each entry."""
        entries, width = self.table.shape
        keys = (patient[:, None] * entries + self._indices).flatten()
        rows = self.g.reshape(-1, width)
        if self._ignored is not None:
            kept = self._indices.flatten() != self._ignored
            keys, rows = keys[kept], rows[kept]
        pairs, position = keys.unique(return_inverse=True)
        summed = rows.new_zeros(len(pairs), width).index_add_(0, position, rows)
        return pairs // entries, pairs % entries, summed

    def norms(self, groups: Groups, norms: Norms) -> None:
        self._found = who, _, rows = self._rows(groups.patient)
        norms.squares.index_add_(0, who, row_squares(rows).double())

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        who, entries, rows = self._found or self._rows(torch.arange(len(self.g), device=self.g.device))
        scale = factors.patients if self._found else factors.records
        self.table.of(flat).index_add_(0, entries, rows * scale[who, None])

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        who, entries, rows = self._rows(groups.patient)
        result = rows.new_zeros(groups.patients, *self.table.shape)
        result[who, entries] = rows
        return [(self.table, result.flatten(1))]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        self.g = silenced(self.g, groups.spread(bad))
        if self._found is not None:
            who, entries, rows = self._found
            self._found = who, entries, silenced(rows, bad[who])
