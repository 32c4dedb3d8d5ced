"""Error bars: coverage over many draws of noise and of patients, oracles from scipy and scikit-learn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn import metrics as sklearn
from small import classes, study

from common import curves
from common.curves import Grid
from common.histograms import histogram_shapes, histograms, merged
from common.metrics import Measured, measure, value_ranges
from common.study import Study
from common.subgroups import FEWEST_PATIENTS, Gap, gaps, subgroups
from common.uncertainty import Estimate, Interval, _nearest_counts, estimate, merged_noise

BINARY = study()
MULTI = study(data={"label": classes(4)}, objective={"task": "multi-class"})
LABEL = {"column": "y", "range": [80, 200], "unit": "mm[Hg]"}
REGRESSION = study(data={"label": LABEL}, objective={"task": "regression"})
SEX = {"kind": "categorical", "name": "sex", "codes": {"0": "female", "1": "male"}}
GROUPED = study(data={"columns": [SEX]}, evaluation={"subgroups": ["sex"]})
Sums = dict[str, np.ndarray]


def told(
    wanted: Study, scores: np.ndarray, labels: np.ndarray, bins: int, groups: np.ndarray | None = None
) -> Sums:
    """Patients with one record each."""
    return histograms(
        wanted,
        torch.from_numpy(np.asarray(scores, dtype=np.float32)),
        torch.from_numpy(labels),
        torch.ones(len(labels)),
        bins,
        None if groups is None else torch.from_numpy(groups[:, None]),
    )


def binary(seed: int, count: int = 500, apart: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    return 1 / (1 + np.exp(-apart * (random.normal(size=count) + apart * (labels - 0.5)))), labels


def multi(seed: int, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    powers = np.exp(random.normal(size=(count, 4)) + 2 * np.eye(4)[labels])
    return powers / powers.sum(axis=1, keepdims=True), labels


def errors(seed: int, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.uniform(-1, 1, count).astype(np.float32)
    return (0.8 * labels + random.normal(0.05, 0.25, count)).clip(-1, 1), labels


def noised(sums: Sums, noise: float, random: np.random.Generator) -> Sums:
    return {name: array + noise * random.standard_normal(array.shape) for name, array in sums.items()}


def covered(wanted: Study, sums: Sums, noise: float, draws: int = 200) -> dict[str, float]:
    """How often each metric's interval holds the metric without noise."""
    random, truth = np.random.default_rng(7), vars(measure(wanted, sums))
    hits: dict[str, list[bool]] = {name: [] for name, value in truth.items() if value is not None}
    for _ in range(draws):
        bounds = estimate(wanted, noised(sums, noise, random), noise).intervals.noise
        for name, found in hits.items():
            low, high = bounds[name]
            found.append(low <= truth[name] <= high)
    return {name: float(np.mean(found)) for name, found in hits.items()}


# Noise multipliers of one evaluation at δ = 1e-4: ε = 1 and ε = 3, about.
@pytest.mark.parametrize(("noise", "apart"), [(3.19, 1.5), (1.2, 2.5)])
def test_noise_intervals_of_a_binary_study_cover(noise: float, apart: float) -> None:
    found = covered(BINARY, told(BINARY, *binary(3, apart=apart), 10), noise)
    assert set(found) == {
        "patients", "auroc", "auprc", "accuracy", "brier", "calibration_error", "sensitivity", "specificity",
        "precision", "sensitivity_90", "sensitivity_95", "score_1", "score_1_half",
    }  # fmt: skip
    for name in ("patients", "auroc", "accuracy", "brier", "sensitivity", "specificity", "precision"):
        assert 0.90 <= found[name] <= 0.99, (name, found)
    for name in ("auprc", "calibration_error", "sensitivity_90", "sensitivity_95", "score_1", "score_1_half"):
        assert 0.88 <= found[name] <= 0.99, (name, found)


