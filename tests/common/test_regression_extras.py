"""Labels that are learnt on their square root, predictions to within a tolerance, and silent defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import study

from common.encoding import encode
from common.errors import StudyError
from common.features import feature_names
from common.histograms import EXACT_BINS, histogram_shapes, histograms
from common.metrics import measure
from common.privacy.plan import histogram_sensitivity
from common.study import Study
from server.display import show_columns
from tests.common.test_schema import category, numeric, study_with, table

LABEL = {"column": "y", "range": [0, 315], "unit": "mg/wk", "transform": "sqrt"}


def dose(tolerance: float | None = 0.2, quantiles: tuple[float, ...] = (), **label: Any) -> Study:
    loss = {"loss": "quantile", "quantiles": list(quantiles)} if quantiles else {}
    return study(
        data={"label": {**LABEL, **label}},
        objective={"task": "regression", **loss},
        evaluation={"tolerance": tolerance},
    )


def told(wanted: Study, found: Any, labels: Any, bins: int = EXACT_BINS) -> dict[str, Any]:
    weights = torch.full((len(labels),), 1.0, dtype=torch.float64)
    return histograms(wanted, torch.from_numpy(found), torch.from_numpy(labels), weights, bins)


def test_a_square_root_is_scaled_to_its_own_range_and_back() -> None:
    label = dose().data.label
    doses = np.array([0.0, 2.1, 31.0, 315.0])
    scaled = label.scaled(doses)
    np.testing.assert_allclose(scaled, 2 * np.sqrt(doses) / np.sqrt(315) - 1)
    np.testing.assert_allclose((label.untransformed(scaled) + 1) / 2 * 315, doses, atol=1e-9)
    plain = dose(transform="none").data.label
    np.testing.assert_allclose(plain.untransformed(plain.scaled(doses)), 2 * doses / 315 - 1)


@pytest.mark.parametrize(
    ("label", "named"),
    [
        ({"range": [-1, 1]}, "transform sqrt goes with the range of a number, from 0 up"),
        ({"transform": "log"}, "transform"),
    ],
)
def test_transforms_that_make_no_sense_are_named(label: dict[str, Any], named: str) -> None:
    with pytest.raises(StudyError, match=named):
        dose(**label)
    with pytest.raises(StudyError, match="transform sqrt goes with"):
        study(data={"label": {"column": "y", "transform": "sqrt", "classes": [
            {"name": "no", "codes": ["0"]}, {"name": "yes", "codes": ["1"]}]}})  # fmt: skip


@pytest.mark.parametrize("transform", ["none", "sqrt"])
def test_whoever_is_predicted_within_the_tolerance_is_near(transform: str) -> None:
    wanted, random = dose(transform=transform), np.random.default_rng(0)
    label = wanted.data.label
    true = random.uniform(3, 90, 400)
    found = (true * random.uniform(0.6, 1.4, 400)).clip(0, 315)
    scaled = [label.scaled(each).astype(np.float32) for each in (found, true)]
    own = measure(wanted, told(wanted, *scaled))
    assert own.near == pytest.approx(np.mean(np.abs(found - true) <= 0.2 * true))
    assert own.mae == pytest.approx(np.abs(found - true).mean(), rel=1e-4)
    without = dose(None, transform=transform)
    assert measure(without, told(without, *scaled)).near is None
    assert (show_columns(wanted)["near"], "near" in show_columns(without)) == ("within 20%", False)
    assert histogram_shapes(wanted, 10) == {"errors": (10,), "moments": (3,), "near": (1,)}


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    seed=st.integers(0, 100_000),
    bins=st.sampled_from([2, 10, 100]),
    edge=st.booleans(),
    quantiles=st.sampled_from([(), (0.1, 0.5, 0.9)]),
)
def test_a_record_adds_at_most_the_stated_sensitivity(
    seed: int, bins: int, edge: bool, quantiles: tuple[float, ...]
) -> None:
    wanted, random = dose(0.9, quantiles), np.random.default_rng(seed)
    values = [-1.0, -0.99, 0.0, 1.0, np.nan, np.inf] if edge else random.uniform(-1.2, 1.2, 50)
    found = random.choice(values, (1, len(quantiles)) if quantiles else 1).astype(np.float32)
    label = random.choice(np.nan_to_num(values).clip(-1, 1), 1).astype(np.float32)
    sums = told(wanted, found, label, bins)
    norm = np.sqrt(sum(float((a**2).sum()) for a in sums.values()))
    assert norm <= histogram_sensitivity(wanted) + 1e-6


def test_a_tolerance_is_for_regression() -> None:
    with pytest.raises(StudyError, match="tolerance is for regression"):
        study(evaluation={"tolerance": 0.2})


def test_a_default_stands_in_without_a_feature_of_its_own() -> None:
    wanted = study_with(numeric(missing="default", default=2), category(missing="default"))
    assert not any(":missing" in name for name in feature_names(wanted))
    found = encode(table(x=["5", None], c=["a", None]), wanted).features
    np.testing.assert_allclose(found[1], [-0.6, *[0] * (found.shape[1] - 1)], rtol=1e-6)
    assert found[0, 1:].sum() == 1
