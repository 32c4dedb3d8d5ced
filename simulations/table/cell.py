"""One cell of a table: a row trained with one seed, and what its model is worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.files import Strict
from simulations.benchmarks.sites import peak_bytes
from simulations.engine import SimulationSettings
from simulations.table.federation import POOLED, Federation, federation_of, pooled
from simulations.table.rows import Row
from simulations.table.scoring import Scored, Scorer, joined, plain
from simulations.table.training import Trained, alone, federated

Metrics = dict[str, Any]


class Result(Strict):
    """What a cell came to.

    Attributes:
        sites: site → metrics on its own test patients; of each site's own model where each trains alone. Of
            a left-out site also, as `ALL`, those on all its patients, none of whom took part.
        whole: metrics on all sites' test patients together; where each site trains alone, the mean of what
            the sites' models come to. Empty where a site is left out.
        interval: 95 % interval of the main metric on those patients (of a left-out site: on all of its own).
        epsilon: the largest that a site spent per patient; None without privacy.
        seconds, peak_bytes: of the process that did it, from reading to metrics; without the interval.
    """

    format: Literal[1] = 1
    sites: dict[str, Metrics]
    whole: Metrics
    interval: tuple[float, float] | None
    epsilon: float | None
    seconds: float
    peak_bytes: int


ALL = "(all patients)"


@dataclass(frozen=True)
class Cell:
    """Attributes:
    sites: folder of site folders.
    metric: that the interval is of.
    workers: threads of a simulation at most.
    initial: the file of weights that the study names, if it names one.
    """

    row: Row
    seed: int
    sites: Path
    metric: str
    workers: int = 1
    initial: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


@dataclass(frozen=True)
class _Tested:
    """What a cell came to, but for the interval.

    Attributes:
        everyone: whom the interval is of, and what the scorer's model says of them; None: there is no
            interval.
    """

    sites: dict[str, Metrics]
    whole: Metrics
    epsilon: float | None
    scorer: Scorer
    everyone: Scored | None


def compute(cell: Cell, work: Path) -> Result:
    """Train and test.

    Args:
        work: an empty folder for what comes up meanwhile; the caller removes it.

    Raises:
        FedwardError: as training does.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)  # as a vault does: results don't depend on the machine's cores
    federation = federation_of(cell.row.study, cell.sites, cell.seed)
    do = {"pooled": _pooled, "federated": _federated, "local": _local, "left-out": _left_out}
    tested = do[cell.row.kind](cell, federation, work)
    seconds, memory = time.perf_counter() - began, peak_bytes()
    everyone = tested.everyone
    return Result(
        sites=tested.sites,
        whole=tested.whole,
        interval=None if everyone is None else tested.scorer.interval(everyone, cell.metric, cell.seed),
        epsilon=tested.epsilon,
        seconds=seconds,
        peak_bytes=memory,
    )


def _pooled(cell: Cell, federation: Federation, work: Path) -> _Tested:
    study, names = cell.row.study, list(federation.records)
    scaling = federation.exact_scaling(names)
    cohorts = federation.cohorts(scaling)
    computing = federation.computing[names[0]]
    plan = federation.pooled_plan(cohorts)
    parameters = alone(study, pooled(cohorts), plan, POOLED, cell.seed, computing, cell.initial)
    return _one_model(federation, Trained(parameters, scaling))


def _federated(cell: Cell, federation: Federation, work: Path) -> _Tested:
    return _one_model(federation, _session(cell, work))


def _session(cell: Cell, work: Path) -> Trained:
    settings = SimulationSettings(
        workers=cell.workers, seed=cell.seed, exact_metrics=True, initial=cell.initial
    )
    return federated(cell.row.study, cell.sites, work, settings, cell.row.site)


def _one_model(federation: Federation, trained: Trained) -> _Tested:
    """One model at all sites."""
    scorer = Scorer(federation.study)
    scorer.load(trained.parameters)
    cohorts = federation.cohorts(trained.scaling)
    parts = {name: scorer.scored(cohort.test) for name, cohort in cohorts.items()}
    return _Tested(
        sites={name: plain(scorer.measured([part])) for name, part in parts.items()},
        whole=plain(scorer.measured(list(parts.values()))),
        epsilon=trained.epsilon,
        scorer=scorer,
        everyone=joined(list(parts.values())),
    )


def _local(cell: Cell, federation: Federation, work: Path) -> _Tested:
    """Each site's own model, at that site and at all."""
    study, scorer = cell.row.study, Scorer(cell.row.study)
    own: dict[str, Metrics] = {}
    everywhere = []
    for name in federation.records:
        cohorts = federation.cohorts(federation.exact_scaling([name]))
        computing = federation.computing[name]
        plan = federation.plan(name)
        scorer.load(alone(study, cohorts[name], plan, name, cell.seed, computing, cell.initial))
        parts = {other: scorer.scored(cohort.test) for other, cohort in cohorts.items()}
        own[name] = plain(scorer.measured([parts[name]]))
        everywhere.append(plain(scorer.measured(list(parts.values()))))
    return _Tested(sites=own, whole=mean(everywhere), epsilon=None, scorer=scorer, everyone=None)


def _left_out(cell: Cell, federation: Federation, work: Path) -> _Tested:
    """The others' model at a site that took no part."""
    site = str(cell.row.site)
    trained = _session(cell, work)
    scorer = Scorer(cell.row.study)
    scorer.load(trained.parameters)
    cohort = federation.only(site).cohorts(trained.scaling)[site]
    test, train = scorer.scored(cohort.test), scorer.scored(cohort.train)
    everyone = joined([train, test])
    return _Tested(
        sites={site: plain(scorer.measured([test])), ALL: plain(scorer.measured([everyone]))},
        whole={},
        epsilon=trained.epsilon,
        scorer=scorer,
        everyone=everyone,
    )


def mean(parts: Sequence[Metrics]) -> Metrics:
    """The mean of each number over those that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    known = {n: [p[n] for p in parts if isinstance(p.get(n), int | float)] for n in names}
    return {name: statistics.fmean(values) for name, values in known.items() if values}
