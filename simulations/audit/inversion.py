"""Gradient inversion: a picture is looked for whose gradient is the one that was sent.

Geiping et al. 2020 (arXiv 2003.14053): the cosine distance of gradients, plus the total variation of the
picture, by signed gradient descent with Adam, from several random starts. Under an MLP a picture
comes back nearly whole; under a CNN most starts end in poor minima, and one of a few comes near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from client.cohort import Patients
from common.columns import NumericColumn
from common.errors import StudyError
from common.features import blocks
from common.messages import Array, Arrays
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy.noise import Randomness
from common.study import Study
from simulations.audit.reconstruction import PROTECTIONS, Protection, seen

RATE = 0.1
_SMOOTHNESS = {True: 1e-3, False: 1e-2}  # weight of the total variation: pixels of a table, and images

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Picture:
    """One picture, and what an update gave away of it.

    Attributes:
        protection: of the update.
        epsilon, delta: of it; None without privacy.
        records: that the update is made of.
        guessed: correlation of the original with the mean of the other sites' pictures, which needs no
            update; None if there is no other site.
        original, found: float64 [height, width], 0 to 1; of several channels their mean.
    """

    protection: Protection
    epsilon: float | None
    delta: float | None
    records: int
    guessed: float | None
    original: Array
    found: Array

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio, decibels."""
        return -10 * math.log10(max(1e-12, float(np.square(self.original - self.found).mean())))

    @property
    def correlation(self) -> float:
        """Pearson's, of the pixels; 0 if one of the pictures is of one grey."""
        return correlation(self.original, self.found)

    def as_json(self) -> dict[str, Any]:
        told = {n: v for n, v in vars(self).items() if n not in ("original", "found")}
        return {**told, "psnr_db": self.psnr, "correlation": self.correlation}


def invert(
    study: Study,
    sites: Sequence[Patients],
    *,
    protections: Sequence[Protection] = PROTECTIONS,
    steps: int = 600,
    starts: int = 4,
    randomness: Randomness | None = None,
) -> tuple[Picture, ...]:
    """Look for the first site's first picture in what the coordinator receives.

    All pictures of an update are looked for together. The attacker is granted the labels and the number of
    records, and the found picture that is shown is the one most like the original.

    Args:
        study: whose records are pictures (see `picture_shape`), the darkest -1 and the lightest 1.
        sites: their training patients, few records each.
        steps: of descent, from each of `starts` random pictures.

    Raises:
        StudyError: if the records are no pictures, or privacy is asked of a study without it.
    """
    shape = picture_shape(study)
    parameters = parameter_arrays(study_model(study, seed=1))
    original = _shown(sites[0].features[:1], shape)[0]
    rest = [_shown(each.features, shape) for each in sites[1:]]
    guessed = correlation(original, np.concatenate(rest).mean(axis=0)) if rest else None
    told = []
    for protection in protections:
        given = list(sites if protection.startswith("secure") else sites[:1])
        gradient = seen(study, sites, parameters, protection, randomness)
        labels = torch.cat([each.labels for each in given])
        weights = torch.cat([_shares(each) for each in given])
        found = _shown(_descend(study, parameters, gradient, (labels, weights, shape), steps, starts), shape)
        privacy = study.privacy if protection.endswith("privacy") else None
        told.append(
            Picture(
                protection=protection,
                epsilon=privacy.epsilon if privacy else None,
                delta=privacy.delta if privacy else None,
                records=len(labels),
                guessed=guessed,
                original=original,
                found=max(found, key=lambda one: correlation(original, one)),
            )
        )
    return tuple(told)


def picture_shape(study: Study) -> Shape:
    """Channels, height and width of the picture that a record is: one column of 2-D images, or one number
    for each pixel of a square.

    Raises:
        StudyError: if records are anything else.
    """
    (first, *more), columns = blocks(study), study.data.columns
    if not more and first.kind == "image" and len(first.shape) == 3:
        channels, height, width = first.shape
        return channels, height, width
    side = math.isqrt(first.width)
    pixels = len(columns) == 1 and isinstance(columns[0], NumericColumn) and side * side == first.width
    if not pixels or first.width != len(columns[0].sources):
        raise StudyError(
            f"a record of {study.name} is no picture",
            remedy="give a study of one column of 2-D images, or of one number for each pixel of a square",
        )
    return 1, side, side


def correlation(one: Array, other: Array) -> float:
    """Pearson's, of the pixels; 0 if one of the pictures is of one grey."""
    a, b = (each.ravel() - each.mean() for each in (one, other))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else 0.0


def _shares(patients: Patients) -> torch.Tensor:
    """What each record counts in its site's mean gradient, float32 [records]."""
    counts = patients.offsets.diff()
    return torch.repeat_interleave(1.0 / (counts * len(patients)), counts).float()


def _shown(features: torch.Tensor, shape: Shape) -> Array:
    """As grey pictures [records, height, width] from 0 to 1, float64."""
    return ((features.double() + 1) / 2).clamp(0, 1).view(-1, *shape).mean(dim=1).numpy()


def _descend(
    study: Study,
    parameters: Arrays,
    gradient: Arrays,
    known: tuple[torch.Tensor, torch.Tensor, Shape],
    steps: int,
    starts: int,
) -> torch.Tensor:
    """The pictures with the least loss, float32 [records, features].

    Args:
        known: the records' labels, their weights in the gradient, and the pictures' shape.
    """
    labels, weights, shape = known
    network = study_model(study)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(parameters[name])))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    smoothness = _SMOOTHNESS[not study.data.wide]
    wanted = torch.cat([torch.from_numpy(gradient[name].astype(np.float32)).flatten() for name in trained])
    drawn = torch.Generator().manual_seed(0)
    size = (len(labels), math.prod(shape))
    best, least = torch.zeros(size), math.inf
    for _ in range(starts):
        x = (0.5 * torch.randn(size, generator=drawn)).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=RATE)
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [3 * steps // 8, 5 * steps // 8, 7 * steps // 8]
        )
        for _ in range(steps):
            losses = record_losses(study.objective, network(x), labels) * weights
            parts = torch.autograd.grad(losses.sum(), list(trained.values()), create_graph=True)
            together = torch.cat([part.flatten() for part in parts])
            distance = 1 - functional.cosine_similarity(together, wanted, dim=0)
            loss = distance + smoothness * _total_variation(x.view(-1, *shape))
            (slope,) = torch.autograd.grad(loss, [x])
            x.grad = slope.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(-1, 1)
        if float(loss.detach()) < least:
            best, least = x.detach().clone(), float(loss.detach())
    return best


def _total_variation(pictures: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring pixels, of pictures [records, channels, height,
    width]."""
    return pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean()
