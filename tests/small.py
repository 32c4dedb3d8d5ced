"""Small studies, cohorts and sites that the tests of the core are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from client.cohort import Patients
from client.policy import approve
from client.settings import SiteFolder
from client.site import make_split_key
from common.errors import StudyError
from common.files import canonical_json, validated
from common.privacy.plan import StepPlan, plan_study
from common.study import Study

WIDTH = 4
# Planted in the data: none of these may ever be seen outside of the site.
SECRETS = ("secretcolumn", "PATIENT-ZEBRA", "123.4567", "sekretcode")


def study(**changes: Any) -> Study:
    """A small study; `changes` replace whole sections, or single keys of a section given as a dict."""
    value: dict[str, Any] = {
        "name": "small",
        "title": "A small study",
        "data": {
            "columns": [
                {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": WIDTH},
            ],
            "label": {
                "column": "y",
                "classes": [{"name": "no", "codes": ["0"]}, {"name": "yes", "codes": ["1"]}],
            },
        },
        "model": {"name": "logistic-regression"},
        "objective": {"task": "binary"},
        "algorithm": {"rounds": 3},
        "training": {
            "optimizer": {"name": "sgd", "learning_rate": 0.5},
            "local_steps": 2,
            "sample_rate": 1.0,
            "max_records_per_patient": 40,
        },
        "privacy": {"mode": "patient-dp", "epsilon": 2.0, "delta": 1e-3, "clipping_norm": 1.0},
    }
    for section, change in changes.items():
        if isinstance(change, dict) and section not in {"model", "objective", "privacy"}:
            value[section] = {**value[section], **change} if section in value else change
        else:
            value[section] = change
    return validated(Study, value, "small", StudyError)


def classes(count: int) -> dict[str, Any]:
    """A label of `count` classes, coded 0 …"""
    return {"column": "y", "classes": [{"name": f"class {i}", "codes": [str(i)]} for i in range(count)]}


def patients(
    counts: Sequence[int], seed: int = 0, outputs: int = 2, width: int = WIDTH, scale: float = 1.0
) -> Patients:
    """Patients with so many random records each."""
    random = np.random.default_rng(seed)
    records = int(sum(counts))
    return Patients(
        features=torch.from_numpy((scale * random.normal(size=(records, width))).astype(np.float32)),
        labels=torch.from_numpy(random.integers(0, outputs, records)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
    )


def without(cohort: Patients, index: int) -> Patients:
    """The cohort less one patient."""
    a, b = int(cohort.offsets[index]), int(cohort.offsets[index + 1])
    kept = torch.cat([torch.arange(a), torch.arange(b, len(cohort.labels))])
    counts = cohort.offsets.diff().tolist()
    del counts[index]
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int64)
    return Patients(cohort.features[kept], cohort.labels[kept], offsets)


def step_plan(**changes: Any) -> StepPlan:
    values: dict[str, Any] = {
        "sample_rate": 1.0,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "divisor": 8.0,
        "max_records": 40,
        "average_records": True,
    }
    return StepPlan(**{**values, **changes})


def write_rows(root: Path, count: int, seed: int = 0) -> None:
    """`count` patients with one to three records each, one of them a canary."""
    random = np.random.default_rng(seed)
    lines = ["patient_id," + ",".join(f"x_{i}" for i in range(WIDTH)) + ",y,secretcolumn"]
    for p in range(count):
        name = "PATIENT-ZEBRA" if p == 3 else f"patient-{p}"
        for _ in range(1 + p % 3):
            x = random.uniform(-1, 1, WIDTH)
            lines.append(",".join([name, *(f"{v:.6f}" for v in x), str(int(x.sum() > 0)), "123.4567"]))
    (root / "patients.csv").write_text("\n".join(lines) + "\n")


def make_site(root: Path, name: str = "north", public_size: int = 50, count: int = 60) -> SiteFolder:
    """A site's folder with data and keys; its policy allows nothing yet."""
    root.mkdir(parents=True, exist_ok=True)
    site = {"site": {"name": name, "public_size": public_size}, "data": {"file": "patients.csv"}}
    (root / "site.toml").write_text(tomli_w.dumps(site))
    write_rows(root, count)
    folder = SiteFolder(root)
    make_split_key(folder)
    return folder


def allow(folder: SiteFolder, wanted: Study, sessions: int = 1, public: bool = False) -> None:
    """Play the site's operator."""
    plan = plan_study(wanted, folder.file.site.public_size)
    approve(folder, wanted, plan, "officer", sessions, public=public)


def toml(wanted: Study, path: Path) -> Path:
    """The study as a file."""
    path.write_bytes(canonical_json(wanted.model_dump(mode="json")))
    return path
