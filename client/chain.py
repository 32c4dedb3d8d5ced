"""Linear layers and elementwise activations, one after the other, without autograd.

What is computed for a record is the same bit for bit, whoever else is there (client/rowwise says why): rows
go through in whole tiles, products are `rowwise.product`, all else is elementwise on whole vectors or goes
row by row. Before a number of rows is used for the first time, a network of the same form with weights of
its own tries it with one record in every row (`Chain.uniform`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from client.matrix import is_large, large_product
from client.rowwise import TILE, VECTOR, each_number, product
from client.taps.losses import output_gradients
from common.objectives import blank_labels, tried_objective
from common.study import Objective

log = logging.getLogger("fedward.training")

Slopes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function and what takes output gradients back through it: (g, input, output) →."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    back: Slopes
    in_place: Callable[[torch.Tensor], torch.Tensor] | None = None


def _gelu(layer: nn.GELU) -> Activation:
    how = layer.approximate
    return Activation(
        lambda x: each_number(lambda some: functional.gelu(some, approximate=how), x),
        lambda g, x, y: each_number(lambda a, b: _aten.gelu_backward(a, b, approximate=how), g, x),
    )


_ACTIVATIONS: dict[type[nn.Module], Callable[..., Activation]] = {
    nn.ReLU: lambda layer: Activation(
        torch.relu, lambda g, x, y: _aten.threshold_backward(g, y, 0), torch.relu_
    ),
    nn.Tanh: lambda layer: Activation(
        lambda x: each_number(torch.tanh, x), lambda g, x, y: each_number(_aten.tanh_backward, g, y)
    ),
    nn.Sigmoid: lambda layer: Activation(
        lambda x: each_number(torch.sigmoid, x), lambda g, x, y: each_number(_aten.sigmoid_backward, g, y)
    ),
    nn.GELU: _gelu,
}

Tapped = tuple[nn.Linear, torch.Tensor, torch.Tensor]
"""A layer, its inputs [rows, inputs] and its output gradients [rows, outputs]."""


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A network's layers in the order in which they are applied, as far as `nn.Sequential` tells it."""
    if type(network) is nn.Sequential:
        for name, layer in network._modules.items():  # named_children() leaves out what is there twice
            if layer is None:
                continue
            yield from ((f"{name}.{inner}" if inner else name, each) for inner, each in _layers(layer))
    else:
        yield "", network


def no_chain(network: nn.Module) -> str | None:
    """None if `Chain` computes this network; else why not: layer's name and type."""
    seen: set[int] = set()
    for place, (name, layer) in enumerate(_layers(network)):
        called = f"{name or 'network'} ({type(layer).__name__})"
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return f"{called}: something hangs on it"
        if type(layer) in _ACTIVATIONS or type(layer) is nn.Identity:
            continue
        if type(layer) is nn.Flatten and place == 0 and (layer.start_dim, layer.end_dim) == (1, -1):
            continue
        if type(layer) is not nn.Linear:
            return f"{called}: neither linear nor an elementwise activation"
        own = dict(layer.named_parameters(recurse=False))
        if not own.keys() <= {"weight", "bias"} or any(p.dtype != torch.float32 for p in own.values()):
            return f"{called}: it has other parameters than float32 weights and biases"
        if any(id(p) in seen for p in own.values()):
            return f"{called}: it shares its weights"
        seen |= {id(p) for p in own.values()}
    return None if seen else "it has no linear layer"


def trainable(layer: nn.Linear) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


Places = tuple[slice, slice | None]
"""Of a layer's weight, and of its bias if it has one."""


