"""What a site sends of its test patients: mergeable sums, never a score or a row.

A test patient adds one unit in all, shared by its records, so that one patient changes a histogram by
at most 1 (the sensitivity that noise is scaled to). Sums of sites give those of all patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common import survival
from common.cells import Cells, stacked
from common.features import ordered_codes
from common.messages import Array, Arrays
from common.study import Study

if TYPE_CHECKING:
    import torch


EXACT_BINS = 10_000


class Packed(int):
    """A number of bins that asks `histograms` for the form of `common.cells.packed`."""


MOST_SUBGROUP_BINS = 1_000


MOMENTS = 3


MISSING_GROUP = "(missing)"


def histograms(
    study: Study,
    scores: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    bins: int,
    groups: torch.Tensor | None = None,
) -> dict[str, Array]:
    """Sums to release. What a patient adds to them at most: `common.privacy.plan.histogram_sensitivity`.

    Args:
        scores: of `common.objectives.scores`: float32 [records], or [records, classes]; in [0, 1].
            Regression: predictions in [-1, 1].
        labels: of the records, as common/encoding makes them.
        weights: float64 [records]; a patient's sum to 1.
        bins: number of equal score intervals; regression: of error intervals over the width of the
            label's range to either side. As `Packed`: the same sums, but packed (common/cells).
        groups: int64 [records, subgroup columns] (common/encoding.subgroup_indices), if the study has any.

    Returns:
        Binary: `scores` [2 labels, bins]. Multi-class: `confidence` [2 wrong/right, bins] of the
        predicted class, and `classes` [classes, 2 others/own, bins]. Multi-label: `labels` [labels, 2 no/yes,
        bins], of the records with that label. Regression: `errors` [bins], and `moments` [3], sums over
        patients of u, u² and 4 (|u| - u²) where u = error / width, so that mean errors don't suffer from
        bins; of two quantiles or more `interval` [2], sums of 1 if the label is within the outermost two,
        and of their distance / width. Survival: see `common.survival.risk_sums`.
        For a subgroup column `sex` the same again as `sex/scores` …, with
        one more axis in front: a group a code (see `ordered_codes`), and the missing. All float64.

    Raises:
        ValueError: if `groups` isn't what the study's subgroups ask for.
    """
    columns = study.subgroup_columns
    if (0 if groups is None else groups.shape[1]) != len(columns):
        raise ValueError(f"study {study.name} has {len(columns)} subgroup columns")
    found, own, shares = scores.numpy(), labels.numpy(), weights.double().numpy()
    whole = _sums(study, found, own, shares, bins)
    for i, column in enumerate(columns):
        index = groups[:, i].numpy() if groups is not None else np.empty(0)
        parts = [
            _sums(study, found[index == g], own[index == g], shares[index == g], _subgroup_bins(bins))
            for g in range(len(column.codes) + 1)
        ]
        whole |= {f"{column.name}/{n}": stacked([part[n] for part in parts]) for n in parts[0]}
    return _finished(whole, bins)


def _finished(sums: dict[str, Cells], bins: int) -> dict[str, Array]:
    if not isinstance(bins, Packed):
        return {name: cells.dense() for name, cells in sums.items()}
    return {n: array for name, cells in sums.items() for n, array in cells.packed(name).items()}


def histograms_apart(
    study: Study, scores: Array, labels: Array, weights: Array, bins: int, counts: list[int]
) -> list[dict[str, Array]]:
    """`histograms` of several sites in one go, each bit for bit as alone; not for studies with subgroups.

    Args:
        scores, labels, weights: of all sites' records, a site's together.
        counts: records of each site.
    """
    owners = np.repeat(np.arange(len(counts)), counts)
    if study.objective.task not in ("binary", "multi-class") or not len(owners):
        ends = np.cumsum(counts)[:-1]
        apart = (np.split(each, ends) for each in (scores, labels, weights))
        return [_finished(_sums(study, s, y, w, bins), bins) for s, y, w in zip(*apart, strict=True)]
    found: list[dict[str, Array]] = [{} for _ in counts]
    for name, cells in _sums(study, scores, labels, weights, bins).items():
        owned = cells.by_owner(np.tile(owners, len(cells.index) // len(owners)), len(counts))
        if isinstance(bins, Packed):
            each = owned.packed_apart(name)
        else:
            each = [{name: sums.copy()} for sums in owned.dense()]
        for site, told in zip(found, each, strict=True):
            site |= told
    return found


def _sums(study: Study, scores: Array, labels: Array, weights: Array, bins: int) -> dict[str, Cells]:
    if study.objective.task == "binary":
        return {"scores": _binned(scores, labels, weights, bins)}
    if study.objective.task == "regression":
        # As for scores: a prediction that is no number counts as the middle of the range.
        known = np.nan_to_num(scores.astype(np.float64), nan=0.0).clip(-1.0, 1.0)
        true = labels.astype(np.float64).clip(-1.0, 1.0)
        linear = study.data.label.untransformed
        known, true = (np.nan_to_num(linear(each), nan=0.0).clip(-1.0, 1.0) for each in (known, true))
        quantiles = study.objective.quantiles
        predicted = known[:, predicted_quantile(quantiles)] if quantiles else known
        found = _errors(predicted, true, weights, bins)
        if len(quantiles) > 1:
            found |= _interval(known, true, weights)
        return found | (_near(study, predicted, true, weights) if study.evaluation.tolerance else {})
    if study.objective.task == "survival":
        return survival.risk_sums(study, scores, labels, weights, bins)
    if study.objective.task == "multi-label":
        return {"labels": _several(scores, labels, weights, bins)}
    predicted, count, bins = scores.argmax(axis=1), scores.shape[1], int(bins)
    classes = np.arange(count)[:, None]
    index = (2 * classes + (labels == classes)) * bins + _bins_of(scores.T, bins)
    return {
        "confidence": _binned(scores.max(axis=1), predicted == labels, weights, bins),
        "classes": Cells((count, 2, bins), index.reshape(-1), np.tile(weights, count)),
    }


def _binned(scores: Array, labels: Array, weights: Array, bins: int) -> Cells:
    bins = int(bins)
    return Cells((2, bins), labels.astype(np.int64) * bins + _bins_of(scores, bins), weights)


def _several(scores: Array, labels: Array, weights: Array, bins: int) -> Cells:
    record, label = np.nonzero(~np.isnan(labels))
    bins = int(bins)
    row = 2 * label + labels[record, label].astype(np.int64)
    return Cells(
        (labels.shape[1], 2, bins), row * bins + _bins_of(scores[record, label], bins), weights[record]
    )


def _bins_of(scores: Array, bins: int) -> npt.NDArray[np.int64]:
    # A score that is no number counts as 0: an error would tell that such a patient is here.
    scaled = scores.astype(np.float64)
    scaled[np.isnan(scaled)] = 0.0
    return (scaled.clip(0.0, 1.0) * bins).astype(np.int64).clip(0, bins - 1)


def _errors(predictions: Array, labels: Array, weights: Array, bins: int) -> dict[str, Cells]:
    error = (predictions - labels) / 2
    index = ((error + 1) / 2 * int(bins)).astype(np.int64).clip(0, bins - 1)
    moments = [error, error**2, 4 * (np.abs(error) - error**2)]
    summed = np.array([(weights * moment).sum() for moment in moments])
    return {
        "errors": Cells((int(bins),), index, weights),
        "moments": Cells((MOMENTS,), np.arange(MOMENTS), summed),
    }


def predicted_quantile(quantiles: Sequence[float]) -> int:
    """Which of the quantiles is the prediction: the one nearest to 0.5, of two the lower one."""
    return int(np.argmin(np.abs(np.asarray(quantiles) - 0.5)))


def _interval(known: Array, labels: Array, weights: Array) -> dict[str, Cells]:
    """Where quantiles cross, the interval is empty, of no width."""
    low, high = known[:, 0], known[:, -1]
    inside = (low <= labels) & (labels <= high)
    told = [inside.astype(np.float64), np.maximum(0.0, high - low) / 2]
    return {"interval": Cells((2,), np.arange(2), np.array([(weights * each).sum() for each in told]))}


def _near(study: Study, predictions: Array, labels: Array, weights: Array) -> dict[str, Cells]:
    label = study.data.label
    low = label.range[0] if label.range is not None else 0.0
    value = low + (labels + 1) / 2 * label.width
    allowed = np.abs(value) * (study.evaluation.tolerance or 0.0)
    near = np.abs(predictions - labels) / 2 * label.width <= allowed
    return {"near": Cells((1,), np.zeros(1, dtype=np.int64), np.array([(weights * near).sum()]))}


def _subgroup_bins(bins: int) -> int:
    """Exact runs have many bins; a block for each group would swell messages."""
    return min(bins, MOST_SUBGROUP_BINS)


def histogram_shapes(study: Study, bins: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `histograms` returns for a study."""

    def whole(bins: int) -> dict[str, tuple[int, ...]]:
        if study.objective.task == "binary":
            return {"scores": (2, bins)}
        if study.objective.task == "survival":
            return survival.sum_shapes(study, bins)
        if study.objective.task == "multi-label":
            return {"labels": (study.outputs, 2, bins)}
        if study.objective.task == "regression":
            shapes: dict[str, tuple[int, ...]] = {"errors": (bins,), "moments": (MOMENTS,)}
            shapes |= {"interval": (2,)} if len(study.objective.quantiles) > 1 else {}
            return shapes | ({"near": (1,)} if study.evaluation.tolerance else {})
        return {"confidence": (2, bins), "classes": (study.outputs, 2, bins)}

    shapes = whole(bins)
    for column in study.subgroup_columns:
        block = whole(_subgroup_bins(bins)).items()
        shapes |= {f"{column.name}/{n}": (len(column.codes) + 1, *shape) for n, shape in block}
    return shapes


def merged(parts: list[Arrays]) -> dict[str, Array]:
    """The histograms of all patients of several sites."""
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def cells_of_patients(sums: Arrays) -> float:
    """The variance of the number of patients, in that of a cell's noise: it is the sum of so many cells, or
    with several labels the mean of such sums."""
    if "labels" in sums:
        return float(sums["labels"].size / sums["labels"].shape[0] ** 2)
    return float(next(sums[n].size for n in ("scores", "confidence", "errors", "risks") if n in sums))


def overall(sums: Arrays) -> dict[str, Array]:
    """The sums over all patients, without those of subgroups."""
    return {name: array for name, array in sums.items() if "/" not in name}


def subgroup_sums(study: Study, sums: Arrays) -> Iterator[tuple[str, str, str, dict[str, Array]]]:
    """Each subgroup's column, code, what the code means, and sums."""
    for column in study.subgroup_columns:
        own = {n.partition("/")[2]: a for n, a in sums.items() if n.partition("/")[0] == column.name}
        meanings = [(code, column.codes[code]) for code in ordered_codes(column)]
        for i, (code, meaning) in enumerate([*meanings, (MISSING_GROUP, MISSING_GROUP)]):
            yield column.name, code, meaning, {name: array[i] for name, array in own.items()}
