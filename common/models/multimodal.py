"""Models for columns of several kinds."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from common.features import Block
from common.models.imaging import Stages, convolutions
from common.models.registry import Hidden, Shape, register
from common.models.sequence import Recurrent
from common.models.text import Tokens, Width, dense


class _Fusion(nn.Module):
    """A branch for each block, side by side, and what reads them."""

    def __init__(self, blocks: tuple[Block, ...], branches: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self._places = [slice(block.start, block.start + block.width) for block in blocks]
        self.branches, self.head = nn.ModuleList(branches), head

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x[:, place]) for place, branch in zip(self._places, self.branches, strict=True)]
        outputs: Tensor = self.head(torch.cat(parts, dim=1))
        return outputs


@register("fusion")
def fusion(
    shape: Shape,
    channels: Stages = (16, 32),
    table: Hidden = 32,
    embedding: Width = 32,
    state: Hidden = 32,
    hidden: Annotated[tuple[Hidden, ...], Field(max_length=32)] = (32,),
) -> nn.Module:
    """Columns of any kinds: what each one's branch makes of it is put side by side, and goes through fully
    connected layers of `hidden` units (intermediate fusion: Baltrušaitis et al. 2019, arXiv 1705.09406).

    Branches: `table` units from numbers, codes and fingerprints; a CNN of these `channels` from an image; the
    mean of `embedding` numbers a token from a text; gated recurrent units with this `state` from a series and
    from a molecule's tokens. They are branches.0 … in the columns' order.
    """
    blocks = shape.blocks or (Block("table", "table", 0, shape.inputs, (shape.inputs,)),)
    branches: list[nn.Module] = []
    widths: list[int] = []
    for block in blocks:
        if block.kind == "image":
            branch, width = convolutions(block, channels), channels[-1]
        elif block.kind == "series":
            layer = nn.GRU(block.shape[1], state, batch_first=True)
            branch, width = Recurrent(layer, block, "last"), state
        elif block.kind == "text":
            branch, width = Tokens(block, embedding), embedding
        elif block.vocabulary:
            layer = nn.GRU(embedding, state, batch_first=True)
            branch, width = Tokens(block, embedding, layer, "last"), state
        else:
            branch, width = nn.Sequential(nn.Linear(block.width, table), nn.ReLU()), table
        branches.append(branch)
        widths.append(width)
    head = nn.Sequential(*dense((sum(widths), *hidden), shape.outputs))
    return _Fusion(blocks, branches, head)
