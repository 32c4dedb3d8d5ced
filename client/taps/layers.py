"""Forward functions of torch's layers that compute the same and tap what the sum needs.

Weights enter detached, so that the backward pass forms no gradient of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from client.rowwise import VECTOR, each_number
from client.taps.convolution import Convolution, Geometry, bias_part
from client.taps.parts import Lookups, Slot, Vectors
from client.taps.products import tapped_product
from client.taps.rows import Rows
from client.taps.tape import Tape

_TOGETHER = 2 * VECTOR  # numbers that torch's elementwise functions take at once
Forward = Callable[..., Any]
Slots = Callable[[torch.Tensor | None], Slot | None]
Maker = Callable[[str, Any, Slots, Tape], Forward]


def _detached(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.detach()


def present(*slots: Slot | None) -> list[Slot]:
    return [slot for slot in slots if slot is not None]


def project(
    tape: Tape,
    name: str,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, Slot | None],
    bias: tuple[torch.Tensor | None, Slot | None],
) -> torch.Tensor:
    """x Wᵀ + b, tapped, of x [records, …, inputs]."""
    matrix, vector = weight[0], bias[0]

    def keep(g: torch.Tensor) -> None:
        if weight[1] is None and bias[1] is None:
            return
        a = x
        if a.dim() > 3:
            a, g = a.flatten(1, -2), g.flatten(1, -2)
        tape.parts.append(Rows(present(weight[1]), present(bias[1]), a, g))

    return tapped_product(tape, name, x, matrix, vector, keep)


def linear(name: str, layer: nn.Linear, slots: Slots, tape: Tape) -> Forward:
    weight, bias = slots(layer.weight), slots(layer.bias)
    return lambda input: project(
        tape, name, input, (layer.weight.detach(), weight), (_detached(layer.bias), bias)
    )


def convolution(name: str, layer: Any, slots: Slots, tape: Tape) -> Forward:
    weight_slot, bias_slot = slots(layer.weight), slots(layer.bias)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[layer.weight.dim() - 3]
    kernel, dilation = layer.kernel_size, layer.dilation
    before: list[int] = list(layer._reversed_padding_repeated_twice)  # last dimension first, both sides
    even = before[::2] == before[1::2]
    padded = layer.padding_mode != "zeros" or not even
    padding = (0,) * len(kernel) if padded else tuple(before[::-2])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    geometry = Geometry(kernel, layer.stride, padding, dilation, layer.groups)

    def forward(input: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight.detach(), _detached(layer.bias)
        x = functional.pad(input, before, mode=mode) if padded else input
        if weight_slot is None and bias_slot is None:  # no backward pass on its account
            frozen: torch.Tensor = convolve(x, weight, bias, layer.stride, padding, dilation, layer.groups)
            return frozen

        def keep(g: torch.Tensor) -> None:
            if weight_slot is not None:
                tape.parts.append(Convolution(weight_slot, geometry, x, g))
            if bias_slot is not None:
                tape.parts.append(bias_part(bias_slot, g))

        return tape.tap(
            name, x, lambda: convolve(x, weight, bias, layer.stride, padding, dilation, layer.groups), keep
        )

    return forward


def elementwise(name: str, layer: nn.Module, slots: Slots, tape: Tape) -> Forward:
    """A function of each number, on so many that all are computed alike: torch takes what is left over at the
    end in another way, which may differ in the last bit."""

    def own(values: torch.Tensor) -> torch.Tensor:
        return type(layer).forward(layer, values)  # type: ignore[no-any-return]

    def forward(input: torch.Tensor) -> torch.Tensor:
        count = input.numel()
        if count % _TOGETHER == 0 and input.is_contiguous():
            return each_number(own, input)
        filled = functional.pad(input.flatten(), (0, -count % _TOGETHER))
        return each_number(own, filled)[:count].view(input.shape)

    return forward


def _group_norm(
    name: str,
    x: torch.Tensor,
    how: tuple[int, float],
    affine: tuple[nn.Parameter | None, nn.Parameter | None],
    slots: Slots,
    tape: Tape,
) -> torch.Tensor:
    """Group normalisation with a copy of scale and shift for each record: as one record with as many more
    channels and groups, of which torch's own kernel gives the gradients per channel."""
    groups, eps = how
    records, channels = x.shape[:2]
    if torch.is_grad_enabled():
        tape.check(name, x)
    copies: list[torch.Tensor | None] = []
    for parameter in affine:
        if parameter is None:
            copies.append(None)
            continue
        copy = parameter.detach().repeat(records)
        slot = slots(parameter)
        if slot is not None and torch.is_grad_enabled():
            copy.requires_grad_().register_hook(_keep_vectors(tape, slot, records))
        copies.append(copy)
    inner = x.reshape(1, records * channels, -1)
    found: torch.Tensor = torch.native_group_norm(
        inner, copies[0], copies[1], 1, records * channels, inner.shape[2], records * groups, eps
    )[0]
    return found.view(x.shape)


