"""From raw files to hospitals: one folder a site, ready for `fedward-site` and `fedward-sim`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simulations.datasets.adrenal import adrenal
from simulations.datasets.bundled import breast_cancer, digits
from simulations.datasets.diabetes130 import readmission
from simulations.datasets.heart_disease import heart_disease, heart_disease_flamby
from simulations.datasets.iwpc import notes, warfarin
from simulations.datasets.physionet2012 import icu_mortality
from simulations.datasets.pneumonia import pneumonia
from simulations.datasets.registry import find
from simulations.datasets.sites import Hospital, write_sites
from simulations.datasets.tables import solubility, tcga_brca, telemonitoring

_PREPARE: dict[str, Callable[[Path], list[Hospital]]] = {
    "breast-cancer": breast_cancer,
    "heart-disease": heart_disease,
    "heart-disease-flamby": heart_disease_flamby,
    "digits": digits,
    "pneumonia": pneumonia,
    "adrenal-3d": adrenal,
    "icu-mortality": icu_mortality,
    "warfarin": warfarin,
    "notes": notes,
    "readmission": readmission,
    "telemonitoring": telemonitoring,
    "tcga-brca": tcga_brca,
    "solubility": solubility,
}


def prepare(name: str, raw: Path, sites: Path) -> tuple[Path, ...]:
    """Write `sites/HOSPITAL/` for every hospital of a data set; the same bytes every time.

    Args:
        raw: the folder that `fetch` returned.

    Returns:
        The hospitals' folders.

    Raises:
        DatasetError: if the raw files are not there or not as published.
    """
    dataset = find(name)
    return write_sites(dataset, _PREPARE[name](raw), sites)
