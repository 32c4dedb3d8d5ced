"""Which public data sets there are: where from, under which licence, and what their bytes hash to."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import DatasetError


@dataclass(frozen=True)
class RemoteFile:
    """A published file. `sha256`: 64 hexadecimal digits; `size` in bytes."""

    name: str
    url: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Dataset:
    """A public data set.

    Attributes:
        folder: what a mirror calls its folder.
        files: what is fetched; empty where a library ships the data.
        citation, licence: as the publisher states them; they end up beside every prepared site.
    """

    name: str
    title: str
    folder: str
    files: tuple[RemoteFile, ...]
    citation: str
    licence: str


_UCI_HEART = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"
_HEART_FILES = tuple(
    RemoteFile(name, _UCI_HEART + name, digest, size)
    for name, digest, size in (
        (
            "processed.cleveland.data",
            "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
            18461,
        ),
        (
            "processed.hungarian.data",
            "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
            10263,
        ),
        (
            "processed.switzerland.data",
            "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
            4109,
        ),
        ("processed.va.data", "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f", 6737),
    )
)
_HEART_CITATION = (
    "Janosi, Steinbrunn, Pfisterer, Detrano: Heart Disease. UCI Machine Learning Repository, 1989, "
    "doi:10.24432/C52P4X. Principal investigators: Andras Janosi (Hungarian Institute of Cardiology, "
    "Budapest), William Steinbrunn (University Hospital, Zurich), Matthias Pfisterer (University Hospital, "
    "Basel), Robert Detrano (V.A. Medical Center, Long Beach, and Cleveland Clinic Foundation). Patients "
    "and split: du Terrail et al., FLamby, NeurIPS 2022 Datasets and Benchmarks."
)

_DATASETS = (
    Dataset(
        "breast-cancer",
        "Breast Cancer Wisconsin (Diagnostic), four hospitals of unequal size",
        "breast_cancer",
        (),
        "Wolberg, Mangasarian, Street, Street: Breast Cancer Wisconsin (Diagnostic). UCI Machine Learning "
        "Repository, 1995, doi:10.24432/C5DW2B; as shipped with scikit-learn.",
        "CC BY 4.0",
    ),
    Dataset(
        "heart-disease",
        "Heart disease in four hospitals: Cleveland, Budapest, Zurich and Basel, Long Beach",
        "heart_disease",
        _HEART_FILES,
        _HEART_CITATION,
        "CC BY 4.0",
    ),
    Dataset(
        "heart-disease-flamby",
        "Heart disease in four hospitals, features as FLamby's Fed-Heart-Disease standardises them",
        "heart_disease",
        _HEART_FILES,
        _HEART_CITATION,
        "CC BY 4.0",
    ),
    Dataset(
        "digits",
        "Handwritten digits, 8x8 padded to 28x28, four sites",
        "digits",
        (),
        "Alpaydin, Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, 1998, "
        "doi:10.24432/C50P49; as shipped with scikit-learn.",
        "CC BY 4.0",
    ),
    Dataset(
        "pneumonia",
        "Chest X-rays of children, with and without pneumonia, four sites",
        "chest_xray_kermany",
        (
            RemoteFile(
                "chest_xray_64.npz",
                "",
                "0df5da75d4285f0873435e31f5ad2925c829905f40629db490a0a3b69b82d911",
                21533432,
            ),
        ),
        "Kermany, Zhang, Goldbaum: Labeled Optical Coherence Tomography (OCT) and Chest X-Ray Images for "
        "Classification. Mendeley Data v2, 2018, doi:10.17632/rscbjbr9sj.2; Kermany et al., Cell "
        "2018;172:1122-1131. Guangzhou Women and Children's Medical Center.",
        "CC BY 4.0",
    ),
)


def datasets() -> tuple[Dataset, ...]:
    return _DATASETS


def find(name: str) -> Dataset:
    """Raises:
    DatasetError: if there is no data set of that name.
    """
    for each in _DATASETS:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in _DATASETS)
    raise DatasetError(f"no data set is called {name!r}", remedy=f"choose one of {known}")
