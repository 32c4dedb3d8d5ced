"""Whole federations to measure: a table of 569 patients at four sites, images, and many small sites.

The same work as other frameworks' measurements: an MLP 30-64-2, batches of 32, one local epoch a round,
SGD with a rate of 0.1, every site in every round, the global model evaluated after each. Images: a CNN of two
convolutions on 28 x 28 pixels, batches of 64 at a rate of 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tomli_w

from common.errors import StudyError
from common.files import validated
from common.study import Study
from simulations.benchmarks.workload import site_name

WIDTH, HIDDEN, BATCH, LEARNING_RATE = 30, 64, 32, 0.1
SIDE = 28  # pixels
RANGE = 16  # of standardised values; a power of two, so that scaling by it rounds nothing
ENDS = (0.4, 0.7, 0.9, 1.0)  # of each site among the 455 training patients
TEST_FRACTION = 0.2
TESTED = 1000  # test patients of all the small sites together
_SEED = 1234

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Federation:
    """Attributes:
    sites: None for the four of the table, else so many small ones.
    patients: that train at each of the small sites.
    images: of noise, with a brighter square where the label is yes, instead of tables.
    """

    name: str
    title: str
    rounds: int
    private: bool = False
    sites: int | None = None
    patients: int = 100
    images: bool = False

    def study(self) -> Study:
        """Private: at an ε that asks for about as much noise as the clipping norm."""
        value: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "data": {
                "columns": [
                    {"kind": "numeric", "name": "x", "unit": "1", "range": [-RANGE, RANGE], "repeat": WIDTH},
                ],
                "label": {
                    "column": "y",
                    "classes": [{"name": "no", "codes": ["0"]}, {"name": "yes", "codes": ["1"]}],
                },
                "split": {"by": "column", "column": "part", "test_fraction": TEST_FRACTION},
            },
            "model": {"name": "mlp", "parameters": {"hidden": [HIDDEN]}},
            "objective": {"task": "multi-class"},
            "algorithm": {"rounds": self.rounds},
            "training": {
                "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE},
                "local_epochs": 1,
                "patients_per_step": BATCH,
            },
            "evaluation": {"every": 1},
            "privacy": {"mode": "none"},
        }
        if self.images:
            value["data"]["columns"] = [{"kind": "image", "name": "x", "size": [SIDE, SIDE]}]
            value["model"] = {"name": "cnn", "parameters": {"channels": [16, 32]}}
            value["training"] |= {
                "optimizer": {"name": "sgd", "learning_rate": 0.05}, "patients_per_step": 64
            }  # fmt: skip
        if self.private:
            value["privacy"] = {"mode": "patient-dp", "epsilon": 20.0, "delta": 1e-3, "clipping_norm": 1.0}
        return validated(Study, value, self.name, StudyError)

    def write(self, folder: Path) -> Path:
        """Write one folder a site; returns `folder`. The same values whenever it is called."""
        parts = _table() if self.sites is None else self._small(self.sites)
        for index, (train, test) in enumerate(parts):
            _write_site(folder / site_name(index), train, test)
        return folder

    def _small(self, sites: int) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
        random = np.random.default_rng(_SEED + 1)
        if self.images:
            return [(_images(random, self.patients), _images(random, TESTED // sites)) for _ in range(sites)]
        weights = random.normal(size=WIDTH)

        def drawn(count: int) -> pd.DataFrame:
            features = random.normal(size=(count, WIDTH)).clip(-RANGE, RANGE)
            labels = features @ weights + random.normal(size=count) > 0
            return _frame(features, labels.astype(np.int64))

        tests = max(1, TESTED // sites)
        return [(drawn(self.patients), drawn(tests)) for _ in range(sites)]


def _table() -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """The breast cancer table of scikit-learn: 455 patients train, 114 test, dealt out to four sites."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    features, labels = load_breast_cancer(return_X_y=True)
    found = train_test_split(features, labels, test_size=0.2, random_state=_SEED, stratify=labels)
    train, test, train_labels, test_labels = found
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    trains = _frame((train - mean) / deviation, train_labels)
    tests = _frame((test - mean) / deviation, test_labels)
    ends = [round(len(trains) * end) for end in ENDS]
    starts = [0, *ends[:-1]]
    dealt = [tests.iloc[k :: len(ENDS)] for k in range(len(ENDS))]
    return [(trains.iloc[a:b], t) for a, b, t in zip(starts, ends, dealt, strict=True)]


def _frame(features: Floats, labels: Labels) -> pd.DataFrame:
    frame = pd.DataFrame(features.clip(-RANGE, RANGE).round(6), columns=[f"x_{i}" for i in range(WIDTH)])
    frame["y"] = labels
    return frame


def _images(random: np.random.Generator, count: int) -> pd.DataFrame:
    """An image a row, as a column of arrays."""
    labels = random.integers(0, 2, count)
    pixels = random.normal(100, 40, (count, SIDE, SIDE))
    pixels[labels == 1, 10:18, 10:18] += 60
    return pd.DataFrame({"x": [*pixels.clip(0, 255).astype(np.uint8)], "y": labels})


def _write_site(root: Path, train: pd.DataFrame, test: pd.DataFrame) -> None:
    root.mkdir(parents=True)
    table = pd.concat([train, test], ignore_index=True)
    table.insert(0, "patient_id", [f"p{i:06d}" for i in range(len(table))])
    table["part"] = ["train"] * len(train) + ["test"] * len(test)
    data: dict[str, Any] = {"file": "patients.csv"}
    if "x" in table:
        np.savez(root / "images.npz", images=np.stack([*table["x"]]))
        table["x"] = range(len(table))
        data["files"] = {"x": {"at": "images.npz"}}
    table.to_csv(root / "patients.csv", index=False)
    site = {"site": {"name": root.name, "public_size": public_size(len(train))}, "data": data}
    (root / "site.toml").write_bytes(tomli_w.dumps(site).encode())


def public_size(training: int) -> int:
    """The size to declare so that it stands for exactly so many training patients."""
    size = int(training / (1 - TEST_FRACTION))
    while int(size * (1 - TEST_FRACTION) + 1e-9) < training:
        size += 1
    return size


FEDERATIONS = {
    each.name: each
    for each in (
        Federation("w1a", "4 sites, 455 patients, MLP 30-64-2", rounds=50),
        Federation("w1b", "the same with patient-level DP", rounds=50, private=True),
        Federation("w2a", "4 sites of 1,000 images, CNN", rounds=10, sites=4, patients=1000, images=True),
        Federation(
            "w2b", "the same with patient-level DP", 10, private=True, sites=4, patients=1000, images=True
        ),
        Federation("w3a", "100 sites of 100 patients, MLP 30-64-2", rounds=10, sites=100),
    )
}
