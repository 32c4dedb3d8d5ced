"""Sites that train together end where each would by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client import stacking
from client.cohort import Cohort
from client.stacking import groups, together, train_together
from client.tasks import Training
from client.training import Trainer
from common.messages import Arrays
from common.models import parameter_arrays, study_model
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import plan_study
from common.study import Study

NEAR = 2e-6  # relative to the largest parameter


def streams(site: int) -> Callable[[], tuple[Stream, Stream]]:
    return lambda: (Seeded(site).stream("sampling"), Seeded(site).stream("noise"))


def training(
    study: Study, site: int, counts: list[int], size: int | None = None, parameters: Arrays | None = None
) -> Training:
    """One site with so many records of each patient, which declares `size` patients."""
    patients = small.patients(counts, seed=site, outputs=max(2, study.outputs))
    if study.objective.task == "regression":
        random = np.random.default_rng(site)
        labels = torch.from_numpy(random.uniform(-1, 1, len(patients.labels)).astype(np.float32))
        patients = type(patients)(patients.features, labels, patients.offsets)
    plan = plan_study(study, size or len(counts))
    trainer = Trainer(study, Cohort(patients, patients), plan)
    return Training(trainer, parameters or parameter_arrays(study_model(study, seed=7)), streams(site))


def public_study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "privacy": {"mode": "none"},
        "model": {"name": "mlp", "parameters": {"hidden": [5]}},
        "training": {"sample_rate": None, "patients_per_step": 4, "local_steps": 7},
    }
    return small.study(**{**values, **changes})


def assert_same(found: Arrays | Exception, alone: Arrays) -> None:
    assert not isinstance(found, Exception), found
    assert found.keys() == alone.keys()
    largest = max(float(np.abs(a).max()) for a in alone.values())
    assert largest > 0
    for name, value in alone.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).max() <= NEAR * max(1.0, largest), name


def check(trainings: list[Training], *, stacked: bool = True) -> None:
    if stacked:
        assert groups(trainings) == [list(range(len(trainings)))]
    alone = [each.alone() for each in trainings]
    for found, expected in zip(together(trainings), alone, strict=True):
        assert_same(found, expected)
    if stacked:
        for found, expected in zip(train_together(trainings), alone, strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"name": "adam"},
        {"name": "adam", "weight_decay": 0.1},
    ],
)
def test_every_optimiser(optimizer: dict[str, Any]) -> None:
    study = public_study(
        training={"sample_rate": None, "patients_per_step": 4, "local_epochs": 2,
                  "optimizer": {"learning_rate": 0.05, **optimizer}, "local_steps": None}
    )  # fmt: skip
    check([training(study, site, [1] * size, round(size / 0.8)) for site, size in enumerate([9, 21, 4, 16])])


@pytest.mark.parametrize(
    ("objective", "label"),
    small.OBJECTIVES,
)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_every_objective_and_activation(objective: dict[str, Any], label: int, activation: str) -> None:
    wanted = small.classes(label) if label else {"column": "y", "range": [0, 1], "unit": "1"}
    study = public_study(
        objective=objective,
        data={"label": wanted},
        model={"name": "mlp", "parameters": {"hidden": [6, 3], "activation": activation}},
    )
    check([training(study, site, [1] * 12, 15) for site in range(3)])


def test_linear_models() -> None:
    study = public_study(model={"name": "logistic-regression"})
    check([training(study, site, [1] * 12, 15) for site in range(3)])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_sites(data: st.DataObject) -> None:
    """Unequal sites, patients with several records, several hidden layers."""
    hidden = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    most = data.draw(st.integers(1, 4))
    study = public_study(
        model={"name": "mlp", "parameters": {"hidden": hidden}},
        training={
            "sample_rate": None,
            "patients_per_step": 8,
            "local_steps": data.draw(st.integers(1, 6)),
            "max_records_per_patient": most,
            "records": data.draw(st.sampled_from(["mean", "sum"])),
            "optimizer": {"name": "sgd", "learning_rate": 0.05},
        },
    )
    sites = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=30), min_size=2, max_size=5))
    check([training(study, site, counts, 12) for site, counts in enumerate(sites)], stacked=False)


def test_all_at_once_and_more_patients_than_declared() -> None:
    study = public_study(training={"sample_rate": 1.0, "patients_per_step": None, "local_steps": 3})
    check([training(study, site, [1] * size, 10) for site, size in enumerate([9, 13, 8])])


def test_each_from_its_own_model() -> None:
    study = public_study()
    models = [parameter_arrays(study_model(study, seed)) for seed in range(3)]
    check([training(study, site, [1] * 10, 12, models[site]) for site in range(3)])


def test_frozen_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_frozen(study: Study) -> nn.Module:
        network = study_model(study)
        first = network[0]  # type: ignore[index]
        first.weight.requires_grad_(False)  # type: ignore[operator, union-attr]
        return network

    monkeypatch.setattr("client.training.study_model", half_frozen)
    study = public_study(model={"name": "mlp", "parameters": {"hidden": [5, 4]}})
    trainings = [training(study, site, [1] * 10, 12) for site in range(3)]
    check(trainings)
    assert not train_together(trainings)[1]["0.weight"].any()


def test_who_fails_fails_alone() -> None:
    study = public_study()
    trainings = [training(study, site, [1] * 10, 12) for site in range(3)]
    expected = [each.alone() for each in trainings]

    def broken() -> tuple[Stream, Stream]:
        raise OSError("gone")

    trainings[1] = Training(trainings[1].trainer, trainings[1].parameters, broken)
    found = together(trainings)
    assert isinstance(found[1], OSError)
    assert_same(found[0], expected[0])
    assert_same(found[2], expected[2])


def test_infinite_weights_of_one_site_reach_no_other() -> None:
    study = public_study()
    good = parameter_arrays(study_model(study, seed=7))
    bad = {name: np.full_like(value, 3e38) for name, value in good.items()}
    trainings = [training(study, site, [1] * 10, 12, bad if site == 1 else good) for site in range(3)]
    found = train_together(trainings)
    assert not all(np.isfinite(a).all() for a in found[1].values())
    for site in (0, 2):
        assert_same(found[site], trainings[site].alone())


def test_what_is_not_alike_stays_apart() -> None:
    private = small.study(model={"name": "mlp", "parameters": {"hidden": [5]}})
    one, other = public_study(), public_study(name="other")
    trainings = [
        training(one, 0, [1] * 10, 12),
        training(private, 1, [1] * 10, 12),
        training(other, 2, [1] * 10, 12),
        training(one, 3, [1] * 11, 12),
        training(private, 4, [1] * 10, 12),
    ]
    assert groups(trainings) == [[0, 3], [1, 4], [2]]
    assert groups([]) == []
    assert together([]) == []


def test_a_group_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    study = public_study()
    trainings = [training(study, site, [1] * 10, 12) for site in range(6)]
    alone = [each.alone() for each in trainings]
    monkeypatch.setattr(stacking, "MEMORY", 4000)
    found = groups(trainings)
    assert 1 < len(found) < 6
    assert sorted(i for group in found for i in group) == list(range(6))
    for update, expected in zip(together(trainings), alone, strict=True):
        assert_same(update, expected)
    monkeypatch.setattr(stacking, "MEMORY", 10)
    assert groups(trainings) == [[i] for i in range(6)]


@pytest.mark.parametrize(
    ("enough", "expected"), [((1, 2), [[0, 1], [2, 3], [4]]), ((1 << 24, 2), [[0, 1, 2, 3, 4]])]
)
def test_a_group_is_no_larger_than_pays(
    monkeypatch: pytest.MonkeyPatch, enough: tuple[int, int], expected: list[list[int]]
) -> None:
    """So many sites or so many bytes, whichever is more."""
    study = public_study()
    trainings = [training(study, site, [1] * 10, 12) for site in range(5)]
    monkeypatch.setattr(stacking, "ENOUGH", enough)
    assert groups(trainings) == expected


def test_the_same_parameters_are_left_as_they_are() -> None:
    study = public_study()
    parameters = parameter_arrays(study_model(study, seed=7))
    before = {name: value.copy() for name, value in parameters.items()}
    updates = train_together([training(study, site, [1] * 10, 12, parameters) for site in range(3)])
    for name, value in before.items():
        np.testing.assert_array_equal(parameters[name], value)
        assert not np.shares_memory(updates[0][name], parameters[name])


def test_only_dense_networks_on_unvaried_records_are_stacked() -> None:
    image = {"kind": "image", "name": "x", "size": [8, 8]}
    varied = {**image, "augmentation": {"flip": True}}
    assert stacking.may_stack(public_study())
    assert stacking.may_stack(public_study(data={"columns": [image]}))
    assert not stacking.may_stack(public_study(data={"columns": [varied]}))
    cnn = {"name": "cnn", "parameters": {"channels": [2, 2]}}
    assert not stacking.may_stack(public_study(data={"columns": [image]}, model=cnn))


def test_who_has_nobody_left_stays_alone() -> None:
    study = public_study()
    trainings = [training(study, site, [1] * 10 if site else [], 12) for site in range(3)]
    assert groups(trainings) == [[0], [1, 2]]
