"""Patient-level DP-SGD (Abadi et al. 2016, with the patient as the unit).

One step: every patient takes part with probability q, by itself; the patient's gradient (mean or sum
over its records) is clipped to L2 norm C over all parameters together; the sum over patients gets
Gaussian noise of standard deviation σC and is divided by a *public* number. An empty batch is a step
like any other: its sum is zero, and it is noised all the same.

The sum comes from one of four engines (`engine_of`), whichever is the fastest that takes the network; each
says in its `sum` how it keeps rounding within the bound.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from client.batches import Batch, pieces
from client.blocks import block_size, filled, layout
from client.cohort import Patients, lanes_of
from client.dense import DenseGradients, not_dense
from client.device import STEP_MEMORY
from client.linear import LinearGradients, not_linear
from client.rowwise import CLIPPING_MARGIN
from client.taps import TappedGradients, covers
from common.objectives import record_losses
from common.privacy.noise import Normals, noised
from common.privacy.plan import StepPlan
from common.study import Objective

log = logging.getLogger("fedward.training")

# torch warns that inputs need no gradient; Opacus's hooks work all the same. Once for the process,
# because `catch_warnings` is not safe among threads, and sites of a simulation are threads.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

MAX_RECORDS = 4096  # in one pass through the network
EVALUATION_RECORDS = 256  # in one pass without gradients
HUGE = 2.0**100  # numbers of a record's gradient from here on count as an overflow
_ROWS, _ELEMENTS = 16, 1 << 16  # of gradients that are float64 at a time: 512 KiB stay in a core's cache


class Engine(Protocol):
    """What gives sums of clipped per-patient gradients of one network.

    Attributes:
        network: taken over: use this one from here on.
        parameters: those to be trained, in the order of the sum.
        size: numbers in them.
    """

    network: nn.Module
    parameters: list[nn.Parameter]
    size: int

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """Σ over patients of min(1, C / ‖g‖) g, float64 [size]; one patient more or less changes it by at
        most C in L2 norm, rounding included."""

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        """The network's outputs [records, outputs] of features [records, …], without gradients; each
        record's are the same in any company."""


def engine_of(
    network: nn.Module, objective: Objective, expected: float = 1.0, memory: int = STEP_MEMORY
) -> Engine:
    """The fastest engine that takes this network: closed form, taps, or Opacus's per-record gradients.

    Args:
        expected: public number of patients in a step.
        memory: bytes that a step's activations and gradients may take up.
    """
    if not_dense(network) is None:
        kind = DenseGradients if not_linear(network, objective) else LinearGradients
        return kind(network, objective, expected, memory=memory)
    reason = covers(network)
    if reason is None:
        return TappedGradients(network, objective, expected, memory=memory)
    log.info("per-record gradients by Opacus, which takes longer and more memory: %s", reason)
    return ClippedGradients(network, objective, expected, memory=memory)


