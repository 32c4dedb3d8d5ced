"""Metrics from histograms against scikit-learn and torchmetrics, which see every score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve as calibration_curve_of_scikit_learn
from sklearn.linear_model import LogisticRegression
from small import classes, study
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from common.errors import StudyError
from common.histograms import (
    EXACT_BINS,
    MISSING_GROUP,
    histogram_shapes,
    histograms,
    merged,
    overall,
    subgroup_sums,
)
from common.metrics import Measured, calibration_curve, edges, measure, operating_point
from common.privacy.plan import histogram_sensitivity
from common.study import Study

BINARY = study()
GROUPED = {
    "data": {
        "columns": [
            {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4},
            {"kind": "categorical", "name": "sex", "codes": {"1": "male", "0": "female"}},
            {"kind": "categorical", "name": "site", "codes": {"a": "A", "b": "B", "10": "ten"}},
        ]
    },
    "evaluation": {"subgroups": ["site", "sex"]},
}
LABEL = {"column": "y", "range": [80, 200], "unit": "mm[Hg]"}
REGRESSION = study(data={"label": LABEL}, objective={"task": "regression"})


def multi(count: int) -> Study:
    return study(data={"label": classes(count)}, objective={"task": "multi-class"})


def told(wanted: Study, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None,
         bins: int = EXACT_BINS) -> dict[str, np.ndarray]:  # fmt: skip
    weights = np.ones(len(labels)) if weights is None else weights
    return histograms(
        wanted,
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(weights),
        bins,
    )


def binary(seed: int, count: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (away from the edges of bins), labels and shares of records."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    scores = 1 / (1 + np.exp(-(random.normal(size=count) + labels)))
    scores = (np.floor(scores * EXACT_BINS) + 0.5) / EXACT_BINS
    return scores, labels, 1.0 / random.integers(1, 5, count)


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_are_scikit_learns(seed: int) -> None:
    scores, labels, weights = binary(seed)
    found = measure(BINARY, told(BINARY, scores, labels, weights))
    w = {"sample_weight": weights}
    assert found.patients == pytest.approx(weights.sum())
    assert found.auroc == pytest.approx(sklearn.roc_auc_score(labels, scores, **w), abs=1e-9)
    assert found.auprc == pytest.approx(sklearn.average_precision_score(labels, scores, **w), abs=1e-9)
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(labels, scores >= 0.5, **w), abs=1e-9)
    assert found.brier == pytest.approx(sklearn.brier_score_loss(labels, scores, **w), abs=1e-6)
    unweighted = measure(BINARY, told(BINARY, scores, labels))
    theirs = binary_calibration_error(torch.from_numpy(_sure(scores)), torch.from_numpy(labels), n_bins=10)
    # torchmetrics bins the score of class 1 as we do, with the labels as frequencies
    assert unweighted.calibration_error == pytest.approx(float(theirs), abs=1e-4)


def _sure(scores: np.ndarray) -> np.ndarray:
    return scores.astype(np.float64)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_multi_class_metrics_are_scikit_learns(count: int) -> None:
    random, wanted = np.random.default_rng(count), multi(count)
    labels = random.integers(0, count, 900)
    logits = random.normal(size=(900, count)) + 1.5 * np.eye(count)[labels]
    scores = torch.from_numpy(logits).softmax(dim=1).numpy()
    found, own = measure(wanted, told(wanted, scores, labels)), np.eye(count)[labels]
    assert found.patients == pytest.approx(900)
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(labels, scores.argmax(axis=1)))
    assert found.auroc == pytest.approx(
        np.mean([sklearn.roc_auc_score(own[:, k], scores[:, k]) for k in range(count)]), abs=1e-4
    )
    assert found.auprc == pytest.approx(
        np.mean([sklearn.average_precision_score(own[:, k], scores[:, k]) for k in range(count)]), abs=2e-3
    )
    assert found.brier == pytest.approx(((scores - own) ** 2).sum(axis=1).mean(), abs=1e-3)
    theirs = multiclass_calibration_error(
        torch.from_numpy(scores), torch.from_numpy(labels), num_classes=count, n_bins=10
    )
    assert found.calibration_error == pytest.approx(float(theirs), abs=2e-3)


@pytest.mark.parametrize("bins", [2, 10, 20, 100])
def test_coarse_bins_count_ties_as_half(bins: int) -> None:
    scores, labels, _ = binary(3)
    middles = (np.floor(scores * bins).clip(0, bins - 1) + 0.5) / bins
    found = measure(BINARY, told(BINARY, scores, labels, bins=bins))
    assert found.auroc == pytest.approx(sklearn.roc_auc_score(labels, middles))
    assert found.auprc == pytest.approx(sklearn.average_precision_score(labels, middles))
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(labels, scores >= 0.5))
    assert found.brier == pytest.approx(sklearn.brier_score_loss(labels, middles))


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 60), bins=st.sampled_from([2, 10, 20]))
def test_sums_of_sites_are_the_metrics_of_all(seed: int, cut: int, bins: int) -> None:
    scores, labels, weights = binary(seed, 60)
    parts = [
        told(BINARY, scores[:cut], labels[:cut], weights[:cut], bins),
        told(BINARY, scores[cut:], labels[cut:], weights[cut:], bins),
    ]
    whole = told(BINARY, scores, labels, weights, bins)
    for name, array in merged(parts).items():
        assert np.allclose(array, whole[name])
    one, other = measure(BINARY, merged(parts)), measure(BINARY, whole)
    for name, value in vars(one).items():
        assert value == pytest.approx(getattr(other, name))


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(((a[n] - b[n]) ** 2).sum()) for n in a))


@settings(deadline=None, derandomize=True)
@given(
    outputs=st.sampled_from([1, 2, 3, 10]),
    records=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    odd=st.sampled_from(["random", "certain", "one class", "NaN", "infinite", "beyond"]),
)
def test_a_patient_adds_at_most_the_stated_sensitivity(
    outputs: int, records: int, seed: int, odd: str
) -> None:
    wanted = BINARY if outputs == 1 else multi(outputs)
    random = np.random.default_rng(seed)
    shape = (30 + records,) if outputs == 1 else (30 + records, outputs)
    scores = random.uniform(size=shape)
    labels = random.integers(0, max(2, outputs), 30 + records)
    if odd == "certain":
        scores = np.round(scores)
    elif odd == "one class":
        scores[30:], labels[30:] = 0.7, 1
    else:
        scores[30:] = {"NaN": np.nan, "infinite": np.inf, "beyond": -7.0}.get(odd, scores[30:])
    weights = np.append(np.ones(30), np.full(records, 1 / records))
    bins = wanted.evaluation.bins
    with_patient = told(wanted, scores, labels, weights, bins)
    without = told(wanted, scores[:30], labels[:30], weights[:30], bins)
    assert {n: a.shape for n, a in with_patient.items()} == histogram_shapes(wanted, bins)
    assert all(a.dtype == np.float64 for a in with_patient.values())
    assert difference(with_patient, without) <= histogram_sensitivity(wanted) * (1 + 1e-9)


def test_the_sensitivity_is_reached() -> None:
    """It could be stated no smaller: one record, certain of one class."""
    for outputs in (1, 3, 10):
        wanted = BINARY if outputs == 1 else multi(outputs)
        score = np.ones(1) if outputs == 1 else np.eye(outputs)[:1]
        sums = told(wanted, score, np.zeros(1), bins=20)
        nothing = {n: np.zeros_like(a) for n, a in sums.items()}
        assert difference(sums, nothing) == pytest.approx(histogram_sensitivity(wanted))


def finite_or_none(found: Measured) -> bool:
    return all(v is None or math.isfinite(v) for v in vars(found).values())


@pytest.mark.parametrize("kind", ["empty", "negative", "one class", "one patient"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_degenerate_histograms(kind: str, outputs: int) -> None:
    wanted = BINARY if outputs == 1 else multi(outputs)
    if kind in {"empty", "negative"}:
        value = 0.0 if kind == "empty" else -2.5
        sums: dict[str, Any] = {n: np.full(s, value) for n, s in histogram_shapes(wanted, 20).items()}
    else:
        count = 1 if kind == "one patient" else 9
        shape = (count,) if outputs == 1 else (count, outputs)
        scores = np.random.default_rng(0).uniform(size=shape)
        sums = told(wanted, scores, np.ones(count), bins=20)
    found = measure(wanted, sums)
    assert finite_or_none(found)
    if kind in {"empty", "negative"}:
        assert vars(found) == {**dict.fromkeys(vars(found)), "patients": 0.0}
    elif outputs == 1:
        assert found.auroc is None
        assert found.accuracy is not None


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), outputs=st.sampled_from([1, 3]), scale=st.sampled_from([0.1, 5.0, 1e3]))
def test_noised_histograms_give_metrics_in_their_range(seed: int, outputs: int, scale: float) -> None:
    wanted, random = (BINARY if outputs == 1 else multi(outputs)), np.random.default_rng(seed)
    sums = {n: random.normal(scale=scale, size=s) for n, s in histogram_shapes(wanted, 20).items()}
    found = measure(wanted, sums)
    assert finite_or_none(found)
    for name in ("auroc", "auprc", "accuracy", "calibration_error"):
        value = getattr(found, name)
        assert value is None or -1e-12 <= value <= 1 + 1e-12, name


def test_measuring_changes_nothing() -> None:
    sums = {"scores": np.full((2, 20), -1.0)}
    measure(BINARY, sums)
    assert (sums["scores"] == -1).all()


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), bins=st.sampled_from([2, 10, 100, EXACT_BINS]))
def test_operating_points_are_scikit_learns(seed: int, bins: int) -> None:
    scores, labels, weights = binary(seed, 80)
    sums = told(BINARY, scores, labels, weights, bins)
    for threshold in edges(bins):
        found = operating_point(sums, threshold)
        called = (scores >= threshold).astype(int)
        recall = {
            positive: sklearn.recall_score(
                labels, called, pos_label=positive, sample_weight=weights, zero_division=np.nan
            )
            for positive in (0, 1)
        }
        accuracy = sklearn.accuracy_score(labels, called, sample_weight=weights)
        assert found.accuracy == pytest.approx(accuracy)
        assert found.sensitivity == pytest.approx(recall[1])
        assert found.specificity == pytest.approx(recall[0])
    half, measured = operating_point(sums, 0.5), measure(BINARY, sums)
    assert (half.accuracy, half.sensitivity, half.specificity) == (
        measured.accuracy,
        measured.sensitivity,
        measured.specificity,
    )


def test_a_threshold_must_be_an_edge() -> None:
    sums = told(BINARY, *binary(0), bins=10)
    assert edges(10) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert edges(20) == edges(10)
    assert edges(4) == (0.5,)
    assert operating_point(sums, 1.0).sensitivity == 0
    assert operating_point(sums, 0.0).sensitivity == 1
    for threshold in (0.25, 0.3001, -0.1, 1.1):
        with pytest.raises(ValueError, match="no edge of 10 bins"):
            operating_point(sums, threshold)
    with pytest.raises(ValueError, match="only a binary study"):
        operating_point({"confidence": np.ones((2, 10))}, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_curve_is_scikit_learns(seed: int) -> None:
    scores, labels, _ = binary(seed)
    frequencies, means = calibration_curve_of_scikit_learn(labels, scores, n_bins=10)
    groups = calibration_curve(told(BINARY, scores, labels))
    found = [g for g in groups if g.patients]
    assert [g.frequency for g in found] == pytest.approx(frequencies)
    assert [g.score for g in found] == pytest.approx(means, abs=1e-4)
    assert sum(g.patients for g in groups) == len(labels)
    assert all(g.low <= (g.score or g.low) <= g.high for g in groups)
    error = sum(g.patients * abs((g.score or 0) - (g.frequency or 0)) for g in groups) / len(labels)
    assert measure(BINARY, told(BINARY, scores, labels)).calibration_error == pytest.approx(error)


@pytest.mark.parametrize("bins", [100, 1000, EXACT_BINS])
def test_the_calibration_line_is_scikit_learns_logistic_regression(bins: int) -> None:
    for seed in range(4):
        scores, labels, weights = binary(seed)
        rounded = (np.floor(scores * bins).clip(0, bins - 1) + 0.5) / bins
        found = measure(BINARY, told(BINARY, rounded, labels, weights, bins))
        line = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
        line.fit(np.log(rounded / (1 - rounded))[:, None], labels, sample_weight=weights)
        assert found.calibration_slope == pytest.approx(line.coef_[0, 0], abs=1e-4)
        assert found.calibration_intercept == pytest.approx(line.intercept_[0], abs=1e-4)


def test_no_calibration_line_where_none_is_sound() -> None:
    scores, labels, _ = binary(0)
    coarse = measure(BINARY, told(BINARY, scores, labels, bins=50))
    assert (coarse.calibration_slope, coarse.calibration_intercept) == (None, None)
    separable = measure(BINARY, told(BINARY, 0.2 + 0.6 * labels, labels))
    assert (separable.calibration_slope, separable.calibration_intercept) == (None, None)
    assert separable.auroc == 1


def regression(seed: int, count: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions and labels in mm[Hg], and shares of records."""
    random = np.random.default_rng(seed)
    labels = random.uniform(80, 200, count)
    return (labels + random.normal(3, 15, count)).clip(80, 200), labels, 1.0 / random.integers(1, 5, count)


