"""International Warfarin Pharmacogenetics Consortium (2009): 21 project sites, genes, history, weekly dose.

The sites are those that contributed the patients, each with its own definition of a therapeutic dose. Who has
no stable dose, or none on record, is left out of the split, as the consortium did.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.raw import held_out, sheet
from simulations.datasets.sites import Hospital
from simulations.partition import by_column

PATIENTS = 5700
_WORKBOOK, _SHEET = "PS206767-553247439.xlsx", "xl/worksheets/sheet2.xml"
_DOSE, _STABLE = "Therapeutic Dose of Warfarin", "Subject Reached Stable Dose of Warfarin"
_RACES = {"White": "white", "Asian": "asian", "Black or African American": "black", "Unknown": "unknown"}
_FLAGS = {
    "amiodarone": "Amiodarone (Cordarone)",
    "azole": "Anti-fungal Azoles",
    "sulfonamide": "Sulfonamide Antibiotics",
    "aspirin": "Aspirin",
    "simvastatin": "Simvastatin (Zocor)",
    "herbal": "Herbal Medications, Vitamins, Supplements",
    "smoker": "Current Smoker",
    "diabetes": "Diabetes",
    "heart_failure": "Congestive Heart Failure and/or Cardiomyopathy",
    "valve_replacement": "Valve Replacement",
}
_INDUCERS = ("Carbamazepine (Tegretol)", "Phenytoin (Dilantin)", "Rifampin or Rifampicin")
_INDICATIONS = {
    "deep_vein_thrombosis": "1",
    "pulmonary_embolism": "2",
    "atrial_fibrillation": "3",
    "heart_valve": "4",
    "cardiomyopathy": "5",
    "stroke": "6",
    "orthopaedic": "7",
    "other_indication": "8",
}
_REASONS = {"valve": "4", "fibrillation": "3", "thrombosis": "[12]", "other": "[5678]"}
_LISTING = ("2", "5", "7", "11", "12", "14", "16", "17", "20")
_RANGES = {"1.7-2.8": "low", "1.7-3.3": "low", "2-3": "usual"}
_INTENSE = ("2-3.5", "2.5-3.5", "3-4", "3.0-4.0")


def warfarin(raw: Path) -> list[Hospital]:
    """All 5,700 patients, one record each; `split` is empty without a stable dose.

    Raises:
        DatasetError: if the workbook is absent or another.
    """
    published = _published(raw)
    table = pd.DataFrame({"patient_id": published["PharmGKB Subject ID"]})
    table["sex"] = published["Gender"]
    table["race"] = published["Race (OMB)"].map(_RACES)
    table["age"] = published["Age"].str.extract(r"^(\d+)", expand=False)  # of a decade, its first year
    table["height"] = _rounded(published["Height (cm)"])
    table["weight"] = _rounded(published["Weight (kg)"])
    table["vkorc1"] = vkorc1(published)
    table["vkorc1_a"] = table["vkorc1"].str.count("A")
    table["cyp2c9"] = published["CYP2C9 consensus"]
    for allele in "23":
        table[f"cyp2c9_{allele}"] = table["cyp2c9"].str.count(rf"\*{allele}(?:/|$)")
    for name, column in _FLAGS.items():
        table[name] = published[column]
    table["inducer"] = published[list(_INDUCERS)].fillna("").max(axis=1)  # "" < "0" < "1"
    reasons = published["Indication for Warfarin Treatment"]
    for name, code in _INDICATIONS.items():
        table[name] = reasons.str.contains(code, regex=False).map({True: "1", False: "0"})
    table["target_inr"] = _rounded(published["Target INR"])
    wanted = published["Estimated Target INR Range Based on Indication"]
    table["target_range"] = wanted.map(_RANGES | dict.fromkeys(_INTENSE, "intense"))
    table["dose"] = _rounded(published[_DOSE])
    stable = (published[_STABLE] == "1") & published[_DOSE].notna()
    return _sites(table, published, stable)


def notes(raw: Path) -> list[Hospital]:
    """What is written of patients, and why they take warfarin, at the nine sites that list medications.

    The other sites filled in a form of a few drugs ("not aspirin; not simvastatin") or wrote nothing. Only
    who has a list, be it "none", and a coded indication is in the split. A list names no indication; `note`,
    which begins with the comorbidities, mostly does. `indication` is the first that is coded of heart valve,
    atrial fibrillation, thrombo-embolism and others.

    Raises:
        DatasetError: if the workbook is absent or another.
    """
    published = _published(raw)
    published = published[published["Project Site"].isin(_LISTING)].reset_index(drop=True)
    reasons = published["Indication for Warfarin Treatment"]
    table = pd.DataFrame({"patient_id": published["PharmGKB Subject ID"]})
    table["sex"] = published["Gender"]
    table["age"] = published["Age"].str.extract(r"^(\d+)", expand=False)
    table["medications"] = published["Medications"]
    table["note"] = published["Comorbidities"].fillna("") + ". " + published["Medications"].fillna("")
    table["indication"] = None
    for name, pattern in reversed(_REASONS.items()):
        table.loc[reasons.str.contains(pattern, na=False), "indication"] = name
    table["fibrillation"] = reasons.str.contains("3", regex=False).map({True: "1", False: "0"})
    return _sites(table, published, table["medications"].notna() & reasons.notna())


def vkorc1(published: pd.DataFrame) -> pd.Series:
    """VKORC1 -1639 G>A (rs9923231), from the three linked variants where it was not typed.

    The rule is public and looks at no other patient: Klein et al. 2009 (NEJM 360:753), appendix. 2255C>T and
    1542G>C stand in for patients that are known to be neither black nor of mixed race, 1173C>T for all.
    """
    found = published["VKORC1 -1639 consensus"].copy()
    linked = published["Race (OMB)"].isin(["White", "Asian"])
    everyone = pd.Series(True, index=published.index)
    for column, who, (common, mixed, rare) in (
        ("VKORC1 2255 consensus", linked, ("C/C", "C/T", "T/T")),
        ("VKORC1 1173 consensus", everyone, ("C/C", "C/T", "T/T")),
        ("VKORC1 1542 consensus", linked, ("G/G", "C/G", "C/C")),
    ):
        told = published[column].map({common: "G/G", mixed: "A/G", rare: "A/A"})
        found = found.fillna(told.where(who))
    return found


def _published(raw: Path) -> pd.DataFrame:
    path = raw / _WORKBOOK
    table = sheet(path, _SHEET)
    if len(table) != PATIENTS or _DOSE not in table.columns:
        raise DatasetError(f"{path}: holds other records than published", remedy="fetch the data set again")
    return table.replace({"NA": None, "": None})


def _rounded(column: pd.Series) -> pd.Series:
    """To two decimals: the workbook has inches as 193.03999999979152 cm."""
    return column.astype(np.float64).round(2)


def _sites(table: pd.DataFrame, published: pd.DataFrame, eligible: pd.Series) -> list[Hospital]:
    """One hospital a project site, if any of its patients is eligible."""
    site = "project-" + published["Project Site"].str.zfill(2)
    table["split"] = np.where(eligible, held_out(table["patient_id"], site), "")
    hospitals = []
    for name, members in by_column(site.to_numpy(dtype=str)).items():
        own = table.iloc[members]
        size = int((own["split"] != "").sum())
        if size:
            hospitals.append(Hospital(name, own, size))
    return hospitals
