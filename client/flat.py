"""All parameters of a network in one tensor: loading, reading and an optimiser's step touch it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from common.messages import Array
from common.study import Optimizer


class FlatParameters:
    """Makes a network's parameters views of one float32 tensor: the trainable ones first, in their order.

    Args:
        network: on `device` already; moving or retyping it later undoes this.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        named = dict(network.named_parameters())
        ordered = sorted(named, key=lambda name: not named[name].requires_grad)  # stable
        self.size = sum(p.numel() for p in named.values() if p.requires_grad)
        self._places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        offset = 0
        for name in ordered:
            count = named[name].numel()
            self._places[name] = slice(offset, offset + count), tuple(named[name].shape)
            offset += count
        self._names = list(named)
        self._host = np.empty(offset, dtype=np.float32)
        self.values = torch.from_numpy(self._host)
        if device.type != "cpu":
            self.values = self.values.to(device)
        with torch.no_grad():
            for name, (where, shape) in self._places.items():
                self.values[where].view(shape).copy_(named[name])
                named[name].data = self.values[where].view(shape)
        self.trainable = nn.Parameter(self.values[: self.size])

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Overwrite all parameters: name → float32 array."""
        for name, (where, shape) in self._places.items():
            self._host[where].reshape(shape)[...] = arrays[name]
        if self.values.device.type != "cpu":
            self.values.copy_(torch.from_numpy(self._host))

    def since(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        """What was added to these arrays, name → new float32 array."""
        if self.values.device.type != "cpu":
            torch.from_numpy(self._host).copy_(self.values)
        found = {}
        for name in self._names:
            where, shape = self._places[name]
            found[name] = np.subtract(self._host[where].reshape(shape), arrays[name])
        return found


def flat_step(settings: Optimizer, flat: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A new optimiser's step on one flat parameter, given its gradient (which it may overwrite).

    Every optimiser here works number by number, so the result is that of torch.optim on the parameters
    one by one, bit for bit. Its state never outlives the noised gradients that it saw.
    """
    if settings.name == "adam":
        return _adam(settings, flat)
    rate, decay, momentum = settings.learning_rate, settings.weight_decay, settings.momentum
    values, velocity = flat.detach(), list[torch.Tensor]()

    def step(gradient: torch.Tensor) -> None:
        """As torch.optim.SGD, without what that costs for 31 numbers."""
        if decay:
            gradient.add_(values, alpha=decay)
        if momentum:
            if velocity:
                gradient = velocity[0].mul_(momentum).add_(gradient)
            else:
                velocity.append(gradient.clone())
        values.add_(gradient, alpha=-rate)

    return step


def _adam(settings: Optimizer, flat: nn.Parameter) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.Adam(
        [flat], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=False
    )

    def step(gradient: torch.Tensor) -> None:
        flat.grad = gradient
        optimizer.step()
        flat.grad = None

    return step