def told_errors(
    predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int
) -> dict[str, np.ndarray]:
    def scaled(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((values - 140) / 60).astype(np.float32))

    return histograms(REGRESSION, scaled(predictions), scaled(labels), torch.from_numpy(weights), bins)


@pytest.mark.parametrize("bins", [10, 100, EXACT_BINS])
def test_errors_in_regression_are_scikit_learns(bins: int) -> None:
    for seed in range(5):
        predictions, labels, weights = regression(seed)
        found = measure(REGRESSION, told_errors(predictions, labels, weights, bins))
        w = {"sample_weight": weights}
        mae = sklearn.mean_absolute_error(labels, predictions, **w)
        assert found.patients == pytest.approx(weights.sum())
        assert found.mae == pytest.approx(mae, rel=1e-5)
        rmse = sklearn.root_mean_squared_error(labels, predictions, **w)
        assert found.rmse == pytest.approx(rmse, rel=1e-5)
        bias = np.average(predictions - labels, weights=weights)
        assert found.bias == pytest.approx(bias, rel=1e-4, abs=1e-4)
        assert (found.auroc, found.accuracy, found.calibration_error) == (None, None, None)
        equal = measure(REGRESSION, told_errors(predictions, labels, np.ones(len(labels)), bins))
        sizes, cell = np.abs(predictions - labels), 240 / bins
        assert equal.median_absolute_error == pytest.approx(np.quantile(sizes, 0.5), abs=cell / 2 + 0.1)
        assert equal.absolute_error_90 == pytest.approx(np.quantile(sizes, 0.9), abs=cell / 2 + 0.3)


