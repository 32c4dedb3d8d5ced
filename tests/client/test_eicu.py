"""Several tables of a real database, the eICU demo's, brought together by one query."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.cohort import load_cohort
from client.settings import SiteFolder
from client.sources import read_table
from common.study import Study, parse_study

pytestmark = pytest.mark.shared

TABLES = ("patient", "lab", "diagnosis")
QUERY = """
WITH labs AS (
    SELECT
        patientunitstayid,
        MAX(CASE WHEN labname = 'creatinine' THEN labresult END) AS creatinine,
        AVG(CASE WHEN labname = 'glucose' THEN labresult END) AS glucose
    FROM lab
    WHERE labresultoffset BETWEEN 0 AND 1440 AND labmeasurenamesystem = 'mg/dL'
    GROUP BY patientunitstayid
),
ill AS (
    SELECT patientunitstayid, MAX(diagnosisstring LIKE 'renal|%') AS renal, COUNT(*) AS diagnoses
    FROM diagnosis
    GROUP BY patientunitstayid
)
SELECT
    p.uniquepid AS patient_id,
    p.patientunitstayid,
    CASE WHEN p.age LIKE '> 89' THEN '90' ELSE p.age END AS age,
    p.gender,
    labs.creatinine,
    labs.glucose,
    COALESCE(ill.renal, 0) AS renal,
    COALESCE(ill.diagnoses, 0) AS diagnoses,
    p.hospitaldischargestatus = 'Expired' AS died
FROM patient AS p
LEFT JOIN labs USING (patientunitstayid)
LEFT JOIN ill USING (patientunitstayid)
WHERE p.hospitaldischargestatus IS NOT NULL
ORDER BY p.patientunitstayid;
"""
SITE = """[site]
name = "eicu"
public_size = 90

[data]
sql = "sqlite:///eicu.db"
query_file = "stays.sql"

[data.columns.sex]
column = "gender"
codes = { Female = "0", Male = "1" }
[data.columns.glucose]
unit = "mg/dL"
multiply = 0.0555
"""
STUDY = """format = 1
name = "stays"
title = "Stays in intensive care"

[data]
missing = "indicator"
label = { column = "died", classes = [{ name = "no", codes = ["0"] }, { name = "yes", codes = ["1"] }] }
columns = [
    { kind = "numeric", name = "age", unit = "a", range = [0, 120] },
    { kind = "categorical", name = "sex", codes = { "0" = "female", "1" = "male" } },
    { kind = "numeric", name = "creatinine", unit = "mg/dL", range = [0, 40] },
    { kind = "numeric", name = "glucose", unit = "mmol/L", range = [0, 80] },
    { kind = "categorical", name = "renal", codes = { "0" = "no", "1" = "yes" } },
    { kind = "numeric", name = "diagnoses", unit = "1", range = [0, 500] },
]

[model]
name = "logistic-regression"

[objective]
task = "binary"

[algorithm]
rounds = 1

[training]
local_steps = 1
sample_rate = 1.0
optimizer = { name = "sgd", learning_rate = 1.0 }

[privacy]
mode = "patient-dp"
epsilon = 1.0
delta = 1e-3
clipping_norm = 1.0
"""


@pytest.fixture
def folder(mirror: Path, tmp_path: Path) -> SiteFolder:
    published = mirror / "eicu_demo_subset"
    if not published.is_dir():
        pytest.skip(f"no real data: {published} is absent")
    with sqlite3.connect(tmp_path / "eicu.db") as database:
        for name in TABLES:
            pd.read_csv(published / f"{name}.csv").to_sql(name, database, index=False)
    database.close()
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "stays.sql").write_text(QUERY)
    return SiteFolder(tmp_path)


def study() -> Study:
    return parse_study(STUDY.encode(), "study")


def test_one_query_joins_what_pandas_joins(folder: SiteFolder, mirror: Path) -> None:
    table = read_table(folder, study())
    stays, lab, diagnosis = (pd.read_csv(mirror / "eicu_demo_subset" / f"{name}.csv") for name in TABLES)
    stays = stays.dropna(subset="hospitaldischargestatus").set_index("patientunitstayid").sort_index()
    lab = lab[lab.labresultoffset.between(0, 1440) & (lab.labmeasurenamesystem == "mg/dL")]
    of = {name: rows.groupby("patientunitstayid").labresult for name, rows in lab.groupby("labname")}

    def numbers(name: str) -> np.ndarray:
        return np.array([np.nan if v is None else float(v) for v in table.columns[name].to_pylist()])

    assert table.records == len(stays) == 171
    assert table.columns["patient_id"].to_pylist() == stays.uniquepid.tolist()
    np.testing.assert_allclose(numbers("creatinine"), of["creatinine"].max().reindex(stays.index))
    np.testing.assert_allclose(numbers("glucose"), of["glucose"].mean().reindex(stays.index) * 0.0555)
    np.testing.assert_array_equal(numbers("died"), stays.hospitaldischargestatus == "Expired")
    counts = diagnosis.groupby("patientunitstayid").size().reindex(stays.index, fill_value=0)
    np.testing.assert_array_equal(numbers("diagnoses"), counts)
    renal = diagnosis[diagnosis.diagnosisstring.str.startswith("renal|")].patientunitstayid
    np.testing.assert_array_equal(numbers("renal"), stays.index.isin(renal))


def test_stays_of_one_patient_count_together(folder: SiteFolder) -> None:
    cohort = load_cohort(folder, study(), bytes(range(32)))
    records = len(cohort.train.labels) + len(cohort.test.labels)
    patients = len(cohort.train) + len(cohort.test)
    assert (records, patients) == (
        171,
        len(set(read_table(folder, study()).columns["patient_id"].to_pylist())),
    )
    assert patients < records
