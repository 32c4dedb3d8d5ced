"""A small study for every registered model, and patients that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from small import classes, study

from client.cohort import Patients
from common.features import blocks, feature_count
from common.models import Shape
from common.study import Study

NUMBERS = {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4}
IMAGE = {"kind": "image", "name": "xray", "size": [8, 9]}
VOLUME = {"kind": "image", "name": "scan", "size": [4, 6, 5]}
SERIES = {
    "kind": "series",
    "name": "stay",
    "hours": 6,
    "step_hours": 1,
    "variables": [
        {"name": "HR", "unit": "/min", "range": [0, 300]},
        {"name": "MAP", "unit": "mm[Hg]", "range": [0, 200]},
    ],
}
TEXT = {"kind": "text", "name": "note", "tokens": 7, "vocabulary": 11}
MOLECULE = {"kind": "molecule", "name": "drug", "representation": "tokens", "tokens": 6}
FINGERPRINT = {"kind": "molecule", "name": "bits", "bits": 64}

# What there is of each: its columns, its parameters. A new model gets its own line here.
EVERY_MODEL: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "logistic-regression": ("logistic-regression", [NUMBERS], {}),
    "linear-svm": ("linear-svm", [NUMBERS], {}),
    "logistic-hazard": ("logistic-hazard", [NUMBERS], {}),
    "mlp": ("mlp", [NUMBERS, FINGERPRINT], {"hidden": [5, 3]}),
    "cnn": ("cnn", [IMAGE], {"channels": [3, 5]}),
    "cnn with a hidden layer": ("cnn", [IMAGE], {"channels": [3], "hidden": 4}),
    "cnn that keeps places": ("cnn", [IMAGE], {"channels": [3, 5], "pooling": "none"}),
    "cnn in 3-D": ("cnn", [VOLUME], {"channels": [3, 4]}),
    "resnet-18": ("resnet-18", [IMAGE], {"width": 2}),
    "resnet-18 with a large stem": ("resnet-18", [IMAGE], {"width": 2, "stem": "large"}),
    "resnet-18 in 3-D": ("resnet-18", [VOLUME], {"width": 1}),
    "gru": ("gru", [SERIES], {"hidden": 5}),
    "gru, deep, mean": ("gru", [SERIES], {"hidden": 5, "layers": 2, "state": "mean"}),
    "lstm": ("lstm", [SERIES], {"hidden": 5}),
    "temporal-cnn": ("temporal-cnn", [SERIES], {"channels": [4, 4, 3], "kernel": 2}),
    "temporal-cnn, mean": ("temporal-cnn", [SERIES], {"channels": [3], "state": "mean"}),
    "embedding-bag": ("embedding-bag", [TEXT], {"width": 5, "hidden": [4]}),
    "embedding-bag of a molecule": ("embedding-bag", [MOLECULE], {"width": 3, "hidden": []}),
    "text-gru": ("text-gru", [TEXT], {"width": 3, "hidden": 5}),
    "text-gru, last": ("text-gru", [TEXT], {"width": 3, "hidden": 5, "state": "last"}),
    "smiles-gru": ("smiles-gru", [MOLECULE], {"width": 3, "hidden": 5}),
    "fusion": (
        "fusion",
        [NUMBERS, IMAGE, TEXT, SERIES, MOLECULE, FINGERPRINT],
        {"channels": [3, 2], "table": 3, "embedding": 4, "state": 5, "hidden": [4]},
    ),
    "fusion of a table and a text": ("fusion", [NUMBERS, TEXT], {"table": 3, "embedding": 4, "hidden": []}),
}


def study_of(name: str, task: str = "binary", **changes: Any) -> Study:
    """The study of one line above.

    Args:
        task: multi-class ones have three classes.
        changes: as `small.study` takes them.
    """
    model, columns, parameters = EVERY_MODEL[name]
    data: dict[str, Any] = {"columns": columns}
    if task == "multi-class":
        data["label"] = classes(3)
    if task == "regression":
        data["label"] = {"column": "y", "range": [-1, 1], "unit": "1"}
    own = {"name": model, "parameters": parameters} | changes.pop("model", {})
    return study(data=data, model=own, **{"objective": {"task": task}, **changes})


def shape_of(wanted: Study) -> Shape:
    return Shape(feature_count(wanted), wanted.outputs, blocks(wanted))


def features_of(wanted: Study, records: int, seed: int = 0) -> torch.Tensor:
    """Random features [records, width]: numbers, bits, and ids of tokens up to some place in a block; one
    block of ids in seven is empty."""
    random = np.random.default_rng(seed)
    parts = []
    for block in blocks(wanted):
        if block.vocabulary:
            ids = random.integers(1, block.vocabulary + 1, (records, block.width))
            lengths = random.integers(0, block.width, (records, 1))
            part = np.where(np.arange(block.width) < lengths, ids, 0)
        elif block.kind == "molecule":
            part = random.integers(0, 2, (records, block.width))
        else:
            part = random.normal(size=(records, block.width))
        parts.append(part.astype(np.float32))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def patients_of(wanted: Study, counts: Sequence[int], seed: int = 0) -> Patients:
    """Patients with so many random records each."""
    random = np.random.default_rng((seed, 1))
    records = int(sum(counts))
    labels = random.integers(0, max(2, wanted.outputs), records)
    if wanted.data.label.number:
        labels = random.uniform(-1, 1, records).astype(np.float32)
    return Patients(
        features=features_of(wanted, records, seed),
        labels=torch.from_numpy(labels),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
    )
