"""The closed form for linear models and MLPs, against a loop over records in float64, and against weights
that a coordinator chose so that rounding decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tapped import clip_between, clipped_by_hand, cohort_of, everybody, gradients_by_hand
from tapped import one_thread as one_thread
from torch import nn

from client import chain, dense, linear
from client.chain import Chain, no_chain
from client.cohort import Patients
from client.dense import DenseGradients
from client.dpsgd import Engine, engine_of
from client.linear import LinearGradients
from client.rowwise import TILE
from common.errors import StudyError
from common.study import Objective

OBJECTIVES = [
    Objective(task="binary"),
    Objective(task="binary", loss="hinge"),
    Objective(task="multi-class"),
    Objective(task="multi-class", loss="hinge"),
    Objective(task="regression", loss="squared"),
    Objective(task="regression", loss="absolute"),
]
CLASSES, BINARY = OBJECTIVES[2], OBJECTIVES[0]
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, lambda: nn.GELU("tanh"), nn.Identity,
]  # fmt: skip
counts = st.lists(st.integers(1, 12), min_size=1, max_size=9)


def mlp(
    widths: Sequence[int], kinds: Sequence[int] = (0,), bias: bool = True, seed: int = 0
) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for place, (i, o) in enumerate(pairwise(widths)):
        layers += [nn.Linear(i, o, bias), ACTIVATIONS[kinds[place % len(kinds)]]()]
    return nn.Sequential(*layers[:-1])


def labelled(cohort: Patients, objective: Objective, classes: int, seed: int) -> Patients:
    random = np.random.default_rng(seed)
    size = len(cohort.labels)
    labels = (
        torch.from_numpy(random.uniform(-1, 1, size).astype(np.float32))
        if objective.task == "regression"
        else torch.from_numpy(random.integers(0, classes, size))
    )
    return Patients(cohort.features, labels, cohort.offsets)


def agrees(engine: Engine, network: nn.Module, cohort: Patients, objective: Objective,
           mean: bool = True) -> None:  # fmt: skip
    """Clipping everybody, some and nobody."""
    batch = everybody(cohort, mean)
    gradients = gradients_by_hand(network, cohort, batch, objective)
    for C in clip_between(gradients):
        if C <= 0:
            continue
        found, expected = engine.sum(cohort, batch, C), clipped_by_hand(gradients, C)
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) + 1e-12


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.one_of(counts, st.integers(1, 70).map(lambda n: [1] * n)),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    kinds=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    objective=st.sampled_from(OBJECTIVES),
    bias=st.booleans(),
    mean=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sums_are_those_of_the_loop(
    counts: list[int], widths: list[int], kinds: list[int], objective: Objective, bias: bool, mean: bool,
    seed: int,
) -> None:  # fmt: skip
    outputs = 3 if objective.task == "multi-class" else 1
    network = mlp([*widths, outputs], kinds, bias, seed)
    cohort = labelled(cohort_of(counts, (widths[0],), seed), objective, max(2, outputs), seed)
    agrees(DenseGradients(network, objective), network, cohort, objective, mean)
    chosen = engine_of(network, objective)
    assert isinstance(chosen, DenseGradients)
    agrees(chosen, network, cohort, objective, mean)
    if isinstance(chosen, LinearGradients):  # the same without numpy
        found = DenseGradients.sum(chosen, cohort, everybody(cohort, mean), 0.3)
        expected = chosen.sum(cohort, everybody(cohort, mean), 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [0, 1 << 28])
@pytest.mark.parametrize("each", [2, 9])
def test_gram_matrices_and_held_gradients_agree(memory: int, each: int) -> None:
    network = mlp([40, 30, 3])
    cohort = cohort_of([each] * 5 + [1, each + 3], (40,))
    engine = DenseGradients(network, CLASSES, memory=memory)
    agrees(engine, network, cohort, CLASSES)


@pytest.mark.parametrize("network", [nn.Linear(6, 3), mlp([6, 5, 3])], ids=["linear", "mlp"])
def test_pieces_make_no_difference(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one patient with more records than fit."""
    cohorts = [cohort_of([1] * 200, (6,)), cohort_of([3, 100, 1, 70, 40], (6,))]
    monkeypatch.setattr(dense, "MAX_RECORDS", TILE)
    monkeypatch.setattr(dense, "PASS", 9)
    monkeypatch.setattr(dense, "PASSES", 2)
    monkeypatch.setattr(linear, "MOST_NUMBERS", 100)
    monkeypatch.setattr(linear, "_HELD", 400)
    for cohort in cohorts:
        agrees(engine_of(network, CLASSES), network, cohort, CLASSES)


