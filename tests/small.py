"""Small studies, cohorts and sites that the tests of the core are made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from client.cohort import Patients
from client.policy import Approval, Policy, approval_of
from client.policy_file import approve, load_policy, set_policy
from client.reservation import Reservation
from client.settings import SiteFolder
from client.site import make_site_keys
from client.vault import Vault
from common.errors import StudyError
from common.files import canonical_json, validated
from common.messages import Job, JobHeader, Refusal, RefusalHeader, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.privacy.plan import HistogramPlan, StepPlan, StudyPlan, plan_study
from common.study import Study

WIDTH = 4
# Planted in the data: none of these may ever be seen outside of the site.
SECRETS = ("secretcolumn", "PATIENT-ZEBRA", "123.4567", "sekretcode")


# Every task and loss, and how many classes its label has (0: it is a number).
OBJECTIVES: list[tuple[dict[str, Any], int]] = [
    ({"task": "binary"}, 2),
    ({"task": "binary", "loss": "hinge"}, 2),
    ({"task": "multi-class"}, 3),
    ({"task": "multi-class", "loss": "hinge"}, 3),
    ({"task": "regression"}, 0),
    ({"task": "regression", "loss": "absolute"}, 0),
]


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


def session_plan(
    noise: float = 4.0, rate: float = 0.5, rounds: int = 3, evaluation: float = 9.0, statistics: float = 8.0
) -> StudyPlan:
    """A session that nobody calibrated, of two steps a round and one evaluation, at its end.

    Args:
        noise, evaluation, statistics: noise multipliers.
    """
    return StudyPlan(
        step=step_plan(noise_multiplier=noise, sample_rate=rate),
        steps_per_round=2,
        rounds=rounds,
        evaluations=1,
        histogram=HistogramPlan(1.0, evaluation),
        final_histogram=HistogramPlan(1.0, evaluation),
        delta=1e-3,
        statistics=HistogramPlan(2.0, statistics),
        statistics_delta=1e-4,
    )


def reservation(
    session: str = "one", number: int = 1, study: str = "a" * 64, epsilon: float | None = 1.0, **changes: Any
) -> Reservation:
    """One round of a made-up session; round 0 are its statistics."""
    plan: StudyPlan = changes.pop("plan", session_plan())
    trains, delta = 1 <= number <= plan.rounds, plan.statistics_delta if number == 0 else plan.delta
    values: dict[str, Any] = {
        "session": session,
        "round": number,
        "study": study,
        "request": hashlib.sha256(f"{session} {number}".encode()).hexdigest(),
        "public_size": 50,
        "plan": plan,
        "training": plan.training_event() if trains and epsilon else None,
        "evaluation": plan.evaluation_event(number) if number > plan.rounds and epsilon else None,
        "statistics": plan.statistics_event() if number == 0 else None,
        "epsilon": epsilon,
        "delta": None if epsilon is None else delta,
        "withdrawn": "0" * 64,
    }
    return Reservation(**{**values, **changes})


def grant(epsilon: float | None = 3.0, delta: float | None = 3e-3, study: str = "a" * 64) -> Approval:
    """An approval of a made-up study."""
    return validated(
        Approval,
        {
            "study": "s",
            "digest": study,
            "epsilon": epsilon,
            "delta": delta,
            "public": epsilon is None,
            "approved_by": "officer",
            "approved_at": "2026-01-01T00:00:00Z",
        },
        "approval",
        StudyError,
    )


def policy_of(*approved: Approval, epsilon: float = 100.0, delta: float = 1e-2, **changes: Any) -> Policy:
    """A policy with these approvals and this lifetime budget."""
    value: dict[str, Any] = {"cohort": {"epsilon": epsilon, "delta": delta}, "approved": approved, **changes}
    return validated(Policy, value, "policy", StudyError)


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
    make_site_keys(folder)
    return folder


def allow(
    folder: SiteFolder, wanted: Study, sessions: int = 1, public: bool = False, lifetime: float = 1000.0
) -> None:
    """Play the site's operator."""
    if load_policy(folder).cohort is None:
        set_policy(folder, {"cohort": {"epsilon": lifetime, "delta": 1e-2}})
    approval = approval_of(wanted, "officer", sessions=sessions, public=public)
    approve(folder, wanted, approval, plan_study(wanted, folder.file.site.public_size))


def job(
    wanted: Study,
    number: int = 1,
    session: str = "first",
    arrays: dict[str, np.ndarray] | None = None,
    scaling: dict[str, np.ndarray] | None = None,
    **header: Any,
) -> bytes:
    """A coordinator's request, with the model that nobody has trained yet, or with `arrays`."""
    if arrays is None:
        arrays = parameter_arrays(study_model(wanted)) if number else {}
    told = JobHeader(session=session, round=number, study=wanted.digest, **header)
    return encode(Job(told, arrays, scaling or {}))


def answered(vault: Vault, request: bytes) -> Reply:
    """The vault's reply; the test fails at anything else."""
    message = decode(vault.answer(request))
    assert isinstance(message, Reply), message
    return message


def refused(vault: Vault, request: bytes) -> RefusalHeader:
    """The vault's refusal; the test fails at anything else."""
    message = decode(vault.answer(request))
    assert isinstance(message, Refusal), "it should have refused"
    return message.header


def epsilon_of_gaussians(noises: Iterable[float], delta: float) -> float:
    """Of Gaussian releases with these noise multipliers, which compose to one of μ² = Σ 1/σ² (Balle and Wang
    2018, theorem 8)."""
    mu = math.sqrt(math.fsum(1 / s**2 for s in noises))

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta)

    return float(brentq(excess, 0.0, 500.0)) if excess(0.0) > 0 else 0.0


def toml(wanted: Study, path: Path) -> Path:
    """The study as a file."""
    path.write_bytes(canonical_json(wanted.model_dump(mode="json")))
    return path
