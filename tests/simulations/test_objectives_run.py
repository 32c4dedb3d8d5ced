"""Studies of several labels, of quantiles and of survival, from invented tables to the report, noised and
exact; and how sure their models are of a patient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from typer.testing import CliRunner

from client.cohort import load_cohort
from client.settings import SiteFolder
from client.site import make_site_keys
from common.explain import explain
from common.files import write_atomic
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy.plan import plan_study
from common.study import Study, load_study
from simulations.audit.cli import app as audit
from simulations.audit.shadows import confidences, pool_of, train_shadows
from simulations.cli import app

LABELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "multi-label": (
        {"columns": [{"name": "a"}, {"name": "b", "missing_codes": ["?"]}]},
        {"task": "multi-label"},
        "logistic-regression",
    ),
    "quantile": (
        {"column": "y", "range": [0, 10], "unit": "mg"},
        {"task": "regression", "loss": "quantile", "quantiles": [0.1, 0.5, 0.9]},
        "mlp",
    ),
    "survival": (
        {"column": "T", "event": "E", "range": [0, 10], "unit": "a", "intervals": 5},
        {"task": "survival"},
        "logistic-hazard",
    ),
}
PATIENTS = 80
KEY = b"0123456789abcdef"


def rows_of(task: str, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    x = random.uniform(-1, 1, (PATIENTS, 2))
    risk = x @ [1.5, -1.0]
    if task == "multi-label":
        yes = (risk[:, None] + random.logistic(size=(PATIENTS, 2)) > 0).astype(int).astype(str).astype(object)
        yes[random.random(PATIENTS) < 0.2, 1] = "?"
        head, label = "a,b", [",".join(each) for each in yes]
    elif task == "quantile":
        head, label = "y", [f"{v:.3f}" for v in (5 + risk + random.normal(size=PATIENTS)).clip(0, 10)]
    else:
        event, left = random.exponential(6 * np.exp(-risk)), random.uniform(0, 12, PATIENTS).clip(max=10)
        seen = event <= left
        head = "T,E"
        label = [f"{min(t, c):.3f},{int(s)}" for t, c, s in zip(event, left, seen, strict=True)]
    part = ["test" if i % 5 < 2 else "train" for i in range(PATIENTS)]
    lines = [f"p{i},{part[i]},{x[i, 0]:.4f},{x[i, 1]:.4f},{label[i]}" for i in range(PATIENTS)]
    return [f"patient_id,part,x_0,x_1,{head}", *lines]


@pytest.fixture(scope="module", params=list(LABELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A study and two sites."""
    task = request.param
    label, objective, model = LABELS[task]
    root = tmp_path_factory.mktemp(task)
    for seed, name in enumerate(("north", "south")):
        (root / "sites" / name).mkdir(parents=True)
        site = {"site": {"name": name, "public_size": PATIENTS}, "data": {"file": "patients.csv"}}
        (root / "sites" / name / "site.toml").write_text(tomli_w.dumps(site))
        (root / "sites" / name / "patients.csv").write_text("\n".join(rows_of(task, seed)) + "\n")
        make_site_keys(SiteFolder(root / "sites" / name))
    study = {
        "name": task,
        "title": f"A study of {task}",
        "data": {
            "columns": [{"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 2}],
            "label": label,
            "split": {"by": "column", "column": "part", "test_fraction": 0.4},
        },
        "model": {"name": model},
        "objective": objective,
        "algorithm": {"rounds": 2},
        "training": {
            "optimizer": {"name": "sgd", "learning_rate": 0.5},
            "local_steps": 5,
            "sample_rate": 0.5,
        },
        "privacy": {"mode": "patient-dp", "epsilon": 3.0, "delta": 1e-3, "clipping_norm": 1.0},
        "statistics": {"epsilon": 2.0, "delta": 1e-3},
    }
    write_atomic(root / "study.toml", tomli_w.dumps(study).encode())
    return task, root


def sim(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


KNOWN = {
    "multi-label": ("auroc", "auprc", "accuracy", "brier", "calibration_error"),
    "quantile": ("mae", "bias", "coverage", "interval_width"),
    "survival": ("c_index", "brier"),
}


@pytest.mark.parametrize("exact", [False, True])
def test_from_a_table_to_the_report(made: tuple[str, Path], exact: bool, tmp_path: Path) -> None:
    task, root = made
    options = ["--sites", root / "sites", "--seed", "1", "--out", tmp_path]
    found = sim("run", root / "study.toml", *options, *(["--exact-metrics"] if exact else []))
    (run,) = found["runs"]
    assert run["exact"] == exact
    for name in KNOWN[task]:
        assert run["measured"][name] is not None or not exact, name
    if exact:
        assert run["measured"]["patients"] == pytest.approx(_known_tests(root, task))
    assert [one["label"] for one in run["labels"]] == (["a", "b"] if task == "multi-label" else [])
    assert [one["horizon"] for one in run["horizons"]] == ([10.0] if task == "survival" else [])
    audited = CliRunner().invoke(audit, ["recompute", f"{found['folder']}/store", "--json"])
    assert audited.exit_code == 0, audited.output
    opinions = json.loads(audited.stdout)["opinions"]
    assert opinions
    assert all(opinion["sound"] for opinion in opinions)


def _known_tests(root: Path, task: str) -> float:
    """Test patients of both sites; of several labels the mean of those that are known."""
    found = 0.0
    for name in ("north", "south"):
        folder = SiteFolder(root / "sites" / name)
        labels = load_cohort(folder, load_study(root / "study.toml"), KEY).test.labels
        found += float((~labels.isnan()).sum() / 2) if task == "multi-label" else len(labels)
    return found


def test_a_cohort_is_described(made: tuple[str, Path]) -> None:
    task, root = made
    found = sim("describe", root / "study.toml", "--sites", root / "sites")
    names = {"multi-label": ["a", "b"], "quantile": ["y"], "survival": ["T", "E"]}[task]
    columns = found["description"]["columns"] if "description" in found else found["columns"]
    assert [c["name"] for c in columns if c["kind"] == "label"] == names


def test_it_is_explained(made: tuple[str, Path]) -> None:
    task, root = made
    words = " ".join(explain(load_study(root / "study.toml"), 10).lines)
    assert {
        "multi-label": "Learns: a, b (2 labels, each yes or no)",
        "quantile": "Learns: y (a number, 0 to 10 mg)",
        "survival": "Learns: T, E (time until the event, 5 intervals to 10 a)",
    }[task] in words
    told = {"multi-label": "histogram of scores", "quantile": "of errors", "survival": "of risks by time"}
    assert told[task] in words
    losses = {"multi-label": "cross-entropy", "quantile": "quantile of 0.1, 0.5, 0.9", "survival": "hazard"}
    assert f"Loss: {losses[task]}." in words
    interval = ", with their sums, with how many lie in the predicted interval and its width"
    sums = {"multi-label": "", "quantile": interval, "survival": ", with sums of squared errors"}
    assert f"bins){sums[task]}. Rows" in words


def test_shadow_models_are_sure_of_patients(made: tuple[str, Path]) -> None:
    task, root = made
    study = load_study(root / "study.toml")
    pool = pool_of(study, [SiteFolder(root / "sites" / "north")])
    parameters = parameter_arrays(study_model(study, seed=3))
    found, right = confidences(study, parameters, pool)
    expected, told = _by_hand(study, pool.features, pool.labels)
    assert np.allclose(found, expected, atol=1e-5)
    assert (right == told).all()
    if task == "survival":
        shadows = train_shadows(study, pool, plan_study(study, PATIENTS), models=8)
        assert shadows.confidence.shape == (8, PATIENTS)
        assert shadows.right is None
        assert (shadows.likelihood > 0).all()


def _by_hand(study: Study, features: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    network = study_model(study, seed=3)
    with torch.no_grad():
        outputs = network(features).double()
    if study.objective.task != "multi-label":
        return -record_losses(study.objective, outputs, labels).numpy(), np.zeros(len(labels), dtype=np.bool_)
    sure, right = [], []
    for z, y in zip(outputs.numpy(), labels.numpy(), strict=True):
        margins = [float(z[k]) * (1 if y[k] == 1 else -1) for k in range(2) if not np.isnan(y[k])]
        sure.append(np.mean(margins))
        right.append(sum(m > 0 for m in margins) > len(margins) / 2)
    return np.array(sure), np.array(right)
