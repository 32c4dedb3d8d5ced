"""A small network as many times as there are sites, trained without autograd; see client/stacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from client.chain import Activation, Chain, trainable
from client.taps.losses import output_gradients
from client.training import Trainer
from common.messages import Array, Arrays
from common.study import Objective

_ADAM = 0.9, 0.999, 1e-8  # torch's own


@dataclass(frozen=True)
class _Layer:
    """A linear layer of some sites.

    Attributes:
        weight: [sites, outputs, inputs]; `turned` is its transpose.
        bias: [sites, 1, outputs].
        gradients: of weight and bias, as the last step left them; absent where frozen.
    """

    weight: torch.Tensor
    turned: torch.Tensor
    bias: torch.Tensor | None
    weight_gradient: torch.Tensor | None
    bias_gradient: torch.Tensor | None


@dataclass(frozen=True)
class _Learnt:
    """A parameter of some sites, its gradient, and what the optimiser keeps of it."""

    value: torch.Tensor
    gradient: torch.Tensor
    state: list[torch.Tensor]


@dataclass(frozen=True)
class _First:
    """The first sites of a stack."""

    steps: list[_Layer | Activation]
    learnt: list[_Learnt]


_STACKS: WeakKeyDictionary[Trainer, Stack] = WeakKeyDictionary()  # by the first trainer of a group


def stack_of(trainer: Trainer, sites: int) -> Stack:
    """The stack that a group used the last time, or a new one."""
    stack = _STACKS.get(trainer)
    if stack is None or stack.sites != sites:
        stack = _STACKS[trainer] = Stack(trainer, sites)
    return stack


class Stack:
    """A trainer's network as many times as there are sites, with an optimiser for each.

    Its memory is kept between rounds, and parts of it as views: to cut them out of tensors takes as long as
    small networks' arithmetic.
    """

    def __init__(self, trainer: Trainer, sites: int) -> None:
        self.sites, self._device = sites, trainer.flat.values.device
        network, settings = trainer.network, trainer.study.training.optimizer
        named = dict(network.named_parameters())
        self._names = {id(p): name for name, p in named.items()}
        self._given = dict[str, torch.Tensor]()
        self._values = {n: p.new_empty((sites, *p.shape), requires_grad=False) for n, p in named.items()}
        self._gradients = {n: torch.empty_like(self._values[n]) for n, p in named.items() if p.requires_grad}
        slots = 2 if settings.name == "adam" else 1 if settings.momentum else 0
        self._state = {n: [torch.empty_like(g) for _ in range(slots)] for n, g in self._gradients.items()}
        self._settings, self._done = settings, 0
        self._steps = Chain(network).steps
        self._first = min(
            i for i, step in enumerate(self._steps) if isinstance(step, nn.Linear) and trainable(step)
        )
        self._parts = dict[int, _First]()

    def load(self, parameters: Sequence[Arrays]) -> None:
        """Begin a round from these, of each site."""
        self._done = 0
        for name, value in self._values.items():
            self._given[name] = _given([arrays[name] for arrays in parameters], self._device)
            value.copy_(self._given[name])
        for state in self._state.values():
            for each in state:
                each.zero_()

    def step(
        self, objective: Objective, x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """One step of the first sites, down the gradients of each one's Σ weight · loss.

        Args:
            x: [sites, records, inputs]; `labels` [sites, records, …], `weights` [sites, records].
        """
        sites = x.shape[0]
        first = self._parts.get(sites)
        if first is None:
            first = self._parts[sites] = self._cut(sites)
        self._differentiate(first.steps, objective, x, labels, weights)
        self._done += 1
        for each in first.learnt:
            self._optimize(each)

    def _cut(self, sites: int) -> _First:
        def of(named: Mapping[str, torch.Tensor], parameter: object) -> torch.Tensor | None:
            found = named.get(self._names.get(id(parameter), ""))
            return None if found is None else found[:sites]

        steps: list[_Layer | Activation] = []
        for step in self._steps:
            if isinstance(step, Activation):
                steps.append(step)
                continue
            weight, bias = self._values[self._names[id(step.weight)]][:sites], of(self._values, step.bias)
            steps.append(
                _Layer(
                    weight,
                    weight.mT,
                    None if bias is None else bias[:, None],
                    of(self._gradients, step.weight),
                    of(self._gradients, step.bias),
                )
            )
        learnt = [
            _Learnt(
                self._values[name][:sites], gradient[:sites], [each[:sites] for each in self._state[name]]
            )
            for name, gradient in self._gradients.items()
        ]
        return _First(steps, learnt)

    def _differentiate(
        self,
        steps: Sequence[_Layer | Activation],
        objective: Objective,
        x: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        kept = [x]
        for step in steps:
            if isinstance(step, Activation):
                x = step.apply(x)
            elif step.bias is None:
                x = torch.bmm(x, step.turned)
            else:
                x = torch.baddbmm(step.bias, x, step.turned)
            kept.append(x)
        rows = x.flatten(0, 1), labels.flatten(0, 1), weights.flatten()
        g = output_gradients(objective, *rows).view(x.shape)
        for place in range(len(steps) - 1, self._first - 1, -1):
            step = steps[place]
            if isinstance(step, Activation):
                g = step.back(g, kept[place], kept[place + 1])
                continue
            if step.weight_gradient is not None:
                torch.bmm(g.mT, kept[place], out=step.weight_gradient)
            if step.bias_gradient is not None:
                torch.sum(g, dim=1, out=step.bias_gradient)
            if place > self._first:
                g = torch.bmm(g, step.weight)

    def _optimize(self, learnt: _Learnt) -> None:
        """As torch's SGD and Adam."""
        settings, value, gradient, state = self._settings, learnt.value, learnt.gradient, learnt.state
        if settings.weight_decay:
            gradient = gradient.add_(value, alpha=settings.weight_decay)
        if settings.name == "sgd":
            if settings.momentum:
                gradient = state[0].mul_(settings.momentum).add_(gradient)
            value.sub_(gradient, alpha=settings.learning_rate)
            return
        first, second, small = _ADAM
        mean = state[0].lerp_(gradient, 1 - first)
        square = state[1].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (1 - second**self._done) ** 0.5
        rate = settings.learning_rate / (1 - first**self._done)
        value.addcdiv_(mean, square.sqrt().div_(scale).add_(small), value=-rate)

    def updates(self) -> list[Arrays]:
        """What each site's parameters have become, less what they were."""
        moved = {name: (v - self._given[name]).cpu().numpy() for name, v in self._values.items()}
        return [{name: each[site] for name, each in moved.items()} for site in range(self.sites)]


def _given(arrays: Sequence[Array], device: torch.device) -> torch.Tensor:
    """A parameter as all sites were given it, [sites, *shape]; [1, *shape] if that is one array for all."""
    first = arrays[0]
    together = first[None] if all(each is first for each in arrays) else np.stack(arrays)
    return torch.tensor(together, device=device)
