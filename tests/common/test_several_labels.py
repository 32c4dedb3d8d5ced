"""Several labels that each are yes or no, some missing: loss, released sums and metrics, label by label."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from small import study

from common.encoding import encode
from common.errors import DataError, StudyError
from common.histograms import (
    EXACT_BINS,
    Packed,
    cells_of_patients,
    histogram_shapes,
    histograms,
    histograms_apart,
)
from common.metrics import by_label, measure
from common.objectives import record_losses, scores
from common.privacy.plan import histogram_sensitivity
from common.study import Objective, Study
from common.subgroups import gaps
from common.table import Table
from common.uncertainty import estimate

SEVERAL = Objective(task="multi-label")
COLUMNS = [
    {"name": "effusion"},
    {"name": "oedema", "yes": ["yes", "sure"], "no": ["no"]},
    {"name": "mass", "missing_codes": ["-1"]},
]
SEX = {"kind": "categorical", "name": "sex", "codes": {"0": "female", "1": "male"}}


def several(columns: list[dict[str, Any]] | None = None, **changes: Any) -> Study:
    data = {"label": {"columns": columns or COLUMNS}, **changes.pop("data", {})}
    return study(data=data, objective={"task": "multi-label"}, **changes)


def drawn(seed: int, count: int = 400) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scores in the middles of bins, and labels of which a fifth is missing."""
    random = np.random.default_rng(seed)
    labels = (random.random((count, 3)) < [0.5, 0.2, 0.7]).astype(np.float32)
    found = 1 / (1 + np.exp(-(random.normal(size=(count, 3)) + 1.5 * labels - 0.7)))
    labels[random.random((count, 3)) < 0.2] = np.nan
    return (np.floor(found * EXACT_BINS) + 0.5) / EXACT_BINS, labels


def told(wanted: Study, found: Any, labels: Any, bins: int = EXACT_BINS) -> dict[str, Any]:
    weights = torch.ones(len(labels), dtype=torch.float64)
    return histograms(
        wanted, torch.from_numpy(found.astype(np.float32)), torch.from_numpy(labels), weights, bins
    )


def table(**columns: list[str | None]) -> Table:
    count = len(next(iter(columns.values())))
    values: dict[str, list[str | None]] = {f"x_{i}": ["0.5"] * count for i in range(4)}
    return Table.of("t.csv", {"patient_id": [f"p{i}" for i in range(count)], **values, **columns})


def test_labels_from_text() -> None:
    rows = table(effusion=["1", "0", None], oedema=["sure", "no", ""], mass=["-1", "1.0", "0"])
    found = encode(rows, several()).labels
    assert found.dtype == np.float32
    expected = np.array([[1, 1, np.nan], [0, 0, 1], [np.nan, np.nan, 0]])
    assert np.array_equal(found, expected, equal_nan=True)


def test_an_unknown_code_is_told() -> None:
    rows = table(effusion=["1", "0"], oedema=["sure", "maybe"], mass=["1", "0"])
    with pytest.raises(DataError, match=r"column oedema: unknown label code, once \(row 2\)") as raised:
        encode(rows, several())
    assert "maybe" not in raised.value.message


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ({"columns": COLUMNS, "column": "y"}, "with `columns` there is no column"),
        ({"columns": [{"name": "a", "yes": ["1"], "no": ["1"]}]}, "label a: a code stands for two"),
        ({"columns": [{"name": "a"}, {"name": "a"}]}, "column names must be unique"),
        ({}, "give `column`, or `columns`"),
    ],
)
def test_wrong_labels_of_a_study(label: dict[str, Any], problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        study(data={"label": label}, objective={"task": "multi-label"})


def test_tasks_that_do_not_fit() -> None:
    with pytest.raises(StudyError, match="multi-label one with columns"):
        study(objective={"task": "multi-label"})
    with pytest.raises(StudyError, match="multi-label takes the loss cross-entropy"):
        study(data={"label": {"columns": COLUMNS}}, objective={"task": "multi-label", "loss": "hinge"})
    assert several().outputs == 3


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 10_000), records=st.integers(1, 6))
def test_the_loss_is_the_mean_over_known_labels(seed: int, records: int) -> None:
    random = np.random.default_rng(seed)
    z = random.normal(size=(records, 3)) * 3
    labels = random.choice([0.0, 1.0, np.nan], (records, 3))
    found = record_losses(SEVERAL, torch.from_numpy(z).float(), torch.from_numpy(labels).float())
    each = np.where(labels == 1, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))
    expected = [
        np.mean(row[~np.isnan(own)]) if not np.isnan(own).all() else 0.0
        for row, own in zip(each, labels, strict=True)
    ]
    assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_scores_are_probabilities_of_each_label() -> None:
    outputs = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scores(SEVERAL, outputs), outputs.sigmoid())


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scikit_learns(seed: int) -> None:
    wanted = several()
    found, labels = drawn(seed)
    sums = told(wanted, found, labels)
    expected = []
    for k, one in enumerate(by_label(wanted, sums)):
        known = ~np.isnan(labels[:, k])
        y, s = labels[known, k], found[known, k]
        own = {
            "patients": known.sum(),
            "auroc": sklearn.roc_auc_score(y, s),
            "auprc": sklearn.average_precision_score(y, s),
            "brier": np.mean((s - y) ** 2),
            "accuracy": np.mean((s >= 0.5) == y),
            "sensitivity": np.mean(s[y == 1] >= 0.5),
            "precision": np.mean(y[s >= 0.5]),
        }
        expected.append(own)
        assert one.label == COLUMNS[k]["name"]
        for name, value in own.items():
            assert getattr(one.measured, name) == pytest.approx(value, abs=2e-4), name
        assert one.measured.calibration_error is not None
    whole = measure(wanted, sums)
    for name in expected[0]:
        assert getattr(whole, name) == pytest.approx(np.mean([e[name] for e in expected]), abs=2e-4), name
    mean = np.mean([one.measured.calibration_error for one in by_label(wanted, sums)])  # type: ignore[arg-type]
    assert whole.calibration_error == pytest.approx(mean)


