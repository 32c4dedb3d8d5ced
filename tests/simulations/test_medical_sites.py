"""Tables of medicine as published: what each site gets of them, and that it meets its study's dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.features import feature_count
from common.study import load_study
from simulations.datasets import fetch, prepare
from simulations.datasets.raw import sheet, text_table
from simulations.datasets.tables import FOLDS
from simulations.studies import ready_study

KEY = b"a key of thirty-two random bytes"
# Sites and their eligible patients.
PUBLISHED: dict[str, tuple[int, int]] = {
    "warfarin": (21, 5410),
    "readmission": (7, 69_990),
    "telemonitoring": (3, 42),
    "tcga-brca": (6, 1088),
    "solubility": (9, 9982),
}


@pytest.fixture(scope="session")
def prepared(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """Name → folders of its sites."""
    work = tmp_path_factory.mktemp("medical")
    return {name: prepare(name, fetch(name, work / "raw", mirror), work / name) for name in PUBLISHED}


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_sites_and_patients_are_the_published_ones(name: str, prepared: dict[str, tuple[Path, ...]]) -> None:
    tables = [pd.read_csv(f / "patients.csv", dtype=str, keep_default_na=False) for f in prepared[name]]
    eligible = [set(t.loc[t["split"] != "", "patient_id"]) for t in tables]
    assert (len(tables), sum(map(len, eligible))) == PUBLISHED[name]
    assert len(set().union(*eligible)) == PUBLISHED[name][1]  # nobody is at two sites
    for table in tables:
        parts = table[table["split"] != ""].groupby("patient_id")["split"].nunique()
        assert (parts == 1).all()
        assert set(table["split"]) - {""} == {"train", "test"}


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_site_meets_its_studys_dictionary(name: str, prepared: dict[str, tuple[Path, ...]]) -> None:
    study = load_study(ready_study(name))
    counts = []
    for folder in prepared[name]:
        cohort = load_cohort(SiteFolder(folder), study, KEY)
        assert cohort.train.features.shape[1] == feature_count(study)
        assert cohort.train.features.isfinite().all()
        counts.append((len(cohort.train), len(cohort.test)))
    train, test = (sum(each) for each in zip(*counts, strict=True))
    if name == "tcga-brca":
        assert sorted(counts) == sorted(FOLDS)
    else:
        assert test / (train + test) == pytest.approx(0.2, abs=0.02)
    # Of who may be excluded for a value: one molecule in a thousand can't be read.
    assert train + test >= 0.998 * PUBLISHED[name][1]


@pytest.mark.shared
def test_the_bytes_are_the_same_every_time(
    mirror: Path, prepared: dict[str, tuple[Path, ...]], tmp_path: Path
) -> None:
    for name in ("telemonitoring", "tcga-brca", "solubility"):
        again = prepare(name, fetch(name, tmp_path / "raw", mirror), tmp_path / name)
        for one, other in zip(prepared[name], again, strict=True):
            assert {p.name: p.read_bytes() for p in one.iterdir()} == {
                p.name: p.read_bytes() for p in other.iterdir()
            }


@pytest.mark.shared
def test_the_workbook_reads_as_its_csv_does(mirror: Path) -> None:
    """`subject_data.csv` was taken from the workbook by another programme."""
    folder = mirror / "iwpc_warfarin"
    read = sheet(folder / "PS206767-553247439.xlsx", "xl/worksheets/sheet2.xml")
    told = text_table(folder / "subject_data.csv")
    assert list(read.columns) == list(told.columns)
    for column in told.columns:
        if not (read[column] == told[column]).all():  # a float's seventeenth digit
            numbers = [pd.to_numeric(t[column], errors="coerce") for t in (read, told)]
            np.testing.assert_allclose(*numbers, rtol=1e-14)


@pytest.mark.shared
def test_a_dose_follows_its_genes(prepared: dict[str, tuple[Path, ...]]) -> None:
    table = pd.concat([pd.read_csv(f / "patients.csv") for f in prepared["warfarin"]])
    stable = table[table["split"].notna()]
    assert stable["vkorc1_a"].isna().sum() == 102  # 1,444 were not typed
    means = stable.groupby("vkorc1_a")["dose"].mean()
    assert means[0] > means[1] > means[2]
    assert set(stable["cyp2c9_2"].dropna()) == set(stable["cyp2c9_3"].dropna()) == {0, 1, 2}
