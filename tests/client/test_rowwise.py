"""Rows of a product are the same bit for bit in any company, on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from client.matrix import outer_sum
from client.rowwise import TILE, product
from client.taps import cells
from client.taps.products import rows_product, shared

SHAPES = [(13, 1), (5, 7), (30, 2), (1, 1), (64, 256), (256, 64), (37, 192), (784, 128), (128, 10), (1000, 1),
          (3, 100), (33, 17), (128, 64), (91, 91), (8192, 3), (9000, 40)]  # fmt: skip
ROWS = [1, 2, 5, 31, 32, 33, 64, 200, 257]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_row_is_the_same_anywhere(shape: tuple[int, int], turned: bool, threads: int) -> None:
    torch.manual_seed(0)
    inputs, outputs = shape
    row, bias = torch.randn(1, inputs), torch.randn(outputs)
    weight = torch.randn(inputs, outputs).t() if turned else torch.randn(outputs, inputs)
    expected, with_bias = product(row, weight, bias), rows_product(row, weight, bias)
    for rows in ROWS:
        others = torch.randn(rows, inputs)
        kept = torch.arange(rows) % 3 > 0
        others[~kept] = row
        for found, same in (
            (product(others, weight, bias), expected),
            (rows_product(others, weight, bias), with_bias),
        ):
            assert found.shape == (rows, outputs)
            assert torch.equal(found[~kept], same.expand(int((~kept).sum()), outputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    inputs, outputs = shape
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    for rows in (0, 1, 40, TILE):
        x = torch.randn(rows, inputs)
        exact = x.double() @ weight.double().t()
        assert torch.allclose(product(x, weight).double(), exact, atol=1e-4)
        assert torch.allclose(rows_product(x, weight, bias).double(), exact + bias.double(), atol=1e-4)
    x = torch.randn(2, 3, 4, inputs)
    assert torch.allclose(rows_product(x, weight), x @ weight.t(), atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (64, 256), (48, 144), (192, 64), (16, 16)])
@pytest.mark.parametrize("added", [False, True])
def test_a_step_of_a_sequence_is_the_same_anywhere(shape: tuple[int, int], added: bool, threads: int) -> None:
    torch.manual_seed(2)
    tile = cells.TILE
    inputs, outputs = shape
    row, bias = torch.randn(1, inputs), torch.randn(1, outputs)
    weight = torch.randn(outputs, inputs)
    found = []
    for tiles in (1, 2, 5, 16):
        rows = tiles * tile
        x = row.repeat(rows, 1).view(tiles, tile, inputs)
        start = (bias if added else torch.zeros_like(bias)).repeat(rows, 1).view(tiles, tile, outputs)
        result = torch.baddbmm(start, x, shared(weight.t(), rows, tile)).view(rows, outputs)
        assert torch.equal(result, result[:1].expand(rows, outputs))
        found.append(result[0])
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_large_product_of_parts_of_wider_tensors() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(64, 300)[:, 20:], torch.randn(200, 300)[::2, 20:]
    expected = x.double() @ weight.double().t()
    assert torch.allclose(product(x, weight).double(), expected, atol=1e-4)
    g, inputs = torch.randn(77, 120)[:, :100], torch.randn(77, 400)[:, :300]
    assert torch.allclose(outer_sum(g, inputs).double(), g.double().t() @ inputs.double(), atol=1e-4)
