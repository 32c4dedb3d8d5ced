"""The training of many sites in one piece, for simulations: small networks cost calls more than arithmetic.

Every site keeps weights of its own, in a stack of matrices; each step computes all sites' batches at once, as
products of such stacks. What a site learns is what it would learn alone, to rounding: the same batches, from
its own stream, and the same optimiser. Private trainings (client/privately) end bit for bit where they end
alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.chain import Activation, Chain, no_chain, trainable
from client.cohort import Patients
from client.dpsgd import batch_of
from client.privately import may_join, memory, train_privately
from client.taps.losses import output_gradients
from client.tasks import Training, tried
from client.training import Trainer, plain_batch, shuffled
from common.messages import Arrays
from common.study import Objective, Optimizer

MEMORY = 1 << 28  # bytes that one group's batches of a round, parameters and activations may take
_ADAM = 0.9, 0.999, 1e-8  # torch's own

Indices = npt.NDArray[np.int64]


def together(trainings: Sequence[Training]) -> list[Arrays | Exception]:
    """Train all, stacked where that works; returns each one's update, or what went wrong with it."""
    found: list[Arrays | Exception] = [ValueError("not trained")] * len(trainings)
    for group in groups(trainings):
        chosen = [trainings[i] for i in group]
        for i, update in zip(group, _stacked_or_alone(chosen), strict=True):
            found[i] = update
    return found


def _stacked_or_alone(trainings: Sequence[Training]) -> Sequence[Arrays | Exception]:
    if len(trainings) > 1:
        train = train_privately if trainings[0].trainer.plan.private else train_together
        with suppress(Exception):  # of one of them, perhaps: alone it fails alone
            return train(trainings)
    return [tried(training) for training in trainings]


