"""The example over the OMOP CDM: its query, against SQLite and PostgreSQL, and a round of training on it."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from postgres import cluster
from typer.testing import CliRunner

import simulations
from client.settings import SiteFolder
from client.sources import read_table
from common.study import load_study
from simulations.cli import app

EXAMPLE = Path(simulations.__file__).parent / "examples" / "omop"
# The columns of the CDM 5.4 that the query reads, and a few that it doesn't.
TABLES = {
    "person": "person_id INTEGER, gender_concept_id INTEGER, year_of_birth INTEGER, race_concept_id INTEGER",
    "visit_occurrence": "visit_occurrence_id INTEGER, person_id INTEGER, visit_concept_id INTEGER, "
    "visit_start_date DATE, visit_end_date DATE",
    "condition_occurrence": "condition_occurrence_id INTEGER, person_id INTEGER, "
    "condition_concept_id INTEGER, condition_start_date DATE",
    "measurement": "measurement_id INTEGER, person_id INTEGER, measurement_concept_id INTEGER, "
    "measurement_date DATE, value_as_number NUMERIC, unit_concept_id INTEGER",
    "drug_exposure": "drug_exposure_id INTEGER, person_id INTEGER, drug_concept_id INTEGER, "
    "drug_exposure_start_date DATE",
}
Rows = dict[str, list[tuple[object, ...]]]


def invented(seed: int, persons: int = 80) -> Rows:
    """Rows of a made-up hospital; person 1 is written by hand in `test_the_query_by_hand`."""
    draw = random.Random(seed)
    rows: Rows = {name: [] for name in TABLES}
    for person in range(2, persons + 2):
        born = draw.choice([1940, 1960, 1980, 2004, 2015])
        rows["person"].append((person, draw.choice([8507, 8532, 8551]), born, 0))
        ill = draw.random() < 0.5
        for number in range(draw.randint(1, 4)):
            month = 1 + 3 * number
            visit = (person * 10 + number, person, draw.choice([9201, 9201, 9202, 9203]))
            rows["visit_occurrence"].append((*visit, f"2024-{month:02d}-03", f"2024-{month:02d}-09"))
            if draw.random() < 0.7:
                value, unit = draw.choice([(round(draw.uniform(4, 11), 1), 8554), (48.0, 9579)])
                rows["measurement"].append((visit[0], person, 3004410, f"2024-{month:02d}-04", value, unit))
            rows["drug_exposure"].append((visit[0], person, draw.randint(1, 5), f"2024-{month:02d}-05"))
            if not ill:
                break
        if ill:
            rows["condition_occurrence"].append((person, person, 201826, "2023-05-05"))
    return rows


BY_HAND: Rows = {
    "person": [(1, 8532, 1950, 0)],
    "visit_occurrence": [
        (1, 1, 9202, "2024-02-01", "2024-02-01"),
        (2, 1, 9201, "2024-05-01", "2024-05-10"),
        (3, 1, 581477, "2024-06-01", "2024-06-01"),
    ],
    "condition_occurrence": [(1, 1, 316139, "2024-03-01")],
    "measurement": [
        (1, 1, 3004410, "2024-01-01", 7.5, 8554),
        (2, 1, 3004410, "2024-05-02", 8.5, 8554),
        (3, 1, 3004410, "2024-05-03", 69, 9579),
        (4, 1, 3016723, "2024-05-11", 1.2, 8840),
    ],
    "drug_exposure": [
        (1, 1, 7, "2024-05-01"),
        (2, 1, 7, "2024-05-10"),
        (3, 1, 8, "2024-05-05"),
        (4, 1, 9, "2024-06-01"),
    ],
}


def load(path: Path, *parts: Rows) -> None:
    with sqlite3.connect(path) as database:
        for name, columns in TABLES.items():
            database.execute(f"CREATE TABLE {name} ({columns})")
            marks = ", ".join("?" * (columns.count(",") + 1))
            database.executemany(f"INSERT INTO {name} VALUES ({marks})", [r for p in parts for r in p[name]])
    database.close()


def make(root: Path, name: str, *parts: Rows) -> SiteFolder:
    shutil.copytree(EXAMPLE, root)
    text = (root / "site.toml").read_text()
    (root / "site.toml").write_text(text.replace("omop-site", name))
    load(root / "cdm.db", *parts)
    return SiteFolder(root)


def table_of(folder: SiteFolder) -> pd.DataFrame:
    return read_table(folder, load_study(EXAMPLE / "study.toml")).rows.to_pandas()


def test_the_query_by_hand(tmp_path: Path) -> None:
    folder = make(tmp_path / "site", "hand", BY_HAND)
    table = read_table(folder, load_study(EXAMPLE / "study.toml"))
    found = {name: column.to_pylist() for name, column in table.columns.items()}
    assert found == {
        "patient_id": ["1", "1"],
        "age": ["74", "74"],
        "sex": ["female", "female"],
        "visit_kind": ["outpatient", "inpatient"],
        "hba1c": ["7.5", "8.5"],
        "creatinine": [None, None],
        "drugs": ["0", "2"],
        "earlier_visits": ["0", "1"],
        "diabetes": ["0", "0"],
        "heart_failure": ["0", "1"],
        "admitted_later": ["1", "0"],
    }


def test_two_sites_train_a_round(tmp_path: Path) -> None:
    for seed, name in enumerate(("east", "west")):
        make(tmp_path / "sites" / name, name, invented(seed))
    options = f"--exact-metrics --seed 1 --set algorithm.rounds=1 --out {tmp_path / 'runs'}"
    done = CliRunner().invoke(
        app,
        ["run", str(EXAMPLE / "study.toml"), "--sites", str(tmp_path / "sites"), *options.split()],
    )
    assert done.exit_code == 0, done.output
    assert "east" in done.output
    assert len(list((tmp_path / "runs").rglob("model.safetensors"))) == 1


@pytest.mark.deployment
def test_postgresql_gives_the_same_rows(tmp_path: Path) -> None:
    folder = make(tmp_path / "site", "east", BY_HAND, invented(1))
    wanted = table_of(folder)
    with cluster() as server:
        for name, columns in TABLES.items():
            rows = [row for part in (BY_HAND, invented(1)) for row in part[name]]
            values = ", ".join(str(row) for row in rows)
            server.do(f"CREATE TABLE {name} ({columns})", f"INSERT INTO {name} VALUES {values}")
            server.do(f"GRANT SELECT ON {name} TO ward")
        text = (folder.root / "site.toml").read_text()
        (folder.root / "site.toml").write_text(text.replace("sqlite:///cdm.db", server.url))
        found = table_of(SiteFolder(folder.root))
    assert list(found) == list(wanted)
    numbers = ["hba1c", "creatinine"]  # 7.0 and 7 are one number
    assert found[numbers].astype(float).equals(wanted[numbers].astype(float))
    assert found.drop(columns=numbers).equals(wanted.drop(columns=numbers))
