"""Tables of medicine, and molecules: what their sites get, and that their studies run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from common.columns import CategoricalColumn
from common.errors import DatasetError
from common.study import Study, load_study
from simulations.datasets import prepare
from simulations.datasets.diabetes130 import diagnosis_group
from simulations.datasets.iwpc import vkorc1
from simulations.datasets.raw import held_out
from simulations.datasets.registry import find
from simulations.datasets.sites import Hospital, write_sites
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_study

NAMES = ("warfarin", "readmission", "telemonitoring", "tcga-brca", "solubility")
SMILES = ("CCO", "c1ccccc1", "CC(=O)O", "CCN", "OCC(O)CO", "Cc1ccccc1O")


def invented(study: Study, patients: int, random: np.random.Generator) -> pd.DataFrame:
    """Records that fit a study's dictionary: one to three of each patient."""
    ids = np.repeat([f"invented-{i:03d}" for i in range(patients)], 1 + np.arange(patients) % 3)
    table = pd.DataFrame({"patient_id": ids})
    for column in study.data.columns:
        values: Any
        if column.kind == "numeric":
            values = random.integers(np.ceil(column.range[0]), np.floor(column.range[1]) + 1, len(ids))
        elif isinstance(column, CategoricalColumn):
            values = random.choice(list(column.codes), len(ids))
        else:
            values = random.choice(SMILES, len(ids))
        table[column.name] = values
    label = study.data.label
    for name in label.sources:
        if name in label.codes:
            table[name] = random.choice([code for code, _ in label.codes[name]], len(ids))
        else:
            table[name] = random.uniform(*(label.range or (0, 1)), len(ids)).round(3)
    table["split"] = held_out(table["patient_id"])
    return table


@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_on_invented_records_of_its_shape(name: str, tmp_path: Path) -> None:
    value = load_study(ready_study(name)).model_dump(mode="json")
    value["algorithm"]["rounds"] = 1
    study, random = Study.model_validate(value), np.random.default_rng(0)
    hospitals = [Hospital(site, invented(study, 30, random), 30) for site in ("north", "south")]
    write_sites(find(name), hospitals, tmp_path / "sites")
    done = simulate(study, tmp_path / "sites", tmp_path / "run", SimulationSettings(seed=1))
    assert done.store.checkpoint(done.session, 2)


def test_linked_variants_stand_in_by_the_consortiums_rule() -> None:
    columns = ["Race (OMB)", *(f"VKORC1 {v} consensus" for v in ("-1639", "2255", "1173", "1542"))]
    rows: list[tuple[str | None, ...]] = [
        ("White", "A/A", "C/C", "C/C", "G/G"),  # typed: stays
        ("Asian", None, "T/T", None, None),
        ("Asian", None, None, None, "C/G"),
        ("Black or African American", None, "T/T", None, "C/C"),
        ("Black or African American", None, "T/T", "C/T", None),
        ("Unknown", None, None, None, None),
    ]
    found = vkorc1(pd.DataFrame(rows, columns=columns))
    assert found.fillna("").tolist() == ["A/A", "A/A", "A/G", "", "A/G", ""]


@pytest.mark.parametrize(
    ("code", "group"),
    [
        ("250.83", "diabetes"), ("428", "circulatory"), ("785", "circulatory"), ("486", "respiratory"),
        ("530", "digestive"), ("599", "genitourinary"), ("996", "injury"), ("715", "musculoskeletal"),
        ("239", "neoplasms"), ("276", "other"), ("V57", "other"), ("E888", "other"), ("789", "other"),
    ],
)  # fmt: skip
def test_diagnoses_are_grouped_as_published(code: str, group: str) -> None:
    assert diagnosis_group(code) == group


def test_a_fifth_of_each_groups_patients_is_held_out() -> None:
    patients = pd.Series([f"p{i // 3}" for i in range(300)])
    group = pd.Series(["a" if i < 150 else "b" for i in range(300)])
    split = held_out(patients, group)
    tests = patients[split == "test"]
    assert tests[group == "a"].nunique() == tests[group == "b"].nunique() == 10
    assert not set(tests) & set(patients[split == "train"])
    order = np.random.default_rng(0).permutation(300)
    again = held_out(patients[order], group[order])
    assert dict(zip(patients[order], again, strict=True)) == dict(zip(patients, split, strict=True))


def test_files_that_are_absent_or_others_are_named(tmp_path: Path) -> None:
    for name in (*NAMES, "notes"):
        with pytest.raises(DatasetError, match="cannot be read") as caught:
            prepare(name, tmp_path / "nowhere", tmp_path / "sites")
        assert "fetch the data set first" in caught.value.remedy
    (tmp_path / "parkinsons_updrs.data").write_text("subject#,age\n1,72\n")
    (tmp_path / "data_curated.csv").write_text("ID,InChIKey\nA-1,K\n")
    member = "subject#,age\n"
    with zipfile.ZipFile(tmp_path / "dataset_diabetes.zip", "w") as archive:
        archive.writestr("dataset_diabetes/diabetic_data.csv", "encounter_id,patient_nbr\n1,2\n" + member)
    for name in ("telemonitoring", "solubility", "readmission"):
        with pytest.raises(DatasetError, match="holds other records than published"):
            prepare(name, tmp_path, tmp_path / "sites")
    (tmp_path / "brca.csv").write_text("pid,age_at_index,E,T\nTCGA-1,60,0.0,5\n")
    (tmp_path / "train_test_split.csv").write_text("pid,fold,fold2\nTCGA-1,train,train_0\n")
    with pytest.raises(DatasetError, match="published are"):
        prepare("tcga-brca", tmp_path, tmp_path / "sites")
    (tmp_path / "PS206767-553247439.xlsx").write_bytes(b"no archive")
    with pytest.raises(DatasetError, match="cannot be read"):
        prepare("warfarin", tmp_path, tmp_path / "sites")
