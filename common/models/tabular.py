"""Models for tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from common.models.registry import Shape, register

Width = Annotated[int, Field(ge=1, le=65_536)]


Start = Literal["zero", "uniform"]


def _linear(shape: Shape, initial: Start) -> nn.Module:
    layer = nn.Linear(shape.inputs, shape.outputs)  # uniform in ±1/√inputs, torch's own start
    if initial == "zero":
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


@register("logistic-regression")
def logistic_regression(shape: Shape, initial: Start = "zero") -> nn.Module:
    """One linear layer, for the cross-entropy loss; from zero, because that loss is convex."""
    return _linear(shape, initial)


@register("linear-svm")
def linear_svm(shape: Shape, initial: Start = "zero") -> nn.Module:
    """One linear layer, for the hinge loss; its margin is set by `optimizer.weight_decay`."""
    return _linear(shape, initial)


@register("mlp")
def mlp(
    shape: Shape,
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=32)] = (64,),
    activation: Literal["relu", "tanh", "gelu"] = "relu",
) -> nn.Module:
    """Fully connected layers of widths inputs-hidden…-outputs; `hidden = [128, 64]` on 28×28 images
    of ten digits is 784-128-64-10."""
    kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
    widths = (shape.inputs, *hidden)
    layers: list[nn.Module] = []
    for i, j in pairwise(widths):
        layers += [nn.Linear(i, j), kinds[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], shape.outputs))
