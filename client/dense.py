"""Sums of clipped per-patient gradients in closed form, for linear models and MLPs.

The gradient of a linear layer's weights is Σ over rows of g xᵀ, with the layer's inputs x and output
gradients g. For a patient with one record its squared norm is Σ over layers of |g|² (|x|² + 1) (Goodfellow
2015, arXiv 1510.01799); for one with several, it comes from Gram matrices (Li et al. 2021, arXiv 2110.05679)
or from the patient's own gradient, whichever is cheaper by shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from client.batches import Batch
from client.chain import Chain, Tapped, no_chain, trainable
from client.cohort import Patients
from client.device import STEP_MEMORY
from client.matrix import outer_sum
from client.rowwise import CLIPPING_MARGIN, TILE
from client.taps.groups import Groups
from common.errors import StudyError
from common.study import Objective

MAX_RECORDS = 1024  # in one pass
PASS = 160  # rows of one float32 product into the sum, at most
PASSES = 6  # so many add up in float32
HELD = 32  # multiplications of a Gram matrix that cost as much as to hold a number of a gradient
TINY = 2.0**-60  # more than what float32 squares lose below their range
HUGE = 2.0**50  # inputs and output gradients from here on count as an overflow
CANCELLING = 2.0**15  # times shorter than its rows together a patient's gradient may be, to count in full


def not_dense(network: nn.Module) -> str | None:
    """None if `DenseGradients` takes this network; else why not: layer's name and type."""
    return no_chain(network)


def only_layer(network: nn.Module) -> nn.Linear | None:
    """The linear layer that is all of the network; None if there is more to it."""
    if no_chain(network) is not None:
        return None
    chain = Chain(network)
    return chain.layers[0] if len(chain) == 1 else None


@dataclass(frozen=True)
class _Slot:
    """Where a trainable layer's numbers stand in the flat gradient; None: frozen, or absent."""

    weight: slice | None
    bias: slice | None


class _Total:
    """A flat sum in float64 that is made of parts: of none, or of at least one for each place."""

    def __init__(self, size: int, like: torch.Tensor) -> None:
        self.values = torch.empty(size, dtype=torch.float64, device=like.device)
        self._begun: set[int] = set()

    def add(self, where: slice, part: torch.Tensor) -> None:
        place = self.values[where].view(part.shape)
        if where.start in self._begun:
            place.add_(part)
        else:
            self._begun.add(where.start)
            place.copy_(part)

    def add_sum(self, where: slice, rows: torch.Tensor) -> None:
        """Add Σ over rows, float64 from here on."""
        if where.start in self._begun:
            self.values[where].add_(rows.sum(dim=0, dtype=torch.float64))
        else:
            self._begun.add(where.start)
            torch.sum(rows, dim=0, dtype=torch.float64, out=self.values[where])

    def add_product(self, where: slice, g: torch.Tensor, x: torch.Tensor) -> None:
        """Add gᵀ x, float64 from here on, some rows at a time."""
        place = self.values[where].view(g.shape[1], x.shape[1])
        for some, rows in zip(g.split(PASS), x.split(PASS), strict=True):
            if where.start in self._begun:
                place.addmm_(some.double().t(), rows.double())
            else:
                self._begun.add(where.start)
                torch.mm(some.double().t(), rows.double(), out=place)

    def finished(self) -> torch.Tensor:
        return self.values if self._begun else self.values.zero_()


