"""Sites that train privately side by side end bit for bit where each does by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client import chain, privately
from client.chain import Chain
from client.cohort import Cohort, Patients
from client.dense import DenseGradients
from client.privately import some_more, train_privately
from client.stacking import groups, together
from client.tasks import Training
from client.training import Trainer
from client.withdrawal import NOBODY, Withdrawn
from common.messages import Arrays
from common.models import parameter_arrays, study_model
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import plan_study
from common.study import Study


def private_study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "model": {"name": "mlp", "parameters": {"hidden": [5]}},
        "training": {"sample_rate": 0.5, "local_steps": 3},
    }
    return small.study(**{**values, **changes})


def streams(site: int) -> Callable[[], tuple[Stream, Stream]]:
    return lambda: (Seeded(site).stream("sampling"), Seeded(site).stream("noise"))


def random_patients(study: Study, count: int, seed: int, scale: float = 1.0) -> Patients:
    found = small.patients([1] * count, seed, outputs=max(2, study.outputs), scale=scale)
    if study.objective.task != "regression":
        return found
    labels = np.random.default_rng(seed).uniform(-1, 1, count).astype(np.float32)
    return replace(found, labels=torch.from_numpy(labels))


def training(
    study: Study,
    site: int,
    patients: int | Patients,
    parameters: Arrays | None = None,
    withdrawn: Callable[[], Withdrawn] = lambda: NOBODY,
) -> Training:
    """One site; a number of patients stands for so many random ones, with one record each."""
    held = patients if isinstance(patients, Patients) else random_patients(study, patients, site)
    plan = plan_study(study, max(10, len(held)))
    trainer = Trainer(study, Cohort(held, held), plan, withdrawn)
    return Training(trainer, parameters or parameter_arrays(study_model(study, seed=7)), streams(site))


def bits(update: Arrays | Exception) -> dict[str, bytes]:
    assert not isinstance(update, Exception), update
    return {name: np.asarray(value).tobytes() for name, value in update.items()}


def check(trainings: list[Training]) -> None:
    assert groups(trainings) == [list(range(len(trainings)))]
    alone = [bits(each.alone()) for each in trainings]
    assert [bits(each) for each in train_privately(trainings)] == alone
    assert [bits(each) for each in together(trainings)] == alone


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "sgd"}, {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, {"name": "adam"}],
)
def test_every_optimiser(optimizer: dict[str, Any]) -> None:
    study = private_study(
        training={"sample_rate": 0.5, "local_steps": 3, "optimizer": {"learning_rate": 0.05, **optimizer}}
    )
    check([training(study, site, size) for site, size in enumerate([9, 70, 4, 130])])


@pytest.mark.parametrize(
    ("objective", "label"),
    small.OBJECTIVES,
)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_every_objective_and_activation(objective: dict[str, Any], label: int, activation: str) -> None:
    wanted = small.classes(label) if label else {"column": "y", "range": [0, 1], "unit": "1"}
    study = private_study(
        objective=objective,
        data={"label": wanted},
        model={"name": "mlp", "parameters": {"hidden": [6, 3], "activation": activation}},
    )
    check([training(study, site, size) for site, size in enumerate([40, 12, 75])])


def test_large_layers() -> None:
    """Their products are others' than those of small ones."""
    study = private_study(model={"name": "mlp", "parameters": {"hidden": [96, 128]}})
    check([training(study, site, size) for site, size in enumerate([40, 12, 150])])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_sites(data: st.DataObject) -> None:
    """Unequal sites from models of their own, several hidden layers, batches of none and of many tiles."""
    hidden = data.draw(st.lists(st.sampled_from([1, 3, 16, 33, 64]), min_size=1, max_size=3))
    study = private_study(
        model={"name": "mlp", "parameters": {"hidden": hidden}},
        training={"sample_rate": data.draw(st.sampled_from([0.01, 0.3, 1.0])), "local_steps": 2},
    )
    sizes = data.draw(st.lists(st.sampled_from([1, 5, 32, 33, 100, 400]), min_size=2, max_size=6))
    models = [parameter_arrays(study_model(study, seed)) for seed in range(len(sizes))]
    check([training(study, site, size, models[site]) for site, size in enumerate(sizes)])


def test_more_records_than_a_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dense.MAX_RECORDS", 64)
    study = private_study(training={"sample_rate": 1.0, "local_steps": 2})
    check([training(study, site, size) for site, size in enumerate([200, 64, 65])])


def test_who_takes_more_steps_goes_on() -> None:
    study = private_study(
        training={"sample_rate": None, "local_steps": None, "local_epochs": 1, "patients_per_step": 8}
    )
    trainings = [training(study, site, size) for site, size in enumerate([16, 70, 40])]
    assert len({each.trainer.plan.steps_per_round for each in trainings}) == 3
    check(trainings)


