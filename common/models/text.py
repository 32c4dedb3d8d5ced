"""Models for token ids: texts, and molecules written as texts.

Ids come as float32 like all features; 0 means that there is no token. What such a place holds doesn't count,
however many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from common.errors import StudyError
from common.features import Block
from common.models.registry import Hidden, Shape, register
from common.models.sequence import State, summed

Width = Annotated[int, Field(ge=1, le=4096)]


def tokens(shape: Shape, *kinds: str) -> Block:
    """The one block of a model that takes nothing but token ids.

    Raises:
        StudyError: if the study's columns are others, or hold no token ids.
    """
    block = shape.only(*kinds)
    if not block.vocabulary:
        raise StudyError(
            f"this model takes token ids; {block.name} holds none",
            remedy='give the column representation = "tokens", or choose the model mlp',
        )
    return block


class Tokens(nn.Module):
    """Token ids [records, tokens] to a table's rows, recurrent or not, and these to one row a record.

    Args:
        layer: whose states take the rows' place; the record's own last one is taken where `state` says so.
        state: where there is no layer, the rows' mean.
    """

    def __init__(self, block: Block, width: int, layer: nn.GRU | None = None, state: State = "mean") -> None:
        super().__init__()
        self.table = nn.Embedding(block.vocabulary + 1, width, padding_idx=0)
        self.layer, self._last = layer, layer is not None and state == "last"

    def forward(self, x: Tensor) -> Tensor:
        ids = x.long()
        rows: Tensor = self.table(ids)
        there = ids != 0
        if self.layer is not None:
            rows = self.layer(rows)[0]
        if self._last:
            place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
            last = (there * place).amax(dim=1, keepdim=True)  # 0: none
            return summed(rows * (place == last)[..., None])
        count = there.sum(dim=1, keepdim=True).clamp(min=1)
        return summed(rows * there[..., None]) / count


def dense(widths: tuple[int, ...], outputs: int) -> list[nn.Module]:
    """Linear layers and ReLU through these widths, and one to the outputs."""
    layers: list[nn.Module] = []
    for i, j in pairwise(widths):
        layers += [nn.Linear(i, j), nn.ReLU()]
    return [*layers, nn.Linear(widths[-1], outputs)]


@register("embedding-bag")
def embedding_bag(
    shape: Shape,
    width: Width = 32,
    hidden: Annotated[tuple[Hidden, ...], Field(max_length=32)] = (32,),
) -> nn.Module:
    """Each token's row of a table of `width` numbers, their mean over the record's tokens (as in fastText,
    Joulin et al. 2017, arXiv 1607.01759), and fully connected layers."""
    body = Tokens(tokens(shape, "text", "molecule"), width)
    head = nn.Sequential(*dense((width, *hidden), shape.outputs))
    return nn.Sequential(OrderedDict([("body", body), ("head", head)]))


def token_gru(shape: Shape, block: Block, width: int, hidden: int, state: State) -> nn.Module:
    """A table's rows through gated recurrent units, and the outputs."""
    body = Tokens(block, width, nn.GRU(width, hidden, batch_first=True), state)
    return nn.Sequential(OrderedDict([("body", body), ("head", nn.Linear(hidden, shape.outputs))]))


@register("text-gru")
def text_gru(shape: Shape, width: Width = 32, hidden: Hidden = 64, state: State = "mean") -> nn.Module:
    """Each token's row of a table, gated recurrent units over them (Cho et al. 2014, arXiv 1406.1078), and
    the outputs from the mean of the states at the record's tokens, or from the state at its last one."""
    return token_gru(shape, tokens(shape, "text"), width, hidden, state)
