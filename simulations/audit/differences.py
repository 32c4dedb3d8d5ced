"""Finite differences with the noise off: what one patient changes in the sum that noise is added to.

The vault's own engine sums the clipped gradients of made-up patients with the study's model, with and
without each of them. The difference must be the patient's gradient, clipped as a whole over all tensors and
all its records, whoever else is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from client.batches import Batch, batch_of
from client.cohort import Cohort, Patients
from client.dpsgd import Engine
from client.rowwise import CLIPPING_MARGIN
from client.training import Trainer
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy.noise import Seeded
from common.privacy.plan import StudyPlan
from common.study import Study
from simulations.audit.made_up import made_up

RECORDS = (1, 1, 1, 1, 1, 1, 40, 40, 7, 2)  # of each patient
_ENLARGED = (1.0, 8.0)  # times the start's parameters: a coordinator may send any
_ROUNDING = 1e-3  # of sums in float32; the clipping margin leaves four times as much


@dataclass(frozen=True)
class Difference:
    """One thing that is claimed of a patient's contribution.

    Attributes:
        worst: what was measured, over all patients and parameters.
        allowed: that it may be at most.
    """

    claim: str
    worst: float
    allowed: float

    @property
    def sound(self) -> bool:
        return self.worst <= self.allowed


def differences(study: Study, plan: StudyPlan, seed: int = 0) -> tuple[Difference, ...]:
    """Measure what each of a few made-up patients adds, in units of the clipping norm.

    The engine is that of a site's trainer. Patients are clipped to the study's norm, or to less where few
    of them would be clipped at all.
    """
    patients = made_up(study, RECORDS, seed)
    nobody = Patients(patients.features[:0], patients.labels[:0], patients.offsets[:1])
    longest, apart, company, empty = 0.0, 0.0, 0.0, 0.0
    for enlarged in _ENLARGED:
        trainer = Trainer(study, Cohort(patients, nobody), plan)
        trainer.flat.load({n: enlarged * a for n, a in parameter_arrays(study_model(study, seed)).items()})
        engine = trainer.engine
        batch = _batch(patients, range(len(RECORDS)), plan)
        gradients = [_gradient(study, engine, patients, _of(batch, [i])) for i in range(len(RECORDS))]
        lengths = [float(each.norm()) for each in gradients]
        C = min(plan.step.clipping_norm or 1.0, 0.5 * max(float(np.median(lengths)), 1e-6))
        whole = engine.sum(patients, batch, C)
        for i in range(len(RECORDS)):
            others = engine.sum(patients, _of(batch, [j for j in range(len(RECORDS)) if j != i]), C)
            alone = engine.sum(patients, _of(batch, [i]), C)
            changed = whole - others
            longest = max(longest, float(changed.norm()) / C)
            company = max(company, float((changed - alone).norm()) / C)
            wanted = gradients[i] * min(1.0, C * (1 - CLIPPING_MARGIN) / max(lengths[i], 1e-300))
            apart = max(apart, float((changed - wanted).norm()) / C)
        empty = max(empty, float(engine.sum(patients, _of(batch, []), C).abs().max()))
    return (
        Difference("length of what a patient changes / C", longest, 1.0),
        Difference("distance from the patient's gradient, clipped as a whole / C", apart, _ROUNDING),
        Difference("change of it with other company / C", company, _ROUNDING),
        Difference("largest number in the sum over nobody", empty, 0.0),
    )


def _batch(patients: Patients, chosen: range, plan: StudyPlan) -> Batch:
    return batch_of(patients, np.array(chosen), plan.step, Seeded(0).stream("sampling"))


def _of(batch: Batch, wanted: list[int]) -> Batch:
    """Some of a batch's patients, with the records that they have in it."""
    place = torch.full((batch.patients,), -1)
    place[wanted] = torch.arange(len(wanted))
    mine = place[batch.patient] >= 0
    return Batch(batch.records[mine], place[batch.patient[mine]], batch.weights[mine], len(wanted))


def _gradient(study: Study, engine: Engine, patients: Patients, batch: Batch) -> torch.Tensor:
    """Of a batch, by hand, not clipped; float64 [size]."""
    outputs = engine.network(patients.features[batch.records])
    losses = record_losses(study.objective, outputs, patients.labels[batch.records]) * batch.weights
    found = torch.autograd.grad(losses.sum(), engine.parameters, materialize_grads=True)
    return torch.cat([each.flatten() for each in found]).double()