def test_frozen_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_frozen(study: Study) -> nn.Module:
        network = study_model(study)
        network[0].weight.requires_grad_(False)  # type: ignore[index, operator, union-attr]
        return network

    monkeypatch.setattr("client.training.study_model", half_frozen)
    study = private_study(model={"name": "mlp", "parameters": {"hidden": [5, 4]}})
    trainings = [training(study, site, 40) for site in range(3)]
    check(trainings)
    assert not np.any(train_privately(trainings)[1]["0.weight"])


def test_who_withdraws_between_two_steps_is_out_of_the_second() -> None:
    study = private_study(training={"sample_rate": 1.0, "local_steps": 3})
    plain = small.patients([1] * 40, seed=1)
    patients = replace(plain, hashes=tuple(bytes([i]) * 32 for i in range(40)))
    gone = Withdrawn(frozenset([bytes([3]) * 32]), "later")
    asked: list[int] = []

    def later() -> Withdrawn:
        asked.append(len(asked))
        return NOBODY if len(asked) < 3 else gone

    def made() -> list[Training]:
        asked.clear()
        return [training(study, 0, 30), training(study, 1, patients, withdrawn=later)]

    alone = bits(made()[1].alone())
    assert asked == [0, 1, 2]
    assert bits(together(made())[1]) == alone
    assert asked == [0, 1, 2]
    assert alone != bits(training(study, 1, patients).alone())


# --- others' data

CODES, CATEGORIES = 5, 4  # as in test_hostile_weights: records are one-hot codes


def attacked(hidden: list[int]) -> Study:
    columns = [{"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": CODES * CATEGORIES}]
    return private_study(data={"columns": columns}, model={"name": "mlp", "parameters": {"hidden": hidden}})


def hostile(random: np.random.Generator, study: Study) -> Arrays:
    """A first layer whose sums cancel for every record: rounding is left, many times enlarged."""
    found = parameter_arrays(study_model(study, seed=int(random.integers(99))))
    weight = found["0.weight"]
    rows = random.normal(size=(len(weight), CATEGORIES)) * 10.0 ** random.integers(4, 12)
    found["0.weight"] = np.repeat(rows, CODES, axis=1).astype(np.float32)
    exact = found["0.weight"][:, ::CODES].astype(np.float64).sum(axis=1)
    found["0.bias"] = (-exact).astype(np.float32)
    return found


def coded(random: np.random.Generator, count: int) -> Patients:
    features = np.zeros((count, CODES * CATEGORIES), np.float32)
    for first in range(0, CODES * CATEGORIES, CODES):
        features[np.arange(count), first + random.integers(0, CODES, count)] = 1
    labels = torch.from_numpy(random.integers(0, 2, count))
    return Patients(torch.from_numpy(features), labels, torch.arange(count + 1))


def in_companies(seed: int, hidden: list[int]) -> tuple[Training, set[tuple[bytes, ...]]]:
    """One site, and its different updates beside ever other sites; some have weights of their own."""
    random = np.random.default_rng(seed)
    study = attacked(hidden)
    model = hostile(random, study)
    own, found = training(study, 0, coded(random, int(random.integers(1, 120))), model), set()
    for trial in range(5):
        others = [
            training(study, site, coded(random, int(random.integers(1, 150))),
                     model if trial % 2 else hostile(random, study))
            for site in range(1, int(random.integers(2, 6)))
        ]  # fmt: skip
        place = int(random.integers(len(others) + 1))
        update = train_privately([*others[:place], own, *others[place:]])[place]
        found.add(tuple(bits(update).values()))
    return own, found


@pytest.mark.parametrize("hidden", [[9], [64], [7, 33], [1, 16, 5]])
def test_a_site_ends_alike_whatever_others_hold(hidden: list[int]) -> None:
    for seed in range(3):
        own, found = in_companies(seed, hidden)
        assert found == {tuple(bits(own.alone()).values())}