def test_noise_intervals_of_a_multi_class_study_cover() -> None:
    found = covered(MULTI, told(MULTI, *multi(3), 10), 1.2 * math.sqrt(5))
    for name in ("patients", "auroc", "accuracy", "brier"):
        assert 0.90 <= found[name] <= 0.99, (name, found)
    for name in ("auprc", "calibration_error"):
        assert 0.88 <= found[name] <= 0.99, (name, found)


@pytest.mark.parametrize("bins", [10, 40])
def test_noise_intervals_of_regression_cover(bins: int) -> None:
    found = covered(REGRESSION, told(REGRESSION, *errors(3), bins), 3.19 * math.sqrt(3))
    assert set(found) == {
        "patients", "mae", "rmse", "bias", "median_absolute_error", "absolute_error_90",
    }  # fmt: skip
    for name, share in found.items():
        assert 0.90 <= share <= 0.99, (name, found)


def test_noise_of_merged_sites_adds_up() -> None:
    """Two sites with other noise: the merged interval is that of one site with the root of the squares."""
    assert merged_noise([3.0, 4.0]) == 5.0
    assert merged_noise([]) == 0.0
    scores, labels = binary(5, 1000)
    sites = [told(BINARY, scores[:600], labels[:600], 10), told(BINARY, scores[600:], labels[600:], 10)]
    truth, random, hits = measure(BINARY, merged(list(sites))), np.random.default_rng(0), 0
    for _ in range(100):
        sums = merged([noised(sites[0], 3.0, random), noised(sites[1], 4.0, random)])
        low, high = estimate(BINARY, sums, 5.0).intervals.noise["auroc"]
        assert truth.auroc is not None
        hits += low <= truth.auroc <= high
    assert 90 <= hits <= 99


@pytest.mark.parametrize("kind", ["binary", "multi", "regression"])
def test_the_same_sums_have_the_same_error_bars_in_whatever_order(kind: str) -> None:
    wanted = {"binary": BINARY, "multi": MULTI, "regression": REGRESSION}[kind]
    cohort = {"binary": binary, "multi": multi, "regression": errors}[kind](1)
    sums = noised(told(wanted, *cohort, 10), 3.0, np.random.default_rng(1))
    found = estimate(wanted, sums, 3.0)
    assert found.intervals.noise
    assert found.intervals.sampling
    assert estimate(wanted, dict(reversed(sums.items())), 3.0) == found
    assert estimate(wanted, dict(reversed(sums.items())), 0.0) == estimate(wanted, sums, 0.0)


def test_exact_metrics_have_sampling_error_only() -> None:
    sums = told(BINARY, *binary(1), 100)
    found = estimate(BINARY, sums, 0.0)
    assert found.measured == measure(BINARY, sums)
    assert found.intervals.noise == {}
    names = {name for name, value in vars(found.measured).items() if value is not None}
    points = {
        f"{name}@{t / 10:g}" for name in ("accuracy", "sensitivity", "specificity") for t in range(1, 10)
    }
    assert set(found.intervals.sampling) == names - {"patients"} | points


def inside(value: float, interval: Interval) -> bool:
    return interval[0] - 1e-12 <= value <= interval[1] + 1e-12


def sound(wanted: Study, found: Estimate) -> None:
    """Every bar is finite, within the metric's range, and around the metric."""
    json.dumps(asdict(found), allow_nan=False)
    ranges = value_ranges(wanted)
    for bounds in (found.intervals.noise, found.intervals.sampling):
        for name, (low, high) in bounds.items():
            assert ranges[name][0] - 1e-12 <= low <= high <= ranges[name][1] + 1e-12, name
    for name, interval in found.intervals.noise.items():
        value = getattr(found.measured, name, None)
        if value is not None and name != "calibration_error":
            assert inside(value, interval), name


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["binary", "multi", "regression"]),
    count=st.sampled_from([0, 1, 12, 200]),
    noise=st.sampled_from([0.0, 0.3, 3.0, 100.0]),
)
def test_error_bars_are_sound_whatever_the_noise(seed: int, kind: str, count: int, noise: float) -> None:
    wanted = {"binary": BINARY, "multi": MULTI, "regression": REGRESSION}[kind]
    cohort = {"binary": binary, "multi": multi, "regression": errors}[kind](seed, count)
    sums = noised(told(wanted, *cohort, 10), noise, np.random.default_rng(seed))
    sound(wanted, estimate(wanted, sums, noise))


