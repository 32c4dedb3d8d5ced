"""Diabetes in 130 US hospitals (Strack et al. 2014): encounters, of patients with 1 to 40, and readmission.

Which hospital an encounter was at is not published. The sites are made by the medical specialty of the
patient's first encounter, so that a patient, with all encounters, is at one site. As in the paper, encounters
that end in death or a hospice are left out, because nobody is readmitted after them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.raw import held_out, text_table
from simulations.datasets.sites import Hospital
from simulations.partition import by_column

ENCOUNTERS, PATIENTS = 101_766, 71_518
_ARCHIVE, _MEMBER = "dataset_diabetes.zip", "dataset_diabetes/diabetic_data.csv"
_NEVER_BACK = ("11", "13", "14", "19", "20", "21")  # discharge dispositions: died, or to a hospice
_COUNTS = {
    "time_in_hospital": "days",
    "num_lab_procedures": "lab_procedures",
    "num_procedures": "procedures",
    "num_medications": "medications",
    "number_outpatient": "outpatient_visits",
    "number_emergency": "emergency_visits",
    "number_inpatient": "inpatient_visits",
    "number_diagnoses": "diagnoses",
}
_CODES = {
    "race": "race",
    "gender": "sex",
    "max_glu_serum": "glucose",
    "A1Cresult": "hba1c",
    "insulin": "insulin",
    "metformin": "metformin",
    "change": "change",
    "diabetesMed": "diabetes_drug",
}
_SPECIALTIES = {
    "?": "unknown",
    "InternalMedicine": "internal-medicine",
    "Family/GeneralPractice": "general-practice",
    "Emergency/Trauma": "emergency",
    "Cardiology": "cardiology",
}
_SURGERY = ("Surgery", "Orthopedics", "Urology", "Surgeon", "Otolaryngology", "ObstetricsandGynecology")
_HOME, _CARE = ("1", "6", "8"), ("2", "3", "4", "5", "15", "22", "23", "24", "27", "28", "29", "30")


def readmission(raw: Path) -> list[Hospital]:
    """101,766 encounters of 71,518 patients, at seven sites by specialty.

    Raises:
        DatasetError: if the archive is absent or another.
    """
    path = raw / _ARCHIVE
    published = text_table(path, _MEMBER)
    if (len(published), published["patient_nbr"].nunique()) != (ENCOUNTERS, PATIENTS):
        raise DatasetError(f"{path}: holds other records than published", remedy="fetch the data set again")
    number = published["encounter_id"].astype(np.int64)
    published = published.iloc[np.argsort(number.to_numpy())].reset_index(drop=True)
    patient = published["patient_nbr"]
    known = published.replace("?", None)
    table = pd.DataFrame({"patient_id": patient, "encounter_id": published["encounter_id"]})
    table["age"] = published["age"].str.extract(r"^\[(\d+)-", expand=False)  # of a decade, its first year
    for column, name in {**_COUNTS, **_CODES}.items():
        table[name] = known[column]
    table["sex"] = table["sex"].where(table["sex"].isin(["Female", "Male"]))
    table["admission"] = known["admission_type_id"].where(
        known["admission_type_id"].isin(["1", "2", "3", "4", "7"])
    )
    table["source"] = known["admission_source_id"].map(_source)
    table["discharge"] = known["discharge_disposition_id"].map(_discharge)
    for i in (1, 2, 3):
        table[f"diagnosis_{i}"] = known[f"diag_{i}"].map(diagnosis_group, na_action="ignore")
    table["readmitted"] = published["readmitted"]
    first = published.groupby("patient_nbr", sort=False)["medical_specialty"].first()
    site = patient.map(first).map(_site)
    stays = ~published["discharge_disposition_id"].isin(_NEVER_BACK)
    table["split"] = np.where(stays, held_out(patient, site), "")
    return [_hospital(name, table.iloc[rows]) for name, rows in by_column(site.to_numpy(dtype=str)).items()]


def diagnosis_group(code: str) -> str:
    """A diagnosis's group by its ICD-9-CM code: table 2 of Strack et al. 2014 (doi:10.1155/2014/781670)."""
    if code[0] in "EV":
        return "other"
    number = float(code)
    if int(number) == 250:
        return "diabetes"
    whole = int(number)
    for name, spans in _GROUPS.items():
        if any(low <= whole <= high for low, high in spans):
            return name
    return "other"


_GROUPS = {
    "circulatory": ((390, 459), (785, 785)),
    "respiratory": ((460, 519), (786, 786)),
    "digestive": ((520, 579), (787, 787)),
    "genitourinary": ((580, 629), (788, 788)),
    "injury": ((800, 999),),
    "musculoskeletal": ((710, 739),),
    "neoplasms": ((140, 239),),
}


def _source(code: str) -> str | None:
    if code in ("1", "2", "3"):
        return "referral"
    if code == "7":
        return "emergency"
    return None if code in ("9", "15", "17", "20", "21") else "transfer"


def _discharge(code: str) -> str | None:
    if code in _HOME:
        return "home" if code == "1" else "home care"
    if code in _CARE:
        return "institution"
    return None if code in ("18", "25", "26") else "other"


def _site(specialty: str) -> str:
    if specialty in _SPECIALTIES:
        return _SPECIALTIES[specialty]
    return "surgery" if specialty.startswith(_SURGERY) else "other-specialties"


def _hospital(name: str, records: pd.DataFrame) -> Hospital:
    chosen = records["split"] != ""
    return Hospital(name, records, records.loc[chosen, "patient_id"].nunique())
