"""A record's numbers are the same bit for bit when more threads compute, of any number: three share out rows
so that one thread begins in the middle of a row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from every_model import features_of, study_of
from torch import nn

from client.chain import Chain
from client.rowwise import each_number, sigmoid_
from client.taps import TappedGradients
from common.models import study_model


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "hidden"), [("lstm", 33), ("gru", 48)])
def test_a_state_is_the_same_in_any_company(name: str, hidden: int, threads: int) -> None:
    wanted = study_of(name, model={"parameters": {"hidden": hidden}})
    network = study_model(wanted, 1)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    engine, features = TappedGradients(network, wanted.objective), features_of(wanted, 1552)
    few = torch.cat([engine.outputs(some) for some in features.split(128)])
    for records in (640, 1552):
        assert torch.equal(engine.outputs(features[:records]), few[:records])


def test_a_gate_is_the_same_in_any_company(threads: int) -> None:
    gates = 3 * torch.randn((1504, 4 * 48), generator=torch.Generator().manual_seed(0))
    for columns in (slice(0, 3 * 48), slice(0, 4 * 48)):  # a part of each row, and all of it
        whole, few = gates.clone(), gates.clone()
        sigmoid_(whole[:, columns])
        for some in few.split(16):
            sigmoid_(some[:, columns])
        assert torch.equal(whole, few)
        assert torch.allclose(whole[:, columns], gates[:, columns].sigmoid())


@pytest.mark.parametrize("width", [16, 48, 80])
def test_rows_that_end_within_two_registers(width: int, threads: int) -> None:
    values = 3 * torch.randn((1552, width), generator=torch.Generator().manual_seed(0))
    whole, few = values.clone(), values.clone()
    sigmoid_(whole)
    for some in few.split(16):
        sigmoid_(some)
    assert torch.equal(whole, few)


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, nn.GELU(approximate="tanh"), nn.SiLU()])
@pytest.mark.parametrize("width", [1, 35, 64])
def test_a_number_is_the_same_in_any_company(function: nn.Module, width: int, threads: int) -> None:
    values = 3 * torch.randn((64_000 // width // 32 * 32, 64), generator=torch.Generator().manual_seed(0))
    for x in (values[:, :width], values[:, :width].contiguous()):
        found = each_number(function, x)
        assert torch.equal(found, torch.cat([each_number(function, some) for some in x.split(32)]))
        assert torch.allclose(found, function(x), atol=1e-6)


def test_gradients_through_an_activation_too(threads: int) -> None:
    """Also where a layer's outputs lie in wider rows."""
    chain = Chain(nn.Sequential(nn.Linear(3, 4), nn.GELU(approximate="tanh"), nn.Linear(4, 1)))
    activation = chain.steps[1]
    assert not isinstance(activation, nn.Linear)
    for width in (35, 64):
        x, g = (
            torch.randn((1024, 80), generator=torch.Generator().manual_seed(s))[:, :width] for s in (0, 1)
        )
        y = activation.apply(x)
        few = [activation.back(*each) for each in zip(*(v.split(32) for v in (g, x, y)), strict=True)]
        assert torch.equal(activation.back(g, x, y), torch.cat(few))