def _keep_vectors(tape: Tape, slot: Slot, records: int) -> Callable[[torch.Tensor], None]:
    return lambda g: tape.parts.append(Vectors(slot, g.view(records, -1)))


def group_norm(name: str, layer: nn.GroupNorm, slots: Slots, tape: Tape) -> Forward:
    how, affine = (layer.num_groups, layer.eps), (layer.weight, layer.bias)
    return lambda input: _group_norm(name, input, how, affine, slots, tape)


def instance_norm(name: str, layer: Any, slots: Slots, tape: Tape) -> Forward:
    how, affine = (layer.num_features, layer.eps), (layer.weight, layer.bias)

    def forward(input: torch.Tensor) -> torch.Tensor:
        layer._check_input_dim(input)
        return _group_norm(name, input, how, affine, slots, tape)

    return forward


def layer_norm(name: str, layer: nn.LayerNorm, slots: Slots, tape: Tape) -> Forward:
    weight_slot, bias_slot = slots(layer.weight), slots(layer.bias)
    shape, size = list(layer.normalized_shape), math.prod(layer.normalized_shape)

    def forward(input: torch.Tensor) -> torch.Tensor:
        statistics: list[torch.Tensor] = []

        def compute() -> torch.Tensor:
            weight, bias = _detached(layer.weight), _detached(layer.bias)
            output, *rest = torch.native_layer_norm(input, shape, weight, bias, layer.eps)
            statistics.extend(each.detach() for each in rest)
            return output

        def keep(g: torch.Tensor) -> None:
            flat = g.reshape(len(g), -1, size)
            if weight_slot is not None:
                mean, scale = statistics
                normal = ((input.detach() - mean) * scale).view(flat.shape)
                tape.parts.append(Vectors(weight_slot, (flat * normal).sum(dim=1)))
            if bias_slot is not None:
                tape.parts.append(Vectors(bias_slot, flat.sum(dim=1)))

        return tape.tap(name, input, compute, keep)

    return forward


def embedding(name: str, layer: nn.Embedding, slots: Slots, tape: Tape) -> Forward:
    slot, ignored = slots(layer.weight), layer.padding_idx

    def forward(input: torch.Tensor) -> torch.Tensor:
        return look_up(tape, name, input, layer.weight.detach(), slot, ignored)

    return forward


def look_up(
    tape: Tape, name: str, indices: torch.Tensor, weight: torch.Tensor, slot: Slot | None, ignored: int | None
) -> torch.Tensor:
    """Rows of a table, tapped, for indices [records, …]."""

    def keep(g: torch.Tensor) -> None:
        if slot is not None:
            flat = indices.reshape(len(indices), -1)
            tape.parts.append(Lookups(slot, flat, g.reshape(*flat.shape, -1), ignored))

    return tape.tap(name, indices, lambda: functional.embedding(indices, weight), keep)


def embedding_bag(name: str, layer: nn.EmbeddingBag, slots: Slots, tape: Tape) -> Forward:
    """Bags as rows of indices [records, rows]; mode sum or mean (`covers` refuses others)."""
    slot, ignored = slots(layer.weight), layer.padding_idx

    def forward(
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tape.check(name, input if offsets is None and input.dim() == 2 else input.new_empty(()))
        rows = look_up(tape, name, input, layer.weight.detach(), slot, ignored)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[..., None]
        if ignored is None:
            return rows.sum(dim=1) if layer.mode == "sum" else rows.mean(dim=1)
        counted = (input != ignored)[..., None].to(rows.dtype)
        summed = (rows * counted).sum(dim=1)
        return summed if layer.mode == "sum" else summed / counted.sum(dim=1).clamp(min=1.0)

    return forward