@pytest.mark.parametrize("value", [0.0, -3.0])
@pytest.mark.parametrize("wanted", [BINARY, MULTI, REGRESSION], ids=["binary", "multi", "regression"])
def test_nobody_is_there(value: float, wanted: Study) -> None:
    sums = {name: np.full(shape, value) for name, shape in histogram_shapes(wanted, 10).items()}
    for noise in (0.0, 1.0):
        found = estimate(wanted, sums, noise)
        sound(wanted, found)
        assert found.measured == Measured(patients=0.0)
        assert set(found.intervals.noise) <= {"patients"}


def test_sampling_intervals_are_the_bootstraps() -> None:
    scores, labels = binary(2, 400)
    scores = (np.floor(scores * 100) + 0.5) / 100
    found = estimate(BINARY, told(BINARY, scores, labels, 100), 0.0).intervals.sampling
    functions = {
        "auroc": sklearn.roc_auc_score,
        "auprc": sklearn.average_precision_score,
        "brier": sklearn.brier_score_loss,
    }
    for name, function in functions.items():
        random = np.random.default_rng(0)
        drawn = []
        for _ in range(400):
            chosen = random.integers(0, 400, 400)
            drawn.append(function(labels[chosen], scores[chosen]))
        _close(found[name], tuple(np.quantile(drawn, [0.025, 0.975])))
    right = int((labels == (scores >= 0.5)).sum())
    _close(found["accuracy"], stats.binomtest(right, 400).proportion_ci(method="wilson"))


def _close(one: Interval, other: Any) -> None:
    """Within an eighth of the width."""
    assert np.allclose(one, tuple(other), atol=(other[1] - other[0]) / 8), (one, other)


def test_sampling_intervals_of_errors_are_scipys() -> None:
    predictions, labels = errors(2, 400)
    u = (predictions.clip(-1, 1) - labels) * 60
    found = estimate(REGRESSION, told(REGRESSION, predictions, labels, 100), 0.0).intervals.sampling

    def bootstrap(statistic: Any) -> Interval:
        done = stats.bootstrap((u,), statistic, n_resamples=999, random_state=0, method="percentile")
        return float(done.confidence_interval.low), float(done.confidence_interval.high)

    _close(found["mae"], stats.t.interval(0.95, 399, np.abs(u).mean(), stats.sem(np.abs(u))))
    _close(found["bias"], stats.t.interval(0.95, 399, u.mean(), stats.sem(u)))
    _close(found["rmse"], bootstrap(lambda x, axis=-1: np.sqrt((x**2).mean(axis=axis))))
    _close(found["median_absolute_error"], bootstrap(lambda x, axis=-1: np.median(np.abs(x), axis=axis)))
    _close(found["absolute_error_90"], bootstrap(lambda x, axis=-1: np.quantile(np.abs(x), 0.9, axis=axis)))


def test_sampling_intervals_cover_the_population() -> None:
    scores, labels = binary(99, 400_000)
    truth = vars(measure(BINARY, told(BINARY, scores, labels, 20)))
    hits: dict[str, int] = dict.fromkeys(("auroc", "auprc", "accuracy", "brier", "calibration_error"), 0)
    for seed in range(100):
        found = estimate(BINARY, told(BINARY, *binary(seed, 300), 20), 0.0).intervals.sampling
        for name in hits:
            hits[name] += inside(truth[name], found[name])
    assert all(88 <= share <= 100 for share in hits.values()), hits