@pytest.mark.parametrize("bins", [10, EXACT_BINS])
def test_sites_in_one_go_are_as_alone(bins: int) -> None:
    wanted = several()
    found, labels = drawn(1, 90)
    kind: int = Packed(bins)
    apart = histograms_apart(wanted, found.astype(np.float32), labels, np.ones(90), kind, [40, 0, 50])
    for start, count, own in ((0, 40, apart[0]), (40, 0, apart[1]), (40, 50, apart[2])):
        where = slice(start, start + count)
        alone = told(wanted, found[where], labels[where], kind)
        assert {n: a.tobytes() for n, a in own.items()} == {n: a.tobytes() for n, a in alone.items()}
    assert histogram_shapes(wanted, bins) == {"labels": (3, 2, bins)}


@settings(deadline=None, derandomize=True, max_examples=100)
@given(seed=st.integers(0, 100_000), records=st.integers(1, 5), bins=st.sampled_from([2, 10, 100]))
def test_a_patient_adds_at_most_the_stated_sensitivity(seed: int, records: int, bins: int) -> None:
    random = np.random.default_rng(seed)
    wanted = several()
    found = random.random((records, 3))
    found[random.random((records, 3)) < 0.1] = np.nan
    labels = random.choice([0.0, 1.0, np.nan], (records, 3)).astype(np.float32)
    sums = histograms(
        wanted,
        torch.from_numpy(found.astype(np.float32)),
        torch.from_numpy(labels),
        torch.full((records,), 1 / records, dtype=torch.float64),
        bins,
    )
    norm = float(np.sqrt((sums["labels"] ** 2).sum()))
    assert norm <= histogram_sensitivity(wanted) + 1e-9
    one = told(wanted, np.ones((1, 3)), np.zeros((1, 3), dtype=np.float32), bins)
    assert float(np.sqrt((one["labels"] ** 2).sum())) == pytest.approx(histogram_sensitivity(wanted))


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_error_bars_cover_what_is_without_noise(noise: float) -> None:
    wanted = several(evaluation={"bins": 10})
    exact = told(wanted, *drawn(2, 1500), 10)
    truth, random = measure(wanted, exact), np.random.default_rng(0)
    inside, runs = {"auroc": 0, "auprc": 0, "brier": 0, "accuracy": 0, "patients": 0}, 30 if noise else 1
    for _ in range(runs):
        noisy = {n: a + noise * random.standard_normal(a.shape) for n, a in exact.items()}
        each = estimate(wanted, noisy, noise)
        assert {"auroc", "brier"} <= set(each.intervals.sampling)
        for name in inside if noise else ():
            low, high = each.intervals.noise[name]
            inside[name] += low <= getattr(truth, name) <= high
    assert not noise or min(inside.values()) >= 25
    assert noise or estimate(wanted, exact, 0.0).intervals.noise == {}


def test_the_noise_of_the_number_of_patients() -> None:
    shapes = histogram_shapes(several(evaluation={"bins": 10}), 10)
    drawn_sums = np.random.default_rng(0).standard_normal((4000, *shapes["labels"])).sum(axis=(-2, -1))
    variance = float(drawn_sums.mean(axis=1).var())
    assert cells_of_patients({"labels": np.zeros(shapes["labels"])}) == pytest.approx(variance, rel=0.1)


def test_subgroups_have_gaps() -> None:
    column = {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4}
    wanted = several(data={"columns": [column, SEX]}, evaluation={"subgroups": ["sex"]})
    found, labels = drawn(3)
    groups = torch.from_numpy(np.arange(len(labels)) % 2)[:, None]
    sums = histograms(
        wanted,
        torch.from_numpy(found.astype(np.float32)),
        torch.from_numpy(labels),
        torch.ones(len(labels), dtype=torch.float64),
        EXACT_BINS,
        groups,
    )
    assert sums["sex/labels"].shape == (3, 3, 2, 1000)
    assert {gap.metric for gap in gaps(wanted, sums, 0.0)} == {"auroc", "accuracy", "calibration_error"}