class DenseGradients:
    """Sums of clipped per-patient gradients of one network; see `not_dense`.

    Args:
        expected: public number of patients in a step.

    Raises:
        StudyError: if the network isn't made of linear layers and elementwise activations.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, expected: float = 1.0, *, memory: int = STEP_MEMORY
    ) -> None:
        reason = not_dense(network)
        if reason is not None:
            raise StudyError(f"no closed form: {reason}", remedy="take the taps instead")
        self.network, self._objective = network, objective
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self.chain = Chain(network)
        self._slots: dict[nn.Linear, _Slot] = {}
        places, offset = dict[int, slice](), 0
        for parameter in self.parameters:
            places[id(parameter)] = slice(offset, offset + parameter.numel())
            offset += parameter.numel()
        for layer in self.chain.layers:
            if trainable(layer):
                self._slots[layer] = _Slot(places.get(id(layer.weight)), places.get(id(layer.bias)))
        biased = [[s.bias is not None] for s in reversed(self._slots.values())]  # the last layer first
        self._ones = torch.tensor(biased, dtype=torch.float64, device=self.chain.layers[0].weight.device)
        self._memory = torch.empty(0)
        self._quarter = memory // 4  # of a pass's activations, and of patients' gradients held at a time
        fitting = self._quarter // (4 * self.chain.widest)
        self._records = TILE * max(1, min(MAX_RECORDS, fitting) // TILE)

    # --- what others call

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        """The network's outputs, float32 [records, outputs], of features [records, …]; each record's are
        the same in any company."""
        found = []
        for part in features.split(self._records):
            for rows in part.split(self._sizes(len(part))):
                x = functional.pad(rows.flatten(start_dim=1), (0, 0, 0, -len(rows) % TILE))
                found.append(self.chain.outputs(x)[: len(rows)])
        if not found:
            return features.new_zeros((0, self.chain.layers[-1].out_features))
        return found[0] if len(found) == 1 else torch.cat(found)

    @torch.no_grad()
    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """Σ over patients of min(1, C / ‖g‖) g, float64 [parameters], with ‖g‖ over all of them.

        A patient whose numbers overflow (2^50 is taken for that) counts as zero: NaN would drown the noise
        and tell everyone that such a patient is here.

        One patient more or less changes the result by at most C in L2 norm, rounding included. x and g are
        the same bit for bit in any company; what is clipped to is C (1 - 2^-8), and everything from there
        on must stay within the margin:

        - One record each: norms are those of float32 numbers, relative error below 2^-12 for up to 65,536
          inputs. A product adds up to `PASS` rows in float32, `PASSES` of those add up again, all else is
          float64. To add one more vector of norm C to m of them is off by at most 2^-24 (m + 1) C. So n
          patients' sums are off by at most n (PASS + PASSES + 6) 2^-25 C, 6 being for norms and factors,
          and two such sums by twice that: within the margin up to n = 380, and far beyond it unless all
          roundings conspire (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis").
        - Several records: all is float64 from x and g on. Where a patient's rows cancel to less than 2^-15
          of their lengths' sum, it counts for less, so that rounding of a norm stays below 2^-12 of it.

        Args:
            batch: a patient's records together.
            clipping_norm: C.
        """
        like = self.chain.layers[0].weight
        total = _Total(self.size, like)
        if not batch.patients or not self.size:
            return total.finished()
        C = clipping_norm * (1.0 - CLIPPING_MARGIN)
        if batch.one_record_each:
            for start in range(0, batch.patients, self._records):
                where = slice(start, min(start + self._records, batch.patients))
                self._add(self.clipped(self._taps(patients, batch, where), C), total)
            return total.finished()
        groups = Groups(batch.patient.to(like.device), batch.patients)
        for block in groups.blocks(self._records):
            if block.groups.records > self._records:
                self._long(patients, batch, block.records, C, total)
            else:
                self._several(self._taps(patients, batch, block.records), block.groups, C, total)
        return total.finished()

    # --- inputs and output gradients

    def _sizes(self, records: int) -> int:
        """Records of a pass: all of them, or one at a time on a machine where company shows."""
        rows = records + -records % TILE
        return max(1, records) if not records or self.chain.uniform(self._objective, rows) else 1

    def _taps(self, patients: Patients, batch: Batch, where: slice) -> list[Tapped]:
        """Every layer's inputs and output gradients of those records of the batch, in order."""
        records, weights = batch.records[where], batch.weights[where]
        size = self._sizes(len(records))
        if size == len(records):
            return self._pass(patients, records, weights)
        alone = [
            [(layer, x.clone(), g) for layer, x, g in self._pass(patients, *one)]
            for one in zip(records.split(1), weights.split(1), strict=True)
        ]
        return [
            (each[0][0], torch.cat([x for _, x, _ in each]), torch.cat([g for _, _, g in each]))
            for each in zip(*alone, strict=True)
        ]

    def _pass(self, patients: Patients, records: torch.Tensor, weights: torch.Tensor) -> list[Tapped]:
        count = len(records)
        if count % TILE:  # by the first record, of weight 0
            records = functional.pad(records, (0, -count % TILE))
            weights = functional.pad(weights, (0, -count % TILE))
        device = patients.features.device
        records = records.to(device)
        x = self._gathered(patients.features, records)
        labels = patients.labels.index_select(0, records)
        found = self.chain.tapped(self._objective, x, labels, weights.to(device))
        return [(layer, x[:count], g[:count]) for layer, x, g in found]

    def _gathered(self, features: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Those records' features, [records, inputs], until the next call: batches of ever other sizes would
        leave holes in memory."""
        numbers = records.shape[0] * features[0].numel()
        if self._memory.numel() < numbers or self._memory.device != features.device:
            self._memory = features.new_empty(numbers)
        x = self._memory[:numbers].view(records.shape[0], *features.shape[1:])
        torch.index_select(features, 0, records, out=x)
        return x.flatten(start_dim=1)

    def _lengths(self, taps: list[Tapped]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """|g|² (|x|² + 1) of each layer and row, float64 [layers, rows], and which rows are sound; None: all
        of them."""
        norms = [torch.linalg.vector_norm(g, dim=1) for _, _, g in taps]
        for layer, x, _ in taps:
            frozen = self._slots[layer].weight is None
            norms.append(norms[0].new_zeros(x.shape[0]) if frozen else torch.linalg.vector_norm(x, dim=1))
        lengths = torch.stack(norms)
        sound = None
        if lengths.numel() and not lengths.max() < HUGE:  # NaN isn't
            sound = lengths.amax(dim=0) < HUGE
        far, near = lengths.double().add_(TINY).square_().view(2, len(taps), -1)
        return near.add_(self._ones).mul_(far), sound

    # --- one record each

    def clipped(self, taps: list[Tapped], C: float) -> list[Tapped]:
        """With each row's output gradients times min(1, C / the row's norm); 0 where a row isn't sound."""
        squares, sound = self._lengths(taps)
        factors = squares.sum(dim=0).rsqrt_().mul_(C).clamp_(max=1.0)
        if sound is not None:
            factors = torch.where(sound, factors, 0.0)
            taps = _silenced(taps, sound)
        factors = factors.float()[:, None]
        return [(layer, x, g * factors) for layer, x, g in taps]

    def summed(self, clipped: list[Tapped]) -> torch.Tensor:
        """Σ over rows, float64 [parameters], of what `clipped` gave, as `sum` adds one record each."""
        total = _Total(self.size, self.chain.layers[0].weight)
        rows = clipped[0][1].shape[0] if clipped else 0
        if rows <= self._records:
            self._add(clipped, total)
            return total.finished()
        for start in range(0, rows, self._records):
            where = slice(start, start + self._records)
            self._add([(layer, x[where], g[where]) for layer, x, g in clipped], total)
        return total.finished()

    def _add(self, clipped: list[Tapped], total: _Total) -> None:
        for layer, x, g in clipped:
            slot, most = self._slots[layer], PASSES * PASS
            if slot.weight is not None and x.shape[0] <= most:
                total.add(slot.weight, _summed(g, x))
            elif slot.weight is not None:
                for start in range(0, x.shape[0], most):
                    where = slice(start, start + most)
                    total.add(slot.weight, _summed(g[where], x[where]))
            if slot.bias is not None:
                total.add_sum(slot.bias, g)

    # --- several records each

    def _several(self, taps: list[Tapped], groups: Groups, C: float, total: _Total) -> None:
        squares, sound = self._lengths(taps)
        rows = squares.sqrt_().sum(dim=0)
        together = groups.sum(rows[:, None])[:, 0]
        unsound: torch.Tensor | None = None
        if sound is not None:
            unsound = groups.sum((~sound).double()[:, None])[:, 0] > 0
            together = torch.where(unsound, 0.0, together)
            taps = _silenced(taps, ~groups.spread(unsound))
        held = list[tuple[slice, torch.Tensor]]()
        norms = together.new_zeros(groups.patients)
        sums: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        for layer, x, g in taps:
            slot = self._slots[layer]
            if slot.bias is not None:
                held.append((slot.bias, groups.sum(g.double())))
            if slot.weight is None:
                continue
            inside = groups.records / groups.patients
            numbers = x.shape[1] * g.shape[1]
            affordable = 8 * numbers * groups.patients <= self._quarter
            if affordable and HELD * numbers <= inside**2 * (x.shape[1] + g.shape[1]):
                held.append((slot.weight, _of_patients(x, g, groups)))
            else:
                norms += _gram_squares(x, g, groups)
                sums.append((slot.weight, x, g))
        for _, gradients in held:
            norms += torch.linalg.vector_norm(gradients, dim=1).square_()
        norms = torch.maximum(norms.clamp_(min=0.0).sqrt_(), together / CANCELLING)
        factors = (C / norms.clamp_(min=1e-300)).clamp_(max=1.0)
        if unsound is not None:
            factors = torch.where(unsound, 0.0, factors)
        for where, gradients in held:
            total.add(where, factors @ gradients)
        for where, x, g in sums:
            total.add_product(where, g * groups.spread(factors)[:, None], x)

    def _long(self, patients: Patients, batch: Batch, where: slice, C: float, total: _Total) -> None:
        """One patient with more records than fit: its gradient, some records after the others."""
        own, together = _Total(self.size, total.values), 0.0
        for start in range(where.start, where.stop, self._records):
            taps = self._taps(patients, batch, slice(start, min(start + self._records, where.stop)))
            squares, sound = self._lengths(taps)
            if sound is not None:
                return
            together += float(squares.sqrt_().sum())
            for layer, x, g in taps:
                slot = self._slots[layer]
                if slot.weight is not None:
                    own.add_product(slot.weight, g, x)
                if slot.bias is not None:
                    own.add_sum(slot.bias, g)
        found = own.finished()
        norm = max(float(found.norm()), together / CANCELLING, 1e-300)
        found *= min(1.0, C / norm)
        for slot in self._slots.values():
            for place in (slot.weight, slot.bias):
                if place is not None:
                    total.add(place, found[place])


def _summed(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gᵀ x, float32 [outputs, inputs], of so many rows at a time that rounding stays small."""
    rows = x.shape[0]
    size = -(-rows // -(-rows // PASS))  # even passes
    total = outer_sum(g[:size], x[:size])
    for start in range(size, rows, size):
        total += outer_sum(g[start : start + size], x[start : start + size])
    return total


def _silenced(taps: list[Tapped], sound: torch.Tensor) -> list[Tapped]:
    """With zeros in the rows that aren't sound."""
    rows = sound[:, None]
    return [(layer, torch.where(rows, x, 0.0), torch.where(rows, g, 0.0)) for layer, x, g in taps]


def _laid_out(
    x: torch.Tensor, g: torch.Tensor, groups: Groups
) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]]:
    """Some patients, and their rows of x and g [patients, rows, …] in float64; a few at a time."""
    for layout in groups.layouts():
        inputs, slopes = layout.rows(x[:, None]), layout.rows(g[:, None])
        few = max(1, PASS // layout.most)
        for start in range(0, inputs.shape[0], few):
            some = slice(start, start + few)
            chosen = some if layout.patients is None else layout.patients[some]
            yield chosen, inputs[some].double(), slopes[some].double()


def _of_patients(x: torch.Tensor, g: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Each patient's gradient, float64 [patients, outputs · inputs]."""
    found = x.new_empty((groups.patients, g.shape[1] * x.shape[1]), dtype=torch.float64)
    for chosen, inputs, slopes in _laid_out(x, g, groups):
        found[chosen] = torch.bmm(slopes.transpose(1, 2), inputs).flatten(start_dim=1)
    return found


def _gram_squares(x: torch.Tensor, g: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Each patient's Σ over pairs of rows of (x · x') (g · g'), float64 [patients]."""
    found = x.new_empty(groups.patients, dtype=torch.float64)
    for chosen, inputs, slopes in _laid_out(x, g, groups):
        squares = torch.bmm(inputs, inputs.transpose(1, 2)).mul_(torch.bmm(slopes, slopes.transpose(1, 2)))
        found[chosen] = squares.sum(dim=(1, 2))
    return found
