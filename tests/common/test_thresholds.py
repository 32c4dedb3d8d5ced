"""Sensitivity at a fixed specificity, precision, and the least of both, against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from small import study

from common.histograms import EXACT_BINS, histograms
from common.metrics import measure
from common.uncertainty import estimate

NAMES = ("precision", "sensitivity_90", "sensitivity_95", "score_1", "score_1_half")


def drawn(seed: int, count: int = 700) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Different scores, each the middle of a bin, and labels."""
    random = np.random.default_rng(seed)
    labels = (random.random(count) < 0.25).astype(np.int64)
    found = 1 / (1 + np.exp(-(random.normal(size=count) + 1.7 * labels - 1.2)))
    return (np.floor(found * EXACT_BINS) + 0.5) / EXACT_BINS, labels


def told(found: Any, labels: Any, bins: int = EXACT_BINS) -> dict[str, Any]:
    weights = torch.ones(len(labels), dtype=torch.float64)
    return histograms(
        study(), torch.from_numpy(found.astype(np.float32)), torch.from_numpy(labels), weights, bins
    )


@pytest.mark.parametrize("seed", range(4))
def test_they_are_scikit_learns(seed: int) -> None:
    found, labels = drawn(seed)
    own = measure(study(), told(found, labels))
    false, true, _ = sklearn.roc_curve(labels, found, drop_intermediate=False)
    assert own.sensitivity_90 == pytest.approx(np.interp(0.1, false, true), abs=0.01)
    assert own.sensitivity_95 == pytest.approx(np.interp(0.05, false, true), abs=0.01)
    assert own.precision == pytest.approx(sklearn.precision_score(labels, found >= 0.5))
    half = min(sklearn.recall_score(labels, found >= 0.5), own.precision)
    assert own.score_1_half == pytest.approx(half)
    precision, recall, _ = sklearn.precision_recall_curve(labels, found)
    assert own.score_1 == pytest.approx(np.minimum(precision, recall).max(), abs=1e-9)


def test_a_perfect_and_a_useless_model() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1], dtype=np.int64)
    perfect = measure(study(), told(np.where(labels == 1, 0.9, 0.1), labels))
    assert [getattr(perfect, name) for name in NAMES] == pytest.approx([1.0] * 5)
    useless = measure(study(), told(np.full(6, 0.5), labels))
    assert useless.sensitivity_90 == pytest.approx(0.1)
    assert useless.precision == useless.score_1 == pytest.approx(1 / 3)


def test_without_positives_there_is_none() -> None:
    own = measure(study(), told(np.array([0.2, 0.7]), np.array([0, 0], dtype=np.int64)))
    assert (own.sensitivity_90, own.score_1, own.score_1_half) == (None, None, None)
    assert own.precision == 0.0


def test_they_have_error_bars() -> None:
    exact = told(*drawn(1, 3000), 20)
    truth, random = measure(study(), exact), np.random.default_rng(0)
    inside = dict.fromkeys(("precision", "sensitivity_90", "sensitivity_95", "score_1_half"), 0)
    for _ in range(40):
        noisy = {n: a + 4.0 * random.standard_normal(a.shape) for n, a in exact.items()}
        bounds = estimate(study(), noisy, 4.0).intervals
        assert set(NAMES) <= set(bounds.sampling)
        for name in inside:
            low, high = bounds.noise[name]
            inside[name] += low <= getattr(truth, name) <= high
    assert min(inside.values()) >= 34, inside
