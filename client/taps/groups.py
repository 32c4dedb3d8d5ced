"""Whose records a batch holds: sums over each patient's records, and rows laid out patient by patient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_LAYOUTS = 4  # so many different counts are laid out exactly; of more, each is padded to a power of two


@dataclass(frozen=True)
class Layout:
    """Some patients with (nearly) as many records each.

    Attributes:
        patients: int64 [patients], or None: all of them, in order.
        records: int64 [patients, most], indices into the batch; None: the batch as it lies.
        most: records of a patient, with padding.
        holds: bool [patients, most], False where `records` is padding; None: no padding.
    """

    patients: torch.Tensor | None
    records: torch.Tensor | None
    most: int
    holds: torch.Tensor | None

    @property
    def who(self) -> torch.Tensor | slice:
        """Which of the batch's patients."""
        return slice(None) if self.patients is None else self.patients

    def rows(self, values: torch.Tensor, *, padded: bool = True) -> torch.Tensor:
        """[patients, most · rows, width] of values [records, rows, width].

        Args:
            padded: whether padding must be zero, not just anything finite.
        """
        if self.records is None:
            return values.reshape(-1, self.most * values.shape[1], values.shape[2])
        taken = values[self.records]
        if padded and self.holds is not None:
            taken = taken * self.holds[:, :, None, None].to(values.dtype)
        return taken.flatten(1, 2)

    def columns(self, values: torch.Tensor, *, padded: bool = True) -> torch.Tensor:
        """[patients, width, most · columns] of values [records, width, columns]."""
        if self.most == 1 and self.records is None:
            return values
        taken: torch.Tensor
        if self.records is None:
            taken = values.unflatten(0, (-1, self.most))
        else:
            taken = values[self.records]
            if padded and self.holds is not None:
                taken = taken * self.holds[:, :, None, None].to(values.dtype)
        return taken.transpose(1, 2).flatten(2)


ALONE = Layout(None, None, 1, None)
"""All patients, with one record each."""


class Groups:
    """The patients of a batch.

    Args:
        patient: int64 [records], 0 … patients-1, rising; each patient has a record.
        patients: how many.
    """

    def __init__(self, patient: torch.Tensor, patients: int) -> None:
        self.patient, self.patients, self.records = patient, patients, len(patient)
        self.one_record_each = self.records == patients
        self._equal: int | None = 1 if self.one_record_each else None
        self._counts: torch.Tensor | None = None
        self._layouts: list[Layout] | None = None
        if not self.one_record_each:
            self._counts = torch.bincount(patient, minlength=patients)
            if self.records == patients * int(self._counts.max()):
                self._equal = self.records // patients

    @property
    def mean_records(self) -> float:
        return self.records / max(1, self.patients)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Each patient's sum [patients, width] of values [records, width]."""
        if self.one_record_each:
            return values
        if self._equal is not None:
            return values.view(self.patients, self._equal, -1).sum(dim=1)
        return values.new_zeros(self.patients, values.shape[1]).index_add_(0, self.patient, values)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Each record's [records] of the patients' values [patients]."""
        return values if self.one_record_each else values[self.patient]

    def layouts(self) -> list[Layout]:
        """All patients, in one layout or more."""
        if self._layouts is None:
            self._layouts = self._laid_out()
        return self._layouts

    def _laid_out(self) -> list[Layout]:
        counts = self._counts
        if self._equal is not None or counts is None:
            return [ALONE if self.one_record_each else Layout(None, None, self._equal or 1, None)]
        firsts = counts.cumsum(0) - counts
        different = counts.unique()
        caps = counts if len(different) <= _LAYOUTS else 2 ** counts.double().log2().ceil().long()
        layouts = []
        for cap in caps.unique().tolist():
            chosen = (caps == cap).nonzero().flatten()
            steps = torch.arange(cap, device=counts.device)
            holds = steps < counts[chosen, None]
            records = torch.where(holds, firsts[chosen, None] + steps, firsts[chosen, None])
            layouts.append(Layout(chosen, records, cap, None if holds.all() else holds))
        return layouts

    def blocks(self, size: int) -> Iterator[Block]:
        """The patients in consecutive blocks of at most `size` records, or of one patient."""
        if self.records <= size:
            yield Block(slice(0, self.records), slice(0, self.patients), self)
            return
        counts = [1] * self.patients if self._counts is None else self._counts.tolist()
        first = start = held = 0
        for index, count in enumerate(counts):
            if held and held + count > size:
                yield self._block(start, start + held, first, index)
                start, first, held = start + held, index, 0
            held += count
        yield self._block(start, start + held, first, self.patients)

    def _block(self, start: int, end: int, first: int, last: int) -> Block:
        return Block(
            slice(start, end), slice(first, last), Groups(self.patient[start:end] - first, last - first)
        )


@dataclass(frozen=True)
class Block:
    """Consecutive patients of a batch.

    Attributes:
        records, patients: their positions in the batch.
        groups: they by themselves.
    """

    records: slice
    patients: slice
    groups: Groups
