"""Metrics from histograms (common/histograms), of one site or merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common import curves, survival
from common.curves import Grid
from common.histograms import overall
from common.messages import Array, Arrays
from common.study import Study

FEWEST_BINS_OF_LINE = 100
LINE = ("calibration_intercept", "calibration_slope")
AT_BEST = ("precision", "sensitivity_90", "sensitivity_95", "score_1", "score_1_half")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Measured:
    """Metrics of one model on one group of patients; each is None where undefined.

    Attributes:
        patients: their number, or its noised estimate; of several labels the mean over labels of how many
            have it.
        auroc: area under the ROC curve; multi-class: mean of one-against-the-rest. Of several labels this
            and the others are means over labels.
        auprc: average precision of the positive class; multi-class: mean over classes.
        accuracy: of the prediction (binary: score of at least 0.5).
        brier: mean squared error of the score; multi-class: summed over classes; survival: of the predicted
            survival, mean over horizons (`common.survival.brier_scores`).
        calibration_error: expected calibration error over ten equal score intervals.
        sensitivity, specificity, precision: binary, at a score of 0.5.
        sensitivity_90, sensitivity_95: binary, at the score at which specificity is so many per cent.
        score_1: binary, the least of sensitivity and precision, at the score at which it is largest; chosen
            among noised ones it is rather too large. `score_1_half`: at a score of 0.5. (PhysioNet challenge
            2012, event 1.)
        calibration_intercept, calibration_slope: binary, see `curves.calibration_line`; 0 and 1 are best.
            None with fewer than 100 bins: sure scores rounded to the middle of a wide bin look less sure,
            which made a slope of 0.86 one of 0.98 to 1.24 with 10 bins (0.87 to 0.92 with 100).
        mae, rmse, bias: regression: mean absolute, root mean squared and mean error (prediction - truth),
            in the label's unit. `rmse` is None where noise leaves the mean of squares no more than 0.
        median_absolute_error, absolute_error_90: that 50 % and 90 % of patients stay below; from the
            histogram, so no finer than its bins.
        near: regression: share predicted to within `evaluation.tolerance` of the label's value.
        coverage: quantile regression: share of labels between the outermost quantiles; `interval_width`: the
            mean distance of these, in the label's unit.
        c_index: survival, see `common.survival.c_index`.
    """

    patients: float
    auroc: float | None = None
    auprc: float | None = None
    accuracy: float | None = None
    brier: float | None = None
    calibration_error: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    precision: float | None = None
    sensitivity_90: float | None = None
    sensitivity_95: float | None = None
    score_1: float | None = None
    score_1_half: float | None = None
    calibration_intercept: float | None = None
    calibration_slope: float | None = None
    mae: float | None = None
    rmse: float | None = None
    bias: float | None = None
    median_absolute_error: float | None = None
    absolute_error_90: float | None = None
    near: float | None = None
    coverage: float | None = None
    interval_width: float | None = None
    c_index: float | None = None


@dataclass(frozen=True)
class LabelMetrics:
    """Metrics of one of several labels.

    Attributes:
        label: its column.
    """

    label: str
    measured: Measured


@dataclass(frozen=True)
class HorizonMetrics:
    """Survival up to a time.

    Attributes:
        horizon: in the label's unit.
        survival: share that lives beyond it without the event (Kaplan & Meier).
        brier: expected squared error of the predicted survival; a prediction of the same for everybody has
            about survival (1 - survival).
    """

    horizon: float
    survival: float | None
    brier: float | None


@dataclass(frozen=True)
class OperatingPoint:
    """A binary model that calls positive whoever scores at least `threshold`."""

    threshold: float
    accuracy: float | None
    sensitivity: float | None
    specificity: float | None


@dataclass(frozen=True)
class CalibrationGroup:
    """One interval of the calibration curve; multi-class: of the predicted class's score.

    Attributes:
        low, high: of the score.
        patients: how many score so, or its noised estimate.
        score: their mean score, kept within the interval; None if there are no patients.
        frequency: share of them with label 1 (multi-class: rightly predicted).
    """

    low: float
    high: float
    patients: float
    score: float | None
    frequency: float | None


def measure(study: Study, sums: Arrays, noise: float = 0.0) -> Measured:
    """Metrics from (merged) histograms, those of subgroups aside.

    Sums over many cells (patients, AUROC, accuracy, Brier score, mean errors) are linear in noised counts
    or nearly so: their noise has mean zero. The calibration error adds up absolute values, to which noise
    only adds; what is known to come of it is taken off (`curves.denoised_calibration_error`). What comes
    out is kept within its range.

    Args:
        noise: standard deviation of the Gaussian noise in every cell; of sites that were merged the root
            of the sum of squares. 0: exact.
    """
    own = overall(sums)
    found = {name: array for name, array in values(study, own).items() if "@" not in name}
    ranges = value_ranges(study)
    kept = {name: within(float(array), ranges[name]) for name, array in found.items()}
    if noise > 0 and kept.get("rmse") == 0.0:
        kept["rmse"] = None
    errors = [_calibration_error(counts, noise) for counts in _by_score(own)]
    if errors:
        error = curves.mean_of(errors)
        kept["calibration_error"] = within(float(error), ranges["calibration_error"])
    return Measured(kept.pop("patients") or 0.0, **kept)


def _by_score(sums: Arrays) -> list[Array]:
    """Score histograms [2, bins] of which the calibration error is the mean; none without classes."""
    if "labels" in sums:
        return list(sums["labels"])
    return [sums[name] for name in ("scores", "confidence") if name in sums]


def _calibration_error(counts: Array, noise: float) -> Array:
    if noise > 0:
        return curves.denoised_calibration_error(counts, Grid.whole(counts.shape[-1]), noise)
    return curves.calibration_error(np.maximum(0.0, counts))


def within(value: float, interval: tuple[float, float]) -> float | None:
    """The value, kept within the interval; None if it is NaN."""
    return None if np.isnan(value) else min(interval[1], max(interval[0], value))


def value_ranges(study: Study) -> dict[str, tuple[float, float]]:
    """Between which values each metric lies; operating points are named as in `values`."""
    ranges = {"patients": (0.0, np.inf)}
    if study.objective.task == "regression":
        width = study.data.label.width
        positive = ("mae", "rmse", "median_absolute_error", "absolute_error_90", "interval_width")
        ranges |= dict.fromkeys(positive, (0.0, width))
        return ranges | {"bias": (-width, width), "coverage": (0.0, 1.0), "near": (0.0, 1.0)}
    if study.objective.task == "survival":
        named = ("c_index", "brier", *(f"{n}@{h:g}" for n in ("brier", "survival") for h in study.horizons))
        return ranges | dict.fromkeys(named, (0.0, 1.0))
    shares = ["auroc", "auprc", "accuracy", "calibration_error", *AT_BEST]
    if study.objective.task == "multi-class":
        return ranges | dict.fromkeys(shares, (0.0, 1.0)) | {"brier": (0.0, 2.0)}
    for threshold in ("", *(f"@{t:g}" for t in THRESHOLDS)):
        shares += [f"{name}{threshold}" for name in ("accuracy", "sensitivity", "specificity")]
    lines = dict.fromkeys(LINE, (-np.inf, np.inf))
    return ranges | dict.fromkeys([*shares, "brier"], (0.0, 1.0)) | lines


def values(study: Study, sums: Arrays, grid: Grid | None = None, together: bool = False) -> dict[str, Array]:
    """Every metric but the calibration error, not kept within ranges; NaN where undefined.

    Args:
        sums: of one group of patients, with any leading axes (draws of a Monte Carlo run).
        grid: what the last axis of score histograms stands for, if not for all bins.
        together: before classes are averaged, bring each one's draws (first axis) into the order of the
            first class's, as if all rose and fell together: the spread of the mean is then too wide rather
            than too narrow.

    Returns:
        Metric → float64 [...]; binary studies also have `accuracy@0.3`, `sensitivity@0.3` … for each of
        `THRESHOLDS` that is an edge of the bins, survival studies `brier@365`, `survival@365` for each
        horizon.
    """
    if study.objective.task == "regression":
        return _error_values(study, sums)
    if study.objective.task == "survival":
        return _survival_values(study, sums)
    if study.objective.task == "multi-label":
        return _label_values(sums["labels"], grid, together)
    counts = sums["scores"] if "scores" in sums else sums["confidence"]
    grid = grid or Grid.whole(counts.shape[-1])
    if "scores" in sums:
        parts = [counts]
        found = _binary_values(counts, grid)
    else:
        parts = [sums["classes"][..., k, :, :] for k in range(study.outputs)]
        found = {"accuracy": curves.ratio(counts[..., 1, :].sum(axis=-1), curves.total(counts))}
    by_class: Mapping[str, list[Array]] = {
        "auroc": [curves.auroc(h) for h in parts],
        "auprc": [curves.auprc(h) for h in parts],
        "brier": [curves.brier(h, grid.middles) for h in parts],
    }
    if together:
        by_class = {name: _risen_together(each) for name, each in by_class.items()}
    return {
        "patients": curves.total(counts),
        "auroc": curves.mean_of(by_class["auroc"]),
        "auprc": curves.mean_of(by_class["auprc"]),
        "brier": curves.sum_of(by_class["brier"]),
        **found,
    }


def _error_values(study: Study, sums: Arrays) -> dict[str, Array]:
    count, width = sums["errors"].sum(axis=-1), study.data.label.width
    found = {"patients": count, **curves.error_values(sums["errors"], sums["moments"], width)}
    if "near" in sums:
        found["near"] = curves.ratio(sums["near"][..., 0], count)
    if "interval" in sums:
        found["coverage"] = curves.ratio(sums["interval"][..., 0], count)
        found["interval_width"] = width * curves.ratio(sums["interval"][..., 1], count)
    return found


def _survival_values(study: Study, sums: Arrays) -> dict[str, Array]:
    risks = sums["risks"]
    briers = survival.brier_scores(study, risks, sums["missed"])
    alive = survival.survival_shares(study, risks)
    found = {"patients": risks.sum(axis=(-3, -2, -1)), "c_index": survival.c_index(risks)}
    found["brier"] = briers.mean(axis=-1)
    for h, horizon in enumerate(study.horizons):
        found |= {f"brier@{horizon:g}": briers[..., h], f"survival@{horizon:g}": alive[..., h]}
    return found


def _label_values(counts: Array, grid: Grid | None, together: bool) -> dict[str, Array]:
    """Means over labels, of counts [..., labels, 2, bins]."""
    grid = grid or Grid.whole(counts.shape[-1])
    each = [_one_label(counts[..., k, :, :], grid) for k in range(counts.shape[-3])]
    names = [name for name in each[0] if "@" not in name and name not in LINE]
    parts = {name: [found[name] for found in each] for name in names}
    if together:
        parts = {name: _risen_together(values) for name, values in parts.items()}
    return {name: curves.mean_of(values) for name, values in parts.items()}


def _one_label(counts: Array, grid: Grid) -> dict[str, Array]:
    return {
        "patients": curves.total(counts),
        "auroc": curves.auroc(counts),
        "auprc": curves.auprc(counts),
        "brier": curves.brier(counts, grid.middles),
        **_binary_values(counts, grid),
    }


def by_label(study: Study, sums: Arrays, noise: float = 0.0) -> tuple[LabelMetrics, ...]:
    """Each label's own metrics, of the patients who have it; empty unless there are several labels."""
    if "labels" not in sums:
        return ()
    found = []
    ranges = value_ranges(study)
    for label, counts in zip(study.data.label.columns, sums["labels"], strict=True):
        grid = Grid.whole(counts.shape[-1])
        values = _one_label(counts, grid) | {"calibration_error": _calibration_error(counts, noise)}
        kept = {n: within(float(v), ranges[n]) for n, v in values.items() if n in ranges and "@" not in n}
        found.append(LabelMetrics(label.name, Measured(kept.pop("patients") or 0.0, **kept)))
    return tuple(found)


