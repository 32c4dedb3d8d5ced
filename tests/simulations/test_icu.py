"""Stays in intensive care: what the sites of PhysioNet's challenge get, and that the study runs on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.errors import DatasetError
from common.modalities import SeriesColumn
from common.study import Study, load_study
from simulations.datasets import fetch, prepare
from simulations.datasets.packing import packed, unpacked
from simulations.datasets.physionet2012 import UNITS, icu_mortality
from simulations.datasets.registry import find
from simulations.datasets.sites import write_sites
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_study
from simulations.table.rows import rows_of, settings_of

KEY = b"a key of thirty-two random bytes"
STAYS = 48


@pytest.fixture(scope="session")
def stays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of the published form: 48 invented stays a set, twelve a unit; a fast heart dies."""
    raw, random = tmp_path_factory.mktemp("stays"), np.random.default_rng(0)
    for offset, part in enumerate("ab"):
        files: dict[str, bytes] = {}
        lines = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
        for i in range(STAYS):
            key, died = 132_539 + 1000 * offset + i, int(i % 3 == 0)
            text = (
                f"Time,Parameter,Value\n00:00,RecordID,{key}\n00:00,Age,{40 + i}\n00:00,ICUType,{1 + i % 4}\n"
            )
            for hour in range(0, 48, 3):
                text += f"{hour:02d}:{random.integers(60):02d},HR,{random.normal(80 + 40 * died, 5):.0f}\n"
            files[f"set-{part}/{key}.txt"] = text.encode()
            lines.append(f"{key},-1,-1,5,-1,{died}")
        (raw / f"set-{part}.tar.gz").write_bytes(packed(files, compress=True))
        (raw / f"Outcomes-{part}.txt").write_text("\n".join(lines) + "\n")
    return raw


@pytest.fixture(scope="session")
def sites(stays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    write_sites(find("icu-mortality"), icu_mortality(stays), folder)
    return folder


def one_round(private: bool) -> Study:
    study = load_study(ready_study("icu-mortality")).model_dump(mode="json")
    study["algorithm"]["rounds"] = 1
    study["training"] |= {"local_epochs": None, "local_steps": 2, "patients_per_step": 4}
    study["privacy"] |= {"delta": 1e-3}
    if not private:
        study["privacy"] = {"mode": "none"}
    return Study.model_validate(study)


@pytest.mark.parametrize("private", [False, True])
def test_the_study_runs_on_stays(sites: Path, tmp_path: Path, private: bool) -> None:
    settings = SimulationSettings(seed=1, exact_metrics=True)
    done = simulate(one_round(private), sites, tmp_path, settings)
    assert done.store.checkpoint(done.session, 2)


def test_a_stay_is_at_the_site_of_its_unit_in_the_part_of_its_set(stays: Path, sites: Path) -> None:
    for unit, name in UNITS.items():
        table = pd.read_csv(sites / name / "patients.csv", dtype=str)
        assert table["split"].value_counts().to_dict() == {"train": 12, "test": 12}
        files = dict(unpacked(sites / name / "stays.tar.gz"))
        assert [f"{stay}.txt" for stay in table["stay"]] == list(files)
        assert all(f"ICUType,{unit}\n".encode() in content for content in files.values())
        published = dict(unpacked(stays / "set-a.tar.gz"))
        train = table.loc[table["split"] == "train", "stay"]
        assert all(files[f"{stay}.txt"] == published[f"set-a/{stay}.txt"] for stay in train)


def test_a_stay_keeps_its_measurements_and_its_outcome(sites: Path) -> None:
    study = one_round(private=False)
    cohort = load_cohort(SiteFolder(sites / "medical"), study, KEY)
    (column,) = study.data.wide
    assert isinstance(column, SeriesColumn)
    heart = [v.name for v in column.variables].index("HR")
    rates = cohort.train.features.reshape(-1, *column.shape)[:, -1, heart]
    low, high = column.variables[heart].interval
    fast = low + (rates + 1) / 2 * (high - low) > 100
    assert (fast == (cohort.train.labels == 1)).all()


def test_every_variable_has_room_for_its_reference_and_default() -> None:
    (column,) = one_round(private=False).data.wide
    assert isinstance(column, SeriesColumn)
    assert len(column.variables) == 40  # 36 measured, and age, sex, height, weight
    for variable in column.variables:
        low, high = variable.range
        assert low <= variable.interval[0] < variable.interval[1] <= high, variable.name


def test_a_change_of_one_row_of_the_table_stays_in_that_row() -> None:
    study = load_study(ready_study("icu-mortality"))
    settings = settings_of(study.name, None)
    rates = {row.name: row.study.training.optimizer.learning_rate for row in rows_of(study, settings, (3.0,))}
    assert rates == {"pooled": 0.001, "federated": 0.003, "federated, ε = 3": 2.0, "each site alone": 0.003}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("set-a.tar.gz", b"no archive", r"set-a\.tar\.gz: cannot be read"),
        ("set-b.tar.gz", packed({"set-b/1.txt": b"00:00,ICUType,1\n"}, compress=True), "holds other stays"),
        ("Outcomes-a.txt", b"RecordID,In-hospital_death\n132539,0\n", "holds other stays"),
        ("Outcomes-b.txt", None, r"Outcomes-b\.txt: cannot be read"),
    ],
)
def test_damaged_files_are_refused(
    stays: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    raw = shutil.copytree(stays, tmp_path / "raw")
    (raw / file).unlink()
    if content is not None:
        (raw / file).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        icu_mortality(raw)


@pytest.mark.shared
def test_the_published_stays_become_four_units(mirror: Path, tmp_path: Path) -> None:
    folders = prepare("icu-mortality", fetch("icu-mortality", tmp_path / "raw", mirror), tmp_path / "sites")
    tables = {f.name: pd.read_csv(f / "patients.csv", dtype=str) for f in folders}
    counts = {
        name: tuple((t["split"] == part).sum() for part in ("train", "test")) for name, t in tables.items()
    }
    assert counts == {
        "coronary-care": (577, 590),
        "cardiac-surgery": (874, 782),
        "medical": (1481, 1436),
        "surgical": (1068, 1192),
    }
    whole = pd.concat(tables.values())
    assert whole["patient_id"].is_unique
    assert whole.loc[whole["died"] == "1", "split"].value_counts().to_dict() == {"train": 554, "test": 568}
    study = load_study(ready_study("icu-mortality"))
    cohort = load_cohort(SiteFolder(tmp_path / "sites" / "coronary-care"), study, KEY)
    assert (len(cohort.train), len(cohort.test)) == (577, 590)
    (column,) = study.data.wide
    assert isinstance(column, SeriesColumn)
    masks = cohort.train.features.reshape(-1, *column.shape)[..., len(column.variables) :]
    measured = masks.amax(dim=1).mean(dim=0)  # share of stays that have each variable at all
    shares = dict(zip([v.name for v in column.variables], measured.tolist(), strict=True))
    assert shares["Age"] == 1
    assert shares["HR"] > 0.95
    assert shares["Cholesterol"] < 0.5
