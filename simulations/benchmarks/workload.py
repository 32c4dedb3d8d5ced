"""What the benchmarks compute: a small network on invented patients, with and without privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tomli_w

from common.errors import StudyError
from common.files import validated
from common.study import Study

WIDTH, HIDDEN = 30, 64
BATCH, STEPS = 32, 3
PATIENTS = 100  # of a site
LEARNING_RATE, CLIPPING_NORM = 0.1, 1.0
_SEED = 20_240


def benchmark_study(rounds: int, *, private: bool, trivial: bool = False) -> Study:
    """An MLP 30-64-1 with some steps a round of 32 expected patients; `trivial`: one step of a linear model.

    The test patients are evaluated once, at the end, so that a round is training alone.
    """
    value: dict[str, Any] = {
        "name": "benchmark",
        "title": "Invented patients, for measuring time",
        "data": {
            "columns": [
                {"kind": "numeric", "name": "x", "unit": "1", "range": [-8, 8], "repeat": WIDTH},
            ],
            "label": {
                "column": "y",
                "classes": [{"name": "no", "codes": ["0"]}, {"name": "yes", "codes": ["1"]}],
            },
        },
        "model": {"name": "mlp", "parameters": {"hidden": [HIDDEN]}},
        "objective": {"task": "binary"},
        "algorithm": {"rounds": rounds},
        "training": {
            "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE},
            "local_steps": STEPS,
            "patients_per_step": BATCH,
        },
        "privacy": {"mode": "none"},
    }
    if trivial:
        value["model"] = {"name": "logistic-regression"}
        value["training"]["local_steps"] = 1
    if private:
        value["privacy"] = {
            "mode": "patient-dp",
            "epsilon": 2.0,
            "delta": 1e-3,
            "clipping_norm": CLIPPING_NORM,
        }
    return validated(Study, value, "benchmark", StudyError)


def site_name(index: int) -> str:
    return f"site-{index:04d}"


def write_sites(folder: Path, sites: int, patients: int) -> Path:
    """Write `sites` folders of `patients` patients with one record each; returns `folder`."""
    random = np.random.default_rng(_SEED)
    weights = random.normal(size=WIDTH)
    for index in range(sites):
        root = folder / site_name(index)
        root.mkdir(parents=True)
        features = random.normal(size=(patients, WIDTH)).clip(-8, 8).round(6)
        table = pd.DataFrame(features, columns=[f"x_{i}" for i in range(WIDTH)])
        table.insert(0, "patient_id", [f"p{i:06d}" for i in range(patients)])
        table["y"] = (features @ weights + random.normal(size=patients) > 0).astype(int)
        table.to_csv(root / "patients.csv", index=False)
        site = {"site": {"name": root.name, "public_size": patients}, "data": {"file": "patients.csv"}}
        (root / "site.toml").write_bytes(tomli_w.dumps(site).encode())
    return folder