def test_errors_lie_where_their_histogram_says() -> None:
    """Prediction less truth, over the range's width to either side."""
    found = told_errors(np.array([200.0, 110.0]), np.array([80.0, 113.0]), np.array([1.0, 0.5]), 10)
    assert found["errors"].tolist() == [0, 0, 0, 0, 0.5, 0, 0, 0, 0, 1]
    assert found["moments"] == pytest.approx([1 - 0.0125, 1 + 0.5 * 0.025**2, 0.5 * 4 * (0.025 - 0.025**2)])


@settings(deadline=None, derandomize=True)
@given(
    records=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    odd=st.sampled_from(["random", "worst", "NaN", "infinite", "beyond"]),
)
def test_a_patient_adds_at_most_the_stated_sensitivity_of_errors(records: int, seed: int, odd: str) -> None:
    random = np.random.default_rng(seed)
    predictions, labels = random.uniform(-1, 1, records), random.uniform(-1, 1, records)
    if odd == "worst":
        predictions, labels = np.sign(predictions), np.full(records, np.sign(labels[0]))
    elif odd != "random":
        predictions[:] = {"NaN": np.nan, "infinite": np.inf, "beyond": -7.0}[odd]
        labels = labels * (9.0 if odd == "beyond" else 1.0)
    sums = histograms(
        REGRESSION,
        torch.from_numpy(predictions.astype(np.float32)),
        torch.from_numpy(labels.astype(np.float32)),
        torch.full((records,), 1 / records, dtype=torch.float64),
        20,
    )
    assert {n: a.shape for n, a in sums.items()} == histogram_shapes(REGRESSION, 20)
    nothing = {n: np.zeros_like(a) for n, a in sums.items()}
    assert difference(sums, nothing) <= histogram_sensitivity(REGRESSION) * (1 + 1e-9)