def test_what_is_frozen_stays_out() -> None:
    cohorts = [cohort_of([1] * 20, (6,)), cohort_of([1, 3, 2], (6,))]
    for frozen in (["0.weight", "0.bias"], ["0.weight"], ["2.bias"], ["2.weight", "2.bias"], ["4.weight"]):
        network = mlp([6, 5, 4, 3])
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for cohort in cohorts:
            agrees(engine_of(network, CLASSES), network, cohort, CLASSES)
    network.requires_grad_(False)
    assert engine_of(network, CLASSES).sum(cohorts[0], everybody(cohorts[0]), 1.0).shape == (0,)


def test_images_are_flattened_first() -> None:
    network = nn.Sequential(nn.Flatten(), mlp([12, 5, 3]))
    cohort = cohort_of([1, 2, 3], (1, 3, 4))
    engine = engine_of(network, CLASSES)
    assert type(engine) is DenseGradients
    agrees(engine, network, cohort, CLASSES)
    torch.testing.assert_close(engine.outputs(cohort.features), network(cohort.features).detach())


def test_which_engine_takes_what() -> None:
    assert type(engine_of(nn.Linear(3, 1), BINARY)) is LinearGradients
    assert type(engine_of(nn.Sequential(nn.Linear(3, 3)), CLASSES)) is LinearGradients
    assert type(engine_of(nn.Linear(3, 3), OBJECTIVES[3])) is DenseGradients
    assert type(engine_of(nn.Linear(5000, 2), CLASSES)) is DenseGradients
    assert type(engine_of(nn.Linear(3, 2), BINARY)) is DenseGradients
    assert type(engine_of(mlp([3, 2, 1]), BINARY)) is DenseGradients


class Odd(nn.Linear):
    pass


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def hooked() -> nn.Module:
    network = mlp([3, 3])
    network[0].register_forward_hook(lambda module, x, y: 2 * y)
    return network


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), "Dropout"),
        (nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.ReLU()), "Flatten"),
        (nn.Sequential(nn.Linear(3, 2), nn.Softmax(dim=1)), "Softmax"),
        (Odd(3, 2), "Odd"),
        (shared(), "shares"),
        (hooked(), "hangs"),
        (nn.Linear(3, 2).double(), "float32"),
        (nn.Sequential(nn.ReLU()), "no linear layer"),
    ],
)
def test_other_networks_are_refused(network: nn.Module, reason: str) -> None:
    assert reason in (no_chain(network) or "")
    with pytest.raises(StudyError, match="no closed form"):
        DenseGradients(network, CLASSES)


def test_a_network_that_is_no_linear_model_is_refused() -> None:
    with pytest.raises(StudyError, match="no linear model"):
        LinearGradients(mlp([3, 2, 1]), BINARY)


# --- numbers that overflow


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e20])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("network", [mlp([4, 3]), mlp([4, 5, 3], [1])], ids=["linear", "mlp"])
def test_who_overflows_counts_as_zero(network: nn.Module, each: int, value: float) -> None:
    engines = [engine_of(network, CLASSES), DenseGradients(network, CLASSES)]
    cohort = cohort_of([each] * 6, (4,))
    whole = everybody(cohort)
    cohort.features[2 * each, 1] = value
    kept = torch.arange(6).repeat_interleave(each) != 2
    rest = cohort_of([each] * 6, (4,))
    less = Patients(rest.features[kept], rest.labels[kept], torch.arange(6) * each)
    for engine in engines:
        found = engine.sum(cohort, whole, 0.5)
        assert found.isfinite().all()
        others = engine.sum(less, everybody(less), 0.5)
        if not np.isfinite(value):
            torch.testing.assert_close(found, others, rtol=1e-6, atol=1e-9)
        assert float((found - others).norm()) <= 0.5


