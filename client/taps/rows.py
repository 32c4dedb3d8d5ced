"""The gradient of a matrix that rows of inputs are multiplied with: a record's one row, or one at each time.

Where a patient's gradient isn't held, norm and sum are computed in different ways and their rounding
differs: by no more than what `lengths` bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from client.taps.groups import Groups
from client.taps.parts import (
    CHUNK,
    TINY,
    Factors,
    Norms,
    Slot,
    Where,
    chunks,
    row_lengths,
    row_squares,
    silenced,
    weighted,
)

# Cost of touching one number in a cache, or in memory if there are many, in multiplications of a matrix
# product (measured on one core: 0.15 ns and 0.4 ns against 0.02 ns); a double costs two floats.
_TOUCH, _TOUCH_FAR = 7.0, 20.0
_FAR = 1 << 22  # numbers
_ROWS = 1024  # summed in float32 at a time, if a record has several


def gram_is_cheaper(rows: float, widths: tuple[int, int], patients: int, holdable: bool) -> bool:
    """Whether a patient's norm comes cheaper from Gram matrices than from its gradient, sum included.

    In multiplications: the Gram matrices (in float64) and the weighted sum, against the patient's gradient
    and its passage through memory (written, squared, summed), or two products if it can't be held.

    Args:
        rows: of a patient.
        widths: of an input and of an output.
        patients: that there may be.
    """
    size, width = widths[0] * widths[1], sum(widths)
    touch = _TOUCH_FAR if patients * size > _FAR else _TOUCH
    gram = 2 * rows * rows * width + 3 * rows * width * _TOUCH + rows * size
    gradient = rows * size + 3 * size * touch if holdable else 2 * rows * size + 2 * size * touch
    return gram < gradient


class Rows:
    """Matrices side by side whose gradients are Σ over rows of g aᵀ, with biases whose gradient is Σ g.

    Args:
        weights: [outputs, its inputs] each, in the order of a's columns; none if all are frozen.
        biases: [outputs] each.
        inputs: a [records, rows, inputs] or [records, inputs].
        outputs: g [records, rows, outputs] or [records, outputs], the loss's gradient.
        turned: so many of g's first columns belong last.
    """

    def __init__(
        self,
        weights: Sequence[Slot],
        biases: Sequence[Slot],
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        *,
        turned: int = 0,
    ) -> None:
        self.weights, self.biases, self._turned = tuple(weights), tuple(biases), turned
        self.a, self.g = inputs, outputs
        self._flipped = inputs.shape[-1] < outputs.shape[-1]  # the product is faster than the other way round
        self._held: torch.Tensor | None = None
        self._held_biases: torch.Tensor | None = None

    @property
    def slots(self) -> Sequence[Slot]:
        return (*self.weights, *self.biases)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.a, self.g)

    def take(self, rows: Where) -> None:
        self.a, self.g = self.a[rows], self.g[rows]

    def lengths(self, groups: Groups) -> torch.Tensor:
        found = row_lengths(self.g)
        if self.weights:
            found = found * (row_lengths(self.a).square_() + len(self.biases)).sqrt_()
        else:
            found = found * len(self.biases) ** 0.5
        return groups.sum(found.view(len(found), -1).sum(dim=1, keepdim=True))[:, 0]

    @property
    def _size(self) -> int:
        return self.a.shape[-1] * self.g.shape[-1]

    def norms(self, groups: Groups, norms: Norms) -> None:
        if self.weights and self.g.dim() == 2 and groups.one_record_each:
            # One row: |g aᵀ| = |g| |a|. Squares that underflow must not hide a long other factor.
            a, g = row_squares(self.a), row_squares(self.g).clamp_(min=TINY)
            norms.squares += g * (a + len(self.biases) if self.biases else a.clamp_(min=TINY))
            return
        if self.weights and self._gram_is_cheaper(groups, norms):
            self._gram_norms(groups, norms)
            return
        if self.biases:
            summed = self._bias_gradients(groups)
            norms.squares += len(self.biases) * row_squares(summed)
        if not self.weights:
            self._held_biases = summed
        elif norms.hold(self._size, self.a.element_size()):
            self._held = self._gradients(groups)
            norms.squares += row_squares(self._held)
            self._held_biases = summed if self.biases else None
        else:
            patients = max(1, norms.held // (self._size * self.a.element_size()))
            for block in groups.blocks(max(1, int(patients * groups.mean_records))):
                norms.squares[block.patients] += row_squares(self._gradients(block.groups, block.records))

    def _gram_is_cheaper(self, groups: Groups, norms: Norms) -> bool:
        rows = groups.mean_records * (self.g.shape[1] if self.g.dim() == 3 else 1)
        holdable = norms.could_hold(self._size, self.a.element_size())
        return gram_is_cheaper(rows, (self.a.shape[-1], self.g.shape[-1]), norms.room, holdable)

    def _three(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.a, self.g) if self.g.dim() == 3 else (self.a[:, None], self.g[:, None])

    def _gram_norms(self, groups: Groups, norms: Norms) -> None:
        """Σ over pairs of rows (aᵢ·aⱼ + biases)(gᵢ·gⱼ); in float64, because rows may cancel."""
        a, g = self._three()
        for layout in groups.layouts():
            rows = layout.rows(a, padded=False).double()
            inputs = torch.bmm(rows, rows.transpose(1, 2))
            rows = layout.rows(g).double()
            outputs = torch.bmm(rows, rows.transpose(1, 2))
            inputs += len(self.biases)
            found = (inputs * outputs).sum(dim=(1, 2)).clamp_(min=0.0)
            norms.squares[layout.who] += found

    def _gradients(self, groups: Groups, records: slice = slice(None)) -> torch.Tensor:
        """The weights' gradient of each patient, [patients, outputs, inputs] or the flipped way round, of
        those records."""
        a, g = self._three()
        a, g = a[records], g[records]
        layouts = groups.layouts()
        if layouts[0].patients is None:
            return self._product(layouts[0].rows(a), layouts[0].rows(g))
        widths = (a.shape[2], g.shape[2]) if self._flipped else (g.shape[2], a.shape[2])
        result = a.new_empty(groups.patients, *widths)
        for layout in layouts:
            result[layout.patients] = self._product(layout.rows(a, padded=False), layout.rows(g))
        return result

    def _product(self, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.bmm(a.transpose(1, 2), g) if self._flipped else torch.bmm(g.transpose(1, 2), a)

    def _bias_gradients(self, groups: Groups) -> torch.Tensor:
        """[patients, outputs]"""
        return groups.sum(self.g.sum(dim=1) if self.g.dim() == 3 else self.g)

    def _add(self, gradient: torch.Tensor, flat: torch.Tensor) -> None:
        """A weights' gradient [outputs, inputs] to its slots."""
        columns = gradient.split([slot.shape[1] for slot in self.weights], dim=1)
        for slot, found in zip(self.weights, self._straight(columns, 0), strict=True):
            slot.of(flat).add_(found)

    def _straight(self, gradients: Sequence[torch.Tensor], dim: int) -> Sequence[torch.Tensor]:
        return [g.roll(-self._turned, dim) for g in gradients] if self._turned else gradients

    def _add_biases(self, gradient: torch.Tensor, flat: torch.Tensor) -> None:
        (found,) = self._straight((gradient,), 0)
        for slot in self.biases:
            slot.flat(flat).add_(found)

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        if self._held is not None:
            for some in chunks(len(self._held)):
                held = self._held[some]
                found = weighted(held.flatten(1), factors.patients[some]).view(held.shape[1:])
                self._add(found.t() if self._flipped else found, flat)
        if self._held_biases is not None:
            for some in chunks(len(self._held_biases)):
                self._add_biases(weighted(self._held_biases[some], factors.patients[some]), flat)
        if self._held is not None or self._held_biases is not None:
            return
        scale = factors.records if self.g.dim() == 2 else factors.records[:, None]
        a, g = self.a.flatten(0, -2), (self.g * scale[..., None]).flatten(0, -2)
        for some in chunks(len(g), CHUNK if self.g.dim() == 2 else _ROWS):
            if self.weights:
                self._add(torch.mm(g[some].t(), a[some]), flat)
            if self.biases:
                self._add_biases(g[some].sum(dim=0), flat)

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        found: list[tuple[Slot, torch.Tensor]] = []
        if self.weights:
            both = self._gradients(groups)
            both = both.transpose(1, 2) if self._flipped else both
            columns = both.split([slot.shape[1] for slot in self.weights], dim=2)
            straight = self._straight(columns, 1)
            found += [(slot, each.flatten(1)) for slot, each in zip(self.weights, straight, strict=True)]
        if self.biases:
            (summed,) = self._straight((self._bias_gradients(groups),), 1)
            found += [(slot, summed) for slot in self.biases]
        return found

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        records = groups.spread(bad)
        self.a, self.g = silenced(self.a, records), silenced(self.g, records)
        self._held = None if self._held is None else silenced(self._held, bad)
        self._held_biases = None if self._held_biases is None else silenced(self._held_biases, bad)
