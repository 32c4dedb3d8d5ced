"""Models for time series."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from common.features import Block
from common.models.imaging import norm
from common.models.registry import Hidden, Shape, register

State = Literal["last", "mean"]
Layers = Annotated[int, Field(ge=1, le=8)]


def summed(x: Tensor) -> Tensor:
    """Σ over the steps of x [records, steps, width]. Along memory, where each sum is by itself: across it,
    the order of the terms depends on how many records there are."""
    return x.transpose(1, 2).contiguous().sum(dim=2)


class Recurrent(nn.Module):
    """A recurrent layer's state after the last step, or its mean over the steps: [records, hidden] of
    features [records, steps · variables]."""

    def __init__(self, layer: nn.GRU | nn.LSTM, series: Block, state: State) -> None:
        super().__init__()
        self.layer, self._shape, self._state = layer, series.shape, state

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.layer(x.reshape(len(x), *self._shape))[0]
        return states[:, -1] if self._state == "last" else summed(states) / states.shape[1]


def _headed(body: nn.Module, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(OrderedDict([("body", body), ("head", nn.Linear(width, outputs))]))


@register("gru")
def gru(shape: Shape, hidden: Hidden = 64, layers: Layers = 1, state: State = "last") -> nn.Module:
    """Gated recurrent units (Cho et al. 2014, arXiv 1406.1078) over the steps of a series, and the outputs
    from their last state, or from the mean of all."""
    series = shape.only("series")
    layer = nn.GRU(series.shape[1], hidden, layers, batch_first=True)
    return _headed(Recurrent(layer, series, state), hidden, shape.outputs)


@register("lstm")
def lstm(shape: Shape, hidden: Hidden = 64, layers: Layers = 1, state: State = "last") -> nn.Module:
    """Long short-term memory (Hochreiter & Schmidhuber 1997), else as `gru`."""
    series = shape.only("series")
    layer = nn.LSTM(series.shape[1], hidden, layers, batch_first=True)
    return _headed(Recurrent(layer, series, state), hidden, shape.outputs)


class _Causal(nn.Module):
    """relu(x + f(x)) of two dilated convolutions over time that look back only."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self._before = (kernel - 1) * dilation
        self.first = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)
        self.first_norm = norm(outputs)
        self.second = nn.Conv1d(outputs, outputs, kernel, dilation=dilation)
        self.second_norm = norm(outputs)
        self.shortcut: nn.Module = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        before = (self._before, 0)
        y = functional.relu(self.first_norm(self.first(functional.pad(x, before))))
        y = functional.relu(self.second_norm(self.second(functional.pad(y, before))))
        return functional.relu(self.shortcut(x) + y)


class _Convolved(nn.Module):
    """Blocks over time [records, channels, steps], of which the last step, or the mean, is left."""

    def __init__(self, stages: nn.Module, series: Block, state: State) -> None:
        super().__init__()
        self.stages, self._shape, self._state = stages, series.shape, state

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stages(x.reshape(len(x), *self._shape).transpose(1, 2))
        return y[:, :, -1] if self._state == "last" else y.contiguous().mean(dim=2)


@register("temporal-cnn")
def temporal_cnn(
    shape: Shape,
    channels: Annotated[tuple[Hidden, ...], Field(min_length=1, max_length=12)] = (32, 32, 32, 32),
    kernel: Annotated[int, Field(ge=2, le=31)] = 3,
    state: State = "last",
) -> nn.Module:
    """Residual blocks of causal convolutions over the steps of a series, block i dilated 2^i times (Bai et
    al. 2018, arXiv 1803.01271), with GroupNorm in place of weight normalisation and no dropout."""
    series = shape.only("series")
    blocks, inputs = [], series.shape[1]
    for index, outputs in enumerate(channels):
        blocks.append(_Causal(inputs, outputs, kernel, 1 << index))
        inputs = outputs
    return _headed(_Convolved(nn.Sequential(*blocks), series, state), inputs, shape.outputs)