def at_horizons(study: Study, sums: Arrays) -> tuple[HorizonMetrics, ...]:
    """Survival at each horizon; empty in other studies."""
    if study.objective.task != "survival":
        return ()
    own = values(study, overall(sums))
    return tuple(
        HorizonMetrics(h, *(within(float(own[f"{n}@{h:g}"]), (0.0, 1.0)) for n in ("survival", "brier")))
        for h in study.horizons
    )


def _risen_together(parts: list[Array]) -> list[Array]:
    rank = np.argsort(np.argsort(parts[0], axis=0), axis=0)
    return [np.take_along_axis(np.sort(part, axis=0), rank, axis=0) for part in parts]


def _binary_values(counts: Array, grid: Grid) -> dict[str, Array]:
    names = ("accuracy", "sensitivity", "specificity")
    half = curves.operating(counts, grid.below(0.5))
    found = dict(zip(names, half, strict=True))
    found["precision"] = curves.precision(counts, grid.below(0.5))
    found["score_1_half"] = np.minimum(half[1], found["precision"])
    found["score_1"] = curves.best_of_both(counts)
    for specificity in (90, 95):
        found[f"sensitivity_{specificity}"] = curves.sensitivity_at(counts, specificity / 100)
    for threshold in edges(grid.bins):
        each = curves.operating(counts, grid.below(threshold))
        found |= {f"{name}@{threshold:g}": value for name, value in zip(names, each, strict=True)}
    if grid.bins < FEWEST_BINS_OF_LINE:
        return found
    return found | dict(zip(LINE, curves.calibration_line(counts, grid.middles), strict=True))


