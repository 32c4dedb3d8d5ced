"""The training of many sites in one piece, for simulations: small networks cost calls more than arithmetic.

Every site keeps weights of its own, in a stack of matrices; each step computes all sites' batches at once, as
products of such stacks. What a site learns is what it would learn alone, to rounding: the same batches, from
its own stream, and the same optimiser. Private trainings (client/privately) end bit for bit where they end
alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from client.augment import augmenter_of
from client.batches import batch_of
from client.chain import Chain, no_chain
from client.cohort import Patients
from client.privately import may_join, memory, train_privately
from client.stack import stack_of
from client.tasks import Training, tried
from client.training import Trainer, plain_batch, shuffled
from common.messages import Arrays
from common.models import study_model
from common.study import Study

MEMORY = 1 << 28  # bytes that one group's batches of a round, parameters and activations may take
ENOUGH = 1 << 24, 16  # bytes, and sites, from which on more of them at once are no faster

Indices = npt.NDArray[np.int64]


def together(trainings: Sequence[Training]) -> list[Arrays | Exception]:
    """Train all, stacked where that works; returns each one's update, or what went wrong with it."""
    found: list[Arrays | Exception] = [ValueError("not trained")] * len(trainings)
    for group in groups(trainings):
        chosen = [trainings[i] for i in group]
        for i, update in zip(group, _stacked_or_alone(chosen), strict=True):
            found[i] = update
    return found


def may_stack(study: Study) -> bool:
    """Whether sites may train the study's network in one piece; else none gains by waiting for others."""
    return augmenter_of(study) is None and no_chain(study_model(study)) is None


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
    filled: dict[object, tuple[int, float]] = {}  # kind → groups before its last one, bytes of that one
    for i, training in enumerate(trainings):
        company = _COMPANY.get(training.trainer)
        if company is None:
            company = _COMPANY[training.trainer] = _company(training.trainer)
        key: object = i
        if company.taken <= MEMORY:
            before, taken = filled.get(company.kind, (0, 0.0))
            if taken + company.taken > company.room:
                before, taken = before + 1, 0.0
            filled[company.kind] = before, taken + company.taken
            key = company.kind, before
        alike[key].append(i)
    return list(alike.values())


@dataclass(frozen=True)
class _Company:
    """Whom a trainer may share a group with: those of the same kind, while all fit in its `room`.

    Attributes:
        taken: bytes; infinite for who trains alone.
    """

    kind: tuple[object, ...]
    taken: float

    @property
    def room(self) -> float:
        """Bytes."""
        least, sites = ENOUGH
        return min(MEMORY, max(least, sites * self.taken))


_COMPANY: WeakKeyDictionary[Trainer, _Company] = WeakKeyDictionary()


def _company(trainer: Trainer) -> _Company:
    """By the cohort as it was read: who withdrew since makes the work smaller."""
    digest, plan, network = trainer.study.digest, trainer.plan, trainer.network
    alone = _Company((), math.inf)
    if trainer.augmenter is not None or no_chain(network) is not None:
        return alone
    widest = Chain(network).widest  # numbers that a record's pass keeps
    if may_join(trainer):
        return _Company((digest, plan.step.clipping_norm), memory(trainer, widest))
    patients = trainer.cohort.train
    rows = patients.labels.shape[0]
    if plan.private or not rows:
        return alone
    records = plain_batch(len(patients), plan) * -(-rows // max(1, len(patients)))
    width = patients.features.numel() // rows
    size = sum(p.numel() for p in network.parameters())
    taken = 4 * (records * (plan.steps_per_round * width + widest) + 4 * size)
    return _Company((digest, patients.features.device, records.bit_length()), taken)


def train_together(trainings: Sequence[Training]) -> list[Arrays]:
    """Train one group of `groups`; returns local minus global of each, name → float32 array.

    A site's numbers are those of its own `Trainer.train` up to the rounding of float32 products.
    """
    rounds = [_drawn(training) for training in trainings]
    order = sorted(range(len(rounds)), key=lambda i: -len(rounds[i].counts))  # who is done first stands last
    trainer = trainings[0].trainer
    with torch.no_grad():
        batches = _Batches([rounds[i] for i in order], rounds[0].patients.features.device)
        stack = stack_of(trainer, len(rounds))
        stack.load([trainings[i].parameters for i in order])
        for features, labels, weights in batches.steps():
            stack.step(trainer.study.objective, features, labels, weights)
        placed = dict(zip(order, stack.updates(), strict=True))
    return [placed[i] for i in range(len(rounds))]


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
    patients, plan = trainer.consenting(trainer.cohort.train), trainer.plan
    sampling, _ = training.streams()
    steps = shuffled(len(patients), plan, sampling)
    if patients.one_record_each:
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
        for site, each in enumerate(rounds):
            records = each.records
            if each.counts == self._widths[: len(each.counts)]:
                weights[site, : records.size] = each.weights
            else:
                end, places = _places(tuple(each.counts), tuple(self._widths))
                records = np.zeros(end, dtype=np.int64)
                records[places] = each.records
                weights[site, places] = each.weights
            _gather(each.patients.features, records, self._features, site)
            _gather(each.patients.labels, records, self._labels, site)
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


@lru_cache(maxsize=256)
def _places(counts: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, Indices]:
    """Columns that steps of these widths take up, and those of them that a site's records fill."""
    starts = list(accumulate(widths, initial=0))
    found = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=False)]
    return starts[len(counts)], np.concatenate(found)


def _gather(source: torch.Tensor, rows: Indices, into: torch.Tensor, site: int) -> None:
    """Write rows of [records, …] from the beginning of a site's part of [sites, columns, …]."""
    if source.device.type == "cpu":  # numpy's calls take less time for so few numbers
        source.numpy().take(rows, axis=0, out=into.numpy()[site, : rows.size], mode="clip")
    else:
        chosen = torch.from_numpy(rows).to(source.device)
        torch.index_select(source, 0, chosen, out=into[site, : rows.size])
