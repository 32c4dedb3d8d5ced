"""Patient-level DP-SGD (Abadi et al. 2016, with the patient as the unit).

One step: every patient takes part with probability q, by itself; the patient's gradient (mean or sum
over its records) is clipped to L2 norm C over all parameters together; the sum over patients gets
Gaussian noise of standard deviation σC and is divided by a *public* number. An empty batch is a step
like any other: its sum is zero, and it is noised all the same. Opacus gives the per-record gradients.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from opacus import GradSampleModule
from torch import nn

from client.cohort import Patients
from common.objectives import record_losses
from common.privacy.noise import Stream
from common.privacy.plan import StepPlan
from common.study import Objective

# torch warns that inputs need no gradient; Opacus's hooks work all the same. Once for the process,
# because `catch_warnings` is not safe among threads, and sites of a simulation are threads.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

MAX_RECORDS = 4096  # summed in float32 at a time; pieces add up in float64, so that rounding stays small
MAX_GRADIENT_ELEMENTS = 1 << 26  # 256 MiB of float32 per-record gradients at a time


@dataclass(frozen=True)
class Batch:
    """One step's records.

    Attributes:
        records: int64 [records], indices into the cohort, a patient's together.
        patient: int64 [records], 0 … patients-1, rising.
        weights: float32 [records]: 1 / (the patient's records in this batch), or 1.
        patients: how many take part.
    """

    records: torch.Tensor
    patient: torch.Tensor
    weights: torch.Tensor
    patients: int

    @property
    def one_record_each(self) -> bool:
        return len(self.records) == self.patients


def draw_batch(patients: Patients, plan: StepPlan, stream: Stream) -> Batch:
    """Choose patients by independent coins, and at most `max_records` of each one's records."""
    chosen = np.flatnonzero(stream.bernoulli(len(patients), plan.sample_rate))
    return batch_of(patients, chosen, plan, stream)


def batch_of(patients: Patients, chosen: np.ndarray, plan: StepPlan, stream: Stream) -> Batch:
    """The batch of given patients (indices int64 [patients])."""
    if len(patients.labels) == len(patients):  # one record each
        records = torch.from_numpy(chosen.astype(np.int64))
        return Batch(records, torch.arange(len(chosen)), torch.ones(len(chosen)), len(chosen))
    offsets = patients.offsets.numpy()
    counts = offsets[chosen + 1] - offsets[chosen]
    patient = np.repeat(np.arange(len(chosen)), counts)
    firsts = np.cumsum(counts) - counts
    records = np.arange(counts.sum()) - np.repeat(firsts - offsets[chosen], counts)
    if len(counts) and counts.max() > plan.max_records:
        order = np.lexsort((stream.words(len(records)), patient))
        rank = np.arange(len(records)) - np.repeat(firsts, counts)
        kept = np.sort(order[rank < plan.max_records])
        records, patient = records[kept], patient[kept]
        counts = np.minimum(counts, plan.max_records)
    weights = np.repeat(1.0 / counts, counts) if plan.average_records else np.ones(len(records))
    return Batch(
        records=torch.from_numpy(records.astype(np.int64)),
        patient=torch.from_numpy(patient.astype(np.int64)),
        weights=torch.from_numpy(weights.astype(np.float32)),
        patients=len(chosen),
    )


def pieces(batch: Batch, max_records: int) -> list[Batch]:
    """The batch in pieces of whole patients, each of at most `max_records` records (or one patient)."""
    if len(batch.records) <= max_records:
        return [batch] if batch.patients else []
    counts = torch.bincount(batch.patient, minlength=batch.patients).tolist()
    cuts, size = [0], 0
    for index, count in enumerate(counts):
        if size and size + count > max_records:
            cuts.append(index)
            size = 0
        size += count
    cuts.append(batch.patients)
    result = []
    for first, last in pairwise(cuts):
        inside = (batch.patient >= first) & (batch.patient < last)
        result.append(
            Batch(batch.records[inside], batch.patient[inside] - first, batch.weights[inside], last - first)
        )
    return result


class ClippedGradients:
    """Sums of clipped per-patient gradients of one network.

    Args:
        network: taken over: use `network` of this object from here on.
    """

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        self._module = GradSampleModule(network, loss_reduction="sum")
        self._objective = objective
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        size = sum(p.numel() for p in self.parameters)
        self._max_records = min(MAX_RECORDS, max(1, MAX_GRADIENT_ELEMENTS // max(1, size)))

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """Σ over patients of min(1, C / ‖g‖) g, float32 [parameters], with ‖g‖ over all of them.

        A patient whose g or ‖g‖ overflows counts as zero: NaN would drown the noise and tell everyone
        that such a patient is here.

        Args:
            clipping_norm: C.
        """
        total = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)
        for piece in pieces(batch, self._max_records):
            total += self._piece(patients, piece, clipping_norm)
        return total.float()

    def _piece(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        outputs = self._module(patients.features[batch.records])
        losses = record_losses(self._objective, outputs, patients.labels[batch.records])
        (losses * batch.weights).sum().backward()
        gradients = [self._per_patient(p, batch) for p in self.parameters]
        squares = torch.stack([g.square().sum(dim=1) for g in gradients]).sum(dim=0)
        scale = (clipping_norm / squares.sqrt().clamp(min=1e-30)).clamp(max=1.0)
        sound = squares.isfinite()
        if not sound.all():
            scale = torch.where(sound, scale, 0.0)
            gradients = [torch.where(sound[:, None], g, 0.0) for g in gradients]
        return torch.cat([scale @ g for g in gradients])

    def _per_patient(self, parameter: nn.Parameter, batch: Batch) -> torch.Tensor:
        per_record: torch.Tensor = parameter.grad_sample.flatten(start_dim=1)  # type: ignore[attr-defined]
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
        if batch.one_record_each:
            return per_record
        grouped = torch.zeros(batch.patients, per_record.shape[1])
        return grouped.index_add_(0, batch.patient, per_record)


def noised_mean(total: torch.Tensor, plan: StepPlan, stream: Stream) -> torch.Tensor:
    """(total + σC normal) / divisor, float32 [parameters]: what may be seen."""
    if plan.clipping_norm is None:
        raise ValueError("a plan without clipping has no private gradient")
    noise = stream.normal(total.numel())
    return (total + plan.noise_multiplier * plan.clipping_norm * noise) / plan.divisor
