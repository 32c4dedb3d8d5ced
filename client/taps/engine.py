"""Sums of clipped per-patient gradients from what the layers left on a tape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from client.batches import Batch
from client.blocks import filled
from client.cohort import Patients
from client.device import STEP_MEMORY
from client.rowwise import CLIPPING_MARGIN
from client.taps.company import Company, Seats, Taps, multiple_of
from client.taps.coverage import covers, maker
from client.taps.groups import Block, Groups
from client.taps.losses import output_gradients
from client.taps.parts import Factors, Held, Norms, Part, Slot, chunks
from client.taps.tape import Tape
from common.errors import StudyError
from common.objectives import blank_labels, tried_objective
from common.study import Objective

MAX_RECORDS = 512  # in one pass through the network; see `sum` on rounding
_ENOUGH = 72 << 20  # bytes of a pass of images from which on more are no faster: at least so many records,
_FEWEST = 64
_ENOUGH_OF_WEIGHTS = 32  # and so many times the weights, whose gradients each pass adds up
CANCELLING = 2.0**6  # so many times as long as what they sum up to may a patient's rows be
LARGEST = 2.0**60  # a patient's rows together; from half of it on it counts for less, from here on for zero


class TappedGradients:
    """Sums of clipped per-patient gradients of one network; see `covers`.

    Args:
        network: its own forward functions are back whenever no sum is being taken; what is frozen, and which
            layers there are, must stay as they are now.
        expected: public number of patients in a step, by which is chosen how norms are computed.
        memory: bytes that a step's activations, their gradients and held gradients may take up, as far as
            one record allows.

    Raises:
        StudyError: if a layer isn't covered.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        expected: float = MAX_RECORDS,
        *,
        memory: int = STEP_MEMORY,
    ) -> None:
        reason = covers(network)
        if reason is not None:
            raise StudyError(f"no taps: {reason}", remedy="take per-sample gradients instead")
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self._objective, self._memory = objective, memory
        # More are there once in a billion steps, or where a site has far more than it declares
        self._patients = math.ceil(expected + 6 * math.sqrt(expected)) + 10
        self._tape, self._slots, offset = Tape(), dict[int, Slot](), 0
        for parameter in self.parameters:
            self._slots[id(parameter)] = Slot(offset, tuple(parameter.shape))
            offset += parameter.numel()
        self.size = offset
        self._forwards = list(self._tapped())
        self._companies: dict[tuple[object, ...], Company] = {}

    def _tapped(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Each tapped layer's attributes, and its forward function for a sum."""
        for name, layer in self.network.named_modules():
            make = maker(layer)
            if make is not None:
                called = f"{name or 'network'} ({type(layer).__name__})"
                yield layer.__dict__, make(called, layer, self._slot, self._tape)

    def _slot(self, parameter: torch.Tensor | None) -> Slot | None:
        return None if parameter is None else self._slots.get(id(parameter))

    @contextmanager
    def _taps(self) -> Iterator[None]:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = None
        for attributes, forward in self._forwards:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self._forwards:
                del attributes["forward"]
            self._tape.parts = []

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """Σ over patients of f g, float64 [parameters], with |g| over all of them, C' = C (1 - 2^-8), and
        f = min(1, C' / |g|, 2^6 C' / D) h, where D² = Σ over layers of (Σ over the patient's rows of
        |input| |output gradient|)².

        A patient whose D overflows, or is 2^60 or more, counts as zero: NaN would drown the noise and tell
        everyone that such a patient is here. Below, nothing overflows however it is computed: which of
        several ways to |g| is taken may hang on other patients, and where one of them overflowed and another
        did not, one patient more would silence all others, or give them back. From 2^59 on h falls from 1 to
        0 evenly, so that rounding of D moves nobody by much.

        What the network computes for a record is the same bit for bit whoever else takes part (`company`);
        later steps round, and how may depend on others. A product over n rows is off by at most
        n 2^-24 Σ |input| |output gradient| (Higham 2002, "Accuracy and stability of numerical algorithms",
        section 3.1), hence by at most n 2^-18 C' for each patient thanks to the last term of f: without it
        a patient's rows that cancel could be all rounding. Networks as they are trained have D / |g| of 1 to
        15, and aren't touched.

        What C' leaves of C is for this. Sums go on in float64 after 128 records, 1024 rows, or the positions
        of 128 images. Where every patient is one row to each layer (D = |g|), b patients' sum is off by at
        most 128 b 2^-24 C', with one patient less likewise: the margin covers both up to b = 256. With R
        rows at a time the worst case is 2 R 2^-24 Σ f D over the patients, above the margin for many rows
        that cancel much, but it needs all roundings to conspire. As they fall (Higham & Mary 2019, "A new
        approach to probabilistic rounding error analysis") one patient among 64, each with all the
        cancelling that f allows, moves what the others add by at most 3e-4 C', a tenth of the margin
        (tests/client/test_taps_limits).

        |g| itself is float64's, of gradients that are held as of Gram matrices, with one exception: a
        convolution's Gram matrices are in float32 for patients whose |g| that moves by at most 2^-10 |g| in
        the worst case, and by 1e-7 of it as roundings fall (`Norms.settle`). With those the first bound holds
        up to b = 192.

        Roundings do conspire where patients are alike, and one more makes all of a pass go another way, from
        gradients in float32 to Gram matrices: this moved 3,744 of them by 0.03 C' in all. Hence the few
        records of a pass; and where each patient has one record, public numbers decide which way is taken.
        Where some have several, the mean of a pass's records does, too: one patient more could tip that.

        Args:
            batch: a patient's records together; each patient has one at least.
            clipping_norm: C.

        Raises:
            StudyError: if a layer doesn't get the records in its first dimension, if its input is changed in
                place, or if a weight is used outside of its layer.
        """
        like = self.parameters[0] if self.parameters else torch.empty(0)
        total = like.new_zeros(self.size, dtype=torch.float64, requires_grad=False)
        if not batch.patients or not self.parameters:
            return total
        groups = Groups(batch.patient.to(like.device), batch.patients)
        seats = self._seats(patients.features, groups.records, groups.one_record_each)
        blocks = list(groups.blocks(seats.most))
        for block in blocks:
            seats.probe(block.groups.records)
        with self._taps():
            for block in blocks:
                if block.groups.records > seats.most:
                    total += self._long(patients, batch, block, seats, clipping_norm)
                else:
                    self._add_piece(patients, batch, block, seats, (clipping_norm, total))
        return total

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        """What the network gives for records [records, …], without dropout: [records, outputs], a row the
        same bit for bit whoever the other records belong to; no gradients.

        Raises:
            StudyError: as `sum`.
        """
        if not len(features):  # some layers raise an error for nobody, which would tell that nobody is here
            return self.outputs(features.new_zeros((1, *features.shape[1:])))[:0]
        seats = self._seats(features, len(features))
        pieces = list(chunks(len(features), seats.most))
        for piece in pieces:
            seats.probe(piece.stop - piece.start)
        found = []
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            with self._taps(), torch.enable_grad():  # without, torch has other ways that taps don't see
                for piece in pieces:
                    some, rows = seats.seated(features[piece])
                    self._tape.begin(len(some))
                    found.append(self.network(some).detach()[rows])
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.cat(found)

    def _seats(self, features: torch.Tensor, records: int, alone: bool = True) -> Seats:
        """For so many records like these; see `Company.seats`."""
        kind = (tuple(features.shape[1:]), features.dtype, features.device, torch.get_num_threads())
        company = self._companies.get(kind)
        if company is None:
            tried = tried_objective(self._objective)

            def taps(network: nn.Module) -> Taps:
                return TappedGradients(network, tried, memory=self._memory)._all_taps()

            limits = self._limits(features)
            company = self._companies[kind] = Company(self.network, features, taps, *limits, repr(tried))
        return company.seats(records, alone)

    def _all_taps(self) -> Taps:
        def taps(features: torch.Tensor) -> list[torch.Tensor]:
            with self._taps():
                blank = blank_labels(self._objective, len(features), features.device)
                outputs = self._pass(features, blank, torch.ones(len(features)))
                return [outputs, *(tap for part in self._tape.parts for tap in part.taps)]

        return taps

    def _backward(self, patients: Patients, batch: Batch, where: slice, seats: Seats) -> list[Part]:
        """The parts of those records of the batch."""
        records = batch.records[where].to(patients.features.device)
        features, rows = seats.seated(patients.features[records])
        labels, weights = patients.labels[records], batch.weights[where]
        if len(features) == len(records):
            self._pass(features, labels, weights)
        else:
            self._pass(features, *(filled(values, rows, len(features)) for values in (labels, weights)))
            for part in self._tape.parts:
                part.take(rows)
        return self._tape.parts

    def _pass(self, features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Outputs; the parts are on the tape."""
        self._tape.begin(len(features))
        outputs: torch.Tensor = self.network(features)
        weights = weights.to(outputs)
        if outputs.requires_grad:
            # Of this sum the gradient is theirs; torch imports a library of symbols if one is handed over
            (outputs * output_gradients(self._objective, outputs, labels, weights)).sum().backward()
        if any(p.grad is not None for p in self.parameters):
            raise StudyError(
                "a weight is used outside of its layer",
                remedy="call the layer, or take per-sample gradients instead",
            )
        return outputs.detach()

    def _add_piece(
        self, patients: Patients, batch: Batch, block: Block, seats: Seats, to: tuple[float, torch.Tensor]
    ) -> None:
        clipping_norm, total = to
        groups, parts = block.groups, self._backward(patients, batch, block.records, seats)
        with torch.no_grad():
            lengths = squared_lengths(parts, groups)
            parts = merged(parts, groups)
            room = max(groups.patients, min(self._patients, seats.limit))
            norms = Norms(groups, self.parameters[0], self._memory // 4, room)
            # Small gradients first: holding one saves a product, and most per byte where it is small
            for part in sorted(parts, key=_size):
                part.norms(groups, norms)
            norms.settle()
            known, bound = norms.squares, clipping_norm * (1.0 - CLIPPING_MARGIN)
            scale = (bound * known.rsqrt()).clamp_(max=1.0)  # 1 / 0 is infinite
            if lengths is not None:
                scale = torch.minimum(scale, CANCELLING * bound * lengths.rsqrt())
                if not lengths.max().item() < (LARGEST / 2) ** 2:  # NaN isn't
                    scale *= (2.0 - lengths.sqrt() * (2.0 / LARGEST)).clamp_(0.0, 1.0)
                    sound = scale > 0.0
                    scale = torch.where(sound, scale, 0.0)
                    for part in parts:
                        part.silence(~sound, groups)
            scale = scale.to(self.parameters[0].dtype)
            for part in parts:
                part.write(Factors(scale, groups.spread(scale)), total)

    def _long(
        self, patients: Patients, batch: Batch, block: Block, seats: Seats, clipping_norm: float
    ) -> torch.Tensor:
        """One patient with more records than fit: the gradient of some after the other, then the norm."""
        total = self.parameters[0].new_zeros(self.size, dtype=torch.float64, requires_grad=False)
        lengths = dict[int, torch.Tensor]()
        start = block.records.start
        for some in chunks(block.groups.records, seats.most):
            count = some.stop - some.start
            parts = self._backward(patients, batch, slice(start + some.start, start + some.stop), seats)
            with torch.no_grad():
                one = self.parameters[0].new_ones(count, requires_grad=False)
                groups = Groups(torch.zeros(count, dtype=torch.int64, device=one.device), 1)
                add_lengths(parts, groups, lengths)
                for together in merged(parts, groups):
                    together.write(Factors(one[:1], one), total)
        length = math.sqrt(sum(float(each) ** 2 for each in lengths.values()))
        if not length < LARGEST:
            return torch.zeros_like(total)
        norm, bound = float(torch.linalg.vector_norm(total)), clipping_norm * (1.0 - CLIPPING_MARGIN)
        factor = min(1.0, bound / max(norm, 1e-30), CANCELLING * bound / max(length, 1e-30))
        return total * (factor * min(1.0, 2.0 - length * (2.0 / LARGEST)))

    def _limits(self, features: torch.Tensor) -> tuple[int, int]:
        """Records of a pass: as many as the memory allows, of which gradients may hold a quarter; and so many
        that more are no faster."""
        record = max(1, self._measured(features))
        most = max(1, min(MAX_RECORDS, self._memory * 3 // 4 // record))
        if not any(isinstance(m, _ConvNd) for m in self.network.modules()):
            return most, most
        return most, max(_FEWEST, max(_ENOUGH, _ENOUGH_OF_WEIGHTS * 4 * self.size) // record)

    def _measured(self, features: torch.Tensor) -> int:
        """Bytes that a record's pass keeps, from one over some made-up records: what autograd saves, and the
        taps twice, for the gradients that pass beside them."""
        kept: dict[int, torch.Tensor] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.network.parameters()}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved
            return saved

        count = multiple_of(self.network)
        features = features.new_zeros(count, *features.shape[1:])
        devices = [features.device] if features.is_cuda else []
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with self._taps(), torch.random.fork_rng(devices), saving:
            self._pass(features, blank_labels(self._objective, count, features.device), torch.ones(count))
            taps = [tap for part in self._tape.parts for tap in part.taps]
        saved = sum(each.untyped_storage().nbytes() for key, each in kept.items() if key not in weights)
        return (saved + 2 * sum(tap.numel() * tap.element_size() for tap in taps)) // count


def _size(part: Part) -> int:
    return part.slots[0].size


def squared_lengths(parts: list[Part], groups: Groups) -> torch.Tensor | None:
    """Σ over slots of (Σ over their uses of `Part.lengths`)², float64 [patients]; None: no sum cancels."""
    found = dict[int, torch.Tensor]()
    add_lengths(parts, groups, found)
    return torch.stack(list(found.values())).square_().sum(dim=0) if found else None


def add_lengths(parts: list[Part], groups: Groups, found: dict[int, torch.Tensor]) -> None:
    """Add each part's `Part.lengths`, float64 [patients], to what is found for its slot so far."""
    for part in parts:
        place = part.slots[0].offset
        lengths = part.lengths(groups).double()
        found[place] = found[place] + lengths if place in found else lengths


def merged(parts: list[Part], groups: Groups) -> list[Part]:
    """The same, with one part for each slot: where several uses share one, their gradients of each patient
    are added up and held."""
    places = [slot.offset for part in parts for slot in part.slots]
    if len(set(places)) == len(places):
        return parts
    uses: dict[Slot, int] = {}
    for part in parts:
        for slot in part.slots:
            uses[slot] = uses.get(slot, 0) + 1
    single, shared = list[Part](), dict[Slot, torch.Tensor]()
    for part in parts:
        if all(uses[slot] == 1 for slot in part.slots):
            single.append(part)
            continue
        for slot, gradients in part.gradients(groups):
            shared[slot] = shared[slot] + gradients if slot in shared else gradients
    return [*single, *(Held(slot, gradients) for slot, gradients in shared.items())]
