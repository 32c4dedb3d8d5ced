"""Sums of clipped per-patient gradients from what the layers left on a tape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from client.taps.coverage import HANDLED, covers
from client.taps.groups import Groups
from client.taps.layers import present
from client.taps.losses import output_gradients
from client.taps.parts import Factors, Held, Norms, Part, Rows, Slot
from client.taps.tape import Tape
from common.errors import StudyError
from common.objectives import record_losses
from common.study import Objective

if TYPE_CHECKING:
    from client.cohort import Patients
    from client.dpsgd import Batch

MEMORY = 1 << 30  # bytes
MAX_RECORDS = 4096  # summed in float32 at a time; pieces add up in float64, so that rounding stays small
_ROUNDING = 2.0**-22  # of what `Norms.doubt` bounds


class TappedGradients:
    """Sums of clipped per-patient gradients of one network; see `covers`.

    Args:
        network: its own forward functions are back whenever no sum is being taken; what is frozen, and which
            layers there are, must stay as they are now.
        memory: bytes that a step's activations, their gradients and held gradients may take up, as far as
            one record allows.

    Raises:
        StudyError: if a layer isn't covered.
    """

    def __init__(self, network: nn.Module, objective: Objective, *, memory: int = MEMORY) -> None:
        reason = covers(network)
        if reason is not None:
            raise StudyError(f"no taps: {reason}", remedy="take per-sample gradients instead")
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self._objective, self._memory = objective, memory
        self._tape, self._slots, offset = Tape(), dict[int, Slot](), 0
        for parameter in self.parameters:
            self._slots[id(parameter)] = Slot(offset, tuple(parameter.shape))
            offset += parameter.numel()
        self.size = offset
        self._forwards = list(self._tapped())
        self._record_bytes: dict[tuple[int, ...], int] = {}
        layer = network[0] if type(network) is nn.Sequential and len(network) == 1 else network
        self._only = layer if type(layer) is nn.Linear else None

    def _tapped(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Each tapped layer's attributes, and its forward function for a sum."""
        for name, layer in self.network.named_modules():
            handled = HANDLED.get(type(layer))
            if handled is not None and any(id(p) in self._slots for p in layer.parameters()):
                called = f"{name or 'network'} ({type(layer).__name__})"
                yield layer.__dict__, handled[0](called, layer, self._slot, self._tape)

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
        """Σ over patients of min(1, C / ‖g‖) g, [parameters] in the network's type, ‖g‖ over all of them.

        ‖g‖ is taken a little longer where a patient's rows cancel and rounding could hide it: by at most
        2^-22 Σ over layers and rows of |input| |output gradient|. A patient whose g or ‖g‖ overflows counts
        as zero: NaN would drown the noise and tell everyone that such a patient is here.

        Args:
            batch: a patient's records together; each patient has one at least.
            clipping_norm: C.

        Raises:
            StudyError: if a layer doesn't get the records in its first dimension, if its input is changed in
                place, or if a weight is used outside of its layer.
        """
        like = self.parameters[0] if self.parameters else torch.empty(0)
        if not batch.patients or not self.parameters:
            return like.new_zeros(self.size, requires_grad=False)
        groups = Groups(batch.patient.to(like.device), batch.patients)
        with self._taps():
            limit = self._limit(patients)
            if groups.records <= limit:
                return self._piece(patients, batch, None, groups, clipping_norm)
            total = like.new_zeros(self.size, dtype=torch.float64, requires_grad=False)
            for block in groups.blocks(limit):
                if block.groups.records > limit:
                    total += self._long(patients, batch, block.records, limit, clipping_norm)
                else:
                    total += self._piece(patients, batch, block.records, block.groups, clipping_norm)
        return total.to(like.dtype)

    def _backward(self, patients: Patients, batch: Batch, where: slice | None) -> list[Part]:
        """The parts of those records of the batch; None: all."""
        records, weights = batch.records, batch.weights
        if where is not None:
            records, weights = records[where], weights[where]
        records = records.to(patients.features.device)
        features, labels = patients.features[records], patients.labels[records]
        if self._only is not None:
            return self._one_layer(self._only, features, labels, weights)
        self._tape.begin(len(records))
        outputs = self.network(features)
        weights = weights.to(outputs)
        if outputs.requires_grad:
            outputs.backward(output_gradients(self._objective, outputs, labels, weights))
        if any(p.grad is not None for p in self.parameters):
            raise StudyError(
                "a weight is used outside of its layer",
                remedy="call the layer, or take per-sample gradients instead",
            )
        return self._tape.parts

    @torch.no_grad()
    def _one_layer(
        self, layer: nn.Linear, x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> list[Part]:
        """A linear model needs no backward pass: its output gradients are the loss's."""
        outputs = functional.linear(x, layer.weight, layer.bias)
        g = output_gradients(self._objective, outputs, labels, weights.to(outputs))
        return [Rows(self._slot(layer.weight), present(self._slot(layer.bias)), x, g)]

    def _piece(
        self, patients: Patients, batch: Batch, where: slice | None, groups: Groups, clipping_norm: float
    ) -> torch.Tensor:
        parts = self._backward(patients, batch, where)
        with torch.no_grad():
            parts = merged(parts, groups)
            norms = Norms(groups, self.parameters[0], self._memory // 4)
            # Small gradients first: holding one saves a product, and most per byte where it is small
            for part in sorted(parts, key=_size):
                part.norms(groups, norms)
            known = norms.squares
            if norms.doubt is None:
                scale = norms.squares.rsqrt()
            else:
                known = known + norms.doubt
                scale = (norms.squares.sqrt() + norms.doubt.sqrt() * _ROUNDING).reciprocal()
            scale.mul_(clipping_norm).clamp_(max=1.0)  # 1 / 0 is infinite
            # A sum of numbers none of which is near the largest of float64 is finite if they are
            if not math.isfinite(known.sum().item()):
                sound = known.isfinite()
                scale = torch.where(sound, scale, 0.0)
                for part in parts:
                    part.silence(~sound, groups)
            scale = scale.to(self.parameters[0].dtype)
            return self._written(parts, Factors(scale, groups.spread(scale)))

    def _long(
        self, patients: Patients, batch: Batch, where: slice, limit: int, clipping_norm: float
    ) -> torch.Tensor:
        """One patient with more records than fit: the gradient of some after the other, then the norm."""
        total = self.parameters[0].new_zeros(self.size, dtype=torch.float64, requires_grad=False)
        for start in range(where.start, where.stop, limit):
            part = slice(start, min(start + limit, where.stop))
            parts = self._backward(patients, batch, part)
            with torch.no_grad():
                count = part.stop - part.start
                one = self.parameters[0].new_ones(count, requires_grad=False)
                groups = Groups(torch.zeros(count, dtype=torch.int64, device=one.device), 1)
                total += self._written(merged(parts, groups), Factors(one[:1], one))
        norm = float(torch.linalg.vector_norm(total))
        if not norm < float("inf"):
            return torch.zeros_like(total)
        return total * min(1.0, clipping_norm / max(norm, 1e-30))

    def _written(self, parts: list[Part], factors: Factors) -> torch.Tensor:
        flat = self.parameters[0].new_zeros(self.size, requires_grad=False)
        for part in parts:
            part.write(factors, flat)
        return flat

    def _limit(self, patients: Patients) -> int:
        """Records of a piece: as many as the memory allows, of which gradients may hold a quarter."""
        shape = tuple(patients.features.shape[1:])
        if shape not in self._record_bytes:
            self._record_bytes[shape] = max(1, self._measured(patients))
        return max(1, min(MAX_RECORDS, self._memory * 3 // 4 // self._record_bytes[shape]))

    def _measured(self, patients: Patients) -> int:
        """Bytes that a record's pass keeps, from one over two made-up records: what autograd saves, and the
        taps twice, for the gradients that pass beside them."""
        kept: dict[int, torch.Tensor] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.network.parameters()}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved
            return saved

        features = torch.zeros_like(patients.features[:1]).expand(2, *patients.features.shape[1:])
        labels = torch.zeros_like(patients.labels[:1]).expand(2)
        devices = [features.device] if features.is_cuda else []
        with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self._tape.begin(2)
            outputs = self.network(features.contiguous())
            record_losses(self._objective, outputs, labels.contiguous()).sum().backward()
        taps = [tap for part in self._tape.parts for tap in part.taps]
        saved = sum(each.untyped_storage().nbytes() for key, each in kept.items() if key not in weights)
        return (saved + 2 * sum(tap.numel() * tap.element_size() for tap in taps)) // 2


def _size(part: Part) -> int:
    return part.slots[0].size


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