def test_the_sensitivity_of_errors_holds_on_a_grid_and_is_reached() -> None:
    u = np.linspace(0, 1, 100_001)
    squares = 1 + u**2 + u**4 + 16 * u**2 * (1 - u) ** 2
    assert squares.max() == pytest.approx(3)
    assert histogram_sensitivity(REGRESSION) == pytest.approx(math.sqrt(squares.max()))


def grouped(wanted: Study, seed: int, count: int = 300) -> tuple[dict[str, np.ndarray], tuple[Any, ...]]:
    random = np.random.default_rng(seed)
    outputs = wanted.outputs
    if wanted.objective.task == "regression":
        scores, labels = random.uniform(-1, 1, count), random.uniform(-1, 1, count).astype(np.float32)
    else:
        scores = random.uniform(size=(count, outputs)) if outputs > 1 else random.uniform(size=count)
        labels = random.integers(0, max(2, outputs), count)
    groups = np.stack([random.integers(0, 4, count), random.integers(0, 3, count)], axis=1)
    weights = 1.0 / random.integers(1, 4, count)
    sums = histograms(
        wanted,
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        20,
        torch.from_numpy(groups),
    )
    return sums, (scores, labels, weights, groups)


@pytest.mark.parametrize("task", ["binary", "multi-class", "regression"])
def test_a_subgroups_metrics_are_those_of_its_records_alone(task: str) -> None:
    label = {"binary": classes(2), "multi-class": classes(3), "regression": LABEL}[task]
    wanted = study(
        data={**GROUPED["data"], "label": label}, evaluation=GROUPED["evaluation"], objective={"task": task}
    )
    sums, (scores, labels, weights, groups) = grouped(wanted, 5)
    assert {n: a.shape for n, a in sums.items()} == histogram_shapes(wanted, 20)
    bare = study(data={"label": label}, objective={"task": task})
    found = list(subgroup_sums(wanted, sums))
    assert [(column, code) for column, code, _, _ in found] == [
        ("site", "10"), ("site", "a"), ("site", "b"), ("site", MISSING_GROUP),
        ("sex", "0"), ("sex", "1"), ("sex", MISSING_GROUP),
    ]  # fmt: skip
    assert [meaning for _, _, meaning, _ in found[:2]] == ["ten", "A"]
    for (column, _, _, own), index in zip(found, [0, 1, 2, 3, 0, 1, 2], strict=True):
        mine = groups[:, 0 if column == "site" else 1] == index
        alone = histograms(
            bare,
            torch.from_numpy(scores[mine].astype(np.float32)),
            torch.from_numpy(labels[mine]),
            torch.from_numpy(weights[mine]),
            20,
        )
        assert measure(wanted, own) == measure(bare, alone)
    whole = measure(bare, overall(sums))
    assert measure(wanted, sums) == whole
    for column in ("site", "sex"):
        patients = [measure(wanted, own).patients for name, _, _, own in found if name == column]
        assert sum(patients) == pytest.approx(whole.patients)


