"""A site's work on one study: local training, with and without privacy, and evaluation.

A trainer stays warm between rounds: tensors, network and plan are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from client.blocks import filled, layout
from client.cohort import Cohort, Patients
from client.dpsgd import ClippedGradients, batch_of, draw_batch, drawn_ahead, noised_mean
from client.withdrawal import NOBODY, Withdrawn
from common.errors import Refused
from common.messages import Arrays
from common.metrics import histograms
from common.models import parameter_arrays, study_model
from common.objectives import record_losses, scores
from common.privacy.noise import Stream
from common.privacy.plan import StudyPlan
from common.study import Optimizer, Study

EVALUATION_RECORDS = 256


class Trainer:
    """Trains and evaluates one study's model on one cohort.

    Args:
        cohort: its tensors, grouped by patient.
        plan: what `plan_study` made for this site.
        withdrawn: whose consent is withdrawn by now; asked before each private step.
    """

    def __init__(
        self,
        study: Study,
        cohort: Cohort,
        plan: StudyPlan,
        withdrawn: Callable[[], Withdrawn] = lambda: NOBODY,
    ) -> None:
        self.study, self.cohort, self.plan = study, cohort, plan
        self._withdrawn = withdrawn
        self._consenting: tuple[Patients, Withdrawn, Patients] | None = None
        self._network = study_model(study)
        expected = plan.step.divisor  # patients; each has a record at least
        self._clipped = ClippedGradients(self._network, study.objective, expected) if plan.private else None

    def train(self, parameters: Arrays, sampling: Stream, noise: Stream) -> dict[str, np.ndarray]:
        """One round from the global parameters; returns local minus global, name → float32 array."""
        self._load(parameters)
        optimizer = make_optimizer(self.study.training.optimizer, self._network)
        self._network.train()
        if self._clipped is not None:
            self._private_steps(self._clipped, optimizer, sampling, noise)
        else:
            self._plain_steps(optimizer, sampling)
        trained = parameter_arrays(self._network)
        return {name: trained[name] - parameters[name] for name in trained}

    def _private_steps(
        self, clipped: ClippedGradients, optimizer: torch.optim.Optimizer, sampling: Stream, noise: Stream
    ) -> None:
        step = self.plan.step
        with drawn_ahead(noise, clipped.size) as normals:
            for _ in range(self.plan.steps_per_round):
                patients = self._who_consents(self.cohort.train)
                batch = draw_batch(patients, step, sampling)
                normals.begin()
                total = clipped.sum(patients, batch, step.clipping_norm or 0.0)
                gradient = noised_mean(total, step, normals)
                offset = 0
                for parameter in clipped.parameters:
                    piece = gradient[offset : offset + parameter.numel()]
                    parameter.grad = piece.view_as(parameter)
                    offset += parameter.numel()
                optimizer.step()

    def _plain_steps(self, optimizer: torch.optim.Optimizer, sampling: Stream) -> None:
        """Ordinary mini-batches of shuffled patients, over and over; for cohorts that are public."""
        patients, step = self._who_consents(self.cohort.train), self.plan.step
        size = max(1, round(step.divisor))
        if step.sample_rate == 1:
            size = len(patients)
        waiting = np.empty(0, dtype=np.intp)
        for _ in range(self.plan.steps_per_round):
            if not len(waiting):
                waiting = sampling.permutation(len(patients))
            batch = batch_of(patients, waiting[:size], step, sampling)
            waiting = waiting[size:]
            outputs = self._network(patients.features[batch.records])
            losses = record_losses(self.study.objective, outputs, patients.labels[batch.records])
            optimizer.zero_grad()
            ((losses * batch.weights).sum() / batch.patients).backward()
            optimizer.step()

    def evaluate(self, parameters: Arrays, bins: int) -> dict[str, np.ndarray]:
        """Exact histograms of the test patients' scores (common/metrics); noise is the caller's."""
        self._load(parameters)
        patients = self._who_consents(self.cohort.test)
        found = self._scores(patients)
        return histograms(self.study, found, patients.labels, shares(patients), bins, patients.groups)

    def _who_consents(self, patients: Patients) -> Patients:
        listed = self._withdrawn()
        known = self._consenting
        if known is None or known[0] is not patients or known[1] is not listed:
            known = self._consenting = patients, listed, patients.without(listed.patients)
        return known[2]

    @torch.no_grad()
    def _scores(self, patients: Patients) -> torch.Tensor:
        """In the records' order, computed in blocks (client/blocks)."""
        self._network.eval()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for chosen, rows in layout(patients.lanes, EVALUATION_RECORDS):
            outputs = self._network(filled(patients.features[chosen], rows, EVALUATION_RECORDS))
            found.append((chosen, scores(self.study.objective, outputs)[rows]))
        if not found:
            return scores(self.study.objective, self._network(patients.features))
        together = torch.cat([s for _, s in found])
        return torch.empty_like(together).index_copy_(0, torch.cat([c for c, _ in found]), together)

    def _load(self, parameters: Arrays) -> None:
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(parameters[name])))


def refuse_other_parameters(parameters: Arrays, model: Mapping[str, tuple[int, ...]]) -> None:
    """Check what a coordinator sent against the approved study's model, before anything is spent.

    Args:
        model: the names and shapes of the study's parameters; all are float32.

    Raises:
        Refused: if a name, shape or type is another, or a value is NaN or infinite.
    """
    if {n: (a.shape, str(a.dtype)) for n, a in parameters.items()} != {
        n: (shape, "float32") for n, shape in model.items()
    }:
        raise Refused(
            "the parameters are not those of the approved study's model",
            remedy="the coordinator must send what common.models builds from this study",
        )
    if not all(np.isfinite(a).all() for a in parameters.values()):
        raise Refused("the parameters hold NaN or infinity", remedy="resume from a sound checkpoint")


def shares(patients: Patients) -> torch.Tensor:
    """Each record's share of its patient: 1 / the patient's records, float64 [records]."""
    counts = patients.offsets.diff()
    return torch.repeat_interleave(1.0 / counts.double(), counts)


def make_optimizer(settings: Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    """The local optimiser, new each round: its state never outlives the noised gradients it saw."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if settings.name == "adam":
        return torch.optim.Adam(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=False
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
