"""Models for tables."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from common.models.registry import Hidden, Shape, register

Start = Literal["zero", "uniform"]


def _linear(shape: Shape, initial: Start) -> nn.Module:
    layer = nn.Linear(shape.numbers(), shape.outputs)  # uniform in ±1/√inputs, torch's own start
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
    hidden: Annotated[tuple[Hidden, ...], Field(min_length=1, max_length=32)] = (64,),
    activation: Literal["relu", "tanh", "gelu"] = "relu",
) -> nn.Module:
    """Fully connected layers of widths inputs-hidden…-outputs; `hidden = [128, 64]` on 28×28 images
    of ten digits is 784-128-64-10."""
    kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
    widths = (shape.numbers(), *hidden)
    layers: list[nn.Module] = []
    for i, j in pairwise(widths):
        layers += [nn.Linear(i, j), kinds[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], shape.outputs))


@register("logistic-hazard")
def logistic_hazard(
    shape: Shape, start: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.05
) -> nn.Module:
    """One linear score of risk, the same in every interval, on top of a free hazard of each: proportional
    odds of hazards (Cox 1972, section 9), with inputs + intervals numbers to learn. From score zero.

    Args:
        start: the hazard of each interval that the baseline begins with; a public guess.
    """
    score, baseline = nn.Linear(shape.numbers(), 1, bias=False), nn.Linear(1, shape.outputs)
    nn.init.zeros_(score.weight)
    nn.init.ones_(baseline.weight)
    nn.init.constant_(baseline.bias, math.log(start / (1 - start)))
    baseline.weight.requires_grad_(False)
    return nn.Sequential(score, baseline)