def test_rows_that_cancel_leave_no_rounding() -> None:
    """Two huge records of opposite effect: what is left of them is far below one float32 rounding of each."""
    network = mlp([4, 6, 1], [1], seed=3)
    cohort = cohort_of([2, 1, 2], (4,))
    cohort.features[1] = cohort.features[0]
    cohort.labels[:] = torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        network[0].weight.mul_(1e-3)
        network[0].bias.mul_(0)
        network[2].weight.mul_(1e12)
        network[2].bias.fill_(0)
    engine = DenseGradients(network, BINARY)
    less = Patients(cohort.features[2:], cohort.labels[2:], torch.tensor([0, 1, 3]))
    share = engine.sum(cohort, everybody(cohort), 1.0) - engine.sum(less, everybody(less), 1.0)
    assert float(share.norm()) <= 1.0


# --- company


CODES = 5  # of each category, one-hot encoded


def hostile(random: np.random.Generator, widths: Sequence[int], scale: float) -> nn.Sequential:
    """The first layer's sums cancel: what is left of a record is rounding, enlarged by the layers after."""
    network = mlp(widths)
    with torch.no_grad():
        first = network[0]
        each = (random.normal(size=(widths[1], widths[0] // CODES)) * scale).astype(np.float32)
        first.weight.copy_(torch.from_numpy(np.repeat(each, CODES, axis=1)))
        first.bias.copy_(torch.from_numpy(-each.astype(np.float64).sum(axis=1)))
    return network


def change(network: nn.Sequential, random: np.random.Generator, each: int) -> float:
    """How far the clipped sum moves when one patient goes, in units of C."""
    patients, width = int(random.integers(20, 90)), network[0].in_features
    rows = np.zeros((patients * each, width), np.float32)
    for first in range(0, width, CODES):
        rows[np.arange(len(rows)), first + random.integers(0, CODES, len(rows))] = 1
    features, labels = torch.from_numpy(rows), torch.from_numpy(random.integers(0, 2, len(rows)))
    kept = torch.arange(patients).repeat_interleave(each) != int(random.integers(patients))
    more = Patients(features, labels, torch.arange(patients + 1) * each)
    fewer = Patients(features[kept], labels[kept], torch.arange(patients) * each)
    engines = [engine_of(network, BINARY), DenseGradients(network, BINARY)]
    sums = [[engine.sum(cohort, everybody(cohort), 1.0) for cohort in (more, fewer)] for engine in engines]
    return max(float((a - b).norm()) for a, b in sums)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("widths", [(30, 1), (15, 9, 1), (40, 33, 7, 1)])
def test_nobodys_rounding_tells_of_others(widths: Sequence[int], each: int) -> None:
    for seed in range(25):
        random = np.random.default_rng(seed)
        network = hostile(random, widths, 10.0 ** random.integers(6, 14))
        assert change(network, random, each) <= 1.0, seed


def as_torch_does(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def test_with_ordinary_products_that_test_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "product", as_torch_does)
    monkeypatch.setattr(dense, "TILE", 1)
    monkeypatch.setattr(Chain, "uniform", lambda *_: True)
    found = []
    for seed in range(25):
        random = np.random.default_rng(seed)
        network = hostile(random, (5 * int(random.integers(1, 9)), 1), 10.0 ** random.integers(6, 14))
        found.append(change(network, random, 1))
    assert max(found) > 1.01


@pytest.mark.parametrize("widths", [(30, 64, 2), (30, 7, 3), (31, 10, 5), (3, 8, 2), (784, 128, 10)])
@pytest.mark.parametrize("kind", range(5))
def test_a_record_is_computed_alike_in_any_company(widths: Sequence[int], kind: int) -> None:
    """Bit for bit: outputs, every layer's inputs and output gradients."""
    engine = DenseGradients(mlp(widths, [kind]), CLASSES)
    random = np.random.default_rng(1)
    cohort = labelled(cohort_of([1] * 150, widths[:1]), CLASSES, widths[-1], 0)
    batch = everybody(cohort)

    def bits(chosen: np.ndarray) -> list[list[bytes]]:
        of = Patients(cohort.features[chosen], cohort.labels[chosen], torch.arange(len(chosen) + 1))
        taps = engine._taps(of, everybody(of), slice(0, len(chosen)))
        parts = [engine.outputs(of.features), *(t for _, x, g in taps for t in (x, g))]
        return [[row.tobytes() for row in part.contiguous().numpy()] for part in parts]

    whole = bits(np.arange(len(batch.records)))
    for _ in range(12):
        some = random.permutation(150)[: int(random.integers(1, 150))]
        for part, all_ in zip(bits(some), whole, strict=True):
            assert part == [all_[i] for i in some]


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.loss != "hinge" or o.task == "binary"])
def test_a_linear_models_record_is_computed_alike_in_any_company(objective: Objective) -> None:
    outputs = 3 if objective.task == "multi-class" else 1
    engine = LinearGradients(mlp([13, outputs]), objective)
    cohort = labelled(cohort_of([1] * 100, (13,)), objective, max(2, outputs), 0)
    alone = [engine.sum(cohort, everybody(cohort), 1e9)]
    random = np.random.default_rng(0)

    def slopes(chosen: np.ndarray) -> dict[int, bytes]:
        room = engine._room(len(chosen))
        room.x[: len(chosen), :13] = cohort.features.numpy()[chosen]
        room.weight[:13, :outputs] = engine._weight.detach().numpy().T
        room.weight[13, :outputs] = engine._bias.detach().numpy()  # type: ignore[union-attr]
        room.multiply()
        found = engine._slopes(room.z[: len(chosen), :outputs].T.copy(), cohort.labels.numpy()[chosen])
        return {int(i): found[:, k].tobytes() for k, i in enumerate(chosen)}

    whole = slopes(np.arange(100))
    for _ in range(20):
        some = random.permutation(100)[: int(random.integers(1, 100))]
        assert all(whole[i] == each for i, each in slopes(some).items())
    assert torch.equal(alone[0], engine.sum(cohort, everybody(cohort), 1e9))


def uneven(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A product on a machine where a row's place shows."""
    found = torch.nn.functional.linear(x, weight, bias)
    return found + 1e-7 * torch.arange(len(x), dtype=x.dtype)[:, None]


def test_where_company_shows_records_go_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chain, "product", uneven)
    monkeypatch.setattr(chain, "_FOUND", {})
    network, cohort = mlp([5, 4, 3]), cohort_of([1] * 40, (5,))
    engine = DenseGradients(network, CLASSES)
    with caplog.at_level(logging.WARNING, "fedward.training"):
        agrees(engine, network, cohort, CLASSES)
        outputs = engine.outputs(cohort.features)
    assert len(caplog.records) == 1
    assert "one at a time" in caplog.text
    for record in (0, 17, 39):
        assert torch.equal(outputs[record], engine.outputs(cohort.features[record][None])[0])


def test_where_a_place_shows_a_linear_model_goes_record_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    network, cohort = mlp([5, 3]), cohort_of([1] * 40, (5,))
    usual = LinearGradients(network, CLASSES).sum(cohort, everybody(cohort), 0.1)
    monkeypatch.setattr(linear._Room, "_tried", lambda self: False)
    assert torch.equal(LinearGradients(network, CLASSES).sum(cohort, everybody(cohort), 0.1), usual)


def test_an_empty_batch_and_no_records_at_all() -> None:
    for network in (mlp([4, 3]), mlp([4, 5, 3])):
        engine = engine_of(network, CLASSES)
        nobody = cohort_of([], (4,))
        assert (engine.sum(nobody, everybody(nobody), 1.0) == 0).all()
        assert engine.outputs(nobody.features).shape == (0, 3)
