"""The requests of many sites side by side: all go to their next task, then all tasks are done, and so on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch

from client.cohort import Patients
from client.tasks import Evaluation, Task, Training, Working, tried
from client.training import shares
from common.histograms import histograms, histograms_apart
from common.messages import Array, Arrays
from common.objectives import scores

Outcome = bytes | BaseException
Found = list[Arrays | Exception]  # for each task, in their order, what came of it or what went wrong
Do = Callable[[Sequence[Task]], Found]
Train = Callable[[Sequence[Training]], Found]


def one_by_one(tasks: Sequence[Task]) -> Found:
    """A `Do`: each task by itself."""
    return [tried(each) for each in tasks]


def evaluated(tasks: Sequence[Evaluation]) -> Found:
    """Evaluate one model for many sites in one pass: a record's outputs are the same in any company.

    If that fails, each is evaluated alone, so that who fails fails alone.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, task in enumerate(tasks):
        place = str(task.trainer.cohort.test.features.device)
        kind = id(task.parameters), task.trainer.study.digest, place, task.bins, type(task.bins)
        alike.setdefault(kind, []).append(i)
    found: Found = [ValueError("not evaluated")] * len(tasks)
    for group in alike.values():
        chosen = [tasks[i] for i in group]
        told: Sequence[Arrays | Exception] = []
        if len(chosen) > 1:
            with suppress(Exception):
                told = _in_one_pass(chosen)
        for i, each in zip(group, told or one_by_one(chosen), strict=True):
            found[i] = each
    return found


def _in_one_pass(tasks: Sequence[Evaluation]) -> list[Arrays]:
    first = tasks[0].trainer
    patients = [task.trainer.consenting(task.trainer.cohort.test) for task in tasks]
    first.flat.load(tasks[0].parameters)
    first.network.eval()
    outputs = first.engine.outputs(torch.cat([each.features for each in patients]))
    found = scores(first.study.objective, outputs).cpu()
    counts = [each.labels.shape[0] for each in patients]  # a tensor's len() takes longer
    study, bins = first.study, tasks[0].bins
    if not study.subgroup_columns:
        labels = torch.cat([each.labels for each in patients]).cpu().numpy()
        weights = _shares(patients)
        return list(histograms_apart(study, found.numpy(), labels, weights, bins, counts))
    told = []
    for own, part in zip(patients, found.split(counts), strict=True):
        groups = None if own.groups is None else own.groups.cpu()
        told.append(histograms(study, part, own.labels.cpu(), shares(own), bins, groups))
    return list(told)


def _shares(patients: Sequence[Patients]) -> Array:
    """`client.training.shares` of one site after the other, in one go."""
    if all(each.one_record_each for each in patients):
        return np.ones(sum(each.labels.shape[0] for each in patients))
    counts = np.diff(np.concatenate([each.offsets.numpy() for each in patients]))
    between = np.cumsum([len(each.offsets) for each in patients])[:-1] - 1  # one site's end, the next one's 0
    counts = np.delete(counts, between)
    return np.repeat(1.0 / counts, counts)


WORTH_A_THREAD = 0.01
"""Seconds of a training step from which on threads help: below, Python's own work on it is the most of it,
and that is done by one thread at a time."""


class Pace:
    """A `Do` that looks at the clock, and so knows how many threads are worth their while.

    Args:
        train: trains what is given.
        workers: threads at most.
    """

    def __init__(self, train: Train, workers: int) -> None:
        self._train, self._workers = train, workers
        self._step = math.nan  # seconds of a training step, the least that was seen

    def __call__(self, tasks: Sequence[Task]) -> Found:
        looking = [task for task in tasks if isinstance(task, Evaluation)]
        training = [task for task in tasks if isinstance(task, Training)]
        seen, trained = iter(evaluated(looking)), iter(self._timed(training))
        return [next(seen if isinstance(task, Evaluation) else trained) for task in tasks]

    def _timed(self, waiting: Sequence[Training]) -> Found:
        if not waiting:
            return []
        began = time.perf_counter()
        found = self._train(waiting)
        steps = sum(each.trainer.plan.steps_per_round for each in waiting)
        self._step = min((time.perf_counter() - began) / max(1, steps), self._step)
        return found

    def threads(self) -> int:
        """For the next requests; one as long as nothing was trained."""
        return self._workers if self._step >= WORTH_A_THREAD else 1


def answered(requests: Mapping[int, Working], do: Do) -> dict[int, bytes]:
    """Bring requests to their ends; returns each one's answer.

    A site that fails, be it before its tasks or in one, fails alone: its request then ends in a refusal.

    Args:
        requests: site → its request, of different vaults.
    """
    answers: dict[int, bytes] = {}
    waiting: dict[int, Task] = {}

    def step(site: int, advance: Callable[[], Task]) -> None:
        try:
            waiting[site] = advance()
        except StopIteration as end:
            answers[site] = end.value

    try:
        for site, working in requests.items():
            step(site, working.__next__)
        while waiting:
            sites, tasks = list(waiting), list(waiting.values())
            waiting.clear()
            for site, found in zip(sites, do(tasks), strict=True):
                working = requests[site]
                if isinstance(found, Exception):
                    step(site, partial(working.throw, found))
                else:
                    step(site, partial(working.send, found))
    finally:
        for working in requests.values():
            working.close()  # a vault lets no request in before the last one has ended
    return answers
