"""How good the models of a table are said to be: every task, against scikit-learn, scipy and the metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from small import classes, patients, study

from client.training import shares
from common.metrics import measure
from common.models import parameter_arrays, study_model
from common.study import Study
from simulations.dealing import write_sites
from simulations.table import scoring
from simulations.table.cell import Cell, compute
from simulations.table.federation import federation_of, pooled
from simulations.table.rows import Row
from simulations.table.scoring import Scored, Scorer, columns_of


def scored(counts: list[int], seed: int) -> tuple[Scorer, Scored]:
    one = study()
    own = patients(counts, seed)
    random = np.random.default_rng(seed)
    said = (own.labels.numpy() + random.normal(size=len(own.labels))) / 6 + 0.4
    return Scorer(one), Scored(own, torch.from_numpy(said.clip(0, 1).astype(np.float32)))


def test_a_resample_weighs_patients_with_all_their_records() -> None:
    scorer, found = scored([1, 4, 2, 7, 1, 1, 3, 5, 2, 2], seed=5)
    times = np.array([2, 0, 1, 1, 3, 0, 1, 2, 0, 0])
    own = found.patients
    weights = shares(own).numpy() * np.repeat(times, own.offsets.diff().numpy())
    binned = np.floor(found.scores.numpy().astype(np.float64) * 10_000)
    expected = roc_auc_score(own.labels.numpy(), binned, sample_weight=weights)
    measured = measure(scorer.study, found.sums(scorer.study, times))
    assert measured.patients == pytest.approx(times.sum())
    assert measured.auroc == pytest.approx(expected, abs=1e-9)


def test_an_interval_is_the_bootstrap_percentiles() -> None:
    scorer, found = scored([1] * 150, seed=6)
    right = ((found.scores.numpy() >= 0.5) == found.patients.labels.numpy()).astype(float)
    theirs = bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    ours = scorer.interval(found, "accuracy", seed=1)
    assert ours == scorer.interval(found, "accuracy", seed=1)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.014)  # two patients


def test_no_interval_of_what_is_undefined() -> None:
    scorer, found = scored([1, 2, 1], seed=7)
    same = replace(found.patients, labels=torch.zeros_like(found.patients.labels))
    assert scorer.interval(Scored(same, found.scores), "auroc", seed=1) is None
    nobody = Scored(patients([]), torch.zeros(0))
    assert scorer.interval(nobody, "accuracy", seed=1) is None


TASKS: dict[str, dict[str, Any]] = {
    "multi-class": {"label": classes(3)},
    "multi-label": {"label": {"columns": [{"name": "a"}, {"name": "b"}]}},
    "regression": {"label": {"column": "time", "range": [0, 100], "unit": "d"}},
    "survival": {
        "label": {"column": "time", "event": "a", "range": [0, 100], "unit": "d", "intervals": 5},
        "model": "logistic-hazard",
    },
}


def example(task: str, to: Path) -> Study:
    """A study of one task, and two sites of it: two records a patient."""
    own = TASKS[task]
    random = np.random.default_rng(1)
    values = random.normal(size=(160, 4)).clip(-1, 1)
    risk = values[:, 0] + 0.2 * random.normal(size=160)
    frame = pd.DataFrame(values.round(6), columns=[f"x_{i}" for i in range(4)])
    frame["patient_id"] = [f"p{i // 2}" for i in range(160)]
    frame["y"] = np.digitize(risk, [-0.5, 0.5])
    frame["a"], frame["b"] = (risk > 0).astype(int), (risk > 0.3).astype(int)
    frame["time"] = (50 - 40 * risk.clip(-1, 1)).round(3)
    write_sites(frame, "patient_id", to, 2)
    return study(
        data={"label": own["label"]},
        objective={"task": task},
        model={"name": own.get("model", "logistic-regression")},
        training={"optimizer": {"name": "sgd", "learning_rate": 0.2}},
        privacy={"mode": "none"},
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_table(tmp_path: Path, task: str) -> None:
    """The interval lies around the metric, which is that of the same patients."""
    one = example(task, tmp_path / "sites")
    main = columns_of(one)[0]
    found = compute(Cell(Row("pooled", one), 1, tmp_path / "sites", main), tmp_path)
    assert set(found.sites) == {"site-1", "site-2"}
    assert found.interval is not None
    assert found.interval[0] < found.whole[main] < found.interval[1]
    by_site = compute(Cell(Row("local", one), 1, tmp_path / "sites", main), tmp_path)
    assert by_site.whole["patients"] == found.whole["patients"]


@pytest.mark.parametrize("task", TASKS)
def test_resamples_are_measured_like_any_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Whatever cells are left out on the way: here are all of them."""
    monkeypatch.setattr(scoring, "RESAMPLES", 6)
    one = example(task, tmp_path / "sites")
    main, scorer = columns_of(one)[0], Scorer(one)
    scorer.load(parameter_arrays(study_model(one, 1)))
    found = scorer.scored(pooled(federation_of(one, tmp_path / "sites", 1).cohorts()).train)
    count = len(found.patients)
    random = np.random.default_rng(9)
    drawn = [random.multinomial(count, np.full(count, 1 / count)) for _ in range(6)]
    expected = [getattr(measure(one, found.sums(one, times)), main) for times in drawn]
    told = scorer._resampled(found, main, np.random.default_rng(9))
    np.testing.assert_allclose(told, expected, rtol=1e-9)