@pytest.mark.parametrize("task", ["binary", "multi-class", "regression"])
def test_subgroups_raise_the_sensitivity_by_the_root_of_their_number(task: str) -> None:
    label = {"binary": classes(2), "multi-class": classes(3), "regression": LABEL}[task]
    for names in ([], ["sex"], ["site", "sex"]):
        wanted = study(
            data={**GROUPED["data"], "label": label},
            evaluation={"subgroups": names},
            objective={"task": task},
        )
        bare = study(data={"label": label}, objective={"task": task})
        expected = histogram_sensitivity(bare) * math.sqrt(1 + len(names))
        assert histogram_sensitivity(wanted) == pytest.approx(expected)
        score = torch.tensor([[0.0, 0.0, 1.0]]) if task == "multi-class" else torch.tensor([1.0])
        worst = torch.tensor([-1.0]) if task == "regression" else torch.tensor([0])
        groups = torch.zeros((1, len(names)), dtype=torch.int64)
        sums = histograms(wanted, score, worst, torch.ones(1), 20, groups)
        nothing = {n: np.zeros_like(a) for n, a in sums.items()}
        assert difference(sums, nothing) == pytest.approx(expected)


@settings(deadline=None, derandomize=True)
@given(records=st.integers(1, 20), seed=st.integers(0, 10_000))
def test_a_patient_of_several_groups_adds_no_more(records: int, seed: int) -> None:
    wanted, random = study(**GROUPED), np.random.default_rng(seed)
    groups = np.stack([random.integers(0, 4, records), random.integers(0, 3, records)], axis=1)
    sums = histograms(
        wanted,
        torch.from_numpy(random.uniform(size=records).astype(np.float32)),
        torch.from_numpy(random.integers(0, 2, records)),
        torch.full((records,), 1 / records, dtype=torch.float64),
        20,
        torch.from_numpy(groups),
    )
    nothing = {n: np.zeros_like(a) for n, a in sums.items()}
    assert difference(sums, nothing) <= histogram_sensitivity(wanted) * (1 + 1e-9)


