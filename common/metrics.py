"""Metrics as mergeable sums: a site sends histograms of scores by label, never a score or a row.

A test patient adds one unit in all, shared by its records, so that one patient changes a histogram by
at most 1 (the sensitivity that noise is scaled to). Sums of sites give the metrics of all patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.messages import Array, Arrays
from common.study import Study

if TYPE_CHECKING:
    import torch

EXACT_BINS = 10_000
CALIBRATION_GROUPS = 10


@dataclass(frozen=True)
class Measured:
    """Metrics of one model on one group of patients; each is None where undefined.

    Attributes:
        patients: their number, or its noised estimate.
        auroc: area under the ROC curve; multi-class: mean of one-against-the-rest.
        auprc: average precision of the positive class; multi-class: mean over classes.
        accuracy: of the prediction (binary: score of at least 0.5).
        brier: mean squared error of the score; multi-class: summed over classes.
        calibration_error: expected calibration error over ten equal score intervals.
    """

    patients: float
    auroc: float | None
    auprc: float | None
    accuracy: float | None
    brier: float | None
    calibration_error: float | None


def histograms(
    study: Study, scores: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, bins: int
) -> dict[str, Array]:
    """Sums to release.

    Args:
        scores: float32 [records], or [records, classes]; in [0, 1].
        labels: int64 [records].
        weights: float64 [records]; a patient's sum to 1.
        bins: number of equal score intervals.

    Returns:
        Binary: `scores` [2 labels, bins]. Multi-class: `confidence` [2 wrong/right, bins] of the
        predicted class, and `classes` [classes, 2 others/own, bins]. All float64.
    """
    own, shares = labels.numpy(), weights.double().numpy()
    if study.objective.task == "binary":
        return {"scores": _binned(scores.numpy(), own, shares, bins)}
    by_class = scores.numpy()
    predicted = by_class.argmax(axis=1)
    confidence = _binned(by_class.max(axis=1), predicted == own, shares, bins)
    classes = [_binned(by_class[:, k], own == k, shares, bins) for k in range(by_class.shape[1])]
    return {"confidence": confidence, "classes": np.stack(classes)}


def _binned(scores: Array, labels: Array, weights: Array, bins: int) -> Array:
    # A score that is no number counts as 0: an error would tell that such a patient is here.
    scaled = np.nan_to_num(scores.astype(np.float64), nan=0.0).clip(0.0, 1.0) * bins
    index = scaled.astype(np.int64).clip(0, bins - 1)
    flat = np.bincount(labels.astype(np.int64) * bins + index, weights=weights, minlength=2 * bins)
    return np.asarray(flat, dtype=np.float64).reshape(2, bins)


def histogram_shapes(study: Study, bins: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `histograms` returns for a study."""
    if study.objective.task == "binary":
        return {"scores": (2, bins)}
    return {"confidence": (2, bins), "classes": (study.outputs, 2, bins)}


def merged(parts: list[Arrays]) -> dict[str, Array]:
    """The histograms of all patients of several sites."""
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def measure(sums: Arrays) -> Measured:
    """Metrics from (merged) histograms.

    Sums over many cells (patients, AUROC, accuracy, Brier) use noised counts as they are, because
    the noise has mean zero and taking negative counts as zero would bias them; what comes out is kept
    within its range. Average precision and calibration error look at single cells, where a count below
    zero is taken as zero.
    """
    if "scores" in sums:
        h = sums["scores"]
        half = h.shape[1] // 2
        right = h[0, :half].sum() + h[1, half:].sum()
        return _measured(h, right, [h], h)
    confidence = sums["confidence"]
    return _measured(confidence, confidence[1].sum(), list(sums["classes"]), confidence)


def _measured(counts: Array, right: float, classes: Sequence[Array], calibration: Array) -> Measured:
    """Args:
    counts: whose sum is the number of patients.
    right: patients (in units) that were classified rightly.
    classes: score-by-label histograms [2, bins]; metrics are averaged over them.
    """
    return Measured(
        patients=max(0.0, float(counts.sum())),
        auroc=_mean([_auroc(h) for h in classes]),
        auprc=_mean([_auprc(np.maximum(0.0, h)) for h in classes]),
        accuracy=_ratio(right, counts.sum()),
        brier=_total([_brier(h) for h in classes]),
        calibration_error=_calibration_error(np.maximum(0.0, calibration)),
    )


def _ratio(part: float, whole: float) -> float | None:
    return min(1.0, max(0.0, float(part / whole))) if whole > 0 else None


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _total(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _auroc(h: Array) -> float | None:
    """P(score of a positive > of a negative) + half the ties (Mann & Whitney), ties within a bin."""
    negatives, positives = h
    below = np.cumsum(negatives) - negatives
    if min(negatives.sum(), positives.sum()) <= 0:
        return None
    return _ratio(float((positives * (below + negatives / 2)).sum()), negatives.sum() * positives.sum())


def _auprc(h: Array) -> float | None:
    """Average precision: Σ (recall_n - recall_{n-1}) precision_n over falling thresholds."""
    negatives, positives = h[:, ::-1]
    found, called = np.cumsum(positives), np.cumsum(positives + negatives)
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return _ratio(float((positives * precision).sum()), float(positives.sum()))


def _brier(h: Array) -> float | None:
    middles = (np.arange(h.shape[1]) + 0.5) / h.shape[1]
    return _ratio(float((h[0] * middles**2 + h[1] * (1 - middles) ** 2).sum()), float(h.sum()))


def _calibration_error(h: Array) -> float | None:
    """Σ over score intervals of share * |mean score - frequency| (Naeini et al. 2015)."""
    bins = h.shape[1]
    groups = CALIBRATION_GROUPS if bins % CALIBRATION_GROUPS == 0 else bins
    middles = (np.arange(bins) + 0.5) / bins
    count = h.sum(axis=0)
    score_sum = (count * middles).reshape(groups, -1).sum(axis=1)
    positive_sum = h[1].reshape(groups, -1).sum(axis=1)
    return _ratio(float(np.abs(score_sum - positive_sum).sum()), float(count.sum()))
