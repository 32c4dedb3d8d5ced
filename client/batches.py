"""Who takes part in a step, and with which records."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from client.cohort import Patients
from common.privacy.noise import Stream
from common.privacy.plan import StepPlan


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
        return self.records.shape[0] == self.patients  # a tensor's len() takes longer

    def on(self, device: torch.device) -> Batch:
        """The same on a device."""
        if self.records.device.type == device.type:
            return self
        return Batch(self.records.to(device), self.patient.to(device), self.weights.to(device), self.patients)


def draw_batch(patients: Patients, plan: StepPlan, stream: Stream) -> Batch:
    """Choose patients by independent coins, and at most `max_records` of each one's records."""
    (chosen,) = stream.bernoulli(len(patients), plan.sample_rate).nonzero()
    return batch_of(patients, chosen, plan, stream)


def batch_of(patients: Patients, chosen: np.ndarray, plan: StepPlan, stream: Stream) -> Batch:
    """The batch of given patients (indices int64 [patients])."""
    if patients.one_record_each:
        return Batch(torch.from_numpy(chosen), *_one_each(len(chosen)), len(chosen))
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


@lru_cache(maxsize=64)
def _one_each(patients: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each record's patient and weight where every patient has one. Nobody writes into them."""
    return torch.arange(patients), torch.ones(patients)


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
