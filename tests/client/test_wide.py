"""A site whose table names series, and holds texts and molecules: what the study's cohort comes to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.errors import DataError, SiteError
from common.features import blocks
from common.study import Study, parse_study

KEY = b"a key of thirty-two random bytes"
STUDY = """format = 1
name = "wide"
title = "Every kind of column"

[data]
patient_key = "patient_id"

[[data.columns]]
kind = "numeric"
name = "age"
unit = "a"
range = [0, 120]

[[data.columns]]
kind = "series"
name = "stay"
hours = 3
step_hours = 1
missing = "RULE"
variables = [{ name = "HR", unit = "/min", range = [0, 300], reference = [50, 150] }]

[[data.columns]]
kind = "text"
name = "note"
tokens = 4

[[data.columns]]
kind = "molecule"
name = "drug"
bits = 64
descriptors = true
missing = "RULE"

[data.label]
column = "died"
classes = [{ name = "no", codes = ["0"] }, { name = "yes", codes = ["1"] }]

[model]
name = "logistic-regression"

[objective]
task = "binary"

[algorithm]
name = "fedavg"
rounds = 1

[training]
local_epochs = 1
patients_per_step = 2
optimizer = { name = "sgd", learning_rate = 0.1 }

[privacy]
mode = "none"
"""
SITE = """[site]
name = "ward"
public_size = 3

[data]
file = "stays.csv"

[data.files.stay]
at = "series"
"""
STAYS = """patient_id,age,stay,note,drug,died
a,40,8675309,chest pain,CCO,0
b,50,2,,CC(=O)O,1
c,60,3,Zebedee fell,c1ccccc1,0
"""


def study(rule: str = "refuse") -> Study:
    return parse_study(STUDY.replace("RULE", rule).encode(), "study")


def site(path: Path, stays: str = STAYS, settings: str = SITE) -> SiteFolder:
    (path / "series").mkdir()
    (path / "site.toml").write_text(settings)
    (path / "stays.csv").write_text(stays)
    for name, hr in (("8675309", 100), ("2", 150), ("3", 50)):
        (path / "series" / f"{name}.txt").write_text(f"Time,Parameter,Value\n01:30,HR,{hr}\n")
    return SiteFolder(path)


def rows(folder: SiteFolder, of: Study) -> np.ndarray:
    cohort = load_cohort(folder, of, KEY)
    return np.concatenate([np.asarray(part.features) for part in (cohort.train, cohort.test)])


def test_the_blocks_stand_where_the_study_says(tmp_path: Path) -> None:
    of = study()
    found = rows(site(tmp_path), of)
    assert [(b.name, b.width) for b in blocks(of)] == [("age", 1), ("stay", 6), ("note", 4), ("drug", 77)]
    found = found[found[:, 0].argsort()]
    assert found.shape == (3, 88)
    assert found[:, 1:7].tolist() == [[0, 0, h, 1, h, 0] for h in (0.0, 1.0, -1.0)]
    assert (found[:, 7:11] > 0).sum(axis=1).tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("stay", "column stay: the file that it names is absent, once (line 3)"),
        ("drug", "column drug: not a SMILES that RDKit can read, once (line 3)"),
    ],
)
def test_bad_ones_are_listed_by_line_or_left_out(tmp_path: Path, column: str, said: str) -> None:
    broken = STAYS.replace(",2,", ",8675309x,") if column == "stay" else STAYS.replace("CC(=O)O", "Zebedee")
    folder = site(tmp_path, broken)
    with pytest.raises(DataError) as caught:
        load_cohort(folder, study(), KEY)
    assert said in str(caught.value)
    assert "8675309" not in str(caught.value)
    assert "Zebedee" not in str(caught.value)
    assert sorted(rows(folder, study("exclude"))[:, 0].round(3).tolist()) == pytest.approx(
        [-1 / 3, 0], abs=1e-3
    )


def test_a_bad_line_of_a_series_is_told_without_it(tmp_path: Path) -> None:
    folder = site(tmp_path)
    (tmp_path / "series" / "2.txt").write_text("Time,Parameter,Value\n01:30,HR,Zebedee\n")
    with pytest.raises(
        DataError, match=r"column stay: a value of HR is not a number, once \(line 3\)"
    ) as caught:
        load_cohort(folder, study(), KEY)
    assert "Zebedee" not in str(caught.value)


def test_a_site_must_say_where_its_series_are(tmp_path: Path) -> None:
    folder = site(tmp_path, settings=SITE.split("[data.files")[0])
    with pytest.raises(SiteError, match="says nowhere where the files of column stay are"):
        load_cohort(folder, study(), KEY)
