"""Patient-level DP-SGD with several labels, quantiles and times until an event, on every engine: against a
loop over patients with losses written by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import study, without
from tapped import clipped_by_hand, everybody, one_thread
from test_taps_company import company_of, computed
from torch import nn

from client.cohort import Cohort, Patients
from client.dense import DenseGradients
from client.dpsgd import ClippedGradients, Engine, engine_of
from client.linear import not_linear
from client.privately import train_privately
from client.stacking import groups, together, train_together
from client.taps import TappedGradients
from client.taps.company import Seating
from client.taps.losses import output_gradients
from client.tasks import Training
from client.training import Trainer
from common.messages import Arrays
from common.models import parameter_arrays, study_model
from common.objectives import blank_labels, record_losses
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import plan_study
from common.study import Study

__all__ = ["one_thread"]  # a fixture that pytest finds here

QUANTILES = [0.1, 0.5, 0.8]
TASKS: dict[str, dict[str, Any]] = {
    "multi-label": {
        "data": {"label": {"columns": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}},
        "objective": {"task": "multi-label"},
    },
    "quantile": {
        "data": {"label": {"column": "y", "range": [0, 1], "unit": "1"}},
        "objective": {"task": "regression", "loss": "quantile", "quantiles": QUANTILES},
    },
    "survival": {
        "data": {"label": {"column": "T", "event": "E", "range": [0, 9], "unit": "a", "intervals": 5}},
        "objective": {"task": "survival"},
    },
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("logistic-regression", {}),
    ("logistic-hazard", {}),
    ("mlp", {"hidden": [6, 3], "activation": "tanh"}),
]
ENGINES: dict[str, Callable[..., Engine]] = {
    "usual": engine_of,
    "taps": TappedGradients,
    "Opacus": ClippedGradients,
}
every_task = pytest.mark.parametrize("task", TASKS)


def of_task(task: str, model: str = "mlp", parameters: dict[str, Any] | None = None, **changes: Any) -> Study:
    named = {"name": model, "parameters": parameters or {}}
    return study(**{**TASKS[task], "model": named, **changes})


def patients_of(task: str, counts: list[int], seed: int = 0, scale: float = 1.0) -> Patients:
    random, records = np.random.default_rng(seed), sum(counts)
    if task == "multi-label":
        labels = random.choice([0.0, 1.0, np.nan], (records, 3))
    elif task == "quantile":
        labels = random.uniform(-1, 1, records)
    else:
        times = np.where(
            random.random(records) < 0.2, random.integers(0, 6, records), random.uniform(0, 5, records)
        )
        labels = np.stack([times, random.integers(0, 2, records)], axis=1)
    return Patients(
        features=torch.from_numpy((scale * random.normal(size=(records, 4))).astype(np.float32)),
        labels=torch.from_numpy(labels.astype(np.float32)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
    )


def loss_by_hand(task: str, outputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of one record, from its outputs [outputs]."""
    if task == "multi-label":
        known = [k for k in range(3) if not label[k].isnan()]
        terms = [nn.functional.softplus(-outputs[k] if label[k] == 1 else outputs[k]) for k in known]
        return sum(terms, outputs.sum() * 0.0) / max(1, len(known))
    if task == "quantile":
        errors = [(label.double() - outputs[k], q) for k, q in enumerate(QUANTILES)]
        return sum((q * e if e > 0 else (q - 1) * e for e, q in errors), outputs.sum() * 0.0) / len(QUANTILES)
    time, seen = float(label[0]), bool(label[1])
    total = outputs.sum() * 0.0
    for k in range(len(outputs)):
        if seen and (k < time <= k + 1 or time == k == 0):
            return total + nn.functional.softplus(-outputs[k])
        if (seen and time > k) or (not seen and time >= k + 0.5):
            total = total + nn.functional.softplus(outputs[k])
    return total


def gradients_by_hand(task: str, network: nn.Module, cohort: Patients, mean: bool) -> torch.Tensor:
    """Each patient's gradient [patients, parameters], record by record."""
    exact = copy.deepcopy(network).double()
    trained = [p for p in exact.parameters() if p.requires_grad]
    found = torch.zeros(len(cohort), sum(p.numel() for p in trained), dtype=torch.float64)
    offsets = cohort.offsets.tolist()
    for p in range(len(cohort)):
        records = range(offsets[p], offsets[p + 1])
        for r in records:
            loss = loss_by_hand(task, exact(cohort.features[r].double()[None])[0], cohort.labels[r])
            parts = torch.autograd.grad(loss, trained)
            found[p] += torch.cat([g.flatten() for g in parts]) / (len(records) if mean else 1)
    return found


def network_of(wanted: Study, seed: int) -> nn.Module:
    network, generator = study_model(wanted), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


