"""How good a model is on patients that one may see: exact metrics, and how far chance moves them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from client.cohort import Patients
from client.device import STEP_MEMORY
from client.dpsgd import engine_of
from client.flat import FlatParameters
from client.training import shares
from common.curves import Grid
from common.errors import StudyError
from common.histograms import EXACT_BINS, histograms, merged
from common.messages import Array, Arrays
from common.metrics import Measured, measure, value_ranges, values
from common.models import study_model
from common.objectives import scores
from common.study import Study
from common.survival import c_index, risk_sums
from simulations.table.federation import together

RESAMPLES = 1000
COVERAGE = 0.95
_AT_ONCE = 20  # resamples
_GRIDDED = {"binary", "multi-class", "multi-label"}  # whose sums all have score bins as their last axis
_KNOWN_SHARE = 0.5  # of the resamples that a metric must be defined in

USUAL_COLUMNS = {
    "binary": ("auroc", "accuracy"),
    "multi-class": ("auroc", "accuracy"),
    "multi-label": ("auroc", "accuracy"),
    "regression": ("mae", "rmse"),
    "survival": ("c_index",),
}
"""Metrics that a table shows, by task; the first one is the main one."""


def columns_of(study: Study, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics that a table of this study shows, the main one first.

    Raises:
        StudyError: if one of those that are wanted doesn't exist.
    """
    known = [field.name for field in fields(Measured)]
    for name in wanted:
        if name not in known:
            raise StudyError(f"columns: no metric is called {name!r}", remedy=f"one of {', '.join(known)}")
    return tuple(wanted) or USUAL_COLUMNS[study.objective.task]


@dataclass(frozen=True)
class Scored:
    """Some patients, and what a model says of their records.

    Attributes:
        scores: see `common.objectives.scores`.
    """

    patients: Patients
    scores: torch.Tensor

    def sums(self, study: Study, times: npt.NDArray[np.int64] | None = None) -> Arrays:
        """Exact histograms (common/histograms).

        Args:
            study: without subgroups.
            times: int64 [patients], how often each one counts; once if absent.
        """
        own, found = self.patients, self.scores
        labels, weights = own.labels.cpu(), shares(own)
        if times is not None:
            weights = weights * torch.repeat_interleave(torch.from_numpy(times), own.offsets.diff())
            there = weights > 0
            found, labels, weights = found[there], labels[there], weights[there]
        return histograms(study, found, labels, weights, EXACT_BINS)


class Scorer:
    """A study's model, which takes one set of parameters after the other."""

    def __init__(self, study: Study) -> None:
        # Who belongs to which group is left out: a table is of all patients.
        alone = study.evaluation.model_copy(update={"subgroups": (), "bands": {}})
        self.study = study.model_copy(update={"evaluation": alone})
        self._network = study_model(study)
        self._flat = FlatParameters(self._network, torch.device("cpu"))
        self._engine = engine_of(self._network, study.objective, 1.0, STEP_MEMORY)

    def load(self, parameters: Arrays) -> None:
        """Take these parameters from here on."""
        self._flat.load(parameters)
        self._network.eval()

    def scored(self, patients: Patients) -> Scored:
        """What the model says of each record."""
        return Scored(patients, scores(self.study.objective, self._engine.outputs(patients.features)).cpu())

    def measured(self, parts: Sequence[Scored]) -> Measured:
        """The metrics of all these patients together."""
        return measure(self.study, merged([part.sums(self.study) for part in parts]))

    def interval(self, scored: Scored, metric: str, seed: int) -> tuple[float, float] | None:
        """A 95 % interval of a metric, by the bootstrap's percentiles (Efron & Tibshirani 1993, chapter 13).

        Patients are drawn with replacement, each with all its records; the model stays the same.

        Args:
            metric: an attribute of `Measured`.
            seed: of the draws.

        Returns:
            Its bounds; None if the metric is undefined in half of the resamples or more.
        """
        count = len(scored.patients)
        if count == 0:
            return None
        known = self._resampled(scored, metric, np.random.default_rng(seed))
        if len(known) <= _KNOWN_SHARE * RESAMPLES:
            return None
        low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        least, most = value_ranges(self.study)[metric]
        return max(least, float(low)), min(most, float(high))

    def _resampled(self, scored: Scored, metric: str, random: np.random.Generator) -> Array:
        """The metric in each resample where it is defined, float64 [resamples]."""
        count = len(scored.patients)
        even, study = np.full(count, 1 / count), self.study
        if metric == "c_index":
            found = self._concordances(scored, random.multinomial(count, even, RESAMPLES))
            return np.asarray(found[~np.isnan(found)])
        if study.objective.task not in _GRIDDED:
            drawn = (scored.sums(study, random.multinomial(count, even)) for _ in range(RESAMPLES))
            found = np.array([float(values(study, sums).get(metric, np.nan)) for sums in drawn])
            return np.asarray(found[~np.isnan(found)])
        # Bins in which nobody is are left out: 10,000 of them, mostly empty, would take most of the time.
        whole = scored.sums(study)
        filled = [np.flatnonzero((a > 0).reshape(-1, EXACT_BINS).any(axis=0)) for a in whole.values()]
        grid = Grid(EXACT_BINS, np.unique(np.concatenate([[0], *filled])))
        parts = []
        for start in range(0, RESAMPLES, _AT_ONCE):
            times = random.multinomial(count, even, min(_AT_ONCE, RESAMPLES - start))
            sums = [scored.sums(study, each) for each in times]
            stack = {n: np.stack([each[n][..., grid.columns] for each in sums]) for n in whole}
            parts.append(values(study, stack, grid).get(metric, np.full(len(times), np.nan)))
        found = np.concatenate(parts)
        return np.asarray(found[~np.isnan(found)])

    def _concordances(self, scored: Scored, times: npt.NDArray[np.int64]) -> Array:
        """The C-index in each resample; cells of time and of risk in which nobody is are left out.

        Args:
            times: int64 [resamples, patients], how often each patient counts.
        """
        own = scored.patients
        labels, weights = own.labels.cpu().numpy(), shares(own).numpy()
        cells = risk_sums(self.study, scored.scores.numpy(), labels, weights, EXACT_BINS)["risks"]
        time, event, risk = np.unravel_index(cells.index, cells.shape)
        (whens, when), (risks, which) = (np.unique(each, return_inverse=True) for each in (time, risk))
        shape = (len(whens), 2, len(risks))
        place = (when * 2 + event) * len(risks) + which
        owner = np.repeat(np.arange(len(own)), own.offsets.diff().numpy())
        drawn = (np.bincount(place, weights * each[owner], minlength=math.prod(shape)) for each in times)
        return np.array([float(c_index(each.reshape(shape))) for each in drawn])


def joined(parts: Sequence[Scored]) -> Scored:
    """Several groups of patients as one."""
    return Scored(together([part.patients for part in parts]), torch.cat([part.scores for part in parts]))


def plain(measured: Measured) -> dict[str, Any]:
    """The metrics as plain values, without those that are undefined."""
    return {name: value for name, value in asdict(measured).items() if value is not None}