def test_last_bits_that_depend_on_company_would_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail."""
    real = chain._tile_products

    def rounded_otherwise(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return real(x, weights).mul_(1.0 + 2.0**-23 * (len(weights) % 2))

    monkeypatch.setattr(chain, "_tile_products", rounded_otherwise)
    monkeypatch.setattr(Chain, "uniform", lambda *_, **__: True)
    assert all(len(in_companies(seed, [9])[1]) > 1 for seed in range(3))


def test_numbers_that_overflow_reach_no_other_site() -> None:
    study = private_study()
    good = parameter_arrays(study_model(study, seed=7))
    bad = {name: np.full_like(value, 3e38) for name, value in good.items()}
    wild = small.patients([1] * 30, seed=2)
    wild.features[3] = np.inf
    wild.features[4] = np.nan
    check(
        [
            training(study, 0, 40, good),
            training(study, 1, 40, bad),
            training(study, 2, wild, good),
            training(study, 3, 40, good),
        ]
    )


# --- who joins


def test_who_stays_alone() -> None:
    study = private_study()
    several = small.patients([1, 2, 1])
    logistic = private_study(model={"name": "logistic-regression"})
    large = private_study(model={"name": "mlp", "parameters": {"hidden": [200, 200]}})
    trainings = [
        training(study, 0, 12),
        training(study, 1, several),
        training(logistic, 2, 12),
        training(logistic, 3, 12),
        training(large, 4, 12),
        training(large, 5, 12),
        training(study, 6, 300),
        training(study, 7, small.patients([])),
    ]
    assert groups(trainings) == [[0, 6], [1], [2], [3], [4], [5], [7]]


def test_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    study = private_study()
    trainings = [training(study, site, 40) for site in range(6)]
    alone = [bits(each.alone()) for each in trainings]
    monkeypatch.setattr("client.stacking.MEMORY", 40_000)
    assert 1 < len(groups(trainings)) < 6
    assert [bits(each) for each in together(trainings)] == alone


def test_who_fails_fails_alone() -> None:
    study = private_study()
    trainings = [training(study, site, 40) for site in range(3)]
    alone = [bits(each.alone()) for each in trainings]

    def broken() -> tuple[Stream, Stream]:
        raise OSError("gone")

    trainings[1] = replace(trainings[1], streams=broken)
    assert groups(trainings) == [[0, 1, 2]]
    found = together(trainings)
    assert isinstance(found[1], OSError)
    assert [bits(found[0]), bits(found[2])] == [alone[0], alone[2]]


def test_a_list_that_cannot_be_read_stops_one_site() -> None:
    study = private_study()

    def unreadable() -> Withdrawn:
        raise OSError("gone")

    trainings = [
        training(study, site, 40, withdrawn=unreadable if site == 1 else lambda: NOBODY) for site in range(3)
    ]
    found = together(trainings)
    assert isinstance(found[1], OSError)
    assert [bits(found[site]) for site in (0, 2)] == [bits(trainings[site].alone()) for site in (0, 2)]


def test_whose_patients_have_all_withdrawn_adds_noise_alone() -> None:
    study = private_study()
    patients = replace(small.patients([1] * 12, seed=1), hashes=tuple(bytes([i]) * 32 for i in range(12)))
    gone = Withdrawn(frozenset(patients.hashes or ()), "all")
    check([training(study, 0, 40), training(study, 1, patients, withdrawn=lambda: gone)])


def test_where_company_shows_each_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    study = private_study()
    trainings = [training(study, site, 40) for site in range(3)]
    alone = [bits(each.alone()) for each in trainings]
    tried = Chain.uniform

    def shows(self: Chain, *args: Any, each_tile: bool = False) -> bool:
        return not each_tile and tried(self, *args)

    monkeypatch.setattr(Chain, "uniform", shows)
    with pytest.raises(ArithmeticError, match="one by one"):
        train_privately(trainings)
    assert [bits(each) for each in together(trainings)] == alone


def test_a_trainer_is_in_one_state_at_a_time() -> None:
    study = private_study()
    one = training(study, 0, 40)
    again = replace(one, streams=streams(5))
    with pytest.raises(ValueError, match="twice"):
        train_privately([one, again])
    expected = [bits(one.alone()), bits(again.alone())]
    assert [bits(each) for each in together([one, again])] == expected


def test_few_sizes_are_tried() -> None:
    assert [some_more(n) for n in range(16)] == list(range(16))
    for count in range(1, 4000):
        assert count <= some_more(count) <= count * 1.125
    assert len({some_more(count) for count in range(1, 1025)}) < 80


def test_a_trial_notices_a_product_that_depends_on_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    engine = DenseGradients(network, small.study().objective)
    assert engine.chain.uniform(small.study().objective, 96, each_tile=True)
    real = chain._tile_products

    def by_place(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = real(x, weights)
        found[-1] *= 1.0 + 2.0**-20
        return found

    monkeypatch.setattr(chain, "_tile_products", by_place)
    monkeypatch.setattr(chain, "_FOUND", {})
    assert not engine.chain.uniform(small.study().objective, 96, each_tile=True)
    assert engine.chain.uniform(small.study().objective, 96)


def test_the_place_of_a_site_does_not_show_in_how_its_weights_lie() -> None:
    study = private_study()
    stack = privately._Stack(training(study, 0, 10).trainer, 5)
    assert stack._values.shape[1] % 16 == 0