def test_several_classes_sampling_error_is_rather_too_wide() -> None:
    scores, labels = multi(1, 400)
    found = estimate(MULTI, told(MULTI, scores, labels, 100), 0.0).intervals.sampling
    random, drawn = np.random.default_rng(0), []
    for _ in range(300):
        chosen = random.integers(0, 400, 400)
        drawn.append(measure(MULTI, told(MULTI, scores[chosen], labels[chosen], 100)))
    for name in ("auroc", "auprc", "brier", "accuracy"):
        low, high = np.quantile([getattr(each, name) for each in drawn], [0.025, 0.975])
        width = found[name][1] - found[name][0]
        assert 0.85 <= width / (high - low) <= 2.5, (name, width / (high - low))


def test_the_calibration_error_without_noise_is_the_plain_one() -> None:
    sums = told(BINARY, *binary(4), 10)
    plain = measure(BINARY, sums).calibration_error
    assert measure(BINARY, sums, noise=1e-9).calibration_error == pytest.approx(plain)


def test_noise_no_longer_raises_the_calibration_error() -> None:
    """Of a model that is calibrated but for chance, 500 patients: bias of the plain and of this estimate."""
    random, bias = np.random.default_rng(3), {"plain": [], "here": []}  # type: ignore[var-annotated]
    scores = random.beta(2, 2, 500)
    sums = told(BINARY, scores, (random.uniform(size=500) < scores).astype(np.int64), 10)
    truth = measure(BINARY, sums).calibration_error
    for _ in range(300):
        drawn = noised(sums, 3.19, random)
        bias["plain"].append(measure(BINARY, drawn).calibration_error)
        bias["here"].append(measure(BINARY, drawn, 3.19).calibration_error)
    assert np.mean(bias["plain"]) - truth > 0.008
    assert abs(np.mean(bias["here"]) - truth) < 0.006


def test_the_folded_normals_mean_is_scipys() -> None:
    """What `denoised_calibration_error` takes off: with one group only, it solves one equation."""
    counts = np.array([[30.0, 0.0], [10.0, 40.0]])
    grid, noise = Grid.whole(2), 4.0
    found = float(curves.denoised_calibration_error(counts, grid, noise)) * counts.sum()
    d = curves.calibration_sums(counts, grid)
    t = noise * np.sqrt(grid.middles**2 + (1 - grid.middles) ** 2)
    factor = found / np.abs(d).sum()
    expected = sum(stats.foldnorm.mean(abs(factor * a) / b, scale=b) for a, b in zip(d, t, strict=True))
    assert expected == pytest.approx(np.abs(d).sum(), rel=1e-6)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 10_000), cells=st.integers(1, 8))
def test_the_nearest_counts_are_the_optimisers(seed: int, cells: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.normal(2, 4, cells)
    found = _nearest_counts(counts)
    whole = max(0.0, counts.sum())
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(whole)
    if whole > 0:
        best = optimize.minimize(
            lambda x: ((x - counts) ** 2).sum(),
            np.full(cells, whole / cells),
            jac=lambda x: 2 * (x - counts),
            bounds=[(0, None)] * cells,
            constraints={"type": "eq", "fun": lambda x: x.sum() - whole},
            method="SLSQP",
        )
        assert ((found - counts) ** 2).sum() <= best.fun + 1e-6


def test_a_calibration_line_needs_bins_and_little_noise() -> None:
    sums = told(BINARY, *binary(2, 4000), 100)
    found = estimate(BINARY, noised(sums, 0.5, np.random.default_rng(0)), 0.5)
    truth = measure(BINARY, sums)
    for name in ("calibration_intercept", "calibration_slope"):
        assert inside(getattr(truth, name), found.intervals.noise[name])
        assert inside(getattr(found.measured, name), found.intervals.noise[name])
    drowned = estimate(BINARY, noised(sums, 60.0, np.random.default_rng(0)), 60.0)
    assert (drowned.measured.calibration_intercept, drowned.measured.calibration_slope) == (None, None)


def two_groups(seed: int, apart: Mapping[int, float], counts: tuple[int, int, int]) -> Sums:
    """Patients of the groups female, male and missing, whose scores are so far apart by label."""
    parts = [binary(seed * 10 + g, counts[g], apart[g]) for g in range(3)]
    groups = np.repeat(np.arange(3), counts)
    return told(GROUPED, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), 10,
                groups)  # fmt: skip