@every_task
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("model", "parameters"), MODELS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    seed=st.integers(0, 1000),
    mean=st.booleans(),
    C=st.sampled_from([0.05, 0.8, 1e4]),
)
def test_clipped_sums_are_the_loop_over_patients(
    task: str, engine: str, model: str, parameters: dict[str, Any],
    counts: list[int], seed: int, mean: bool, C: float,
) -> None:  # fmt: skip
    wanted = of_task(task, model, parameters)
    cohort = patients_of(task, counts, seed)
    network = network_of(wanted, seed)
    expected = clipped_by_hand(gradients_by_hand(task, network, cohort, mean), C)
    found = ENGINES[engine](network, wanted.objective).sum(cohort, everybody(cohort, mean), C)
    assert float((found - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


@every_task
def test_one_record_each(task: str) -> None:
    """Tables of small studies take this way."""
    wanted, cohort = of_task(task), patients_of(task, [1] * 70, 3)
    network = network_of(wanted, 3)
    gradients = gradients_by_hand(task, network, cohort, True)
    for C in (float(gradients.norm(dim=1).median()), 1e4):
        expected = clipped_by_hand(gradients, C)
        found = engine_of(network, wanted.objective).sum(cohort, everybody(cohort), C)
        assert float((found - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


@every_task
def test_output_gradients_are_autograds(task: str) -> None:
    wanted, cohort = of_task(task), patients_of(task, [1] * 50, 1)
    outputs = torch.randn(50, wanted.outputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.rand(50, generator=torch.Generator().manual_seed(2))
    loss = (record_losses(wanted.objective, outputs, cohort.labels) * weights).sum()
    (expected,) = torch.autograd.grad(loss, outputs)
    found = output_gradients(wanted.objective, outputs, cohort.labels, weights)
    assert torch.allclose(found, expected, atol=1e-6)
    blank = blank_labels(wanted.objective, 50, torch.device("cpu"))
    assert bool((output_gradients(wanted.objective, outputs, blank, weights) != 0).all())


@every_task
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e20])
def test_one_patient_changes_the_sum_by_at_most_c(task: str, scale: float) -> None:
    C, wanted = 0.7, of_task(task)
    cohort, network = patients_of(task, [9, 1, 4, 2], 5), network_of(wanted, 5)
    cohort.features[10:14] *= scale
    engine = engine_of(network, wanted.objective)
    whole = engine.sum(cohort, everybody(cohort), C)
    for index in range(len(cohort)):
        less = without(cohort, index)
        assert float((whole - engine.sum(less, everybody(less), C)).norm()) <= C * (1 + 1e-6)


def test_a_patient_without_any_label_adds_nothing() -> None:
    wanted, cohort = of_task("multi-label"), patients_of("multi-label", [1, 1], 0)
    cohort.labels[:] = torch.nan
    assert not engine_of(network_of(wanted, 1), wanted.objective).sum(cohort, everybody(cohort), 1.0).any()


@every_task
def test_a_record_is_computed_alike_in_any_company(task: str) -> None:
    wanted, cohort = of_task(task), patients_of(task, [1] * 40, 3)
    engine = TappedGradients(network_of(wanted, 1), wanted.objective)
    whole, random = computed(engine, cohort, torch.arange(40)), np.random.default_rng(0)
    for size in (1, 5, 23):
        some = torch.from_numpy(random.permutation(40)[:size])
        assert all(whole[record] == bits for record, bits in computed(engine, cohort, some).items())
    assert company_of(engine).seating is Seating.FREE


@every_task
def test_closed_forms_take_them_but_for_the_linear_one(task: str) -> None:
    wanted = of_task(task, "logistic-regression")
    assert not_linear(study_model(wanted), wanted.objective) is not None
    assert type(engine_of(study_model(wanted), wanted.objective)) is DenseGradients


# --- sites that train together


def training(wanted: Study, task: str, site: int, count: int, records: int = 1) -> Training:
    held = patients_of(task, [records] * count, site)
    trainer = Trainer(wanted, Cohort(held, held), plan_study(wanted, max(10, count)))

    def streams() -> tuple[Stream, Stream]:
        return Seeded(site).stream("sampling"), Seeded(site).stream("noise")

    return Training(trainer, parameter_arrays(study_model(wanted, seed=7)), streams)


def bits(update: Arrays | Exception) -> dict[str, bytes]:
    assert not isinstance(update, Exception), update
    return {name: np.asarray(value).tobytes() for name, value in update.items()}


@every_task
@pytest.mark.parametrize("model", ["mlp", "logistic-hazard"])
def test_private_sites_together_are_bit_for_bit_as_alone(task: str, model: str) -> None:
    wanted = of_task(task, model, training={"sample_rate": 0.5, "local_steps": 3})
    trainings = [training(wanted, task, site, count) for site, count in enumerate([40, 9, 75])]
    assert groups(trainings) == [[0, 1, 2]]
    alone = [bits(each.alone()) for each in trainings]
    assert [bits(each) for each in train_privately(trainings)] == alone
    assert [bits(each) for each in together(trainings)] == alone
    frozen = [name for name, p in study_model(wanted).named_parameters() if not p.requires_grad]
    assert all(not np.frombuffer(each[name], dtype=np.float32).any() for each in alone for name in frozen)


@every_task
@pytest.mark.parametrize("records", [1, 3])
def test_sites_without_privacy_together_end_where_each_would(task: str, records: int) -> None:
    wanted = of_task(
        task,
        privacy={"mode": "none"},
        training={"sample_rate": None, "patients_per_step": 4, "local_steps": 7},
    )
    trainings = [training(wanted, task, site, count, records) for site, count in enumerate([12, 30])]
    for found, each in zip(train_together(trainings), trainings, strict=True):
        for name, value in each.alone().items():
            assert np.abs(found[name] - value).max() <= 2e-6 * max(1.0, float(np.abs(value).max()))