def groups(trainings: Sequence[Training]) -> list[list[int]]:
    """Which trainings may be taken at once, as places in `trainings`; each is in one group.

    Those of one study, if its network is linear layers and elementwise activations and nothing is augmented,
    whose batches fit in `MEMORY` together: without privacy those whose steps take about as many records, by
    `train_together`; with it those that `may_join`, by `train_privately`.
    """
    alike: dict[object, list[int]] = defaultdict(list)
    room: dict[object, int] = defaultdict(int)
    known: dict[str, tuple[bool, int, int]] = {}  # study → what its network is like
    for i, training in enumerate(trainings):
        trainer = training.trainer
        digest, plan = trainer.study.digest, trainer.plan
        if digest not in known:
            known[digest] = _form(trainer.network)
        fits, widest, size = known[digest]
        fits = fits and trainer.augmenter is None
        key: object = i
        kind: tuple[object, ...]
        if fits and may_join(trainer):
            taken = memory(trainer, widest)
            if taken <= MEMORY:
                kind = digest, plan.step.clipping_norm
                room[kind] += taken
                key = kind, room[kind] // MEMORY
        elif fits and not plan.private:
            patients = _patients_of(trainer)
            rows = patients.labels.shape[0]
            records = plain_batch(len(patients), plan) * -(-rows // max(1, len(patients)))
            width = patients.features.numel() // max(1, rows)
            taken = 4 * (records * (plan.steps_per_round * width + widest) + 4 * size)
            kind = digest, patients.features.device, records.bit_length()
            if rows and taken <= MEMORY:
                room[kind] += taken
                key = kind, room[kind] // MEMORY
        alike[key].append(i)
    return list(alike.values())


def train_together(trainings: Sequence[Training]) -> list[Arrays]:
    """Train one group of `groups`; returns local minus global of each, name → float32 array.

    A site's numbers are those of its own `Trainer.train` up to the rounding of float32 products.
    """
    rounds = [_drawn(training) for training in trainings]
    order = sorted(range(len(rounds)), key=lambda i: -len(rounds[i].counts))  # who is done first stands last
    trainer = trainings[0].trainer
    device = rounds[0].patients.features.device
    stack = _Stack(trainer.network, [trainings[i].parameters for i in order], device)
    batches = _Batches([rounds[i] for i in order], device)
    optimizer = _Update(trainer.study.training.optimizer, stack)
    for features, labels, weights in batches.steps():
        stack.differentiate(trainer.study.objective, features, labels, weights)
        optimizer.step(features.shape[0])
    placed = dict(zip(order, stack.updates(), strict=True))
    return [placed[i] for i in range(len(rounds))]


def _form(network: nn.Module) -> tuple[bool, int, int]:
    """Whether it is a chain of layers, the numbers that a record's pass keeps, and its parameters."""
    if no_chain(network) is not None:
        return False, 0, 0
    return True, Chain(network).widest, sum(p.numel() for p in network.parameters())


def _patients_of(trainer: Trainer) -> Patients:
    """Who trains: everyone but those whose consent is withdrawn by now."""
    return trainer.consenting(trainer.cohort.train)


# --- batches


@dataclass(frozen=True)
class _Round:
    """One site's batches of a round.

    Attributes:
        counts: records in each step.
        records: int64 [sum of counts], of all steps one after the other.
        weights: float32, of each in its step's loss: they sum to at most 1 in a step.
    """

    patients: Patients
    counts: list[int]
    records: Indices
    weights: npt.NDArray[np.float32]


def _drawn(training: Training) -> _Round:
    trainer = training.trainer
    patients, plan = _patients_of(trainer), trainer.plan
    sampling, _ = training.streams()
    steps = shuffled(len(patients), plan, sampling)
    if patients.labels.shape[0] == len(patients):  # one record each
        chosen = list(steps)
        counts = [len(each) for each in chosen]
        return _Round(patients, counts, np.concatenate(chosen), _even(tuple(counts)))
    batches = [batch_of(patients, each, plan.step, sampling) for each in steps]
    return _Round(
        patients,
        [len(batch.records) for batch in batches],
        torch.cat([batch.records for batch in batches]).numpy(),
        torch.cat([batch.weights / batch.patients for batch in batches]).numpy(),
    )


@lru_cache(maxsize=64)
def _even(counts: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """1 / its step's records, of each record."""
    return np.repeat(np.float32(1) / np.array(counts, dtype=np.float32), counts)


class _Batches:
    """All sites' batches, filled up to the largest in each step with records of weight 0.

    Args:
        rounds: of the sites, the one with the most steps first.
    """

    def __init__(self, rounds: Sequence[_Round], device: torch.device) -> None:
        steps = range(len(rounds[0].counts))
        self._active = [sum(len(r.counts) > step for r in rounds) for step in steps]
        self._widths = [
            max(r.counts[step] for r in rounds[:k]) for step, k in zip(steps, self._active, strict=True)
        ]
        columns = sum(self._widths)
        first = rounds[0].patients
        self._features = first.features.new_empty((len(rounds), columns, *first.features.shape[1:]))
        self._labels = first.labels.new_empty((len(rounds), columns, *first.labels.shape[1:]))
        weights = np.zeros((len(rounds), columns), dtype=np.float32)
        starts = list(accumulate(self._widths, initial=0))
        for site, each in enumerate(rounds):
            records = each.records
            if each.counts == self._widths[: len(each.counts)]:
                weights[site, : records.size] = each.weights
            else:
                places = np.concatenate(
                    [np.arange(s, s + n) for s, n in zip(starts, each.counts, strict=False)]
                )
                records = np.zeros(starts[len(each.counts)], dtype=np.int64)
                records[places] = each.records
                weights[site, places] = each.weights
            rows = torch.from_numpy(records).to(device)
            end = records.size
            torch.index_select(each.patients.features, 0, rows, out=self._features[site, :end])
            torch.index_select(each.patients.labels, 0, rows, out=self._labels[site, :end])
        self._weights = torch.from_numpy(weights).to(device)

    def steps(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Features [sites, records, inputs], labels [sites, records, …] and weights [sites, records] of the
        sites that are not done: the first ones."""
        start = 0
        for active, width in zip(self._active, self._widths, strict=True):
            columns = slice(start, start + width)
            features = self._features[:active, columns].flatten(start_dim=2)
            yield features, self._labels[:active, columns], self._weights[:active, columns]
            start += width


# --- networks


@dataclass(frozen=True)
class _Layer:
    """A linear layer of all sites.

    Attributes:
        weight, bias: [sites, outputs, inputs] and [sites, outputs].
        gradients: of them, as the last step left them; absent where frozen.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_gradient: torch.Tensor | None
    bias_gradient: torch.Tensor | None


class _Stack:
    """One network's parameters as many times as there are sites.

    Attributes:
        values: name → float32 [sites, *shape].
        gradients: likewise of the last step, of the parameters that learn.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[Arrays], device: torch.device) -> None:
        named = dict(network.named_parameters())
        self._parameters, self._device = parameters, device
        self.values = {name: self._stacked(name).clone() for name in named}
        self.gradients = {n: torch.zeros_like(self.values[n]) for n, p in named.items() if p.requires_grad}
        names = {id(p): name for name, p in named.items()}
        steps = Chain(network).steps
        self._steps = [s if isinstance(s, Activation) else self._layer(s, names) for s in steps]
        self._first = min(
            i for i, step in enumerate(steps) if isinstance(step, nn.Linear) and trainable(step)
        )

    def _stacked(self, name: str) -> torch.Tensor:
        """A parameter as all sites were given it, [sites, *shape]."""
        first = self._parameters[0][name]
        if all(arrays[name] is first for arrays in self._parameters):
            together = np.broadcast_to(first, (len(self._parameters), *first.shape)).copy()
        else:
            together = np.stack([arrays[name] for arrays in self._parameters])
        return torch.from_numpy(together).to(self._device)

    def _layer(self, layer: nn.Linear, names: Mapping[int, str]) -> _Layer:
        weight, bias = names[id(layer.weight)], names.get(id(layer.bias), "")
        return _Layer(
            self.values[weight], self.values.get(bias), self.gradients.get(weight), self.gradients.get(bias)
        )

    @torch.no_grad()
    def differentiate(
        self, objective: Objective, x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Write the gradients of each site's Σ weight · loss.

        Args:
            x: [sites, records, inputs] of the first sites; `labels` [sites, records, …], `weights` [sites,
                records].
        """
        sites = x.shape[0]
        kept = [x]
        for step in self._steps:
            if isinstance(step, Activation):
                x = step.apply(x)
            elif step.bias is None:
                x = torch.bmm(x, step.weight[:sites].mT)
            else:
                x = torch.baddbmm(step.bias[:sites, None], x, step.weight[:sites].mT)
            kept.append(x)
        rows = x.flatten(0, 1), labels.flatten(0, 1), weights.flatten()
        g = output_gradients(objective, *rows).view(x.shape)
        for place in range(len(self._steps) - 1, self._first - 1, -1):
            step = self._steps[place]
            if isinstance(step, Activation):
                g = step.back(g, kept[place], kept[place + 1])
                continue
            if step.weight_gradient is not None:
                torch.bmm(g.mT, kept[place], out=step.weight_gradient[:sites])
            if step.bias_gradient is not None:
                torch.sum(g, dim=1, out=step.bias_gradient[:sites])
            if place > self._first:
                g = torch.bmm(g, step.weight[:sites])

    def updates(self) -> list[Arrays]:
        """What each site's parameters have become, less what they were."""
        moved = {name: (v - self._stacked(name)).cpu().numpy() for name, v in self.values.items()}
        return [{name: each[site] for name, each in moved.items()} for site in range(len(self._parameters))]


class _Update:
    """torch's SGD and Adam on every site's row of a stack, of which the last ones may be done earlier."""

    def __init__(self, settings: Optimizer, stack: _Stack) -> None:
        self._settings, self._stack, self._done = settings, stack, 0
        slots = 2 if settings.name == "adam" else 1 if settings.momentum else 0
        self._state = {
            name: [torch.zeros_like(gradient) for _ in range(slots)]
            for name, gradient in stack.gradients.items()
        }

    def step(self, sites: int) -> None:
        """One step of the first `sites` rows."""
        self._done += 1
        for name, gradient in self._stack.gradients.items():
            state = [each[:sites] for each in self._state[name]]
            self._one(self._stack.values[name][:sites], gradient[:sites], state)

    def _one(self, value: torch.Tensor, gradient: torch.Tensor, state: Sequence[torch.Tensor]) -> None:
        settings = self._settings
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
