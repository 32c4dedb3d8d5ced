"""UCI Heart Disease: four hospitals, with the patients and the split of FLamby's Fed-Heart-Disease.

FLamby (du Terrail et al. 2022) drops slope, ca and thal, then every record with a missing value, and
splits each centre with scikit-learn, stratified where both classes have more than two patients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.sites import Hospital

Floats = npt.NDArray[np.float64]
Column = npt.NDArray[Any]

CENTRES = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg",
    "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num",
)  # fmt: skip
PUBLISHED_COUNTS = {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}

_DROPPED = ["slope", "ca", "thal"]
_ONE_HOT = ["cp", "restecg"]
_TRAIN_SIZE, _SEED = 0.66, 43


def heart_disease(raw: Path) -> list[Hospital]:
    """All 920 patients with all 14 columns; `split` is empty for those that FLamby leaves out."""
    return [
        Hospital(centre, table, int((table["split"] != "").sum()))
        for centre, table in ((c, _read(raw, c)) for c in CENTRES)
    ]


def heart_disease_flamby(raw: Path) -> list[Hospital]:
    """FLamby's 740 patients with its 13 features x0 … x12, standardised per centre by its train part.

    Standardising by a site's own data spends privacy, which nobody accounts for here: only for
    reproducing what FLamby published.
    """
    hospitals = []
    for centre, (values, labels, split, ids) in flamby_features(raw).items():
        values = standardised(values, values[split == "train"])
        table = pd.DataFrame(values, columns=[f"x{i}" for i in range(values.shape[1])]).round(9)
        table.insert(0, "patient_id", ids)
        table["label"] = labels
        table["split"] = split
        hospitals.append(Hospital(centre, table, len(table)))
    return hospitals


def flamby_features(raw: Path) -> dict[str, tuple[Floats, Column, Column, Column]]:
    """Centre → FLamby's 13 features before standardising (float64 [patients, 13]), labels, split, ids.

    Raises:
        DatasetError: if the raw files are not as published.
    """
    tables = {centre: _read(raw, centre) for centre in CENTRES}
    chosen = pd.concat([t[t["split"] != ""].assign(centre=c) for c, t in tables.items()], ignore_index=True)
    features = chosen[[c for c in COLUMNS if c not in (*_DROPPED, "num")]].astype(np.float64)
    # The categories are those of all centres together, as in FLamby: every hospital gets 13 columns.
    features = pd.get_dummies(features, columns=_ONE_HOT, drop_first=True).astype(np.float32)
    labels = (chosen["num"].to_numpy().astype(np.float64) > 0).astype(np.int64)
    found = {}
    for centre in CENTRES:
        here = (chosen["centre"] == centre).to_numpy()
        found[centre] = (
            features.to_numpy()[here].astype(np.float64),
            labels[here],
            chosen["split"].to_numpy()[here],
            chosen["patient_id"].to_numpy()[here],
        )
    return found


def standardised(values: Floats, train: Floats) -> Floats:
    """Values less the mean of `train`, over its standard deviation (ddof 1, + 1e-9), by column."""
    scaled: Floats = (values - train.mean(axis=0)) / (train.std(axis=0, ddof=1) + 1e-9)
    return scaled


def _read(raw: Path, centre: str) -> pd.DataFrame:
    """A centre's published records as text, with `patient_id` in front and `split` behind.

    Raises:
        DatasetError: if the file is absent, or doesn't give FLamby's published counts.
    """
    from sklearn.model_selection import train_test_split

    path = raw / f"processed.{centre}.data"
    try:
        table = pd.read_csv(
            path, header=None, names=list(COLUMNS), dtype=str, na_values="?", keep_default_na=False
        )
    except (OSError, ValueError):
        raise DatasetError(f"{path}: cannot be read", remedy="fetch the data set first") from None
    for column in COLUMNS:
        table[column] = table[column].str.strip()
    whole = np.flatnonzero(table.drop(columns=_DROPPED).notna().all(axis=1))
    positive = table["num"].iloc[whole].astype(np.float64).to_numpy() > 0
    stratify = positive if min(positive.sum(), (~positive).sum()) > 2 else None
    train, test = train_test_split(
        np.arange(len(whole)), train_size=_TRAIN_SIZE, test_size=1 - _TRAIN_SIZE,
        random_state=_SEED, shuffle=True, stratify=stratify,
    )  # fmt: skip
    if (len(train), len(test)) != PUBLISHED_COUNTS[centre]:
        raise DatasetError(
            f"{path}: the split gives {len(train)} train and {len(test)} test patients, published are "
            f"{PUBLISHED_COUNTS[centre]}",
            remedy="fetch the data set again; check the version of scikit-learn",
        )
    split = np.full(len(table), "", dtype=object)
    split[whole[train]], split[whole[test]] = "train", "test"
    table.insert(0, "patient_id", [f"{centre}-{i:03d}" for i in range(1, len(table) + 1)])
    table["split"] = split
    return table