class EachTile:
    """Weights of its own for each tile of rows, in the place of a network's; see `Chain.tapped`.

    A tile goes through the kernel of `rowwise.product`, and so gives the same bits as there.

    Args:
        numbers: float32 [tiles, numbers], each tile's parameters one after the other.
        places: where the numbers of a layer's weight and bias stand.
    """

    def __init__(self, numbers: torch.Tensor, places: Mapping[nn.Linear, Places]) -> None:
        self._numbers, self._places = numbers, places

    def forward(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """What the layer makes of [rows, inputs]."""
        found, bias = _tile_products(x, self._weight(layer)), self._places[layer][1]
        if bias is not None:
            found.view(-1, TILE, layer.out_features).add_(self._numbers[:, None, bias])
        return found

    def back(self, layer: nn.Linear, g: torch.Tensor) -> torch.Tensor:
        """Gradients by the layer's inputs, of those by its outputs [rows, outputs]."""
        return _tile_products(g, self._weight(layer).mT)

    def _weight(self, layer: nn.Linear) -> torch.Tensor:
        numbers = self._numbers[:, self._places[layer][0]]
        return numbers.view(-1, layer.out_features, layer.in_features)


def _tile_products(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x weightᵀ, [rows, outputs], of rows [rows, inputs] and each tile's weight [tiles, outputs, inputs]."""
    tiles, outputs, inputs = weights.shape
    if is_large(x, outputs):
        return torch.cat([large_product(*each) for each in zip(x.split(TILE), weights, strict=True)])
    if outputs % VECTOR:
        weights = functional.pad(weights, (0, 0, 0, -outputs % VECTOR))
    found = torch.bmm(x.reshape(tiles, TILE, inputs), weights.mT)
    return found.flatten(0, 1)[:, :outputs]


class _Own:
    """The layers' own weights, as `EachTile`."""

    def forward(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return product(x, layer.weight, layer.bias)

    def back(self, layer: nn.Linear, g: torch.Tensor) -> torch.Tensor:
        return product(g, layer.weight.t())


_OWN = _Own()


class Chain:
    """A network of which `no_chain` says nothing."""

    def __init__(self, network: nn.Module) -> None:
        self.steps: list[nn.Linear | Activation] = []
        form: list[object] = []
        for _, layer in _layers(network):
            if isinstance(layer, nn.Linear):
                form.append((layer.in_features, layer.out_features, layer.bias is not None))
                self.steps.append(layer)
            elif type(layer) in _ACTIVATIONS:
                form.append(repr(layer))
                self.steps.append(_ACTIVATIONS[type(layer)](layer))
        self.layers = [step for step in self.steps if isinstance(step, nn.Linear)]
        self._form = tuple(form)
        learning = [i for i, s in enumerate(self.steps) if isinstance(s, nn.Linear) and trainable(s)]
        self._learning = frozenset(learning)
        self._first = min(learning, default=len(self.steps))  # the backward pass ends there

    def __len__(self) -> int:
        """Linear layers and activations."""
        return len(self.steps)

    @property
    def widest(self) -> int:
        """Numbers that a record's pass keeps, or more."""
        return sum(2 * layer.in_features + 3 * layer.out_features for layer in self.layers)

    @torch.no_grad()
    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, outputs] of float32 [rows, inputs]; rows: whole tiles."""
        for step, after in self._in_order():
            x = _applied(_OWN, step, x, after)
        return x

    @torch.no_grad()
    def tapped(
        self,
        objective: Objective,
        x: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        layers: EachTile | _Own = _OWN,
    ) -> list[Tapped]:
        """Every trainable layer with what went in and the gradient of Σ weight · loss by what came out.

        Args:
            x: float32 [rows, inputs]; rows: whole tiles.
            labels, weights: [rows].
            layers: what the layers multiply by; their own weights unless told otherwise.
        """
        kept = [x]
        for step, after in self._in_order():
            kept.append(_applied(layers, step, kept[-1], after))
        g = output_gradients(objective, kept[-1], labels, weights)
        found: list[Tapped] = []
        for place in range(len(self.steps) - 1, self._first - 1, -1):
            step = self.steps[place]
            if isinstance(step, Activation):
                g = step.back(g, kept[place], kept[place + 1])
                continue
            if place in self._learning:
                found.append((step, kept[place], g))
            if place > self._first:
                g = layers.back(step, g)
        return found

    def _in_order(self) -> Iterator[tuple[nn.Linear | Activation, bool]]:
        """Each step, and whether it follows a linear layer, whose output nobody needs any more."""
        after = False
        for step in self.steps:
            yield step, after
            after = isinstance(step, nn.Linear)

    @torch.no_grad()
    def uniform(self, objective: Objective, rows: int, *, each_tile: bool = False) -> bool:
        """Whether so many rows with the same record come out alike to the last bit, and as one tile does.

        Tried once in a process for each form of network, with weights that depend on nobody.

        Args:
            each_tile: as they go through `EachTile`.
        """
        objective, device = tried_objective(objective), self.layers[0].weight.device
        key = (self._form, objective, rows, device, torch.get_num_threads(), each_tile)
        with _LOCK:
            known = _FOUND.get(key)
        if known is None:
            known = self._tried(objective, rows, device, each_tile)
            if not known:
                log.warning("on this machine a product of %d rows depends on the row: one at a time", rows)
            with _LOCK:
                _FOUND[key] = known
        return known

    def _tried(self, objective: Objective, rows: int, device: torch.device, each_tile: bool) -> bool:
        random = torch.Generator().manual_seed(rows)
        shadow = Chain.__new__(Chain)
        shadow._first, shadow.steps, shadow.layers = 0, [], []
        shadow._learning = frozenset(range(len(self.steps)))
        for step in self.steps:
            if isinstance(step, nn.Linear):
                step = _drawn(step, random, device)
                shadow.layers.append(step)
            shadow.steps.append(step)
        record = torch.randn(shadow.layers[0].in_features, generator=random).to(device)

        def taps(count: int, layers: EachTile | _Own) -> Iterator[torch.Tensor]:
            labels = blank_labels(objective, count, device)
            weights = torch.ones(count, device=device)
            found = shadow.tapped(objective, record.repeat(count, 1), labels, weights, layers)
            for _, x, g in found[:-1]:
                yield from (x, g)
            yield found[-1][2]  # what the first layer gets is the record

        layers = shadow._repeated(rows // TILE) if each_tile else _OWN
        return all(
            bool((_bits(many) == _bits(one[0])).all())
            for many, one in zip(taps(rows, layers), taps(TILE, _OWN), strict=True)
        )

    def _repeated(self, tiles: int) -> EachTile:
        """The same weights for each of some tiles, laid out as those of many networks are."""
        own, places, start = list[torch.Tensor](), dict[nn.Linear, Places](), 0
        for layer in self.layers:
            own += [p.detach().flatten() for p in (layer.weight, layer.bias) if p is not None]
            weight = slice(start, start + layer.weight.numel())
            start = weight.stop if layer.bias is None else weight.stop + layer.out_features
            places[layer] = weight, None if layer.bias is None else slice(weight.stop, start)
        numbers = functional.pad(torch.cat(own), (0, -start % VECTOR))
        return EachTile(numbers.repeat(tiles, 1), places)


def _applied(
    layers: EachTile | _Own, step: nn.Linear | Activation, x: torch.Tensor, after: bool
) -> torch.Tensor:
    if isinstance(step, Activation):
        return step.in_place(x) if after and step.in_place is not None else step.apply(x)
    return layers.forward(step, x)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """As integers; all zeros alike, because a zero's sign changes no sum, and one tile may have another."""
    return values.add(0.0).contiguous().view(torch.int32)


def _drawn(layer: nn.Linear, random: torch.Generator, device: torch.device) -> nn.Linear:
    """A layer of the same form with random weights, of either sign and of many sizes."""
    made = nn.Linear.__new__(nn.Linear)  # whose own start would use up torch's generator
    nn.Module.__init__(made)
    made.in_features, made.out_features = layer.in_features, layer.out_features
    weight = torch.randn(layer.weight.shape, generator=random).mul_(layer.in_features**-0.5)
    made.weight = nn.Parameter(weight.to(device))
    bias = None if layer.bias is None else torch.randn(layer.bias.shape, generator=random).to(device)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return made


_FOUND: dict[tuple[object, ...], bool] = {}
_LOCK = threading.Lock()
