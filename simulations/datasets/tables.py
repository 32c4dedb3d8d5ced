"""Three smaller tables: Parkinson's telemonitoring, breast cancer of TCGA, solubility of AqSolDB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.raw import SEED, TEST, TRAIN, held_out, text_table
from simulations.datasets.sites import Hospital
from simulations.partition import by_column, iid

_CLINICS = ("ashford", "birchwood", "cedar-hill")
_VOICE = {
    "Jitter(%)": "jitter",
    "Jitter(Abs)": "jitter_absolute",
    "Jitter:RAP": "jitter_rap",
    "Jitter:PPQ5": "jitter_ppq5",
    "Jitter:DDP": "jitter_ddp",
    "Shimmer": "shimmer",
    "Shimmer(dB)": "shimmer_db",
    "Shimmer:APQ3": "shimmer_apq3",
    "Shimmer:APQ5": "shimmer_apq5",
    "Shimmer:APQ11": "shimmer_apq11",
    "Shimmer:DDA": "shimmer_dda",
    "NHR": "nhr",
    "HNR": "hnr",
    "RPDE": "rpde",
    "DFA": "dfa",
    "PPE": "ppe",
}
_REGIONS = ("Northeast", "South", "West", "Midwest", "Europe", "Canada")
FOLDS = ((248, 63), (156, 40), (164, 42), (129, 33), (129, 33), (40, 11))


def telemonitoring(raw: Path) -> list[Hospital]:
    """5,875 recordings of 42 patients (101 to 168 each), dealt out to three clinics of 14 patients.

    Nothing is published of sites. In each clinic three patients test.

    Raises:
        DatasetError: if the file is absent or another.
    """
    path = raw / "parkinsons_updrs.data"
    published = text_table(path)
    subject = published.get("subject#", pd.Series(dtype=str))
    if (len(published), subject.nunique()) != (5875, 42):
        raise DatasetError(f"{path}: holds other records than published", remedy="fetch the data set again")
    table = published.rename(
        columns={"subject#": "patient_id", "test_time": "day", "motor_UPDRS": "motor", "total_UPDRS": "total"}
        | _VOICE
    )
    table["patient_id"] = "subject-" + subject.str.zfill(2)
    people = np.unique(table["patient_id"].to_numpy(dtype=str))
    clinic = pd.Series("", index=people)
    for name, part in zip(
        _CLINICS, iid(len(people), len(_CLINICS), np.random.default_rng(SEED)), strict=True
    ):
        clinic.iloc[part] = name
    site = table["patient_id"].map(clinic)
    table["split"] = held_out(table["patient_id"], site)
    return _by_site(table, site)


def tcga_brca(raw: Path) -> list[Hospital]:
    """1,088 patients with breast cancer in six regions, with FLamby's 39 features and its split.

    Raises:
        DatasetError: if the files are absent, or don't give FLamby's published counts.
    """
    table = text_table(raw / "brca.csv")
    folds = text_table(raw / "train_test_split.csv").set_index("pid")["fold2"]
    table = table.rename(columns={name: plain_name(name) for name in table.columns})
    table = table.rename(columns={"pid": "patient_id", "E": "died", "T": "days"})
    fold = table["patient_id"].map(folds)
    table, fold = table[fold.notna()], fold.dropna()
    table["split"] = fold.str.partition("_")[0]
    region = fold.str.partition("_")[2].astype(np.int64)
    counts = tuple(
        tuple(int((table.loc[region == i, "split"] == part).sum()) for part in (TRAIN, TEST))
        for i in range(len(_REGIONS))
    )
    if counts != FOLDS:
        raise DatasetError(
            f"{raw}: the split gives {counts} train and test patients, published are {FOLDS}",
            remedy="fetch the data set again",
        )
    return _by_site(table, region.map(dict(enumerate(r.lower() for r in _REGIONS))))


def plain_name(name: str) -> str:
    """A column of brca.csv under a name that a data dictionary may have."""
    letters = "".join(c if c.isalnum() else "_" for c in name.lower().replace("(i-)", "itc_negative"))
    short = "_".join(part for part in letters.split("_") if part)
    return short if name not in ("pid", "E", "T") else name


def solubility(raw: Path) -> list[Hospital]:
    """9,982 compounds of nine data sets, each of which is a site; a compound takes the place of a patient.

    Raises:
        DatasetError: if the file is absent or another.
    """
    path = raw / "data_curated.csv"
    published = text_table(path)
    if len(published) != 9982 or not published.get("InChIKey", pd.Series(dtype=str)).is_unique:
        raise DatasetError(f"{path}: holds other records than published", remedy="fetch the data set again")
    table = published.rename(columns={"ID": "patient_id", "SMILES": "smiles", "Solubility": "log_s"})
    table = table.drop(columns=["Name", "InChI", "InChIKey", "SD", "Occurrences", "Group"])
    site = "source-" + table["patient_id"].str[0].str.lower()
    table["split"] = held_out(table["patient_id"], site)
    return _by_site(table, site)


def _by_site(table: pd.DataFrame, site: pd.Series) -> list[Hospital]:
    return [
        Hospital(name, table.iloc[rows], table["patient_id"].iloc[rows].nunique())
        for name, rows in by_column(site.to_numpy(dtype=str)).items()
    ]
