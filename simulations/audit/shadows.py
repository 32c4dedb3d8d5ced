"""Shadow models: a study's model, trained again and again on random halves of one pool of patients.

The trainer is the one that a site uses. The whole pool is one site: so many patients under one noise is the
least noise that a study's model can carry (k sites with a k-th of them each add √k times as much).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit

from client.cohort import Cohort, Patients, load_cohort
from client.settings import SiteFolder
from client.training import Trainer
from common.errors import FedwardError
from common.messages import Array, Arrays
from common.models import parameter_arrays, study_model
from common.objectives import known_labels, record_losses
from common.privacy.noise import OperatingSystem, Randomness
from common.privacy.plan import StudyPlan, plan_study
from common.study import Study
from server.algorithms import Update, algorithm_of

FEWEST_MODELS = 8
WITHOUT_CLASSES = ("regression", "survival")
NO_SECRET = b"who tests doesn't matter here"  # it orders the patients only


@dataclass(frozen=True)
class Shadows:
    """Models trained on random halves of one pool, and what each says of each patient.

    Attributes:
        member: bool [models, patients]: who trained.
        confidence: float64 [models, patients]; see `confidences`.
        likelihood: float64 [models, patients]: of the patient's label, up to a factor.
        right: share of the labels that are told rightly, of members and of others (of patients with several
            labels: share of those with most of them right); None in regression and survival.
    """

    member: np.ndarray
    confidence: np.ndarray
    likelihood: np.ndarray
    right: tuple[float, float] | None


def pooled(parts: Iterable[Patients]) -> Patients:
    """The patients of several sites, or parts of sites, as one cohort.

    Raises:
        FedwardError: if there is none.
    """
    given = [part for part in parts if len(part)]
    if not given:
        raise FedwardError("nobody is in the pool", remedy="give site folders with patients")
    counts = torch.cat([part.offsets.diff() for part in given])
    return Patients(
        features=torch.cat([part.features for part in given]),
        labels=torch.cat([part.labels for part in given]),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    )


def pool_of(study: Study, folders: Iterable[SiteFolder]) -> Patients:
    """All patients of some sites, those that train and those that test: the coins say anew who trains.

    Raises:
        DataError, SiteError: as the sites themselves would.
    """
    cohorts = [load_cohort(folder, study, NO_SECRET) for folder in folders]
    return pooled(part for cohort in cohorts for part in (cohort.train, cohort.test))


def chosen_of(pool: Patients, kept: np.ndarray) -> Patients:
    """Some of the patients.

    Args:
        kept: bool [patients].
    """
    mask, counts = torch.from_numpy(kept), pool.offsets.diff()
    rows = torch.repeat_interleave(mask, counts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts[mask].cumsum(0)])
    return Patients(pool.features[rows], pool.labels[rows], offsets)


def half_plan(study: Study, pool: Patients) -> StudyPlan:
    """The plan of a site whose training patients are half of the pool."""
    share = 1.0 - study.data.split.test_fraction
    return plan_study(study, max(1, round(len(pool) / 2 / share)))


def train_shadows(
    study: Study,
    pool: Patients,
    plan: StudyPlan,
    *,
    models: int,
    coins: int = 0,
    randomness: Randomness | None = None,
) -> Shadows:
    """Train models, each from the study's start, with a fair coin for each patient.

    Raises:
        FedwardError: if there are too few models or patients.
    """
    if models < FEWEST_MODELS or len(pool) < 4:
        raise FedwardError(
            f"{models} shadow models on {len(pool)} patients tell nothing",
            remedy=f"at least {FEWEST_MODELS} models and 4 patients",
        )
    torch.set_num_threads(1)  # as a vault does
    drawn = randomness or OperatingSystem()
    member = np.random.default_rng(coins).random((models, len(pool))) < 0.5
    found = []
    for number, kept in enumerate(member):
        train = chosen_of(pool, kept)
        trainer = Trainer(study, Cohort(train, chosen_of(pool, np.zeros_like(kept))), plan)
        found.append(confidences(study, released_model(trainer, drawn, number), pool))
    confidence = np.stack([c for c, _ in found])
    right = np.stack([r for _, r in found])
    regression = study.objective.task in WITHOUT_CLASSES
    return Shadows(
        member=member,
        confidence=confidence,
        likelihood=np.exp(confidence) if regression else expit(confidence),
        right=None if regression else (float(right[member].mean()), float(right[~member].mean())),
    )


def released_model(trainer: Trainer, randomness: Randomness, number: int = 0) -> Arrays:
    """What a study of one site releases at its end.

    Args:
        number: tells its streams from those of other models.
    """
    study = trainer.study
    algorithm = algorithm_of(study.algorithm)
    parameters: Arrays = parameter_arrays(study_model(study))
    state = algorithm.init(parameters)
    for turn in range(1, study.algorithm.rounds + 1):
        streams = [randomness.stream(what, "shadow", number, turn) for what in ("sampling", "noise")]
        update = trainer.train(parameters, *streams)
        state, parameters = algorithm.apply(state, parameters, [Update("pool", 1, update)])
    return parameters


@torch.no_grad()
def confidences(study: Study, parameters: Arrays, patients: Patients) -> tuple[Array, Array]:
    """How sure a model is of each patient's label, and whether it is right: float64 and bool [patients].

    Of a record it is log(p / (1 - p)), p the probability of its label (Carlini et al. 2022, section V.A,
    here from the logits, so that nothing overflows); after a hinge loss the margin (section VI.E); in
    regression and survival minus the loss; of several labels the mean over those that are known. A patient
    has the mean of its records.
    """
    network = study_model(study)
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.from_numpy(np.array(parameters[name])))
    network.eval()
    outputs = network(patients.features).double()
    labels = patients.labels
    if study.objective.task in WITHOUT_CLASSES:
        found = -record_losses(study.objective, outputs, labels)
        right = torch.zeros_like(found)
    elif study.objective.task == "multi-label":
        known, wanted = known_labels(labels, outputs)
        margins = outputs * (2 * wanted - 1) * known
        found = margins.sum(dim=1) / known.sum(dim=1).clamp(min=1)
        right = (margins > 0).double().sum(dim=1) - known.sum(dim=1) / 2
    elif study.objective.task == "binary":
        found = outputs[:, 0] * (2 * labels - 1)
        right = found
    else:
        own = outputs.gather(1, labels[:, None])[:, 0]
        others = outputs.scatter(1, labels[:, None], -math.inf)
        right = own - others.amax(dim=1)
        found = right if study.objective.loss == "hinge" else own - others.logsumexp(dim=1)
    counts = patients.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(patients)), counts)
    means = [torch.zeros(len(patients), dtype=torch.float64).index_add_(0, owner, x) for x in (found, right)]
    return (means[0] / counts).numpy(), (means[1] > 0).numpy()
