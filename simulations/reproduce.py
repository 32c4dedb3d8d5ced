"""Published results, run again: FLamby's FedAvg on Fed-Heart-Disease (du Terrail et al. 2022)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.study import load_study
from server.coordinator import PARAMETERS, part
from server.report import report
from simulations.datasets import fetch, prepare
from simulations.datasets.heart_disease import flamby_features, standardised
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_study

NAME = "heart-disease-flamby"
SEEDS = (42, 43, 44, 45, 46)
# results_benchmark_fed_heart_disease at commit edacf54, mean and standard deviation over five seeds.
PUBLISHED = {"pooled test": (0.7480, 0.0268), "mean of client tests": (0.6850, 0.0283)}


@dataclass(frozen=True)
class Reproduced:
    """Accuracies of one quantity, one for each seed, beside the published mean and deviation."""

    quantity: str
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def published(self) -> tuple[float, float]:
        return PUBLISHED[self.quantity]

    @property
    def within(self) -> bool:
        """Whether the mean lies within one published standard deviation of the published mean."""
        return abs(self.mean - self.published[0]) <= self.published[1]


def flamby_heart(work: Path, mirror: Path | None, seeds: Sequence[int] = SEEDS) -> tuple[Reproduced, ...]:
    """FedAvg with FLamby's preprocessing, model, batches and rounds, without privacy.

    As FLamby does, the sites' tests are standardised by each site's own training part, and the pooled
    test by the pooled training part.

    Raises:
        DatasetError: if the data can't be had.
    """
    raw = fetch(NAME, work / "raw", mirror)
    prepare(NAME, raw, work / "sites")
    study = load_study(ready_study(NAME))
    values, labels = _pooled_test(raw)
    pooled, clients = [], []
    for seed in seeds:
        done = simulate(study, work / "sites", work / f"seed-{seed}", SimulationSettings(seed=seed))
        told = report(done.store, done.store.session(done.session))
        clients.append(statistics.fmean(s.measured.accuracy or 0.0 for s in told.sites if s.measured))
        arrays = part(done.store.checkpoint(done.session, study.algorithm.rounds + 1), PARAMETERS)
        weight, bias = sorted(arrays.values(), key=lambda a: -a.ndim)
        pooled.append(float(np.mean((values @ weight[0] + bias > 0) == labels)))
    return (
        Reproduced("pooled test", tuple(pooled)),
        Reproduced("mean of client tests", tuple(clients)),
    )


def _pooled_test(raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features of all test patients standardised by all training patients, and their labels."""
    centres = list(flamby_features(raw).values())
    values = np.concatenate([c[0] for c in centres])
    labels = np.concatenate([c[1] for c in centres])
    split = np.concatenate([c[2] for c in centres])
    return standardised(values, values[split == "train"])[split == "test"], labels[split == "test"]