def edges(bins: int) -> tuple[float, ...]:
    """Those of `THRESHOLDS` that are edges of so many bins."""
    return tuple(t for t in THRESHOLDS if abs(t * bins - round(t * bins)) < curves.ROUNDING * bins)


def operating_point(sums: Arrays, threshold: float) -> OperatingPoint:
    """Accuracy, sensitivity and specificity of a binary model at a threshold.

    Raises:
        ValueError: if the threshold is no edge of the bins, or the sums aren't a binary study's.
    """
    if "scores" not in sums:
        raise ValueError("only a binary study has thresholds")
    counts = sums["scores"]
    found = curves.operating(counts, Grid.whole(counts.shape[-1]).below(threshold))
    return OperatingPoint(threshold, *(within(float(value), (0.0, 1.0)) for value in found))


def calibration_curve(sums: Arrays) -> tuple[CalibrationGroup, ...]:
    """Score against frequency, from low to high scores; empty unless the label is a class."""
    if "scores" not in sums and "confidence" not in sums:
        return ()
    counts = sums["scores"] if "scores" in sums else sums["confidence"]
    grid = Grid.whole(counts.shape[-1])
    groups = grid.groups.shape[1]
    patients = counts.sum(axis=0) @ grid.groups
    scores = curves.ratio((counts.sum(axis=0) * grid.middles) @ grid.groups, patients)
    frequencies = curves.ratio(counts[1] @ grid.groups, patients)
    return tuple(
        CalibrationGroup(
            low=g / groups,
            high=(g + 1) / groups,
            patients=max(0.0, float(patients[g])),
            score=within(float(scores[g]), (g / groups, (g + 1) / groups)),
            frequency=within(float(frequencies[g]), (0.0, 1.0)),
        )
        for g in range(groups)
    )
