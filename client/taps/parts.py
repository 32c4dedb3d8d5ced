"""What a tapped layer leaves for the sum: squared norms per patient, and the weighted gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from client.taps.groups import Groups

TINY = 1e-32  # squares below are not told from zero in float32; see `Rows`
_TINY_LENGTH = 1e-16
_WIDE = 1 << 14
_ROUGH = 2.0**-9  # of a square
CHUNK = 128  # records summed in float32 at a time; from there on in float64


Where = slice | torch.Tensor
"""Positions of records."""


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
        held: bytes that gradients of patients may take up.
        room: patients that there may be. A public number, for which way norms are computed shouldn't depend
            on how many others there are; see `TappedGradients.sum` on rounding.
    """

    def __init__(self, groups: Groups, like: torch.Tensor, held: int, room: int) -> None:
        self.squares = like.new_zeros(groups.patients, dtype=torch.float64)
        self.held, self.room = held, room
        self._rough: list[tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = []

    def add_rough(
        self, found: torch.Tensor, error: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Have `settle` add squares that are off by at most `error`, float64 [patients] each.

        Args:
            exact: gives those of some patients (int64 positions) exactly.
        """
        self._rough.append((found, error, exact))

    def settle(self) -> None:
        """Once all norms are taken: add the rough squares, and exact ones for patients whose norm may be off
        by more than 2^-10 of it. A patient's own numbers decide."""
        if not self._rough:
            return
        found, errors = (torch.stack(each).sum(dim=0) for each in list(zip(*self._rough, strict=True))[:2])
        (doubtful,) = (~(errors <= _ROUGH * (self.squares + found))).nonzero(as_tuple=True)
        if len(doubtful):
            found[doubtful] = torch.stack([exact(doubtful) for _, _, exact in self._rough]).sum(dim=0)
        self.squares += found

    def could_hold(self, size: int, itemsize: int) -> bool:
        """Whether so many numbers of each patient may be held."""
        return self.room * size * itemsize <= self.held

    def hold(self, size: int, itemsize: int) -> bool:
        """The same; if so, they count as held from here on."""
        if not self.could_hold(size, itemsize):
            return False
        self.held -= self.room * size * itemsize
        return True


class Part(Protocol):
    """One use of a layer by a batch."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        """What it holds, [records, …] each."""

    def take(self, rows: Where) -> None:
        """Keep these records only, in this order."""

    def lengths(self, groups: Groups) -> torch.Tensor:
        """At least Σ |input| |output gradient| over the rows whose products add up to a patient's gradient,
        [patients]: what their rounding is in proportion to, however much they cancel."""

    def norms(self, groups: Groups, norms: Norms) -> None:
        """Add the squared norms of the patients' gradients."""

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        """Add Σ factor · gradient to the slots of `flat`, float64."""

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        """The patients' gradients [patients, slot's size]."""

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        """Make the patients where `bad` [patients] zero."""


def row_squares(values: torch.Tensor) -> torch.Tensor:
    """Σ values² over all but the first dimension, float64."""
    flat = values if values.dim() == 2 else values.flatten(1)
    # torch adds up squares in float32, one after the other
    found = [torch.linalg.vector_norm(some, dim=1).double().square_() for some in flat.split(_WIDE, dim=1)]
    return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)


def record_lengths(values: torch.Tensor) -> torch.Tensor:
    """√Σ values² over all but the first dimension, where squares that underflow count all the same."""
    return row_lengths(values.flatten(1))


def row_lengths(values: torch.Tensor) -> torch.Tensor:
    """√Σ values² over the last dimension, where squares that underflow count all the same."""
    found: torch.Tensor = torch.linalg.vector_norm(values, dim=-1)
    return found.clamp_(min=_TINY_LENGTH)


def chunks(records: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive records, at most `size` at a time."""
    for start in range(0, records, size):
        yield slice(start, min(start + size, records))


def weighted(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Σ factor · values [n, size]: [size]."""
    return torch.mm(factors[None], values)[0]


def add_weighted(values: torch.Tensor, factors: torch.Tensor, target: torch.Tensor) -> None:
    """Add Σ factor · values [n, size] to float64 [size]."""
    for some in chunks(len(values)):
        target += weighted(values[some], factors[some])


def silenced(values: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """`values` with zeros where `bad` [first dimension]."""
    return values.masked_fill(bad.view(-1, *[1] * (values.dim() - 1)), 0.0)


class _OneSlot:
    """Values [patients or records, slot's size] for one slot."""

    def __init__(self, slot: Slot, values: torch.Tensor) -> None:
        self.slot, self.values = slot, values

    @property
    def slots(self) -> Sequence[Slot]:
        return (self.slot,)

    @property
    def taps(self) -> Sequence[torch.Tensor]:
        return (self.values,)

    def take(self, rows: Where) -> None:
        self.values = self.values[rows]


class Held(_OneSlot):
    """The patients' gradients of one slot, [patients, slot's size]."""

    def lengths(self, groups: Groups) -> torch.Tensor:
        return record_lengths(self.values)

    def norms(self, groups: Groups, norms: Norms) -> None:
        norms.squares += row_squares(self.values)

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        add_weighted(self.values, factors.patients, self.slot.flat(flat))

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        return [(self.slot, self.values)]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        self.values = silenced(self.values, bad)


class Vectors(_OneSlot):
    """A gradient per record, [records, slot's size]: of biases and of scales."""

    def __init__(self, slot: Slot, records: torch.Tensor) -> None:
        super().__init__(slot, records)
        self._held: Held | None = None

    def lengths(self, groups: Groups) -> torch.Tensor:
        return groups.sum(record_lengths(self.values)[:, None])[:, 0]

    def norms(self, groups: Groups, norms: Norms) -> None:
        self._held = Held(self.slot, groups.sum(self.values))
        self._held.norms(groups, norms)

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        if self._held is not None:
            self._held.write(factors, flat)
        else:
            add_weighted(self.values, factors.records, self.slot.flat(flat))

    def gradients(self, groups: Groups) -> list[tuple[Slot, torch.Tensor]]:
        return [(self.slot, groups.sum(self.values))]

    def silence(self, bad: torch.Tensor, groups: Groups) -> None:
        self.values = silenced(self.values, groups.spread(bad))
        if self._held is not None:
            self._held.silence(bad, groups)


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

    def take(self, rows: Where) -> None:
        self._indices, self.g = self._indices[rows], self.g[rows]

    def lengths(self, groups: Groups) -> torch.Tensor:
        return groups.sum(row_lengths(self.g).sum(dim=1, keepdim=True))[:, 0]

    def norms(self, groups: Groups, norms: Norms) -> None:
        self._found = who, _, rows = self._rows(groups.patient)
        norms.squares.index_add_(0, who, row_squares(rows).double())

    def write(self, factors: Factors, flat: torch.Tensor) -> None:
        who, entries, rows = self._found or self._rows(torch.arange(len(self.g), device=self.g.device))
        scale = factors.patients if self._found else factors.records
        self.table.of(flat).index_add_(0, entries, (rows * scale[who, None]).to(flat.dtype))

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
