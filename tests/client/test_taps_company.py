"""What a network computes for a record is the same bit for bit whoever else is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tapped import (
    OBJECTIVE,
    OUTPUTS,
    assert_exact,
    clipped_by_hand,
    cohort_of,
    everybody,
    gradients_by_hand,
    one_thread,
)
from test_taps import LAYERS, Mean, head, network_of
from torch import nn

from client.batches import Batch
from client.cohort import Patients
from client.taps import TappedGradients
from client.taps import company as company_module
from client.taps.company import Company, Seating
from client.taps.coverage import ACTIVATIONS
from common.study import Objective

__all__ = ["one_thread"]  # a fixture that pytest finds here
SIZES = (1, 2, 7, 16, 21, 33, 64)


def company_of(engine: TappedGradients) -> Company:
    (found,) = engine._companies.values()
    return found


def computed(engine: TappedGradients, cohort: Patients, records: torch.Tensor) -> dict[int, bytes]:
    """Everything that is tapped of each record, and its outputs."""
    batch = Batch(records, torch.arange(len(records)), torch.ones(len(records)), len(records))
    seats = engine._seats(cohort.features, len(records))
    found: dict[int, bytes] = {}
    for start in range(0, len(records), seats.most):
        piece = slice(start, min(start + seats.most, len(records)))
        seats.probe(piece.stop - piece.start)
        with engine._taps():
            taps = [t for part in engine._backward(cohort, batch, piece, seats) for t in part.taps]
            for index, record in enumerate(records[piece].tolist()):
                found[record] = b"".join(tap[index].detach().numpy().tobytes() for tap in taps)
    outputs = engine.outputs(cohort.features[records])
    return {r: bits + outputs[i].numpy().tobytes() for i, (r, bits) in enumerate(found.items())}


@pytest.mark.parametrize("name", LAYERS)
def test_a_record_is_computed_alike_in_any_company(name: str) -> None:
    _, shape, tokens = LAYERS[name]
    random, cohort = np.random.default_rng(0), cohort_of([1] * 70, shape, 8, tokens)
    engine = TappedGradients(network_of(name), OBJECTIVE)
    whole = computed(engine, cohort, torch.arange(70))
    for size in SIZES:
        some = torch.from_numpy(random.permutation(70)[:size])
        assert all(whole[record] == bits for record, bits in computed(engine, cohort, some).items())
    assert company_of(engine).seating is Seating.FREE


def test_frozen_layers_are_computed_alike_too() -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, OUTPUTS))
    network[2].requires_grad_(False)
    cohort, engine = cohort_of([1] * 30, (5,)), TappedGradients(network, OBJECTIVE)
    whole = computed(engine, cohort, torch.arange(30))
    assert all(whole[r] == bits for r, bits in computed(engine, cohort, torch.arange(3, 20)).items())
    assert company_of(engine).seating is Seating.FREE


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_computed_alike_too(activation: type[nn.Module]) -> None:
    """torch's own functions of what is left over at the end of the registers round in another way."""
    makes: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
        (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), activation(), head(3)), (3,)),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3), activation(), Mean(), head(3)), (3, 7)),
    ]
    random = np.random.default_rng(0)
    for make, shape in makes:
        for seed in range(4):
            torch.manual_seed(seed)
            cohort, engine = cohort_of([1] * 70, shape, 8), TappedGradients(make(), OBJECTIVE)
            whole = computed(engine, cohort, torch.arange(70))
            for size in SIZES[1:-1]:
                some = torch.from_numpy(random.permutation(70)[:size])
                assert all(whole[r] == bits for r, bits in computed(engine, cohort, some).items())
            assert company_of(engine).seating is Seating.FREE
            assert_exact(make(), cohort_of([1, 3], shape), everybody(cohort_of([1, 3], shape)))


