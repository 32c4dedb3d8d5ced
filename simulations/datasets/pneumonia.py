"""Kermany's chest X-rays (2018): children with and without pneumonia, dealt out to four sites by patient.

One hospital published them, so the sites are invented: a patient, with all its images and its part of the
authors' split, goes to one of four. Numbers of patients occur in both parts; they are taken to be different
patients, as the numbering seems to start again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.sites import Hospital, npz
from simulations.partition import by_sizes

SITES = ("ashford", "birchwood", "cedar-hill", "dunmore")
_SHARES, _SEED = (40, 30, 20, 10), 2024
_SUBTYPES = np.array(["normal", "bacteria", "virus"])


def pneumonia(raw: Path) -> list[Hospital]:
    """5,840 grey images of 64 x 64 pixels, 3,273 patients with 1 to 30 images.

    Raises:
        DatasetError: if the file is absent or another.
    """
    path = raw / "chest_xray_64.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, keys = archive["images"], archive["patient_key"]
            table = pd.DataFrame(
                {
                    "patient_id": keys,
                    "finding": _SUBTYPES[archive["subtype"]],
                    "split": np.where(archive["split"] == 0, "train", "test"),
                }
            )
    except (OSError, ValueError, KeyError):
        raise DatasetError(f"{path}: cannot be read", remedy="fetch the data set first") from None
    site = np.empty(len(table), dtype=np.int64)
    random = np.random.default_rng(_SEED)
    for split in ("train", "test"):  # each site has its share of both
        patients = np.unique(keys[table["split"] == split])
        for i, part in enumerate(by_sizes(len(patients), _SHARES, random)):
            site[np.isin(keys, patients[part]) & (table["split"] == split)] = i
    return [_hospital(name, table[site == i], images[site == i]) for i, name in enumerate(SITES)]


def _hospital(name: str, records: pd.DataFrame, images: np.ndarray) -> Hospital:
    records = records.assign(xray=np.arange(len(records)))
    return Hospital(
        name,
        records,
        records["patient_id"].nunique(),
        files={"xrays.npz": npz(images=images)},
        places={"xray": {"at": "xrays.npz"}},
    )
