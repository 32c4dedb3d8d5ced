"""What a session came to: error bars where metrics are noised, the plain table where they are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import study

from common.console import Speaker
from common.histograms import EXACT_BINS, histograms, merged
from common.metrics import measure
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from common.privacy.plan import histogram_sensitivity
from common.study import Study
from common.uncertainty import estimate
from server.coordinator import METRICS
from server.display import show
from server.report import SessionReport, report
from server.store import Settings, SiteAnswer, Store

SEX = {"kind": "categorical", "name": "sex", "codes": {"0": "female", "1": "male"}}
LABEL = {"column": "y", "range": [80, 200], "unit": "mm[Hg]"}
BINARY = study()
GROUPED = study(data={"columns": [SEX]}, evaluation={"subgroups": ["sex"]})
REGRESSION = study(data={"label": LABEL}, objective={"task": "regression"}, evaluation={"bins": 40})
NOISES = {"ash": 1.5, "birch": 2.5}


def exact_sums(wanted: Study, seed: int, bins: int, count: int = 400) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    if wanted.objective.task == "regression":
        labels: np.ndarray = random.uniform(-1, 1, count).astype(np.float32)
        scores = (labels + random.normal(0, 0.2, count)).clip(-1, 1)
    else:
        labels = random.integers(0, 2, count)
        scores = 1 / (1 + np.exp(-2 * (random.normal(size=count) + 2 * labels - 1)))
    groups = torch.from_numpy(random.integers(0, 2, (count, 1))) if wanted.subgroup_columns else None
    return histograms(
        wanted,
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(labels),
        torch.ones(count),
        bins,
        groups,
    )


def told(root: Path, wanted: Study, *, exact: bool) -> tuple[SessionReport, dict[str, dict[str, Any]]]:
    """The report of a session of two sites whose last round is the final evaluation."""
    store = Store(root, durable=False)
    store.create("one", wanted, Settings(sites=2, quorum=2))
    last = wanted.algorithm.rounds + 1
    cost = SubsampledGaussian(noise_multiplier=2.0, sample_rate=0.5, steps=3).model_dump(mode="json")
    for number in range(1, last):
        answers = tuple(SiteAnswer(name, "reply", training=cost) for name in NOISES)
        store.record("one", number, {"parameters/w": np.zeros(1)}, answers)
    random = np.random.default_rng(0)
    sums: dict[str, dict[str, np.ndarray]] = {}
    for seed, (name, multiplier) in enumerate(NOISES.items()):
        own = exact_sums(wanted, seed, EXACT_BINS if exact else wanted.evaluation.bins)
        noise = 0.0 if exact else multiplier * histogram_sensitivity(wanted)
        sums[name] = {n: a + noise * random.standard_normal(a.shape) for n, a in own.items()}
    events = {n: GaussianRelease(noise_multiplier=m).model_dump(mode="json") for n, m in NOISES.items()}
    answers = tuple(
        SiteAnswer(name, "reply", evaluation=None if exact else events[name], exact=exact) for name in NOISES
    )
    answers += (SiteAnswer("cedar", "silence"),)
    arrays = {f"{METRICS}{name}/{n}": a for name, own in sums.items() for n, a in own.items()}
    store.record("one", last, arrays, answers)
    return report(store, store.session("one")), sums


def printed(capsys: pytest.CaptureFixture[str], wanted: Study, *reports: SessionReport) -> list[str]:
    show(Speaker(as_json=False), wanted, reports)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("wanted", [BINARY, GROUPED, REGRESSION], ids=["binary", "grouped", "regression"])
def test_each_sites_own_noise_makes_its_error_bars(tmp_path: Path, wanted: Study) -> None:
    found, sums = told(tmp_path, wanted, exact=False)
    sensitivity = histogram_sensitivity(wanted)
    for site in found.sites:
        expected = estimate(wanted, sums[site.site], NOISES[site.site] * sensitivity)
        assert (site.measured, site.intervals) == (expected.measured, expected.intervals)
        assert site.intervals is not None
        assert site.intervals.noise
    together = estimate(wanted, merged(list(sums.values())), float(np.hypot(1.5, 2.5)) * sensitivity)
    assert (found.measured, found.intervals) == (together.measured, together.intervals)
    assert not found.exact
    assert found.rounds == wanted.algorithm.rounds


def test_who_is_missing_is_told_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, durable=False)
    store.create("one", BINARY, Settings(sites=2, quorum=1))
    cost = SubsampledGaussian(noise_multiplier=2.0, sample_rate=0.5, steps=3).model_dump(mode="json")
    for number, reason in ((1, "not-approved: no approval"), (2, "budget-exhausted: too little is left")):
        answers = (SiteAnswer("ash", "reply", training=cost), SiteAnswer("birch", "refusal", reason))
        store.record("one", number, {"parameters/w": np.zeros(1)}, answers)
    found = report(store, store.session("one"))
    assert [(u.site, u.rounds, u.outcome) for u in found.unanswered] == [("birch", 2, "refusal")]
    lines = printed(capsys, BINARY, found)
    reason = "refusal: budget-exhausted: too little is left"
    assert any(f"birch is missing from 2 rounds, the last time for its {reason}" in line for line in lines)


def test_json_has_everything(tmp_path: Path) -> None:
    found, _ = told(tmp_path, GROUPED, exact=False)
    value = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert set(value["intervals"]["noise"]) >= {"auroc", "auprc", "accuracy", "calibration_error", "brier"}
    assert set(value["intervals"]["sampling"]) >= {"auroc", "sensitivity@0.3"}
    assert [p["threshold"] for p in value["operating_points"]] == [t / 10 for t in range(1, 10)]
    assert len(value["calibration_curve"]) == 10
    assert [(g["column"], g["group"], g["meaning"]) for g in value["subgroups"]] == [
        ("sex", "0", "female"),
        ("sex", "1", "male"),
        ("sex", "(missing)", "(missing)"),
    ]
    assert [gap["metric"] for gap in value["gaps"]] == ["auroc", "accuracy", "calibration_error"]
    assert value["sites"][0]["intervals"]["noise"]["auroc"]


def test_exact_metrics_are_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, sums = told(tmp_path, BINARY, exact=True)
    assert found.measured == measure(BINARY, merged(list(sums.values())))
    assert found.intervals is not None
    assert not found.intervals.noise
    lines = printed(capsys, BINARY, found)
    assert lines[1] == "On test patients; exact metrics, on public data; ε spent per patient at δ = 0.001"
    m, cells = found.measured, lines[-3].split()
    assert m is not None
    assert cells == [
        "all", "sites", "800", f"{m.auroc:.3f}", f"{m.accuracy:.3f}", f"{m.calibration_error:.3f}", cells[-1],
    ]  # fmt: skip


def test_noised_metrics_are_shown_with_their_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = told(tmp_path, BINARY, exact=False)
    lines = printed(capsys, BINARY, found)
    assert "noised metrics (95 % interval of the noise)" in lines[1]
    assert found.measured is not None
    assert found.intervals is not None
    low, high = found.intervals.noise["auroc"]
    assert f"{found.measured.auroc:.3f} ({low:.3f}–{high:.3f})" in lines[-3]
    assert not any("Gaps" in line for line in lines)
    several = printed(capsys, BINARY, found, found)
    assert "mean ± sd over 2 seeds" in several[1]
    assert not any("(" in line for line in several[3:-2])  # then who was missing, by run


def test_gaps_are_shown_beside_what_chance_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = told(tmp_path, GROUPED, exact=False)
    lines = printed(capsys, GROUPED, found)
    start = next(i for i, line in enumerate(lines) if line.startswith("Gaps"))
    assert lines[start + 2].split() == [
        "by",
        "metric",
        "gap",
        "highest",
        "lowest",
        "by",
        "noise",
        "by",
        "sampling",
    ]
    auroc = found.gaps[0]
    names = {"0": "female", "1": "male"}
    numbers = [f"{value:.3f}" for value in (auroc.gap, auroc.noise, auroc.sampling)]
    row = ["sex", "AUROC", numbers[0], names[auroc.highest], names[auroc.lowest], *numbers[1:]]
    assert lines[start + 4].split() == row


def test_regression_is_shown_in_its_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, sums = told(tmp_path, REGRESSION, exact=True)
    lines = printed(capsys, REGRESSION, found)
    assert "in mm[Hg]" in lines[1]
    m = measure(REGRESSION, merged(list(sums.values())))
    assert lines[-3].split()[:6] == ["all", "sites", "800", f"{m.mae:.3f}", f"{m.rmse:.3f}", f"{m.bias:.3f}"]
    assert found.calibration_curve == ()


def test_a_session_that_has_not_evaluated_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, durable=False)
    store.create("one", BINARY, Settings(sites=1, quorum=1))
    found = report(store, store.session("one"))
    assert (found.measured, found.intervals, found.rounds, found.exact) == (None, None, 0, False)
    json.dumps(found.as_json(), allow_nan=False)
    assert printed(capsys, BINARY, found)