class Own(nn.Module):
    """An operation that torch knows nothing of, before a head."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.operation, self.head = operation, nn.Linear(5, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.operation(x))
        return outputs


def by_place(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + 1e-7 * torch.arange(len(x)).remainder(3)[:, None])


def by_lane(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + 1e-6 * torch.arange(len(x)).remainder(4)[:, None])


def by_size(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + 1e-6 * (len(x) > 20))


def less_the_mean(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(dim=0)


def spreading(x: torch.Tensor) -> torch.Tensor:
    return x + 0.0 * x.sum()


def refusing(x: torch.Tensor) -> torch.Tensor:
    if x.isnan().any():
        raise ValueError("no")
    return x


@pytest.mark.parametrize(
    ("operation", "seating"),
    [(by_place, Seating.ALONE), (by_lane, Seating.LANES), (less_the_mean, Seating.ALONE),
     (spreading, Seating.ALONE), (refusing, Seating.ALONE), (by_size, Seating.FREE)],
)  # fmt: skip
def test_what_depends_on_company_is_found(
    operation: Callable[[torch.Tensor], torch.Tensor], seating: Seating
) -> None:
    torch.manual_seed(0)
    cohort, engine = cohort_of([1, 3, 1, 2] * 12, (5,)), TappedGradients(Own(operation), OBJECTIVE)
    engine.sum(cohort, everybody(cohort), 1.0)
    assert company_of(engine).seating is seating
    single = cohort_of([1] * 50, (5,))
    whole = computed(engine, single, torch.arange(50))
    some = torch.from_numpy(np.random.default_rng(0).permutation(50)[:23])
    if seating is not Seating.LANES:  # there a record's own lane comes into it, and here decides
        assert all(whole[r] == bits for r, bits in computed(engine, single, some).items())
    assert len(engine.outputs(single.features[:0])) == 0


def test_a_network_that_mixes_records_gives_each_its_own_gradient() -> None:
    torch.manual_seed(0)
    cohort = cohort_of([1, 3, 2], (5,))
    assert_exact(Own(less_the_mean), cohort, everybody(cohort))


def test_a_size_that_does_not_pass_is_not_used() -> None:
    network = Own(by_size)
    cohort, engine = cohort_of([1] * 50, (5,)), TappedGradients(network, OBJECTIVE)
    seats = engine._seats(cohort.features, 50)
    assert seats.most == 16
    assert [company_of(engine).fits(size) for size in (16, 32)] == [True, False]
    assert_exact(network, cohort, everybody(cohort))


@pytest.mark.parametrize("seating", [Seating.LANES, Seating.ALONE])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "lstm", "embedding", "transformer", "linear twice"])
def test_other_seats_are_exact(name: str, seating: Seating, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shape, tokens = LAYERS[name]
    monkeypatch.setattr(Company, "seating", seating)
    for counts in ([1] * 9, [1, 20, 3, 2]):
        cohort = cohort_of(counts, shape, 5, tokens)
        network = network_of(name)
        assert_exact(network, cohort, everybody(cohort))
        expected = network(cohort.features)
        found = TappedGradients(network, OBJECTIVE).outputs(cohort.features)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_lanes_are_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Company, "seating", Seating.LANES)
    cohort, engine = cohort_of([1] * 50, (5,)), TappedGradients(network_of("mlp"), OBJECTIVE)
    whole = computed(engine, cohort, torch.arange(50))
    some = torch.from_numpy(np.random.default_rng(0).permutation(50)[:23])
    assert all(whole[r] == bits for r, bits in computed(engine, cohort, some).items())


def test_answers_are_kept_by_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one make share them; another width, a frozen layer or another head is another network."""
    monkeypatch.setattr(company_module, "_answers", type(company_module._answers)())
    cohort = cohort_of([1] * 5, (3, 4))
    makes: list[Callable[[], nn.Module]] = [
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True),
        lambda: nn.TransformerEncoderLayer(4, 1, 6, 0.0, batch_first=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 7, 0.0, batch_first=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True).requires_grad_(False),
    ]
    for make in makes:
        for _ in range(2):
            network = nn.Sequential(make(), nn.Flatten(), nn.Linear(12, OUTPUTS))
            TappedGradients(network, OBJECTIVE).sum(cohort, everybody(cohort), 1.0)
    assert len(company_module._answers) == len(makes)


