"""Quantile regression: the pinball loss, the prediction, and what lies between the outermost quantiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from small import study

from common.errors import StudyError
from common.histograms import EXACT_BINS, Packed, histogram_shapes, histograms, histograms_apart
from common.histograms import predicted_quantile as chosen
from common.metrics import measure
from common.objectives import record_losses, scores
from common.privacy.plan import histogram_sensitivity
from common.study import Study
from common.uncertainty import estimate

LABEL = {"column": "y", "range": [80, 200], "unit": "mm[Hg]"}
QUANTILES = (0.1, 0.5, 0.9)


def quantile(quantiles: tuple[float, ...] = QUANTILES, **changes: Any) -> Study:
    objective = {"task": "regression", "loss": "quantile", "quantiles": list(quantiles)}
    return study(data={"label": {**LABEL, **changes.pop("label", {})}}, objective=objective, **changes)


def drawn(seed: int, count: int = 500) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Quantiles [count, 3] and labels [count], scaled; some quantiles cross."""
    random = np.random.default_rng(seed)
    labels = random.uniform(-1, 1, count)
    middle = 0.7 * labels + 0.2 * random.normal(size=count)
    width = 0.3 + 0.2 * random.normal(size=count)
    return np.stack([middle - width, middle, middle + width], axis=1).clip(-1, 1), labels


def told(wanted: Study, found: Any, labels: Any, bins: int = EXACT_BINS, records: int = 1) -> dict[str, Any]:
    weights = torch.full((len(labels),), 1 / records, dtype=torch.float64)
    return histograms(
        wanted,
        torch.from_numpy(found.astype(np.float32)),
        torch.from_numpy(labels.astype(np.float32)),
        weights,
        bins,
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_scikit_learns(seed: int) -> None:
    found, labels = drawn(seed, 40)
    outputs = torch.from_numpy(3 * found).float()
    losses = record_losses(quantile().objective, outputs, torch.from_numpy(labels).float())
    assert losses.shape == (40,)
    expected = np.mean(
        [
            sklearn.mean_pinball_loss(labels.astype(np.float32), outputs[:, k].numpy(), alpha=q)
            for k, q in enumerate(QUANTILES)
        ]
    )
    assert float(losses.mean()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(scores(quantile().objective, outputs), outputs.clamp(-1, 1))


def test_the_prediction_is_the_quantile_nearest_the_middle() -> None:
    assert chosen((0.1, 0.5, 0.9)) == 1
    assert chosen((0.05, 0.4, 0.7, 0.95)) == 1
    assert chosen((0.25, 0.75)) == 0
    assert chosen((0.9,)) == 0


@pytest.mark.parametrize("transform", ["none", "sqrt"])
def test_metrics_are_plain_means(transform: str) -> None:
    wanted = quantile(label={"transform": transform})
    found, labels = drawn(1)
    found, labels = found.astype(np.float32).astype(float), labels.astype(np.float32).astype(float)

    def unit(scaled: Any) -> Any:
        if transform == "none":
            return 80 + 60 * (scaled + 1)
        low, high = np.sqrt(80), np.sqrt(200)
        return (low + (high - low) * (scaled + 1) / 2) ** 2

    own = measure(wanted, told(wanted, found, labels))
    y, p = unit(labels), unit(found)
    assert own.patients == 500
    assert own.mae == pytest.approx(np.abs(p[:, 1] - y).mean(), rel=1e-5)
    assert own.rmse == pytest.approx(np.sqrt(((p[:, 1] - y) ** 2).mean()), rel=1e-5)
    assert own.coverage == pytest.approx(np.mean((p[:, 0] <= y) & (y <= p[:, 2])))
    assert own.interval_width == pytest.approx(np.maximum(0, p[:, 2] - p[:, 0]).mean(), rel=1e-5)


def test_one_quantile_has_no_interval() -> None:
    wanted = quantile((0.5,))
    found, labels = drawn(2)
    own = measure(wanted, told(wanted, found[:, 1:2], labels))
    assert own.mae is not None
    assert (own.coverage, own.interval_width) == (None, None)
    assert histogram_sensitivity(wanted) == pytest.approx(np.sqrt(3))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 100_000),
    records=st.integers(1, 4),
    bins=st.sampled_from([2, 10, 100]),
    edge=st.booleans(),
    transform=st.sampled_from(["none", "sqrt"]),
)
def test_a_patient_adds_at_most_the_stated_sensitivity(
    seed: int, records: int, bins: int, edge: bool, transform: str
) -> None:
    random = np.random.default_rng(seed)
    wanted = quantile(label={"transform": transform})
    values = [-1.0, -0.99, 0.0, 1.0, np.nan] if edge else random.uniform(-1.2, 1.2, 50)
    found = random.choice(values, (records, 3))
    labels = random.choice(np.nan_to_num(values).clip(-1, 1), records)
    sums = told(wanted, found, labels, bins, records)
    norm = np.sqrt(sum(float((a**2).sum()) for a in sums.values()))
    assert norm <= histogram_sensitivity(wanted) + 1e-6


def test_sites_in_one_go_are_as_alone() -> None:
    wanted = quantile()
    found, labels = (each.astype(np.float32) for each in drawn(3, 60))
    kind: int = Packed(EXACT_BINS)
    apart = histograms_apart(wanted, found, labels, np.ones(60), kind, [20, 40])
    alone = told(wanted, found[20:], labels[20:], kind)
    assert {n: a.tobytes() for n, a in apart[1].items()} == {n: a.tobytes() for n, a in alone.items()}
    assert histogram_shapes(wanted, 10) == {"errors": (10,), "moments": (3,), "interval": (2,)}


def test_noise_intervals_cover() -> None:
    wanted = quantile()
    exact = told(wanted, *drawn(4, 800), 20)
    truth, random = measure(wanted, exact), np.random.default_rng(0)
    inside = {"coverage": 0, "interval_width": 0, "mae": 0}
    for _ in range(40):
        noisy = {n: a + 6.0 * random.standard_normal(a.shape) for n, a in exact.items()}
        bounds = estimate(wanted, noisy, 6.0).intervals.noise
        for name in inside:
            low, high = bounds[name]
            inside[name] += low <= getattr(truth, name) <= high
    assert min(inside.values()) >= 34
    assert "mae" in estimate(wanted, exact, 0.0).intervals.sampling


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ({"task": "regression", "loss": "quantile"}, "give quantiles with the loss"),
        ({"task": "regression", "quantiles": [0.5]}, "give quantiles with the loss"),
        ({"task": "regression", "loss": "quantile", "quantiles": [0.9, 0.1]}, "quantiles must rise"),
        ({"task": "regression", "loss": "quantile", "quantiles": [0.5, 1.0]}, "less than 1"),
        ({"task": "binary", "loss": "quantile", "quantiles": [0.5]}, "binary takes the loss"),
    ],
)
def test_wrong_objectives(objective: dict[str, Any], problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        study(data={"label": LABEL}, objective=objective)
