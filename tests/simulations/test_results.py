"""What the README says comes out, comes out: with the ready studies and the seeds named there."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from common.study import Study, load_study
from server.report import SessionReport, report
from simulations.datasets import fetch, prepare
from simulations.engine import SimulationSettings, simulate
from simulations.reproduce import flamby_heart
from simulations.studies import ready_study


def changed(name: str, **privacy: float) -> Study:
    value = load_study(ready_study(name)).model_dump(mode="json")
    value["privacy"].update(privacy)
    return Study.model_validate(value)


def reports(study: Study, sites: Path, out: Path, seeds: range) -> list[SessionReport]:
    found = []
    for seed in seeds:
        done = simulate(study, sites, out / str(seed), SimulationSettings(seed=seed, exact_metrics=True))
        found.append(report(done.store, done.store.session(done.session)))
    return found


def accuracy(told: SessionReport) -> float:
    assert told.measured is not None
    assert told.measured.accuracy is not None
    return told.measured.accuracy


def mean_of_sites(told: SessionReport) -> float:
    return statistics.fmean(s.measured.accuracy or 0.0 for s in told.sites if s.measured)


def test_the_demo_reaches_its_auroc_at_epsilon_one(tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    prepare("breast-cancer", fetch("breast-cancer", tmp_path / "raw"), sites)
    study = load_study(ready_study("breast-cancer"))
    assert (study.privacy.epsilon, study.privacy.delta) == (1.0, 1e-4)
    told = reports(study, sites, tmp_path, range(1, 6))
    assert statistics.fmean(r.measured.auroc or 0.0 for r in told if r.measured) >= 0.985
    assert all(0.99 < s.epsilon <= 1.0 for r in told for s in r.sites if s.epsilon is not None)


@pytest.mark.shared
def test_heart_disease_on_flambys_patients(mirror: Path, tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    prepare("heart-disease", fetch("heart-disease", tmp_path / "raw", mirror), sites)
    study = load_study(ready_study("heart-disease"))
    assert (study.privacy.epsilon, study.privacy.delta) == (1.0, 1e-3)
    told = reports(study, sites, tmp_path / "one", range(1, 11))
    assert statistics.fmean(map(accuracy, told)) >= 0.80
    assert statistics.fmean(map(mean_of_sites, told)) >= 0.81
    told = reports(changed("heart-disease", epsilon=0.1), sites, tmp_path / "tenth", range(1, 11))
    assert statistics.fmean(map(mean_of_sites, told)) >= 0.72


@pytest.mark.shared
def test_flambys_fedavg_comes_out_as_published(mirror: Path, tmp_path: Path) -> None:
    found = flamby_heart(tmp_path, mirror)
    assert [f.quantity for f in found] == ["pooled test", "mean of client tests"]
    assert all(f.within for f in found), found


def test_the_network_of_the_issue_learns_digits(tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    prepare("digits", fetch("digits", tmp_path / "raw"), sites)
    study = load_study(ready_study("digits-mlp"))
    assert study.model.parameters == {"hidden": [128, 64]}
    assert (study.training.optimizer.name, study.algorithm.rounds, study.training.local_epochs) == (
        "adam",
        20,
        1,
    )
    (told,) = reports(study, sites, tmp_path, range(1, 2))
    assert accuracy(told) >= 0.95
