"""Max-pooling by halves gives what torch's own gives, bit for bit, gradients of equal numbers included."""

from __future__ import annotations

import copy

import pytest
import torch
from tapped import OBJECTIVE, OUTPUTS, assert_exact, cohort_of, everybody, one_thread
from torch import nn

from client.taps import TappedGradients
from client.taps.company import Seating
from client.taps.pooling import max_pooling
from client.taps.tape import Tape

__all__ = ["one_thread"]  # a fixture that pytest finds here
HALVED = {
    "1-D": (nn.MaxPool1d(2), (3, 5, 9)),
    "2-D": (nn.MaxPool2d(2), (3, 2, 8, 6)),
    "2-D, odd": (nn.MaxPool2d((2, 2), stride=2), (3, 2, 7, 5)),
    "3-D": (nn.MaxPool3d(2), (2, 3, 4, 6, 8)),
    "3-D, odd": (nn.MaxPool3d(2), (2, 3, 5, 6, 7)),
}
OTHERS = {
    "overlapping": nn.MaxPool2d(2, stride=1),
    "wide": nn.MaxPool2d(3),
    "padded": nn.MaxPool2d(2, padding=1),
    "dilated": nn.MaxPool2d(2, dilation=2),
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Many of which are equal."""
    drawn = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype).requires_grad_()


def both(layer: nn.Module, x: torch.Tensor) -> None:
    own, torchs = max_pooling("pool", layer, None, Tape())(x), layer(x)
    assert torch.equal(own, torchs)
    g = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=own.dtype)
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (own, torchs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HALVED)
def test_as_torchs(kind: str, dtype: torch.dtype) -> None:
    layer, shape = HALVED[kind]
    both(layer, numbers(shape, dtype))
    both(
        layer, numbers(shape, dtype).transpose(-1, 1).contiguous().transpose(-1, 1).detach().requires_grad_()
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_other_windows_are_torchs(kind: str) -> None:
    both(OTHERS[kind], numbers((3, 2, 9, 7)))


def test_other_layouts_are_torchs() -> None:
    both(nn.MaxPool2d(2), numbers((3, 8, 6)))  # no dimension of records
    values, indices = max_pooling("pool", nn.MaxPool2d(2, return_indices=True), None, Tape())(
        numbers((1, 1, 4, 4))
    )
    assert values.shape == indices.shape == (1, 1, 2, 2)


def test_nan_goes_through() -> None:
    x = torch.zeros(4, 1, 2, 2)
    x.view(4, 4)[range(4), range(4)] = torch.nan
    assert max_pooling("pool", nn.MaxPool2d(2), None, Tape())(x).isnan().all()


@pytest.mark.parametrize("side", [8, 9])
def test_in_a_network(side: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 4, OUTPUTS),
    )  # fmt: skip
    cohort = cohort_of([1, 2, 3, 1], (1, side, side))
    assert_exact(copy.deepcopy(network), cohort, everybody(cohort))
    engine = TappedGradients(network, OBJECTIVE)
    torch.testing.assert_close(engine.outputs(cohort.features), network(cohort.features).detach())
    assert [each.seating for each in engine._companies.values()] == [Seating.FREE]