def gap_of(found: tuple[Gap, ...], metric: str) -> Gap:
    return next(gap for gap in found if gap.metric == metric)


def test_a_gap_is_the_largest_less_the_smallest() -> None:
    sums = two_groups(0, {0: 0.5, 1: 3.0, 2: 1.0}, (400, 500, FEWEST_PATIENTS - 1))
    by_group = {each.group: each.measured for each in subgroups(GROUPED, sums, 0.0)}
    assert {name: m.patients for name, m in by_group.items()} == {"0": 400, "1": 500, "(missing)": 19}
    found = gaps(GROUPED, sums, 0.0)
    assert [gap.metric for gap in found] == ["auroc", "accuracy", "calibration_error"]
    auroc = gap_of(found, "auroc")
    assert (auroc.column, auroc.highest, auroc.lowest, auroc.noise) == ("sex", "1", "0", None)
    assert auroc.gap == pytest.approx((by_group["1"].auroc or 0) - (by_group["0"].auroc or 0))
    assert auroc.sampling is not None
    assert auroc.gap > auroc.sampling
    noisy = gap_of(gaps(GROUPED, noised(sums, 3.0, np.random.default_rng(0)), 3.0), "auroc")
    assert noisy.noise is not None
    assert noisy.gap > noisy.noise


def test_groups_that_noise_may_have_made_do_not_count() -> None:
    sums = two_groups(0, {0: 1.5, 1: 1.5, 2: 1.5}, (400, 60, 0))
    assert len(gaps(GROUPED, sums, 0.0)) == 3
    assert gaps(GROUPED, sums, 10.0) == ()
    assert gaps(BINARY, told(BINARY, *binary(0), 10), 0.0) == ()


def test_between_equal_groups_noise_and_sampling_make_no_larger_gap() -> None:
    even = {0: 1.5, 1: 1.5, 2: 1.5}
    within = {"noise": 0, "sampling": 0}
    fixed = two_groups(3, even, (300, 300, 0))
    fixed["sex/scores"][1] = fixed["sex/scores"][0]
    random = np.random.default_rng(1)
    for seed in range(60):
        noise = gap_of(gaps(GROUPED, noised(fixed, 2.0, random), 2.0), "auroc")
        within["noise"] += noise.gap <= (noise.noise or 0)
        sampled = gap_of(gaps(GROUPED, two_groups(seed, even, (300, 300, 0)), 0.0), "auroc")
        within["sampling"] += sampled.gap <= (sampled.sampling or 0)
    assert all(53 <= count <= 60 for count in within.values()), within


def test_no_error_is_none_rather_than_zero() -> None:
    sums = told(REGRESSION, *errors(0), 10)
    sums["moments"][1] = -1.0
    found = estimate(REGRESSION, sums, 5.0)
    assert found.measured.rmse is None
    assert found.intervals.noise["rmse"][0] == 0.0
    perfect = told(REGRESSION, np.zeros(9), np.zeros(9, dtype=np.float32), 10)
    assert measure(REGRESSION, perfect).rmse == 0.0


def test_errors_have_gaps_too() -> None:
    wanted = study(
        data={"columns": [SEX], "label": LABEL},
        objective={"task": "regression"},
        evaluation={"subgroups": ["sex"]},
    )
    predictions, labels = errors(0, 600)
    groups = np.arange(600) % 2
    predictions = np.where(groups == 1, labels, predictions)
    (found,) = gaps(wanted, told(wanted, predictions, labels, 20, groups), 0.0)
    assert (found.metric, found.highest, found.lowest) == ("mae", "0", "1")
    assert replace(found, gap=0.0).sampling is not None
    assert found.gap > (found.sampling or 0)
