"""What a prepared hospital looks like: site.toml, patients.csv, SOURCE.txt, and files that records name."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w

from common.errors import DatasetError
from common.files import write_atomic
from simulations.datasets.registry import Dataset


@dataclass(frozen=True)
class Hospital:
    """Attributes:
    name: the site's name, and its folder's.
    patients: one row a record, columns under the dictionary's names; missing values are NaN.
    eligible: patients that a study may use; its tens are declared as public size.
    files: name → content of what lies beside patients.csv.
    places: column → the `[data.files]` table of site.toml.
    """

    name: str
    patients: pd.DataFrame
    eligible: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def npz(**arrays: np.ndarray) -> bytes:
    """Arrays as an .npz file, compressed; the same bytes every time."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return content.getvalue()


def write_sites(dataset: Dataset, hospitals: Sequence[Hospital], sites: Path) -> tuple[Path, ...]:
    """Write one folder per hospital; its keys, policy and ledger, if there are any, stay as they are.

    Raises:
        DatasetError: if the folder cannot be written.
    """
    source = (
        f"{dataset.title}\n\nCitation: {dataset.citation}\nLicence: {dataset.licence}\n\n"
        "Prepared by fedward as one hospital of a simulated consortium. Public data, not a cohort of that "
        "hospital's present patients.\n"
    )
    own = {"SOURCE.txt": source.encode()}
    return tuple(
        write_site(replace(hospital, files={**hospital.files, **own}), sites / hospital.name)
        for hospital in hospitals
    )


def write_site(hospital: Hospital, folder: Path) -> Path:
    """Write one hospital's folder, site.toml last; returns it.

    Raises:
        DatasetError: if it cannot be written.
    """
    site = {
        "site": {"name": hospital.name, "public_size": max(1, hospital.eligible // 10 * 10)},
        "data": {"file": "patients.csv"} | ({"files": hospital.places} if hospital.places else {}),
    }
    csv = hospital.patients.to_csv(index=False, lineterminator="\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "patients.csv", csv.encode())
        for name, content in hospital.files.items():
            write_atomic(folder / name, content)
        write_atomic(folder / "site.toml", tomli_w.dumps(site).encode())
    except OSError as failure:
        raise DatasetError(
            f"{folder}: cannot be written ({failure.strerror})", remedy="choose another folder"
        ) from None
    return folder
