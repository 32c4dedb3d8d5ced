"""Which public data sets there are: where from, under which licence, and what their bytes hash to."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import DatasetError


@dataclass(frozen=True)
class RemoteFile:
    """A published file. `sha256`: 64 hexadecimal digits; `size` in bytes.

    Attributes:
        packed: this very file has no address: it was made of the many files at `url`, and a mirror has it.
    """

    name: str
    url: str
    sha256: str
    size: int
    packed: bool = False


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

_COPIES = "https://raw.githubusercontent.com/"  # at a commit, where the publisher has no address of the file
_IWPC_FILES = (
    RemoteFile(
        "PS206767-553247439.xlsx",
        f"{_COPIES}CountZero-Error/Warfarin_dose-Prediction/33e1bc59ea644fc792f571b27ebe1c7a3c59a04b/datasets/"
        "PS206767-553247439.xlsx",
        "242439813aba2f1288768de75bbbbfd5e5b1cbbc45c91721444f3e05d976a0fb",
        1879763,
    ),
)
_IWPC_CITATION = (
    "International Warfarin Pharmacogenetics Consortium: Estimation of the Warfarin Dose with Clinical and "
    "Pharmacogenetic Data, NEJM 2009;360:753-764, doi:10.1056/NEJMoa0809329; PharmGKB submission PS206767. "
    "A research resource, not for decisions on treatment."
)
_FLAMBY = f"{_COPIES}owkin/FLamby/edacf54d5211520583b0133d55ac39b6fda8324b/flamby/datasets/fed_tcga_brca/"

_XRAY_FOLDER = "https://github.com/waliatushar/ai-pneumonia-detection/tree/362d6d1be840461d0f26253972ec86bbc8533772/dataset"
_ICU = "https://physionet.org/files/challenge-2012/1.0.0/"

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
                "chest_xray_224.tar",
                _XRAY_FOLDER,
                "5a41aa3521aa1f63653694dd7ffa966adbbe2afb94dad72126fe37bd5bd1dd08",
                42321920,
                packed=True,
            ),
            RemoteFile(
                "manifest.csv",
                _XRAY_FOLDER,
                "8984a3097f53157403b63cfd16bee4714df83699d26c94ed38bf9326e863ff86",
                812176,
                packed=True,
            ),
        ),
        "Kermany, Zhang, Goldbaum: Labeled Optical Coherence Tomography (OCT) and Chest X-Ray Images for "
        "Classification. Mendeley Data v2, 2018, doi:10.17632/rscbjbr9sj.2; Kermany et al., Cell "
        "2018;172:1122-1131. Guangzhou Women and Children's Medical Center.",
        "CC BY 4.0",
    ),
    Dataset(
        "adrenal-3d",
        "Shapes of adrenal glands on CT, four sites",
        "adrenalmnist3d",
        (
            RemoteFile(
                "adrenalmnist3d_64.npz",
                "https://zenodo.org/records/10519652/files/adrenalmnist3d_64.npz",
                "124a53ea2c66c8ac1985a4c98ea6f34d1ab35bdab1dc50947f80d4a87e54057d",
                1880591,
            ),
        ),
        "Yang, Shi, Wei, Liu, Zhao, Ke, Pfister, Ni: MedMNIST v2, Scientific Data 2023;10:41, "
        "doi:10.5281/zenodo.10519652. Zhongshan Hospital, Fudan University.",
        "CC BY 4.0",
    ),
    Dataset(
        "icu-mortality",
        "The first 48 hours in intensive care, four kinds of unit as sites",
        "physionet2012",
        (
            *(
                RemoteFile(name, f"{_ICU}{name}", digest, size)
                for name, digest, size in (
                    (
                        "Outcomes-a.txt",
                        "2613ea60ccda29f87571a7d6b09ad130858a8ccd66325bd073365925026883c2",
                        79219,
                    ),
                    (
                        "Outcomes-b.txt",
                        "1305f29734da374a809483229a99f33a9230aa8d4fa74b1a2d6ad788136423d5",
                        79149,
                    ),
                )
            ),
            *(
                RemoteFile(f"set-{part}.tar.gz", _ICU, digest, size, packed=True)
                for part, digest, size in (
                    ("a", "785f8001e9de2b711b03d6e3c74a0add8096eb820987790df81aa300daedcec2", 6554503),
                    ("b", "8df03e1d0f976b44959f0434061de947c1906a6d0886052cc47c654a564df252", 6575069),
                )
            ),
        ),
        "Silva, Moody, Scott, Celi, Mark: Predicting in-hospital mortality of ICU patients: the "
        "PhysioNet/Computing in Cardiology Challenge 2012, Comput Cardiol 2012;39:245-248; PhysioNet "
        "challenge-2012 1.0.0; Goldberger et al., Circulation 2000;101:e215-e220.",
        "Open Data Commons Attribution 1.0",
    ),
    Dataset(
        "warfarin",
        "Warfarin dose from genes and history, 21 sites",
        "iwpc_warfarin",
        _IWPC_FILES,
        _IWPC_CITATION,
        "CC BY-SA 4.0",
    ),
    Dataset(
        "notes",
        "Medication lists of patients on warfarin as text, and why they take it, nine sites",
        "iwpc_warfarin",
        _IWPC_FILES,
        _IWPC_CITATION,
        "CC BY-SA 4.0",
    ),
    Dataset(
        "readmission",
        "Diabetes in 130 US hospitals: encounters and readmission, seven sites by specialty",
        "diabetes130",
        (
            RemoteFile(
                "dataset_diabetes.zip",
                f"{_COPIES}PranavSharma008/Re-Admission-of-Diabetic-Patients-after-Discharge/"
                "e04649c4fc3d9164abcf87c915811cca340a09b4/dataset_diabetes.zip",
                "3a17a3b55b6dd4a1926703185c0ad8e2ed30bc8e2f9b927cdd1000b733d1de8e",
                3347213,
            ),
        ),
        "Strack, DeShazo, Gennings, Olmo, Ventura, Cios, Clore: Impact of HbA1c Measurement on Hospital "
        "Readmission Rates, BioMed Research International 2014, 781670; Clore, Cios, DeShazo, Strack: "
        "Diabetes 130-US Hospitals for Years 1999-2008, UCI Machine Learning Repository, 2014, "
        "doi:10.24432/C5230J.",
        "CC BY 4.0",
    ),
    Dataset(
        "telemonitoring",
        "Parkinson's disease by telephone, 42 patients with 101 to 168 recordings, three clinics",
        "parkinsons_telemonitoring",
        (
            RemoteFile(
                "parkinsons_updrs.data",
                f"{_COPIES}behnazrzf/Parkinson-s_Telemonitoring/f603774b38bfc967f20b4752bec4b6f872917d98/data/"
                "parkinsons_updrs.data",
                "f2c7d5025dec4e92e7feae367a5f7ccf58789a10ac6b54bdf15976c599f9dd39",
                911261,
            ),
        ),
        "Tsanas, Little, McSharry, Ramig: Accurate telemonitoring of Parkinson's disease progression by "
        "non-invasive speech tests, IEEE TBME 2010;57:884-893; UCI Machine Learning Repository, "
        "doi:10.24432/C5ZS3S.",
        "CC BY 4.0",
    ),
    Dataset(
        "tcga-brca",
        "Breast cancer of The Cancer Genome Atlas, six regions, survival",
        "tcga_brca",
        (
            RemoteFile(
                "brca.csv",
                f"{_FLAMBY}brca.csv",
                "07cb53423f7d579d33cfdbf2cba57b2aee75318b85866c68ce39a75b1f1ba020",
                113184,
            ),
            RemoteFile(
                "train_test_split.csv",
                f"{_FLAMBY}dataset_creation_scripts/train_test_split.csv",
                "1249c6543a4060ff0fdaf8510fc37017755836db6c9fc5e6af96057c36510990",
                28946,
            ),
        ),
        "The Cancer Genome Atlas (NCI, NHGRI), Genomic Data Commons; Liu et al., Cell 2018;173:400-416; "
        "features and split: Andreux et al. 2020 (arXiv:2006.08997) and du Terrail et al., FLamby, NeurIPS "
        "2022 Datasets and Benchmarks.",
        "GDC open access (unrestricted); users must not try to identify participants",
    ),
    Dataset(
        "solubility",
        "Solubility in water of 9,982 compounds, nine data sets as sites",
        "aqsoldb",
        (
            RemoteFile(
                "data_curated.csv",
                f"{_COPIES}mcsorkun/AqSolDB/8e02b548fd9a78778ff89a5aa9a460d1a289cc3a/results/data_curated.csv",
                "363a42a4e4ea8e6039758146d34efdd95cde2da81c665316cacc1869e0a805ed",
                3750252,
            ),
        ),
        "Sorkun, Khetan, Er: AqSolDB, a curated reference set of aqueous solubility and 2D descriptors for a "
        "diverse set of compounds, Scientific Data 2019;6:143, doi:10.1038/s41597-019-0151-1.",
        "CC0 1.0",
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
