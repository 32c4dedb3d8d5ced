"""The ready study `notes`: whom it holds, that its text doesn't tell the label, and that it runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.study import Study, load_study
from simulations.datasets import fetch, prepare
from simulations.datasets.registry import find
from simulations.datasets.sites import Hospital, write_sites
from simulations.studies import ready_study
from simulations.table.cell import Cell, compute
from simulations.table.rows import rows_of, settings_of
from simulations.wanted import varied

KEY = b"a key of thirty-two random bytes"
# Site → patients who train, who test, and who of both have atrial fibrillation.
COUNTS = {
    "project-02": (128, 33, 97),
    "project-05": (278, 68, 198),
    "project-07": (349, 87, 229),
    "project-11": (92, 23, 13),
    "project-12": (161, 40, 119),
    "project-14": (240, 60, 150),
    "project-16": (71, 18, 36),
    "project-17": (174, 43, 109),
    "project-20": (88, 21, 50),
}
DRUGS = {True: ("digoxin", "diltiazem", "amiodarone", "sotalol"), False: ("insulin", "codeine", "iron")}
USUAL = ("aspirin", "lasix", "Furosemide 40 mg", "lisinopril", "vitamin D")


def study() -> Study:
    return load_study(ready_study("notes"))


def generated(patients: int, random: np.random.Generator) -> pd.DataFrame:
    """Rows like those of the real sites: a list of medications each, and the label."""
    rows = []
    for i in range(patients):
        ill = bool(random.integers(2))
        drugs = [*random.choice(USUAL, 2, replace=False), random.choice(DRUGS[ill])]
        rows.append(
            {
                "patient_id": f"p-{i:03d}",
                "medications": "; ".join(drugs) if i else None,
                "fibrillation": str(int(ill)),
                "split": "test" if i % 5 == 1 else "train",
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of generated rows; one patient of each has no list."""
    folder = tmp_path_factory.mktemp("sites")
    random = np.random.default_rng(3)
    hospitals = [Hospital(name, generated(60, random), 59) for name in ("ashford", "cedar-hill")]
    write_sites(find("notes"), hospitals, folder)
    return folder


@pytest.fixture(scope="session")
def raw(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("notes", tmp_path_factory.mktemp("raw"), mirror=mirror)


@pytest.fixture(scope="session")
def real(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The folders of the real sites."""
    return prepare("notes", raw, tmp_path_factory.mktemp("real"))


@pytest.mark.shared
def test_the_real_sites_have_these_patients(real: tuple[Path, ...]) -> None:
    found = {}
    for folder in real:
        cohort = load_cohort(SiteFolder(folder), study(), KEY)
        ill = int(cohort.train.labels.sum() + cohort.test.labels.sum())
        found[folder.name] = (len(cohort.train), len(cohort.test), ill)
    assert found == COUNTS
    patients = sum(train + test for train, test, _ in COUNTS.values())
    assert (study().privacy.delta or 1) < 1 / patients
    assert f"{patients:,} patients" in study().description


@pytest.mark.shared
def test_no_list_of_medications_names_an_indication(real: tuple[Path, ...]) -> None:
    tables = [pd.read_csv(f / "patients.csv", dtype=str, keep_default_na=False) for f in real]
    lists = pd.concat([t.loc[t["split"] != "", "medications"] for t in tables])
    assert (lists != "").all()
    named = lists.str.contains(r"fibril|flutter|\ba\.?fib|valve|thrombos|embol|stroke|\bfor\b", case=False)
    assert not named.any()


@pytest.mark.shared
def test_preparing_twice_writes_the_same_bytes(raw: Path, real: tuple[Path, ...], tmp_path: Path) -> None:
    again = prepare("notes", raw, tmp_path)
    assert [f.name for f in again] == [f.name for f in real]
    for first, second in zip(real, again, strict=True):
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes()


def test_who_has_no_list_is_left_out(sites: Path) -> None:
    cohort = load_cohort(SiteFolder(sites / "ashford"), study(), KEY)
    assert (len(cohort.train), len(cohort.test)) == (47, 12)
    assert cohort.train.features.shape == (47, study().data.wide[0].width)
    assert ((cohort.train.features != 0).sum(dim=1) > 0).all()


@pytest.mark.parametrize("row", range(4))
def test_every_way_of_training_runs(row: int, sites: Path, tmp_path: Path) -> None:
    """Pooled, federated, with privacy, each site alone, as its table has them, for one round."""
    settings = settings_of("notes", None)
    wanted = rows_of(study(), settings, (3.0,))[row]
    short = varied(wanted.study, {"algorithm.rounds": 1}, "the test")
    result = compute(Cell(type(wanted)(wanted.kind, short), 1, sites, "auroc"), tmp_path)
    assert 0 <= result.whole["auroc"] <= 1
    assert math.isfinite(result.whole["brier"])
    assert (result.epsilon or 0) <= 3.0
    assert (result.epsilon is not None) == short.private
