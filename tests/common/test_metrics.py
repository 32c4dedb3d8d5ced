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
from small import classes, study
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from common.metrics import EXACT_BINS, Measured, histogram_shapes, histograms, measure, merged
from common.privacy.plan import histogram_sensitivity
from common.study import Study

BINARY = study()


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
    found = measure(told(BINARY, scores, labels, weights))
    w = {"sample_weight": weights}
    assert found.patients == pytest.approx(weights.sum())
    assert found.auroc == pytest.approx(sklearn.roc_auc_score(labels, scores, **w), abs=1e-9)
    assert found.auprc == pytest.approx(sklearn.average_precision_score(labels, scores, **w), abs=1e-9)
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(labels, scores >= 0.5, **w), abs=1e-9)
    assert found.brier == pytest.approx(sklearn.brier_score_loss(labels, scores, **w), abs=1e-6)
    unweighted = measure(told(BINARY, scores, labels))
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
    found, own = measure(told(wanted, scores, labels)), np.eye(count)[labels]
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
    found = measure(told(BINARY, scores, labels, bins=bins))
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
    one, other = measure(merged(parts)), measure(whole)
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
    found = measure(sums)
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
    found = measure(sums)
    assert finite_or_none(found)
    for name in ("auroc", "auprc", "accuracy", "calibration_error"):
        value = getattr(found, name)
        assert value is None or -1e-12 <= value <= 1 + 1e-12, name


def test_measuring_changes_nothing() -> None:
    sums = {"scores": np.full((2, 20), -1.0)}
    measure(sums)
    assert (sums["scores"] == -1).all()