def test_groups_that_do_not_fit_the_study() -> None:
    inputs = torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(3)
    for wanted, groups in (
        (study(**GROUPED), None),
        (study(**GROUPED), torch.zeros((3, 1), dtype=torch.int64)),
        (BINARY, torch.zeros((3, 1), dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="subgroup columns"):
            histograms(wanted, *inputs, 10, groups)


def test_blocks_of_exact_runs_are_bounded() -> None:
    shapes = histogram_shapes(study(**GROUPED), EXACT_BINS)
    assert shapes == {"scores": (2, EXACT_BINS), "site/scores": (4, 2, 1000), "sex/scores": (3, 2, 1000)}


@pytest.mark.parametrize(
    ("section", "change", "problem"),
    [
        ("evaluation", {"subgroups": ["x"]}, "not a categorical column"),
        ("evaluation", {"subgroups": ["nowhere"]}, "not a categorical column"),
        ("evaluation", {"subgroups": ["sex", "sex"]}, "twice"),
        ("evaluation", {"final_share": 1.0}, "less than 1"),
        ("objective", {"task": "regression"}, "range and unit"),
        ("objective", {"task": "binary", "loss": "squared"}, "takes the loss"),
        ("data", {"label": {**LABEL, "classes": classes(2)["classes"]}}, "give `classes`"),
        ("data", {"label": {"column": "y"}}, "give `classes`"),
        ("data", {"label": {"column": "y", "range": [0, 1]}}, "give `classes`"),
        ("data", {"label": {**LABEL, "range": [2, 1]}}, "must rise"),
        ("data", {"label": classes(1)}, "one class only"),
        ("data", {"label": LABEL}, "range and unit"),
    ],
)
def test_studies_that_do_not_fit_together(section: str, change: dict[str, Any], problem: str) -> None:
    parts: dict[str, Any] = {"data": dict(GROUPED["data"])}
    parts[section] = {**parts.get(section, {}), **change}
    with pytest.raises(StudyError, match=problem):
        study(**parts)


def test_two_blocks_of_thirty_three_codes_are_too_many() -> None:
    column = {"kind": "categorical", "name": "c", "codes": {str(i): str(i) for i in range(33)}}
    with pytest.raises(StudyError, match="32 codes at most"):
        study(data={"columns": [column]}, evaluation={"subgroups": ["c"]})


# Of `binary(11)`, as the first version of these formulas computed them: published tables must not move.
GOLDEN = {
    20: (303.83333333333337, 0.7309802037043277, 0.7119480153495119, 0.6316511245200219,
         0.222075905101481, 0.10916072408118488),
    EXACT_BINS: (303.8333333333333, 0.7308247834648509, 0.7274546219230288, 0.6316511245200219,
                 0.22196463506719696, 0.10897169500822826),
}  # fmt: skip


@pytest.mark.parametrize("bins", GOLDEN)
def test_exact_metrics_stay_the_same_bit_for_bit(bins: int) -> None:
    found = measure(BINARY, told(BINARY, *binary(11), bins=bins))
    names = ("patients", "auroc", "auprc", "accuracy", "brier", "calibration_error")
    assert tuple(getattr(found, name) for name in names) == GOLDEN[bins]
