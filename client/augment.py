"""Images varied at each training step, as the study declares: mirrored, moved, turned, stretched, brighter.

It happens to a record by itself, before its patient's gradient is taken and clipped, and by draws that
nobody's data decides. So given the draws, one patient more or less changes a step's sum by at most the
clipping norm, as it does without; the noise and its cost stay what they are. One patient more also moves the
others' draws to a later place of the stream: there they are as uniform, and as independent of every coin, so
the mixture over them is the same with and without that patient. An evaluation varies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from client.batches import Batch
from client.cohort import Patients
from common.features import blocks
from common.modalities import Augmentation, ImageColumn
from common.privacy.noise import Stream
from common.study import Study

_AXES = ("depth", "height", "width")


@dataclass(frozen=True)
class Picture:
    """An image column that is varied, among the features.

    Attributes:
        start: its first feature.
        shape: channels, and two or three axes of space.
    """

    start: int
    shape: tuple[int, ...]
    augmentation: Augmentation

    @property
    def draws(self) -> int:
        """Uniform numbers that a record takes: a coin and a shift for each axis, also a stretch if the study
        has it, an angle, a brightness."""
        space = len(self.shape) - 1
        return (3 if self.augmentation.stretch else 2) * space + 2

    def varied(self, image: torch.Tensor, draws: npt.NDArray[np.float64]) -> torch.Tensor:
        """One image, float32 [*shape], in [-1, 1].

        Args:
            draws: uniform in [0, 1), float64 [self.draws].
        """
        asked, sizes = self.augmentation, self.shape[1:]
        space = len(sizes)
        coins, even = draws[:space], 2.0 * draws[space:] - 1.0
        moves, stretches, (angle, light) = even[:space], even[space:-2], even[-2:]
        axes = _AXES[-space:]
        flips = [name in asked.flip and coin < 0.5 for name, coin in zip(axes, coins, strict=True)]
        shifts = [
            round(asked.shift * size * float(move)) for size, move in zip(sizes, moves, strict=True)
        ]  # whole pixels
        for axis, (size, flip, shift) in enumerate(zip(sizes, flips, shifts, strict=True), start=1):
            if flip or shift:
                places = torch.arange(size, device=image.device) - shift
                places = (size - 1 - places if flip else places).clamp_(0, size - 1)
                image = image.index_select(axis, places)
        if asked.rotate or asked.stretch:
            factors = [(1.0 + asked.stretch) ** float(each) for each in stretches] or [1.0, 1.0]
            image = turned(image, math.radians(asked.rotate * float(angle)), factors)
        if asked.brightness:
            image = (image + 2.0 * asked.brightness * float(light)).clamp_(-1.0, 1.0)
        return image


@dataclass(frozen=True)
class Augmenter:
    """What varies a batch's records."""

    pictures: tuple[Picture, ...]

    def varied(self, patients: Patients, batch: Batch, sampling: Stream) -> tuple[Patients, Batch]:
        """The batch's records, each varied by its own draws, and the batch as one of them.

        Args:
            sampling: the stream that the batch was drawn from; a record takes `Picture.draws` numbers.
        """
        device = patients.features.device
        records = batch.records.to(device)
        features = patients.features[records]
        count = len(records)
        for picture in self.pictures:
            draws = sampling.uniform(count * picture.draws).reshape(count, picture.draws)
            part = slice(picture.start, picture.start + math.prod(picture.shape))
            for own, row in zip(draws, features, strict=True):
                image = row[part].view(picture.shape)
                image.copy_(picture.varied(image, own))
        counts = torch.bincount(batch.patient.cpu(), minlength=batch.patients)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        here = torch.arange(count, device=batch.records.device)
        return (
            Patients(features, patients.labels[records], offsets),
            Batch(here, batch.patient, batch.weights, batch.patients),
        )


def augmenter_of(study: Study) -> Augmenter | None:
    """What the study declares; None if it varies nothing."""
    starts = {block.name: block.start for block in blocks(study) if block.kind == "image"}
    pictures = [
        Picture(starts[column.name], column.shape, column.augmentation)
        for column in study.data.wide
        if isinstance(column, ImageColumn) and column.augmentation.varies
    ]
    return Augmenter(tuple(pictures)) if pictures else None


def turned(image: torch.Tensor, angle: float, factors: Sequence[float] = (1.0, 1.0)) -> torch.Tensor:
    """A picture stretched and then turned about its middle, linearly between pixels; the edge is repeated
    outwards.

    Args:
        image: float32 [channels, height, width].
        angle: in radians, counter-clockwise as it is shown (rows go down).
        factors: by which height and width grow; what grows out of the picture is lost.
    """
    height, width = image.shape[1:]
    down = torch.arange(height, device=image.device, dtype=torch.float32)[:, None] - (height - 1) / 2
    right = torch.arange(width, device=image.device, dtype=torch.float32)[None] - (width - 1) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    y = ((right * sine + down * cosine) / factors[0] + (height - 1) / 2).clamp_(0, height - 1)
    x = ((right * cosine - down * sine) / factors[1] + (width - 1) / 2).clamp_(0, width - 1)
    # From pixels to [-1, 1], where the ends are the middles of the outermost pixels
    grid = torch.stack([x * (2.0 / max(1, width - 1)) - 1.0, y * (2.0 / max(1, height - 1)) - 1.0], dim=-1)
    return torch.nn.functional.grid_sample(
        image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True
    )[0]
