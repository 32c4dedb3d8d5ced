"""A cohort whose every patient can be seen: what a site's update is made of, read off one column each.

Patient i has one feature, the i-th, and that is huge. So its gradient lies in the i-th column of the first
layer, along a direction that follows from the parameters alone; clipping leaves C times that direction, and
the update tells each patient's contributions apart (gradient canaries in orthogonal directions: Nasr et al.
2023, arXiv 2302.07956). Half of the columns have no patient: noise alone must be there. A few wide patients
have a record in each of `WIDE` further columns, which shows how many records a step takes of them.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w

from client.policy import approval_of
from client.policy_file import approve, load_policy, set_policy
from client.settings import SiteFolder
from client.site import make_site_keys
from common.errors import StudyError
from common.files import validated, write_atomic
from common.messages import Arrays
from common.models import parameter_arrays, study_model
from common.privacy.plan import StudyPlan, plan_study
from common.study import Study

HUGE = 1e6  # a canary's feature; what its gradient has outside of its column is smaller by so much
FIRST = "0.weight"
WIDE, WIDE_PATIENTS = 24, 12
CAP = 3  # records of a patient in a step, at most; what a study says beyond it works alike
FAMILIES = ("logistic-regression", "linear-svm", "mlp")

Family = Literal["logistic-regression", "linear-svm", "mlp"]


@dataclass(frozen=True)
class Canaries:
    """Who is in the cohort.

    Attributes:
        present: bool [columns]: whether the column has a patient that trains.
        records: int [columns]: of each patient.
        public_size: that the site declares; not the true number.
        tested: patients that test.

    After these columns come `WIDE` each for `WIDE_PATIENTS` more.
    """

    present: np.ndarray
    records: np.ndarray
    public_size: int
    tested: int

    @property
    def columns(self) -> int:
        """Features in all."""
        return len(self.present) + WIDE * WIDE_PATIENTS


def canaries(columns: int, seed: int, *, many: int = 40) -> Canaries:
    """A fair coin for each column, from `seed`, says whether it gets a patient; every eighth patient has
    `many` records.

    A third more is declared than is to be expected, so that a divisor taken from the data shows.
    """
    random = np.random.default_rng(seed)
    present = random.random(columns) < 0.5
    records = np.where(random.permutation(np.arange(columns) % 8 == 0), many, 1)
    tested = max(4, columns // 10)
    return Canaries(present, records, round(4 / 3 * (columns // 2 + WIDE_PATIENTS + tested)), tested)


def canary_study(
    family: Family,
    columns: int,
    *,
    epsilon: float,
    delta: float = 1e-4,
    rounds: int = 30,
    local_steps: int = 1,
    sample_rate: float = 0.25,
    clipping_norm: float = 1.0,
    most_records: int = CAP,
) -> Study:
    """A study that trains `family` on canaries.

    Args:
        columns: features in all.
        local_steps: more than one only for linear models; then the step is so short that the parameters
            stay what they were, as far as a gradient can tell.

    Raises:
        StudyError: if a number is out of range.
    """
    rate = 1.0 if local_steps == 1 else 1e-12
    value: dict[str, Any] = {
        "name": f"audit-{family}",
        "title": f"Canaries for {family}",
        "data": {
            "columns": [
                {"kind": "numeric", "name": "x", "unit": "1", "range": [-HUGE, HUGE], "reference": [-1, 1],
                 "repeat": columns},
            ],
            "label": {
                "column": "y",
                "classes": [{"name": "no", "codes": ["0"]}, {"name": "yes", "codes": ["1"]}],
            },
            "split": {"by": "column", "column": "part", "test_fraction": 0.1},
        },
        "model": {"name": family, "parameters": {"hidden": [16]} if family == "mlp" else {}},
        "objective": {"task": "binary", "loss": "hinge" if family == "linear-svm" else "cross-entropy"},
        "algorithm": {"rounds": rounds},
        "training": {
            "optimizer": {"name": "sgd", "learning_rate": rate},
            "local_steps": local_steps,
            "sample_rate": sample_rate,
            "max_records_per_patient": most_records,
        },
        "privacy": {
            "mode": "patient-dp", "epsilon": epsilon, "delta": delta, "clipping_norm": clipping_norm
        },
    }  # fmt: skip
    return validated(Study, value, "the audit's study", StudyError)


def make_site(root: Path, name: str, who: Canaries) -> SiteFolder:
    """Write a site's folder with these canaries, and its keys."""
    root.mkdir(parents=True, exist_ok=True)
    site = {"site": {"name": name, "public_size": who.public_size}, "data": {"file": "canaries.csv"}}
    write_atomic(root / "site.toml", tomli_w.dumps(site).encode(), mode=0o644)
    zeros, narrow = ["0"] * who.columns, len(who.present)
    with (root / "canaries.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["patient_id", *(f"x_{i}" for i in range(who.columns)), "y", "part"])
        for i in np.flatnonzero(who.present).tolist():
            features = zeros.copy()
            for number in range(int(who.records[i])):
                features[i] = f"{HUGE - number:.0f}"  # no two rows are the same
                rows.writerow([f"c{i}", *features, "0", "train"])
        for i in range(narrow, who.columns):
            features = zeros.copy()
            features[i] = f"{HUGE:.0f}"
            rows.writerow([f"w{(i - narrow) // WIDE}", *features, "0", "train"])
        for i in range(who.tested):
            rows.writerow([f"t{i}", *zeros, str(i % 2), "test"])
    folder = SiteFolder(root)
    make_site_keys(folder)
    return folder


def admit(folder: SiteFolder, study: Study, least_noise: float = 0.0) -> StudyPlan:
    """Play the privacy officer of a site of canaries; returns the site's plan.

    Args:
        least_noise: noise multiplier that the policy demands of a training step.

    Raises:
        PolicyForbids, StudyError: as a real approval would.
    """
    if load_policy(folder).cohort is None:
        budget = {"epsilon": 1000.0, "delta": 0.05}
        set_policy(folder, {"cohort": budget, "floors": {"noise_multiplier": least_noise}})
    approval = approval_of(study, "auditor")
    plan = plan_study(study, folder.file.site.public_size, load_policy(folder).limits(approval))
    approve(folder, study, approval, plan)
    return plan


def crafted(study: Study) -> Arrays:
    """Parameters under which each canary's gradient is in its own column only: first layer zero, its
    biases 1 (so that every unit passes its gradient on), the rest as the model starts."""
    arrays = parameter_arrays(study_model(study, seed=1))
    arrays[FIRST] = np.zeros_like(arrays[FIRST])
    if study.model.name == "mlp":
        arrays["0.bias"] = np.ones_like(arrays["0.bias"])
    else:
        arrays["0.bias"] = np.zeros_like(arrays["0.bias"])
    return arrays


@dataclass(frozen=True)
class ColumnGauge:
    """Reads canaries whose gradient lies in their own column of the first layer.

    Attributes:
        unit: float64 [outputs of the first layer], see `direction`.
    """

    parameters: Arrays
    unit: np.ndarray
    share: float = 1.0

    def read(self, sums: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See `simulations.audit.observe.Gauge`."""
        first = sums.pop(FIRST)
        across = np.linalg.qr(np.column_stack([self.unit, np.eye(len(self.unit))[:, 1:]]))[0].T[1:]
        return self.unit @ first, sums | {"0.weight, across": across @ first}


def column_gauge(study: Study) -> ColumnGauge:
    """The gauge of a `canary_study`."""
    parameters = crafted(study)
    return ColumnGauge(parameters, direction(study, parameters))


def direction(study: Study, parameters: Arrays) -> np.ndarray:
    """The unit vector [outputs of the first layer] along which a canary's gradient lies in its column.

    All canaries have label 0, so the loss falls with the logit, and the gradient is a positive multiple of
    d logit / d (first layer's outputs).
    """
    if study.model.name != "mlp":
        return np.ones(1)
    upwards = parameters["2.weight"][0].astype(np.float64)
    return np.asarray(upwards / np.linalg.norm(upwards))
