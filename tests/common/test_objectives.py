"""Losses and scores of every task against torch and scikit-learn, and a numeric label on its way from the
file to the histogram of errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from small import classes, make_site, study
from torch.nn import functional

from client.batches import batch_of
from client.cohort import Cohort, load_cohort
from client.dpsgd import ClippedGradients
from client.training import Trainer
from common.encoding import encode
from common.errors import DataError, StudyError
from common.histograms import histogram_shapes, histograms
from common.metrics import measure
from common.models import study_model
from common.objectives import record_losses, scores
from common.privacy.noise import Seeded
from common.privacy.plan import histogram_sensitivity, plan_study
from common.schema import examine
from common.study import Objective, Study
from common.table import Table

LABEL = {"column": "y", "range": [80, 200], "unit": "mm[Hg]"}
SEX = {"kind": "categorical", "name": "sex", "codes": {"1": "male", "0": "female"}, "missing": "indicator"}
KEY = b"0123456789abcdef"


def regression(**changes: Any) -> Study:
    return study(data={"label": LABEL}, objective={"task": "regression"}, **changes)


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), records=st.integers(0, 20))
def test_losses_of_regression_are_torchs(seed: int, records: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(records, 1, generator=generator) * 3
    labels = torch.rand(records, generator=generator) * 2 - 1
    for loss, oracle in (("squared", functional.mse_loss), ("absolute", functional.l1_loss)):
        found = record_losses(Objective(task="regression", loss=loss), outputs, labels)
        assert found.shape == (records,)
        assert torch.equal(found, oracle(outputs[:, 0], labels, reduction="none"))


def test_losses_of_classes_are_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs, labels = torch.randn(50, 3, generator=generator), torch.arange(50) % 3
    for loss, oracle in (
        ("cross-entropy", functional.cross_entropy),
        ("hinge", functional.multi_margin_loss),
    ):
        found = record_losses(Objective(task="multi-class", loss=loss), outputs, labels)
        torch.testing.assert_close(found, oracle(outputs, labels, reduction="none"))
    margin, own = outputs[:, :1], labels % 2
    logistic = record_losses(Objective(task="binary"), margin, own)
    expected = [sklearn.log_loss([y], [p], labels=[0, 1]) for y, p in zip(own, margin.sigmoid(), strict=True)]
    np.testing.assert_allclose(logistic.numpy(), np.array(expected), rtol=1e-5)
    hinge = record_losses(Objective(task="binary", loss="hinge"), margin, own)
    sign, zero = 2.0 * own - 1, torch.zeros(50)
    theirs = functional.margin_ranking_loss(margin[:, 0], zero, sign, margin=1.0, reduction="none")
    torch.testing.assert_close(hinge, theirs)


def test_the_usual_loss_goes_with_the_task() -> None:
    assert regression().objective.loss == "squared"
    assert study().objective.loss == "cross-entropy"
    absolute = study(data={"label": LABEL}, objective={"task": "regression", "loss": "absolute"})
    assert absolute.objective.loss == "absolute"
    assert absolute.digest != regression().digest


def test_predictions_are_kept_within_the_range_but_their_gradient_is_not() -> None:
    objective = regression().objective
    outputs = torch.tensor([[-3.0], [0.25], [7.0]], requires_grad=True)
    assert scores(objective, outputs).tolist() == [-1.0, 0.25, 1.0]
    record_losses(objective, outputs, torch.zeros(3)).sum().backward()
    assert outputs.grad is not None
    assert outputs.grad[:, 0].tolist() == [-6.0, 0.5, 14.0]


def test_scores_of_classes_are_probabilities() -> None:
    outputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scores(Objective(task="multi-class"), outputs).sum(dim=1), torch.ones(20))
    assert torch.allclose(scores(Objective(task="binary"), outputs), outputs[:, 0].sigmoid(), atol=1e-7)


def table(labels: list[str | None]) -> Table:
    columns: dict[str, list[str | None]] = {f"x_{i}": ["0"] * len(labels) for i in range(4)}
    ids: list[str | None] = [f"p{i}" for i in range(len(labels))]
    return Table.of("t.csv", {"patient_id": ids, "y": labels, **columns})


def test_a_number_is_scaled_from_its_range_to_plus_minus_one() -> None:
    encoded = encode(table(["80", " 140 ", "2e2", "110.0"]), regression())
    assert encoded.labels.dtype == np.float32
    assert encoded.labels.tolist() == [-1.0, 0.0, 1.0, -0.5]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("79.9", "outside the plausible range 80 to 200 mm[Hg]"),
        ("201", "outside the plausible range 80 to 200 mm[Hg]"),
        ("inf", "infinite"),
        ("high", "not a number"),
        ("", "missing; every record needs a label"),
        (None, "missing; every record needs a label"),
        ("NaN", "missing; every record needs a label"),
    ],
)
def test_a_label_outside_of_its_range_is_a_violation(value: str | None, problem: str) -> None:
    _, violations = examine(table(["100", value, "120"]), regression())
    (found,) = violations
    assert (found.column, found.problem, found.places) == ("y", problem, (2,))
    with pytest.raises(DataError, match="column y") as raised:
        encode(table(["100", value]), regression())
    assert value in (None, "") or str(value) not in str(raised.value).replace("infinite", "")


def test_there_is_one_output() -> None:
    wanted = regression(model={"name": "mlp", "parameters": {"hidden": [3]}})
    assert wanted.outputs == 1
    assert study_model(wanted)(torch.zeros(5, 4)).shape == (5, 1)
    assert study(data={"label": classes(2)}).outputs == 1
    assert study(data={"label": classes(2)}, objective={"task": "multi-class"}).outputs == 2


def cohort_of(root: Path, wanted: Study, lines: list[str]) -> Cohort:
    folder = make_site(root)
    header = "patient_id,x_0,x_1,x_2,x_3,sex,y"
    (root / "patients.csv").write_text("\n".join([header, *lines]) + "\n")
    return load_cohort(folder, wanted, KEY)


def made_up(seed: int, patients: int) -> list[str]:
    """Records whose pressure follows from their features, one to three a patient; some of unknown sex."""
    random = np.random.default_rng(seed)
    lines = []
    for p in range(patients):
        for r in range(1 + p % 3):
            x = random.uniform(-1, 1, 4).round(6)
            y = 140 + 40 * x[0] - 15 * x[1] + random.normal(0, 2)
            sex = ["0", "1", ""][(p + r) % 3]
            lines.append(",".join([f"p{p}", *map(str, x), sex, f"{y:.4f}"]))
    return lines


def with_sex(**changes: Any) -> Study:
    columns = [*study().model_dump(mode="json")["data"]["columns"], SEX]
    return study(
        data={"columns": columns, "label": LABEL},
        objective={"task": "regression"},
        evaluation={"subgroups": ["sex"], "bins": 40},
        **changes,
    )


def test_the_order_in_the_file_leaves_no_trace(tmp_path: Path) -> None:
    """Records of a patient that differ in their label, or only in what their group is, included."""
    lines = made_up(0, 20)
    lines += ["p0,0.1,0.1,0.1,0.1,1,100.5", "p0,0.1,0.1,0.1,0.1,1,100.25", "p0,0.1,0.1,0.1,0.1,1,99"]
    found = [
        cohort_of(tmp_path / str(i), with_sex(), part)
        for i, part in enumerate([lines, lines[::-1], sorted(lines)])
    ]
    for other in found[1:]:
        for one, same in ((found[0].train, other.train), (found[0].test, other.test)):
            assert torch.equal(one.features, same.features)
            assert torch.equal(one.labels, same.labels)
            assert torch.equal(one.offsets, same.offsets)
            assert one.groups is not None
            assert same.groups is not None
            assert torch.equal(one.groups, same.groups)
    assert found[0].train.labels.dtype == torch.float32


def test_a_records_group_is_its_code_and_a_missing_one_is_a_group(tmp_path: Path) -> None:
    lines = [f"p{i},0.5,0,0,0,{'01'[i % 2] if i % 5 else ''},{100 + i}" for i in range(60)]
    cohort = cohort_of(tmp_path, with_sex(), lines)
    for part in (cohort.train, cohort.test):
        assert part.groups is not None
        assert part.groups.dtype == torch.int64
        assert part.groups.shape == (len(part.labels), 1)
        for label, group in zip(part.labels, part.groups[:, 0], strict=True):
            i = round(float(label) * 60 + 140) - 100
            assert group == (i % 2 if i % 5 else 2)
    whole = cohort_of(tmp_path / "bare", regression(), [line.replace("p", "q", 1) for line in lines])
    assert whole.train.groups is None


@pytest.mark.parametrize("loss", ["squared", "absolute"])
@pytest.mark.parametrize("private", [False, True])
def test_regression_is_learnt(tmp_path: Path, loss: str, private: bool) -> None:
    privacy = {"mode": "patient-dp", "epsilon": 50.0, "delta": 1e-3, "clipping_norm": 1.0}
    wanted = with_sex(
        privacy=privacy if private else {"mode": "none"},
        training={"local_steps": 60, "optimizer": {"name": "sgd", "learning_rate": 0.1 if private else 0.2}},
    )
    value = wanted.model_dump(mode="json")
    value["objective"]["loss"] = loss
    wanted = Study.model_validate(value)
    cohort = cohort_of(tmp_path, wanted, made_up(1, 300))
    trainer = Trainer(wanted, cohort, plan_study(wanted, 300))
    start = {n: p.detach().numpy().copy() for n, p in study_model(wanted).named_parameters()}
    before = measure(wanted, trainer.evaluate(start, 40))
    update = trainer.train(start, Seeded(1).stream("sampling"), Seeded(1).stream("noise"))
    sums = trainer.evaluate({n: start[n] + update[n] for n in start}, 40)
    after = measure(wanted, sums)
    assert {n: a.shape for n, a in sums.items()} == histogram_shapes(wanted, 40)
    assert before.mae is not None
    assert after.mae is not None
    assert after.mae < before.mae / 2
    assert after.patients == pytest.approx(len(cohort.test))
    assert np.sum(sums["sex/errors"]) == pytest.approx(after.patients)


def test_a_patients_gradient_is_clipped_in_regression_too(tmp_path: Path) -> None:
    wanted = with_sex()
    patients = cohort_of(tmp_path, wanted, made_up(2, 40)).train
    plan = plan_study(wanted, 40).step
    network = study_model(wanted)
    clipped = ClippedGradients(network, wanted.objective)
    total = torch.zeros(sum(p.numel() for p in clipped.parameters))
    for index in range(len(patients)):
        batch = batch_of(patients, np.array([index]), plan, Seeded(0).stream("sampling"))
        norm = 0.05
        alone = clipped.sum(patients, batch, norm)
        assert alone.norm() <= norm * (1 + 1e-5)
        total += alone
    everyone = batch_of(patients, np.arange(len(patients)), plan, Seeded(0).stream("sampling"))
    torch.testing.assert_close(clipped.sum(patients, everyone, 0.05).float(), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("interval", "transform"),
    [([0.0, 5e-324], "none"), ([0.0, 5e-324], "sqrt"), ([1.0, 1.0 + 2**-52], "sqrt")],
)
def test_a_range_in_which_no_number_has_a_place_is_refused(interval: list[float], transform: str) -> None:
    """Its lower end would be 0 · ∞ on the scale that is learnt, and one such patient would make sums NaN."""
    label = {"column": "y", "range": interval, "unit": "1", "transform": transform}
    with pytest.raises(StudyError, match="range is too narrow"):
        study(data={"label": label}, objective={"task": "regression"})


@pytest.mark.parametrize("transform", ["none", "sqrt"])
def test_a_label_that_is_no_number_adds_no_more_than_others(transform: str) -> None:
    label = {**LABEL, "transform": transform}
    wanted = study(data={"label": label}, objective={"task": "regression"}, evaluation={"tolerance": 0.1})
    one = torch.ones(1, dtype=torch.float64)
    sums = histograms(wanted, torch.tensor([0.5]), torch.tensor([torch.nan]), one, 10)
    norm = math.sqrt(sum(float((array**2).sum()) for array in sums.values()))
    assert norm <= histogram_sensitivity(wanted)  # NaN isn't
