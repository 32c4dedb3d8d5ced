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
from simulations.datasets.packing import packed, unpacked
from simulations.datasets.raw import SEED, text_table
from simulations.datasets.sites import Hospital
from simulations.partition import by_sizes

SITES = ("ashford", "birchwood", "cedar-hill", "dunmore")
_SHARES = (40, 30, 20, 10)
_FOLDER = "chest_xray_224/"


def pneumonia(raw: Path) -> list[Hospital]:
    """5,840 JPEGs of 224 x 224 pixels, 3,273 patients with 1 to 30 images.

    At a site they are called by a number, because the published names tell the finding.

    Raises:
        DatasetError: if the files are absent or others.
    """
    path = raw / "chest_xray_224.tar"
    images = {name.removeprefix(_FOLDER): content for name, content in unpacked(path)}
    table = text_table(raw / "manifest.csv")
    if set(table.get("file", ())) != set(images) or "patient_key" not in table:
        raise DatasetError(f"{path}: holds other files than its list", remedy="fetch the data set again")
    table = table.rename(columns={"patient_key": "patient_id", "subtype": "finding"})
    keys = table["patient_id"].to_numpy(dtype=str)
    site = np.empty(len(table), dtype=np.int64)
    random = np.random.default_rng(SEED)
    for split in ("train", "test"):  # each site has its share of both
        of_split = (table["split"] == split).to_numpy()
        patients = np.unique(keys[of_split])
        for i, part in enumerate(by_sizes(len(patients), _SHARES, random)):
            site[np.isin(keys, patients[part]) & of_split] = i
    return [_hospital(name, table[site == i], images) for i, name in enumerate(SITES)]


def _hospital(name: str, records: pd.DataFrame, images: dict[str, bytes]) -> Hospital:
    names = [f"{i:05d}.jpeg" for i in range(len(records))]
    files = {own: images[published] for own, published in zip(names, records["file"], strict=True)}
    return Hospital(
        name,
        records[["patient_id", "finding", "split"]].assign(xray=names),
        records["patient_id"].nunique(),
        files={"xrays.tar": packed(files)},
        places={"xray": {"at": "xrays.tar"}},
    )
