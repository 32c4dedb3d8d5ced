"""The networks that a step is measured on: what hospitals use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


class _Sequences(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.layer(x)[0][:, -1])
        return outputs


class _Block(nn.Module):
    """A residual block (He et al. 2016) with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.GroupNorm(32, outputs), nn.GroupNorm(32, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(32, outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(inner)) + self.shortcut(x))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def _cnn_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool3d(2),
        nn.Flatten(), nn.Linear(16 * 7**3, 11),
    )  # fmt: skip


def _resnet() -> nn.Module:
    """ResNet-18 for small images: a stem of 3 × 3 without pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inputs, outputs, stride), _Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 9))


def _sequences(kind: str, private: bool) -> nn.Module:
    if not private:
        return _Sequences(getattr(nn, kind)(37, 64, batch_first=True))
    from opacus import layers

    return _Sequences(getattr(layers, f"DP{kind}")(37, 64, batch_first=True))


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        network: called with True it gives the network that Opacus takes.
        shape: of a batch's features.
        outputs: classes.
        records: of each patient.
    """

    title: str
    network: Callable[[bool], nn.Module]
    shape: tuple[int, ...]
    outputs: int
    records: int = 1


WORKS: dict[str, Work] = {
    "logistic": Work("logistic regression, 30 features, batch 64", lambda _: nn.Linear(30, 2), (64, 30), 2),
    "mlp": Work("MLP 784-128-64-10, batch 256", lambda _: _mlp(), (256, 784), 10),
    "cnn": Work("CNN 28×28, two convolutions, batch 256", lambda _: _cnn(), (256, 1, 28, 28), 10),
    "cnn-3d": Work("3-D CNN 28³, batch 32", lambda _: _cnn_3d(), (32, 1, 28, 28, 28), 11),
    "lstm": Work("LSTM 48×37, hidden 64, batch 64", lambda p: _sequences("LSTM", p), (64, 48, 37), 2),
    "gru": Work("GRU 48×37, hidden 64, batch 64", lambda p: _sequences("GRU", p), (64, 48, 37), 2),
    "resnet": Work("ResNet-18 (GroupNorm), 28×28×3, batch 64", lambda _: _resnet(), (64, 3, 28, 28), 9),
    "mlp-patients": Work(
        "MLP, 8 patients with 40 records each", lambda _: _mlp(), (320, 784), 10, records=40
    ),
    "mlp-ungrouped": Work("MLP, the same 320 records, one a patient", lambda _: _mlp(), (320, 784), 10),
}
