"""Reconstruction: what a coordinator gets back of the records from the updates that sites send.

The attacks go through the trainer that a site uses, and the coordinator chooses nothing but the parameters:
the study, its model and its training are what was approved. Each is tried on the bare update, on the sum
that secure aggregation leaves, and under the study's differential privacy. One step with everybody in it is
the attacker's best case; under privacy all of the study's ε goes to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from client.cohort import Cohort, Patients
from client.training import Trainer
from common.errors import StudyError
from common.files import validated
from common.messages import Array, Arrays
from common.models import parameter_arrays, study_model
from common.privacy.noise import OperatingSystem, Randomness, Stream
from common.privacy.plan import plan_study
from common.study import Study
from simulations.audit.attempts import Case, Target, refused

Protection = Literal["none", "secure aggregation", "privacy", "secure aggregation and privacy"]
PROTECTIONS: tuple[Protection, ...] = (
    "none", "secure aggregation", "privacy", "secure aggregation and privacy",
)  # fmt: skip
NEAR = 0.1  # of a feature's spread, root mean square: so near a record counts as recovered


@dataclass(frozen=True)
class Imprint:
    """What a planted first layer gave away.

    Attributes:
        protection: of the update.
        epsilon, delta: of it; None without privacy.
        sites, records: that the update is made of.
        recovered: records that some reconstruction comes as near as `NEAR`.
        guessed: likewise by as many records of other people: what one gets without any update.
        attributed: whether it is known from which site each came.
    """

    protection: Protection
    epsilon: float | None
    delta: float | None
    sites: int
    records: int
    recovered: int
    guessed: int
    attributed: bool

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "near": NEAR}


def one_step(study: Study, *, private: bool) -> Study:
    """The study as one step with every patient, by plain gradient descent, its images as they are.

    Raises:
        StudyError: if `private` is asked of a study without privacy.
    """
    if private and not study.private:
        raise StudyError(f"study {study.name} promises no privacy", remedy="give one that does")
    value = study.model_dump(mode="json")
    value["algorithm"]["rounds"] = 1
    for column in value["data"]["columns"]:
        column.pop("augmentation", None)
    value["training"] |= {
        "local_steps": 1,
        "local_epochs": None,
        "sample_rate": 1.0,
        "patients_per_step": None,
    }
    value["training"]["optimizer"] = {"name": "sgd", "learning_rate": 1.0}
    if not private:
        value["privacy"] = {"mode": "none"}
    return validated(Study, value, study.name, StudyError)


def gradient_of(
    study: Study, patients: Patients, parameters: Arrays, streams: tuple[Stream, Stream]
) -> Arrays:
    """What the coordinator reads off a site's update: the mean gradient, as the site's trainer sends it.

    Args:
        study: see `one_step`.
        streams: of sampling and of noise.
    """
    share = 1.0 - study.data.split.test_fraction
    plan = plan_study(study, math.ceil(len(patients) / share))
    nobody = Patients(patients.features[:0], patients.labels[:0], patients.offsets[:1])
    trainer = Trainer(study, Cohort(patients, nobody), plan)
    update = trainer.train(parameters, *streams)
    return {name: -array / study.training.optimizer.learning_rate for name, array in update.items()}


def seen(
    study: Study,
    sites: Sequence[Patients],
    parameters: Arrays,
    protection: Protection,
    randomness: Randomness | None = None,
) -> Arrays:
    """The gradient that reaches the coordinator, float64: the first site's, or the sum of all sites'."""
    torch.set_num_threads(1)  # as a vault does
    drawn = randomness or OperatingSystem()
    asked = one_step(study, private=protection.endswith("privacy"))
    given = sites if protection.startswith("secure") else sites[:1]
    found = {name: np.zeros(array.shape) for name, array in parameters.items()}
    for number, patients in enumerate(given):
        streams = [drawn.stream(what, protection, number) for what in ("sampling", "noise")]
        for name, array in gradient_of(asked, patients, parameters, (streams[0], streams[1])).items():
            found[name] += array
    return found


def imprint(
    study: Study,
    sites: Sequence[Patients],
    others: Array,
    *,
    seed: int = 0,
    randomness: Randomness | None = None,
) -> tuple[Imprint, ...]:
    """Plant an imprint in the first layer of the study's own network (Fowl et al. 2022, arXiv 2110.13057).

    All hidden units see the same projection of a record, with thresholds at its quantiles. So the gradients
    of neighbouring units differ by the records between their thresholds; where that is one, the difference
    of the weights' gradients over that of the biases' is the record.

    Args:
        study: of an `mlp` with `relu` units.
        sites: their training patients; the first site's is the update without secure aggregation.
        others: features [people, width] of other people, from whom the quantiles are known.

    Raises:
        StudyError: if the model is another.
    """
    parameters, signs = planted(study, others, seed)
    spread = others.std(axis=0) + 1e-9
    told = []
    for protection in PROTECTIONS if study.private else PROTECTIONS[:2]:
        given = sites if protection.startswith("secure") else sites[:1]
        records = np.concatenate([each.features.numpy() for each in given])
        gradient = seen(study, sites, parameters, protection, randomness)
        found = bins(gradient, signs)
        guesses = others[: len(found)]
        paid = one_step(study, private=True) if protection.endswith("privacy") else None
        told.append(
            Imprint(
                protection=protection,
                epsilon=paid.privacy.epsilon if paid else None,
                delta=paid.privacy.delta if paid else None,
                sites=len(given),
                records=len(records),
                recovered=int((distances(found, records, spread) <= NEAR).sum()),
                guessed=int((distances(guesses, records, spread) <= NEAR).sum()),
                attributed=len(given) == 1,
            )
        )
    return tuple(told)


def planted(study: Study, others: Array, seed: int = 0) -> tuple[Arrays, Array]:
    """Parameters with an imprint, and the sign [units] with which each unit enters the output.

    The signs alternate, so that a record's outputs stay small and its gradient doesn't vanish.

    Raises:
        StudyError: if the study's model isn't an `mlp` with `relu` units.
    """
    network = study_model(study)
    layers = list(network.children())
    if study.model.name != "mlp" or not isinstance(layers[1], nn.ReLU):
        raise StudyError(f"model {study.model.name} can't be imprinted", remedy="an mlp with relu units")
    arrays = {name: np.zeros_like(array) for name, array in parameter_arrays(network).items()}
    units, width = arrays["0.weight"].shape
    direction = np.random.default_rng(seed).normal(size=width)
    direction /= np.linalg.norm(direction)
    thresholds = np.quantile(others @ direction, (np.arange(units) + 0.5) / units)
    arrays["0.weight"][:] = direction
    arrays["0.bias"][:] = -thresholds
    signs = np.where(np.arange(units) % 2, -1.0, 1.0)
    arrays["2.weight"][0] = signs
    if len(layers) > 3:  # deeper ones pass the first unit on
        for number in range(4, 2 * len(layers), 2):
            if f"{number}.weight" in arrays:
                arrays[f"{number}.weight"][0, 0] = 1.0
        arrays["2.bias"][0] = 10.0
    return arrays, signs


def bins(gradient: Arrays, signs: Array) -> Array:
    """Reconstructed records, float64 [at most units, width].

    Args:
        gradient: of parameters that `planted` made; `signs` likewise.
    """
    weights = gradient["0.weight"] * signs[:, None]
    biases = gradient["0.bias"] * signs
    above = np.zeros((1, weights.shape[1])), np.zeros(1)  # beyond the last threshold nobody is
    difference = weights - np.concatenate([weights[1:], above[0]])
    height = biases - np.concatenate([biases[1:], above[1]])
    largest = float(np.abs(height).max(initial=0.0))
    kept = np.abs(height) > 1e-6 * largest
    return np.asarray(difference[kept] / height[kept, None])


def distances(found: Array, records: Array, spread: Array) -> Array:
    """From each record to the nearest reconstruction, as root mean square over features in units of their
    spread; float64 [records]."""
    if not len(found):
        return np.full(len(records), np.inf)
    scaled, theirs = found / spread, records / spread
    return np.array([np.sqrt(np.square(scaled - r).mean(axis=1).min()) for r in theirs])


def undeclared_models(target: Target) -> Iterator[Case]:
    """Parameters of another model than the study's: each must be refused before anything is spent.

    So a coordinator cannot plant a layer that the study didn't declare.
    """
    whole = target.parameters
    first = next(iter(whole))
    wider = np.concatenate([whole[first], whole[first]])
    layer = np.ones((64, 4), np.float32)
    for name, tried, arrays in (
        ("wider-layer", "the first layer twice as wide", {**whole, first: wider}),
        ("planted-layer", "one more layer in front", {**whole, "imprint.weight": layer}),
        ("missing-tensor", "the first tensor left out", {n: a for n, a in whole.items() if n != first}),
        ("renamed-tensor", "the first tensor under another name", _renamed(whole, first)),
        ("other-type", "float64 instead of float32", {n: a.astype(np.float64) for n, a in whole.items()}),
        ("flat-tensors", "the same numbers in one row", {n: a.reshape(1, -1) for n, a in whole.items()}),
        ("no-parameters", "none at all", {}),
    ):  # fmt: skip
        yield refused(target, name, tried, target.job(1, arrays), "refused")


def _renamed(arrays: Arrays, name: str) -> Arrays:
    return {("imprint.weight" if n == name else n): a for n, a in arrays.items()}
