"""AdrenalMNIST3D (MedMNIST v2, 2023): shapes of adrenal glands on CT, dealt out to four invented sites.

The file holds 1,584 left and right glands of 792 patients, but no patient's number: a gland takes the place
of a patient. To a person with both, what is promised to one gland holds only as to a group of two: twice the
ε, and δ times 1 + exp(ε). The authors' split is by patient.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.raw import SEED
from simulations.datasets.sites import Hospital, npz
from simulations.partition import by_sizes

SITES = ("ashford", "birchwood", "cedar-hill", "dunmore")
_SHARES = (40, 30, 20, 10)
# The authors' validation part trains too: what it could choose was chosen on parts of the training glands.
_PARTS = {"train": "train", "val": "train", "test": "test"}


def adrenal(raw: Path) -> list[Hospital]:
    """1,584 masks of 64 x 64 x 64 voxels, 0 or 255; hyperplasia or a mass in 350 of them.

    Raises:
        DatasetError: if the file is absent or another.
    """
    path = raw / "adrenalmnist3d_64.npz"
    sites: list[list[tuple[pd.DataFrame, np.ndarray]]] = [[] for _ in SITES]
    random = np.random.default_rng(SEED)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for part, split in _PARTS.items():
                masks, labels = archive[f"{part}_images"], archive[f"{part}_labels"][:, 0]
                table = pd.DataFrame(
                    {
                        "patient_id": [f"{part}-{i:04d}" for i in range(len(masks))],
                        "finding": np.where(labels == 1, "abnormal", "normal"),
                        "split": split,
                    }
                )
                for site, chosen in zip(sites, by_sizes(len(masks), _SHARES, random), strict=True):
                    site.append((table.iloc[chosen], masks[chosen]))
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error):
        raise DatasetError(f"{path}: cannot be read", remedy="fetch the data set first") from None
    return [_hospital(name, parts) for name, parts in zip(SITES, sites, strict=True)]


def _hospital(name: str, parts: list[tuple[pd.DataFrame, np.ndarray]]) -> Hospital:
    glands = pd.concat([table for table, _ in parts], ignore_index=True)
    return Hospital(
        name,
        glands.assign(gland=np.arange(len(glands))),
        len(glands),
        files={"glands.npz": npz(images=np.concatenate([masks for _, masks in parts]))},
        places={"gland": {"at": "glands.npz"}},
    )