class ClippedGradients:
    """Sums of clipped per-patient gradients of one network, by Opacus's per-record gradients.

    Norms and sums are computed in float64, so that rounding does not undo the bound.

    Args:
        network: taken over: use `network` of this object from here on.
        expected: public number of patients in a step, by which the size of blocks is chosen.
        memory: bytes that per-record gradients may take up.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, expected: float = 1.0, *, memory: int = STEP_MEMORY
    ) -> None:
        self.network = network
        self._hooked: nn.Module | None = None
        self._objective = objective
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self._max_records = min(MAX_RECORDS, max(1, memory // (16 * max(1, self.size))))
        self._block = block_size(expected, self._max_records)

    @property
    def _module(self) -> nn.Module:
        """The network with Opacus's hooks: from the first sum on, because they slow ordinary training."""
        if self._hooked is None:
            from opacus import GradSampleModule  # takes seconds to import

            self._hooked = GradSampleModule(self.network, loss_reduction="sum")
        return self._hooked

    @torch.no_grad()
    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        """The network's outputs, float32 [records, outputs], in the records' order, computed in blocks."""
        if not len(features):  # some layers raise an error for nobody, which would tell that nobody is here
            return self.outputs(features.new_zeros((1, *features.shape[1:])))[:0]
        lanes = lanes_of(features)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for chosen, rows in layout(lanes, EVALUATION_RECORDS):
            outputs: torch.Tensor = self.network(filled(features[chosen], rows, EVALUATION_RECORDS))
            found.append((chosen, outputs[rows]))
        together = torch.cat([s for _, s in found])
        return torch.empty_like(together).index_copy_(0, torch.cat([c for c, _ in found]), together)

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """Σ over patients of min(1, C / ‖g‖) g, float64 [parameters], with ‖g‖ over all of them.

        A patient with a record whose gradient overflows (2^100 is taken for that) counts as zero: NaN would
        drown the noise and tell everyone that such a patient is here. Below, no sum of records overflows in
        whatever order it is taken, which may depend on others.

        From g on, all is float64, and what is clipped to is C (1 - 2^-8). So one patient more or less
        changes the result by at most C in L2 norm, rounding included: that of a norm is below 2^-40 of
        it; a sum of n patients' vectors is off by at most n² 2^-53 C (Higham 2002, "Accuracy and
        stability of numerical algorithms", section 3.1), which the margin covers up to
        n = 4,000,000.

        g itself is float32, and is computed in blocks whose size and order tell nothing of who else is
        there (client/blocks).

        Args:
            clipping_norm: C.
        """
        total = torch.zeros(self.size, dtype=torch.float64)  # on the processor, whatever the device
        for piece in pieces(batch, self._max_records):
            total += self._piece(patients, piece, clipping_norm).cpu()
        return total

    def _piece(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        gradients = self._per_patient(patients, batch)
        norms = _norms(gradients)
        sound = norms.isfinite()
        if not sound.all():
            norms = torch.where(sound, norms, 0.0)
            gradients = [torch.where(sound[:, None], g, 0.0) for g in gradients]
        scale = clipping_norm * (1.0 - CLIPPING_MARGIN) / norms.clamp(min=1e-300)
        return _weighted_sums(gradients, scale.clamp(max=1.0))

    def _per_patient(self, patients: Patients, batch: Batch) -> list[torch.Tensor]:
        """Each patient's gradient in some order, one float32 matrix [patients, numbers] a parameter."""
        blocks = list(layout(patients.lanes[batch.records], self._block))
        alone = batch.one_record_each and len(blocks) == 1
        device = patients.features.device
        sizes = [] if alone else [(batch.patients, p.numel()) for p in self.parameters]
        grouped = [torch.zeros(size, device=device) for size in sizes]
        for chosen, rows in blocks:
            records = batch.records[chosen]
            outputs = self._module(filled(patients.features[records], rows, self._block))
            labels = filled(patients.labels[records], rows, self._block)
            weights = filled(batch.weights[chosen].to(device), rows, self._block)
            (record_losses(self._objective, outputs, labels) * weights).sum().backward()
            found = [self._taken(p)[rows] for p in self.parameters]
            if alone:
                return found
            for together, part in zip(grouped, found, strict=True):
                together.index_add_(0, batch.patient[chosen].to(device), part)
        return grouped

    def _taken(self, parameter: nn.Parameter) -> torch.Tensor:
        per_record: torch.Tensor = parameter.grad_sample.flatten(start_dim=1)  # type: ignore[attr-defined]
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
        low, high = per_record.aminmax()
        if not (low > -HUGE and high < HUGE):  # NaN isn't
            per_record = torch.where(per_record.abs() < HUGE, per_record, math.inf)
        return per_record


def _in_float64(gradient: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """A float32 matrix [patients, parameters] in float64, a cacheful at a time: rows, columns, part.

    A part is overwritten by the next one.
    """
    if gradient.numel() <= _ELEMENTS:
        yield slice(None), slice(None), gradient.double()
        return
    rows, columns = gradient.shape
    high = min(rows, max(_ROWS, _ELEMENTS // columns))
    wide = min(columns, _ELEMENTS // high)
    memory = gradient.new_empty(high * wide, dtype=torch.float64)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            part = gradient[top : top + high, left : left + wide]
            doubled = memory[: part.numel()].view(part.shape)
            yield slice(top, top + high), slice(left, left + wide), doubled.copy_(part)


def _norms(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Each patient's L2 norm over all its gradients, float64 [patients]."""
    squares = gradients[0].new_zeros(len(gradients[0]), dtype=torch.float64)
    for gradient in gradients:
        for rows, _, part in _in_float64(gradient):
            squares[rows] += part.square_().sum(dim=1)
    return squares.sqrt_()


def _weighted_sums(gradients: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ over patients of weight · gradient, float64 [parameters].

    Args:
        weights: float64 [patients].
    """
    sums = []
    for gradient in gradients:
        total = gradient.new_zeros(gradient.shape[1], dtype=torch.float64)
        for rows, columns, part in _in_float64(gradient):
            total[columns].addmv_(part.T, weights[rows])
        sums.append(total)
    return torch.cat(sums)


def noised_mean(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
    """(total + noise of standard deviation σC) / divisor, on a grid, float32 [parameters]: may be seen.

    Args:
        total: what an engine's `sum` gave.
        source: a stream, or what draws ahead of it; see common/privacy/noise, `noised`.

    Raises:
        ValueError: if the plan has no clipping, or no noise.
    """
    if plan.clipping_norm is None:
        raise ValueError("a plan without clipping has no private gradient")
    deviation = plan.noise_multiplier * plan.clipping_norm
    if total.device.type == "cpu":
        return noised(total, deviation, source, divisor=plan.divisor)
    return noised(total.cpu(), deviation, source, divisor=plan.divisor).to(total.device)