@pytest.mark.parametrize("task", ["binary", "multi-class"])
def test_a_hinge_does_not_blind_the_trial(task: Any) -> None:
    """Sure of itself, a network has no gradient by a hinge loss: backward, all rows would be alike, zero."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, OUTPUTS if task == "multi-class" else 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            surely = torch.zeros(self.layer.out_features)
            surely[0] = 9.0 if task == "multi-class" else -9.0
            found: torch.Tensor = self.layer(x) + surely
            return found

    objective = Objective(task=task, loss="hinge")
    engine, cohort = TappedGradients(Sure(), objective), cohort_of([1] * 20, (4,))
    engine.outputs(cohort.features)
    company = company_of(engine)
    outputs, *taps = company._twin()(company._batch(16, ()))
    assert all(bool(tap.any()) for tap in (outputs, *taps))


def test_another_loss_has_answers_of_its_own() -> None:
    """What is tapped depends on it, so that of two studies one would find the other's rows never alike."""
    cohort = cohort_of([1] * 50, (3, 7))
    for task, size in (("multi-class", 48), ("multi-label", 80)):
        engine = TappedGradients(network_of("conv1d"), Objective(task=task))  # type: ignore[arg-type]
        engine.outputs(cohort.features)
        assert company_of(engine).fits(size)


def test_where_features_lie_in_memory_does_not_matter() -> None:
    cohort, engine = cohort_of([1] * 40, (3, 7)), TappedGradients(network_of("conv1d"), OBJECTIVE)
    whole = engine.outputs(cohort.features)
    assert all(torch.equal(engine.outputs(cohort.features[i : i + 16]), whole[i : i + 16]) for i in range(9))


def test_outputs_are_without_dropout_and_leave_modes_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, OUTPUTS))
    network[1].eval()
    cohort, engine = cohort_of([1] * 20, (5,)), TappedGradients(network, OBJECTIVE)
    found = engine.outputs(cohort.features)
    assert [m.training for m in network] == [True, False, True]
    assert not found.requires_grad
    assert torch.allclose(found, network(cohort.features), atol=1e-6)
    network[1].train()
    assert torch.equal(engine.outputs(cohort.features), found)
    assert torch.equal(engine.outputs(cohort.features[4:5]), found[4:5])


@pytest.mark.parametrize("name", ["mlp", "conv2d", "lstm", "attention"])
def test_others_numbers_that_overflow_do_not_spread(name: str) -> None:
    """Not finite, or finite and far too large: everyone else adds what they add without this patient."""
    _, shape, _ = LAYERS[name]
    cohort = cohort_of([1, 2, 1, 3], shape, 4)
    network = network_of(name)
    engine, batch = TappedGradients(network, OBJECTIVE), everybody(cohort)
    alone = cohort_of([1, 1, 3], shape, 4)
    kept = torch.tensor([0, 3, 4, 5, 6])
    alone.features.copy_(cohort.features[kept])
    alone.labels.copy_(cohort.labels[kept])
    expected = engine.sum(alone, everybody(alone), 0.5)
    for value in (float("nan"), float("inf"), -3e38):
        cohort.features[1:3] = value
        found = engine.sum(cohort, batch, 0.5)
        assert found.isfinite().all()
        assert float((found - expected).norm()) <= 0.5
        if not np.isfinite(value) and name != "conv2d":
            assert float((found - expected).norm()) <= 1e-6


def test_the_guard_bounds_what_a_cancelling_patient_adds() -> None:
    """Two records that undo each other: what is left is no more than their rounding, and is cut."""
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, OUTPUTS))
    cohort = cohort_of([2, 1], (5,))
    cohort.features[1] = cohort.features[0]
    batch = everybody(cohort)
    weights = batch.weights.clone()
    weights[0], weights[1] = 1e9, -1e9
    labels = cohort.labels.clone()
    labels[1] = labels[0]
    hostile = Patients(cohort.features, labels, cohort.offsets)
    odd = Batch(batch.records, batch.patient, weights, batch.patients)
    engine = TappedGradients(network, OBJECTIVE)
    both = engine.sum(hostile, odd, 1.0)
    last = clipped_by_hand(gradients_by_hand(network, hostile, batch)[1:], 1.0)
    assert float((both - last).norm()) <= 1.0
