"""Multi-head attention composed of tapped projections (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from client.rowwise import VECTOR
from client.taps.layers import Forward, Slots, project
from client.taps.parts import Slot
from client.taps.tape import Tape


def _third(slot: Slot | None, index: int) -> Slot | None:
    """The query's, key's or value's part of a packed projection."""
    if slot is None:
        return None
    size = slot.size // 3
    return Slot(slot.offset + index * size, (slot.shape[0] // 3, *slot.shape[1:]))


def attention(name: str, layer: nn.MultiheadAttention, slots: Slots, tape: Tape) -> Forward:
    """The same as `layer`'s own forward function, which has the arguments' meaning."""
    packed, own = layer.in_proj_weight, (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    bias_slots = [_third(slots(layer.in_proj_bias), i) for i in range(3)]
    weight_slots = [_third(slots(packed), i) for i in range(3)] if packed is not None else [*map(slots, own)]
    last, last_slots = layer.out_proj, (slots(layer.out_proj.weight), slots(layer.out_proj.bias))

    def heads(x: torch.Tensor, index: int) -> torch.Tensor:
        """[records, heads, length, width of a head]."""
        weight = own[index].detach() if packed is None else packed.detach().chunk(3)[index]
        bias = None if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)[index]
        found = project(tape, name, x, (weight, weight_slots[index]), (bias, bias_slots[index]))
        return found.view(*found.shape[:2], layer.num_heads, -1).transpose(1, 2)

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not layer.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = heads(query, 0), heads(key, 1), heads(value, 2)
        mask = _mask(attn_mask, key_padding_mask, layer.num_heads, q)
        dropout = layer.dropout if layer.training else 0.0
        mixed, shares = _mixed(q, k, v, mask, dropout)
        bias = None if last.bias is None else last.bias.detach()
        ours, theirs = (last.weight.detach(), last_slots[0]), (bias, last_slots[1])
        output = project(tape, name, mixed.transpose(1, 2).flatten(2), ours, theirs)
        if need_weights:
            shares = shares.mean(dim=1) if average_attn_weights else shares
        return (output if layer.batch_first else output.transpose(0, 1)), shares if need_weights else None

    return forward


def _mixed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values as each query mixes them, and its shares of them [records, heads, queries, keys].

    Widths and keys are filled up to the processor's vectors (client/rowwise): a record's matrices then lie
    alike in memory whichever record of the batch it is.
    """
    width, keys = q.shape[3], k.shape[2]
    wider, longer = -width % VECTOR, -keys % VECTOR
    if wider or longer:
        q = functional.pad(q, (0, wider))
        k, v = (functional.pad(x, (0, wider, 0, longer)) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / math.sqrt(width))[..., :keys]
    scores = scores if mask is None else scores + mask
    shares = functional.dropout(scores.softmax(dim=3), dropout)
    mixed = functional.pad(shares, (0, longer)) @ v
    return mixed[..., :width], shares


def _mask(
    pairs: torch.Tensor | None, keys: torch.Tensor | None, heads: int, like: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the scores, to fit [records, heads, queries, keys]; True in a mask means "not"."""
    result = None
    if pairs is not None:
        result = _added(pairs, like)
        if result.dim() == 3:
            result = result.unflatten(0, (-1, heads))
    if keys is not None:
        added = _added(keys, like)[:, None, None, :]
        result = added if result is None else result + added
    return result


def _added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
