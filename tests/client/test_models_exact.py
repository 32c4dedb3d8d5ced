"""Every registered model's clipped sums against a loop over records, and its numbers in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from every_model import EVERY_MODEL, patients_of, study_of
from small import without
from tapped import assert_exact, everybody, one_thread
from test_taps_company import company_of, computed
from torch import nn

from client.dense import DenseGradients
from client.dpsgd import engine_of
from client.linear import LinearGradients
from client.taps import TappedGradients, covers
from client.taps.company import Seating
from common.models import registered, study_model
from common.objectives import scores, sigmoid
from common.study import Study

__all__ = ["one_thread"]  # a fixture that pytest finds here
every_model = pytest.mark.parametrize("name", EVERY_MODEL)
COUNTS = {"one each": [1] * 5, "some": [1, 4, 2, 1], "alone": [1], "many": [40, 2, 19]}
TASKS = {"one each": "binary", "some": "multi-class", "alone": "regression", "many": "binary"}


def network_of(wanted: Study, seed: int = 0) -> nn.Module:
    """With biases and norms that aren't all alike."""
    network = study_model(wanted, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return network


def test_no_model_is_left_out() -> None:
    assert {model for model, _, _ in EVERY_MODEL.values()} == set(registered())


@every_model
def test_the_fast_path_takes_it(name: str) -> None:
    wanted = study_of(name)
    assert covers(study_model(wanted)) is None
    engine = engine_of(study_model(wanted), wanted.objective)
    assert isinstance(engine, TappedGradients | DenseGradients | LinearGradients)


@every_model
@pytest.mark.parametrize("counts", COUNTS)
def test_clipped_sums_are_the_loop_over_records(name: str, counts: str) -> None:
    wanted = study_of(name, TASKS[counts])
    cohort = patients_of(wanted, COUNTS[counts], 1)
    batch = everybody(cohort, mean=counts != "some")
    assert_exact(network_of(wanted), cohort, batch, objective=wanted.objective)


@every_model
def test_micro_batches_are_exact(name: str) -> None:
    """With room for next to nothing, each record is a pass of its own."""
    wanted = study_of(name)
    cohort = patients_of(wanted, [1, 3, 1], 5)
    assert_exact(network_of(wanted), cohort, everybody(cohort), objective=wanted.objective, memory=1)


@every_model
def test_nobody_adds_nothing(name: str) -> None:
    wanted = study_of(name)
    engine = engine_of(study_model(wanted), wanted.objective)
    found = engine.sum(patients_of(wanted, [1, 2]), everybody(patients_of(wanted, [])), 1.0)
    assert found.shape == (engine.size,)
    assert not found.any()


@every_model
def test_a_record_is_computed_alike_in_any_company(name: str) -> None:
    wanted = study_of(name)
    cohort, random = patients_of(wanted, [1] * 40, 3), np.random.default_rng(0)
    engine = TappedGradients(network_of(wanted), wanted.objective)
    whole = computed(engine, cohort, torch.arange(40))
    for size in (1, 7, 23):
        some = torch.from_numpy(random.permutation(40)[:size])
        assert all(whole[record] == bits for record, bits in computed(engine, cohort, some).items())
    assert company_of(engine).seating is Seating.FREE


@every_model
def test_weights_chosen_to_cancel_move_nothing_but_the_patients_own(name: str) -> None:
    """However large the weights are, one patient more or less changes the sum by at most C, and nobody
    else's outputs."""
    wanted = study_of(name)
    for seed in range(3):
        random = np.random.default_rng(seed)
        network = study_model(wanted, seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter *= float(10.0 ** random.integers(0, 5))
        counts = random.integers(1, 4, 15).tolist()
        out, cohort = int(random.integers(15)), patients_of(wanted, counts, seed)
        fewer = without(cohort, out)
        engine = engine_of(network, wanted.objective)
        sums = [engine.sum(each, everybody(each), 1.0) for each in (cohort, fewer)]
        assert float((sums[0] - sums[1]).norm()) <= 1.0
        kept = torch.ones(len(cohort.labels), dtype=torch.bool)
        kept[int(cohort.offsets[out]) : int(cohort.offsets[out + 1])] = False
        outputs = engine.outputs(cohort.features)[kept].nan_to_num(7.0)
        assert torch.equal(outputs, engine.outputs(fewer.features).nan_to_num(7.0))


@pytest.mark.parametrize("task", ["binary", "multi-class", "regression"])
def test_a_score_is_the_same_in_any_company(task: str) -> None:
    wanted = study_of("logistic-regression", task)
    outputs = 3 * torch.randn(200, wanted.outputs, generator=torch.Generator().manual_seed(1))
    whole = scores(wanted.objective, outputs)
    for count in range(1, 80):
        assert torch.equal(scores(wanted.objective, outputs[:count]), whole[:count])
        assert torch.equal(scores(wanted.objective, outputs[-count:]), whole[-count:])
    # A logit that torch's own sigmoid puts on either side of 0.55, by how many there are
    alike = scores(wanted.objective, torch.full((95, wanted.outputs), 0.20067058503627777))
    assert len(alike.unique()) == 1


def test_a_sigmoid_is_the_same_wherever_it_stands() -> None:
    """torch's own depends on how many numbers there are, on some machines."""
    x = 3 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    whole = sigmoid(x)
    assert torch.allclose(whole, x.sigmoid())
    for count in (*range(1, 100), 1999):
        assert torch.equal(sigmoid(x[:count]), whole[:count])
        assert torch.equal(sigmoid(x[-count:]), whole[-count:])
    assert torch.equal(sigmoid(x.view(-1, 2)[:, 0]), whole[::2])
    many = x.repeat(50)
    assert torch.equal(sigmoid(many), whole.repeat(50))
    assert sigmoid(x[:0]).shape == (0,)
