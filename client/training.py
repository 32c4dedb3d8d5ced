"""A site's work on one study: local training, with and without privacy, and evaluation.

A trainer stays warm between rounds: tensors, network and plan are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from client.ahead import DrawnAhead, drawn_ahead
from client.augment import Augmenter, augmenter_of
from client.batches import batch_of, draw_batch
from client.cohort import Cohort, Patients
from client.device import DEFAULT, Computing, resolve
from client.dpsgd import Engine, engine_of, noised_mean
from client.flat import FlatParameters, flat_step
from client.withdrawal import NOBODY, Withdrawn
from common.errors import Refused
from common.histograms import histograms
from common.messages import Arrays
from common.models import study_model
from common.objectives import record_losses, scores
from common.privacy.noise import Stream
from common.privacy.plan import StepPlan, StudyPlan
from common.study import Study

FlatStep = Callable[[torch.Tensor], None]


class Trainer:
    """Trains and evaluates one study's model on one cohort.

    Attributes:
        network, engine, flat: the model, what differentiates it, and its parameters as one tensor; whoever
            trains several sites together uses them too.
        augmenter: varies a step's images, if the study says so.

    Args:
        cohort: its tensors, grouped by patient.
        plan: what `plan_study` made for this site.
        withdrawn: whose consent is withdrawn by now; asked before each private step.
        computing: where, and in how much memory; the cohort and the network go there.

    Raises:
        SiteError: if the device is absent.
    """

    def __init__(
        self,
        study: Study,
        cohort: Cohort,
        plan: StudyPlan,
        withdrawn: Callable[[], Withdrawn] = lambda: NOBODY,
        computing: Computing = DEFAULT,
    ) -> None:
        place = resolve(computing.device)
        self.study, self.cohort, self.plan = study, cohort.on(place), plan
        self._withdrawn = withdrawn
        self._known: dict[int, tuple[Patients, Withdrawn, Patients]] = {}  # who train, and who test
        self.augmenter = augmenter_of(study)
        self.network = study_model(study).to(place)
        self.flat = FlatParameters(self.network, place)
        expected = plan.step.divisor  # patients; each has a record at least
        self.engine = engine_of(self.network, study.objective, expected, computing.step_memory)

    def train(self, parameters: Arrays, sampling: Stream, noise: Stream) -> dict[str, np.ndarray]:
        """One round from the global parameters; returns local minus global, name → float32 array."""
        self.flat.load(parameters)
        step = flat_step(self.study.training.optimizer, self.flat.trainable)
        self.network.train()
        if self.plan.private:
            self._private_steps(self.engine, step, sampling, noise)
        else:
            self._plain_steps(step, sampling)
        return self.flat.since(parameters)

    def _private_steps(self, engine: Engine, step: FlatStep, sampling: Stream, noise: Stream) -> None:
        plan, vary = self.plan.step, self.augmenter
        deviation = plan.noise_multiplier * (plan.clipping_norm or 0.0)
        with drawn_ahead(noise, engine.size, scale=deviation) as normals:
            for _ in range(self.plan.steps_per_round):
                private_step(engine, self.consenting(self.cohort.train), plan, step, sampling, normals, vary)

    def _plain_steps(self, step: FlatStep, sampling: Stream) -> None:
        """Ordinary mini-batches of shuffled patients, over and over; for cohorts that are public."""
        patients, plan = self.consenting(self.cohort.train), self.plan.step
        parameters = self.engine.parameters
        for chosen in shuffled(len(patients), self.plan, sampling):
            batch = batch_of(patients, chosen, plan, sampling).on(patients.features.device)
            shown = patients
            if self.augmenter is not None:
                shown, batch = self.augmenter.varied(patients, batch, sampling)
            outputs = self.network(shown.features[batch.records])
            losses = record_losses(self.study.objective, outputs, shown.labels[batch.records])
            loss = (losses * batch.weights).sum() / batch.patients
            found = torch.autograd.grad(loss, parameters, materialize_grads=True)
            step(torch.cat([each.flatten() for each in found]))

    def evaluate(self, parameters: Arrays, bins: int) -> dict[str, np.ndarray]:
        """Exact histograms of the test patients' scores (common/histograms); noise is the caller's."""
        self.flat.load(parameters)
        patients = self.consenting(self.cohort.test)
        self.network.eval()
        found = scores(self.study.objective, self.engine.outputs(patients.features)).cpu()
        groups = None if patients.groups is None else patients.groups.cpu()
        return histograms(self.study, found, patients.labels.cpu(), shares(patients), bins, groups)

    def consenting(self, patients: Patients) -> Patients:
        """Those of the cohort's `train` or `test` whose consent stands by now."""
        listed = self._withdrawn()
        known = self._known.get(id(patients))
        if known is None or known[0] is not patients or known[1] is not listed:
            known = self._known[id(patients)] = patients, listed, patients.without(listed.patients)
        return known[2]


def private_step(
    engine: Engine,
    patients: Patients,
    plan: StepPlan,
    step: FlatStep,
    sampling: Stream,
    normals: DrawnAhead,
    augmenter: Augmenter | None = None,
) -> None:
    """One step of DP-SGD, from the coins to the optimiser.

    Args:
        step: the optimiser's, on the parameters that `engine` sees.
        normals: of the stream that noise comes from.
        augmenter: varies the batch's records, each by itself, before gradients are clipped.
    """
    batch = draw_batch(patients, plan, sampling)
    normals.begin()
    if augmenter is not None:
        patients, batch = augmenter.varied(patients, batch, sampling)
    total = engine.sum(patients, batch, plan.clipping_norm or 0.0)
    step(noised_mean(total, plan, normals))


def plain_batch(patients: int, plan: StudyPlan) -> int:
    """How many take part in a step without privacy."""
    return patients if plan.step.sample_rate == 1 else max(1, round(plan.step.divisor))


def shuffled(patients: int, plan: StudyPlan, sampling: Stream) -> Iterator[npt.NDArray[np.intp]]:
    """Who takes part in each step of a round without privacy: shuffled patients, over and over."""
    size = plain_batch(patients, plan)
    waiting = np.empty(0, dtype=np.intp)
    for _ in range(plan.steps_per_round):
        if not waiting.size:
            waiting = sampling.permutation(patients)
        yield waiting[:size]
        waiting = waiting[size:]


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
