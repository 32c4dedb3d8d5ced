"""Models for images and volumes."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from common.errors import StudyError
from common.features import Block
from common.models.registry import Shape, register

Channels = Annotated[int, Field(ge=1, le=4096)]
Stages = Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)]
Pooling = Literal["mean", "none"]

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_POOLINGS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEANS = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def norm(channels: int) -> nn.GroupNorm:
    """Groups of 8 channels or so (Wu & He 2018, arXiv 1803.08494): nothing in it mixes records."""
    groups = next(g for g in range(max(1, channels // 8), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def convolutions(image: Block, channels: tuple[int, ...], pooling: Pooling = "mean") -> nn.Module:
    """Features [records, image.width] to the mean of each of the last stage's channels, [records,
    channels[-1]], or to all that is left of them.

    Raises:
        StudyError: if the image is too small for so many stages.
    """
    spatial, smallest = len(image.shape) - 1, min(image.shape[1:])
    if smallest >> len(channels) == 0:
        raise StudyError(
            f"model.parameters: {len(channels)} stages halve {image.name}, {smallest} wide, to nothing",
            remedy=f"give at most {smallest.bit_length() - 1} channels, or a larger size",
        )
    stages, inputs = [], image.shape[0]
    for outputs in channels:
        convolution = _CONVOLUTIONS[spatial](inputs, outputs, 3, padding=1)
        stages.append(nn.Sequential(convolution, norm(outputs), nn.ReLU(), _POOLINGS[spatial](2)))
        inputs = outputs
    parts: list[tuple[str, nn.Module]] = [
        ("image", nn.Unflatten(1, image.shape)),
        ("stages", nn.Sequential(*stages)),
    ]
    if pooling == "mean":
        parts.append(("mean", _MEANS[spatial](1)))
    return nn.Sequential(OrderedDict([*parts, ("flat", nn.Flatten())]))


@register("cnn")
def cnn(
    shape: Shape,
    channels: Stages = (16, 32, 64),
    hidden: Annotated[int, Field(ge=0, le=65_536)] = 0,
    pooling: Pooling = "mean",
) -> nn.Module:
    """Stages of convolution (3 wide), GroupNorm, ReLU and max-pooling (2), in 2-D or 3-D as the image is;
    then the mean over what is left of each channel, `hidden` units if any, and the outputs.

    `pooling = "none"` keeps each place of what is left, for images that are all taken in one position.
    """
    image = shape.only("image")
    parts: list[tuple[str, nn.Module]] = [("body", convolutions(image, channels, pooling))]
    inputs = channels[-1]
    if pooling == "none":
        inputs *= math.prod(side >> len(channels) for side in image.shape[1:])
    if hidden:
        parts += [("hidden", nn.Linear(inputs, hidden)), ("relu", nn.ReLU())]
        inputs = hidden
    return nn.Sequential(OrderedDict([*parts, ("head", nn.Linear(inputs, shape.outputs))]))


class _Residual(nn.Module):
    """relu(x + f(x)) of two convolutions f; where f changes the size, x goes through one of width 1."""

    def __init__(self, spatial: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[spatial]
        self.first = convolution(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = norm(outputs)
        self.second = convolution(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                convolution(inputs, outputs, 1, stride=stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return functional.relu(self.shortcut(x) + y)


@register("resnet-18")
def resnet_18(
    shape: Shape, width: Annotated[int, Field(ge=1, le=512)] = 64, stem: Literal["small", "large"] = "small"
) -> nn.Module:
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with GroupNorm in place of batch normalisation, in 2-D or
    3-D as the image is: four stages of two residual blocks, `width` to 8 · `width` channels.

    `stem`: `small`, a convolution 3 wide as for CIFAR there; `large`, 7 wide with stride 2, and max-pooling
    with stride 2, for images of 128 pixels a side or more. Parameters begin with stem, stages.0 … stages.3
    and head.
    """
    image = shape.only("image")
    spatial = len(image.shape) - 1
    kernel, stride = (3, 1) if stem == "small" else (7, 2)
    first: list[nn.Module] = [
        _CONVOLUTIONS[spatial](image.shape[0], width, kernel, stride=stride, padding=kernel // 2, bias=False),
        norm(width),
        nn.ReLU(),
    ]
    if stem == "large":
        first.append(_POOLINGS[spatial](3, stride=2, padding=1))
    stages = []
    inputs = width
    for stage in range(4):
        outputs = width << stage
        stages.append(
            nn.Sequential(
                _Residual(spatial, inputs, outputs, 1 if stage == 0 else 2),
                _Residual(spatial, outputs, outputs, 1),
            )
        )
        inputs = outputs
    parts: list[tuple[str, nn.Module]] = [
        ("image", nn.Unflatten(1, image.shape)),
        ("stem", nn.Sequential(*first)),
        ("stages", nn.Sequential(*stages)),
        ("mean", _MEANS[spatial](1)),
        ("flat", nn.Flatten()),
        ("head", nn.Linear(inputs, shape.outputs)),
    ]
    network = nn.Sequential(OrderedDict(parts))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network
