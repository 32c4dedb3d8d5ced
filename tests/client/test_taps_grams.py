"""Norms from Gram matrices in float32: no further off than they say, and float64's where that is too far."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tapped import one_thread
from torch.nn import functional

from client.taps.convolution import Convolution, Geometry
from client.taps.groups import Groups
from client.taps.parts import Norms, Slot

__all__ = ["one_thread"]  # a fixture that pytest finds here
RECORDS = 5
GEOMETRIES = {
    "pixels": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), 7),
    "patches": (Geometry((3, 3), (2, 2), (1, 1), (1, 1), 1), 8),
    "apart": (Geometry((2, 3), (1, 2), (0, 1), (2, 1), 1), 6),
    "places": (Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), 5),
    "series": (Geometry((3,), (1,), (1,), (1,), 1), 9),
}


def convolution(
    kind: str, channels: tuple[int, int], scales: tuple[float, float], close: float | None, seed: int = 0
) -> Convolution:
    """Random numbers, or output gradients that add up to nearly nothing where the inputs are nearly equal."""
    how, side = GEOMETRIES[kind]
    generator = torch.Generator().manual_seed(seed)
    planes = len(how.kernel)
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for k, s, p, d in zip(how.kernel, how.stride, how.padding, how.dilation, strict=True)
    ]
    x = torch.randn(RECORDS, channels[0], *[side] * planes, generator=generator)
    g = torch.randn(RECORDS, channels[1], *sides, generator=generator)
    if close is not None:
        x = 1 + close * x
        inner = functional.pad(g, [-1, -1] * planes)  # where no padding is
        inner -= inner.flatten(2).mean(dim=2).view(*g.shape[:2], *[1] * planes)
        g = functional.pad(inner, [1, 1] * planes)
    slot = Slot(0, (channels[1], channels[0], *how.kernel))
    return Convolution(slot, how, x * scales[0], g * scales[1])


def exact(part: Convolution) -> torch.Tensor:
    """Squared norms [records] of the gradients, in float64."""
    how, x, g = part._geometry, part.x.double(), part.g.double()
    like = torch.empty(part.weight.shape, dtype=torch.float64)
    found = [how.weight_gradient(x[i : i + 1], g[i : i + 1], 1, like) for i in range(len(x))]
    return torch.stack(found).flatten(1).square().sum(dim=1)


def rough(part: Convolution) -> Norms:
    groups = Groups(torch.arange(len(part.x)), len(part.x))
    norms = Norms(groups, part.x, 0, RECORDS)
    part._gram_norms(groups, norms)
    return norms


numbers = settings(max_examples=80, deadline=None, derandomize=True)


@numbers
@given(
    kind=st.sampled_from(sorted(GEOMETRIES)),
    channels=st.sampled_from([(1, 2), (40, 3), (200, 70)]),
    scales=st.tuples(*[st.sampled_from([1e-30, 1e-12, 1.0, 1e9, 1e18])] * 2),
    close=st.sampled_from([None, 0.0, 1e-4, 0.1]),
    seed=st.integers(0, 99),
)
def test_no_further_off_than_they_say(
    kind: str, channels: tuple[int, int], scales: tuple[float, float], close: float | None, seed: int
) -> None:
    part = convolution(kind, channels, scales, close, seed)
    norms, expected = rough(part), exact(part)
    ((found, error, _),) = norms._rough
    assert not bool(((found - expected).abs() > error).any())  # NaN says that it is one
    norms.settle()
    assert bool(((norms.squares - expected).abs() <= 2.0**-9 * expected + 1e-8 * error).all())
    if close is None and min(scales) > 1e-20:  # nothing cancels: as roundings fall
        assert bool(((norms.squares - expected).abs() <= 2e-6 * expected).all())


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_whoever_may_be_too_far_off_is_taken_exactly(kind: str) -> None:
    plain, cancelling = (convolution(kind, (30, 20), (1.0, 1.0), close) for close in (None, 1e-2))
    alone = rough(plain)
    alone.settle()
    plain.x[2], plain.g[2] = cancelling.x[2], cancelling.g[2]
    norms, expected = rough(plain), exact(plain)
    ((found, error, _),) = norms._rough
    doubtful = error > 2.0**-9 * expected
    assert doubtful.tolist() == [False, False, True, False, False]
    norms.settle()
    assert float(norms.squares[2]) == pytest.approx(float(expected[2]), rel=1e-9)
    others = ~doubtful
    assert torch.equal(norms.squares[others], found[others])
    torch.testing.assert_close(norms.squares[others], alone.squares[others], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [math.inf, math.nan, 3e38])
def test_what_overflows_shows(scale: float) -> None:
    part = convolution("pixels", (3, 4), (1.0, 1.0), None)
    expected = exact(part)
    part.x[1] *= scale
    norms = rough(part)
    norms.settle()
    finite = torch.tensor([True, False, True, True, True])
    assert torch.equal(norms.squares.isfinite() & (norms.squares < 1e60), finite)
    torch.testing.assert_close(norms.squares[finite], expected[finite], rtol=1e-5, atol=0)


def test_zeros_are_zero() -> None:
    part = convolution("pixels", (3, 4), (1.0, 0.0), None)
    norms = rough(part)
    norms.settle()
    assert float(norms.squares.abs().max()) == 0


def test_patients_with_several_records_are_taken_exactly() -> None:
    part = convolution("pixels", (3, 4), (1.0, 1.0), None)
    norms = Norms(Groups(torch.zeros(RECORDS, dtype=torch.int64), 1), part.x, 0, RECORDS)
    part._gram_norms(Groups(torch.zeros(RECORDS, dtype=torch.int64), 1), norms)
    assert not norms._rough
    how, like = part._geometry, torch.empty(part.weight.shape, dtype=torch.float64)
    whole = how.weight_gradient(part.x.double(), part.g.double(), 1, like).square().sum()
    assert float(norms.squares) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("close", [None, 1e-2])
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_who_has_one_record_is_taken_alike_beside_one_with_several(kind: str, close: float | None) -> None:
    """Else one patient more would move all others' norms at once."""
    part = convolution(kind, (30, 20), (1.0, 1.0), close)
    alone = rough(part)
    alone.settle()
    patient = torch.tensor([0, 1, 1, 2, 3])
    mixed = Norms(Groups(patient, 4), part.x, 0, RECORDS)
    part._gram_norms(Groups(patient, 4), mixed)
    ((_, error, _),) = mixed._rough
    assert (error > 0).tolist() == [True, False, True, True]
    mixed.settle()
    torch.testing.assert_close(mixed.squares[[0, 2, 3]], alone.squares[[0, 3, 4]], rtol=1e-6, atol=0)
    two = Convolution(part.weight, part._geometry, part.x[1:3], part.g[1:3])
    together = Norms(Groups(torch.zeros(2, dtype=torch.int64), 1), part.x, 0, RECORDS)
    two._gram_norms(Groups(torch.zeros(2, dtype=torch.int64), 1), together)
    assert float(mixed.squares[1]) == pytest.approx(float(together.squares), rel=1e-12)
