"""Models for images and volumes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from common.models.registry import Shape, register

Channels = Annotated[int, Field(ge=1, le=4096)]


def _groups(channels: int) -> int:
    """Of a GroupNorm: 8 channels each or so, a divisor of their number."""
    return next(g for g in range(max(1, channels // 8), 0, -1) if channels % g == 0)


@register("cnn")
def cnn(
    shape: Shape,
    channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)] = (16, 32, 64),
    hidden: Annotated[int, Field(ge=0, le=65_536)] = 0,
) -> nn.Module:
    """Stages of convolution (3 wide), GroupNorm, ReLU and max-pooling (2), in 2-D or 3-D as the image is;
    then the mean over what is left of each channel, `hidden` units if any, and the outputs."""
    image = shape.only("image")
    spatial = len(image.shape) - 1
    convolution, pooling, mean = (
        (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
        if spatial == 2
        else (nn.Conv3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d)
    )
    layers: list[nn.Module] = [nn.Unflatten(1, image.shape)]
    inputs = image.shape[0]
    for outputs in channels:
        layers += [
            convolution(inputs, outputs, 3, padding=1),
            nn.GroupNorm(_groups(outputs), outputs),
            nn.ReLU(),
            pooling(2),
        ]
        inputs = outputs
    layers += [mean(1), nn.Flatten()]
    if hidden:
        layers += [nn.Linear(inputs, hidden), nn.ReLU()]
        inputs = hidden
    return nn.Sequential(*layers, nn.Linear(inputs, shape.outputs))
