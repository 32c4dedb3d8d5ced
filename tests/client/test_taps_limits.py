"""Taps where it is hard: no patient counts for more than C, whatever its numbers; what isn't covered is
refused; random networks; memory."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tapped import OBJECTIVE, OUTPUTS, assert_exact, cohort_of, everybody, one_thread
from torch import nn
from torch.nn import functional

from client.batches import Batch
from client.dpsgd import ClippedGradients
from client.rowwise import CLIPPING_MARGIN
from client.taps import TappedGradients, covers
from client.taps import engine as engine_module
from client.taps.convolution import Convolution, Geometry
from client.taps.engine import CANCELLING
from client.taps.groups import Block, Groups
from client.taps.losses import output_gradients
from client.taps.parts import Factors, Lookups, Norms, Part, Slot
from client.taps.rows import Rows
from common.errors import StudyError
from common.objectives import record_losses
from common.study import Objective

__all__ = ["one_thread"]  # a fixture that pytest finds here

# --- no patient counts for more than C


def contribution(part: Part, size: int, records: int, C: float, monkey: pytest.MonkeyPatch) -> torch.Tensor:
    """One patient's clipped gradient from its part, as the engine makes it."""
    engine = TappedGradients(nn.Linear(1, size - 1) if size > 1 else nn.Linear(1, 1, bias=False), OBJECTIVE)
    engine.size = size
    monkey.setattr(engine, "_backward", lambda *_: [part])
    block = Block(slice(0, records), slice(0, 1), Groups(torch.zeros(records, dtype=torch.int64), 1))
    total = torch.zeros(size, dtype=torch.float64)
    seats = SimpleNamespace(limit=1)
    engine._add_piece(None, None, block, seats, (C, total))  # type: ignore[arg-type]
    return total


def adversarial(kind: str, rows: int, width: int, scale: float, seed: int) -> torch.Tensor:
    """Rows [rows, width] whose products are large, and cancel."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, width))
    if kind == "equal":
        values[:] = values[0]
    if kind == "spread":
        values *= 10.0 ** random.uniform(-6, 6, (rows, 1))
    return torch.from_numpy(values * scale).float()


def cancelling(g: torch.Tensor, a: torch.Tensor, close: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of the rows undoes the first, up to `close`."""
    half = len(g) // 2
    g[half : 2 * half] = -g[:half] * (1 + close)
    a[half : 2 * half] = a[:half]
    return g, a


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 3, 8, 40, 200]),
    widths=st.sampled_from([(3, 2), (30, 50), (300, 20), (2000, 1)]),
    scales=st.tuples(*[st.sampled_from([1e-12, 1e-6, 1.0, 1e4, 1e8, 1e12])] * 2),
    kind=st.sampled_from(["random", "equal", "spread"]),
    close=st.sampled_from([None, 0.0, 1e-7, 1e-3]),
    biases=st.integers(0, 2),
    way=st.sampled_from(["by shape", "held", "gram", "by blocks"]),
    C=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
    records=st.booleans(),
)
def test_rows_never_exceed_c(
    rows: int, widths: tuple[int, int], scales: tuple[float, float], kind: str, close: float | None,
    biases: int, way: str, C: float, seed: int, records: bool,
) -> None:  # fmt: skip
    inputs, outputs = widths
    a = adversarial(kind, rows, inputs, scales[0], seed)
    g = adversarial(kind, rows, outputs, scales[1], seed + 100)
    if close is not None:
        g, a = cancelling(g, a, close)
    exact = (g.double().t() @ a.double(), *[g.double().sum(dim=0)] * biases)
    norm = float(torch.cat([e.flatten() for e in exact]).norm())
    size = inputs * outputs
    slots = [Slot(size + i * outputs, (outputs,)) for i in range(biases)]
    shaped = (a, g) if records else (a[None], g[None])
    part = Rows([Slot(0, (outputs, inputs))], slots, *shaped)
    with pytest.MonkeyPatch.context() as monkey:
        if way != "by shape":
            monkey.setattr(Rows, "_gram_is_cheaper", lambda *_: way == "gram")
        if way == "by blocks":
            monkey.setattr(Norms, "hold", lambda *_: False)
        found = contribution(part, size + biases * outputs, len(shaped[0]), C, monkey)
    assert float(found.norm()) <= C
    lengths = float((g.double().norm(dim=1) * (a.double().square().sum(dim=1) + biases).sqrt()).sum())
    if norm > 1e-15 and lengths < 10 * norm and norm < 1e15:  # nothing cancels: exact
        expected = torch.cat([e.flatten() for e in exact]) * min(1.0, C * (1 - CLIPPING_MARGIN) / norm)
        assert float((found.double() - expected).norm()) <= 1e-5 * float(expected.norm())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    channels=st.sampled_from([(1, 2), (3, 4), (40, 40)]),
    side=st.sampled_from([1, 2, 5, 12]),
    records=st.sampled_from([1, 2, 7]),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    hold=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions_never_exceed_c(
    channels: tuple[int, int], side: int, records: int, scale: float, offset: float, hold: bool, seed: int
) -> None:
    """Inputs far from zero and output gradients whose sum is nearly zero: what normalisation leads to."""
    torch.manual_seed(seed)
    x = scale * (torch.randn(records, channels[0], side, side) + offset)
    g = torch.randn(records, channels[1], side, side)
    g -= g.mean(dim=(0, 2, 3), keepdim=True)
    slot = Slot(0, (channels[1], channels[0], 3, 3))
    part = Convolution(slot, Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), x, g)
    with pytest.MonkeyPatch.context() as monkey:
        if not hold:
            monkey.setattr(Norms, "hold", lambda *_: False)
        found = contribution(part, slot.size, records, 1.0, monkey)
    assert float(found.norm()) <= 1


def cut(part: Part, groups: Groups) -> torch.Tensor:
    """What each record is multiplied by so that D is as long as the guard lets it be, C' being 1."""
    return (CANCELLING / part.lengths(groups)).float()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(64, 28), (16, 28), (128, 14), (256, 4), (37, None), (64, None)])
def test_rounding_of_rows_that_cancel_is_within_the_margin(
    shape: tuple[int, int | None], offset: float
) -> None:
    """64 patients cancel as much as they may; one goes."""
    torch.manual_seed(0)
    width, side = shape

    def summed(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        groups = Groups(torch.arange(len(x)), len(x))
        part: Part
        if side is None:
            part = Rows([Slot(0, (g.shape[-1], width))], (), x, g)
        else:
            slot = Slot(0, (width, width, 3, 3))
            part = Convolution(slot, Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), x, g)
        total = torch.zeros(part.slots[0].size, dtype=torch.float64)
        factors = cut(part, groups).to(x.dtype)
        part.write(Factors(factors, factors), total)
        return total

    size = (64, 48, width) if side is None else (64, width, side, side)
    x = torch.randn(size) * 0.1 + offset
    g = torch.randn(64, 48, 256) if side is None else torch.randn(size)
    g -= g.mean(dim=1, keepdim=True) if side is None else g.mean(dim=(2, 3), keepdim=True)
    moved = summed(x, g) - summed(x[1:], g[1:])
    exact = summed(x.double(), g.double()) - summed(x[1:].double(), g[1:].double())
    assert float((moved - exact).norm()) < CLIPPING_MARGIN / 10


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_lookups_never_exceed_c(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    g = scale * torch.randn(3, 50, 7)
    g[1, :, :] = -g[0] * (1 + 1e-7)
    part = Lookups(Slot(0, (4, 7)), torch.arange(50).remainder(4).expand(3, 50), g, None)
    found = contribution(part, 28, 3, 1.0, monkeypatch)
    assert float(found.norm()) <= 1


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(5)
    return {
        "linear": (nn.Linear(6, OUTPUTS), (6,)),
        "mlp": (nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, OUTPUTS)), (6,)),
        "conv": (
            nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6, OUTPUTS)),
            (2, 8),
        ),
        "gru": (Last(nn.GRU(4, 5, batch_first=True)), (6, 4)),
    }


class Last(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.layer(x)[0][:, -1])
        return outputs


def less(batch: Batch, index: int) -> Batch:
    kept = batch.patient != index
    patient = batch.patient[kept]
    return Batch(
        batch.records[kept], patient - (patient > index).long(), batch.weights[kept], batch.patients - 1
    )


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("scale", [1.0, 1e18, 1e30, 3e38, float("nan")])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [1, 5, 2, 3]])
@pytest.mark.parametrize("memory", [1 << 28, 1])
def test_nobody_sticks_out(name: str, scale: float, counts: list[int], memory: int) -> None:
    network, shape = networks()[name]
    cohort = cohort_of(counts, shape)
    cohort.features[int(cohort.offsets[1]) : int(cohort.offsets[2])] *= scale
    engine, batch = TappedGradients(network, OBJECTIVE, memory=memory), everybody(cohort)
    whole = engine.sum(cohort, batch, 0.7).double()
    assert whole.isfinite().all()
    for index in range(4):
        rest = engine.sum(cohort, less(batch, index), 0.7).double()
        assert float((whole - rest).norm()) <= 0.7
    if not scale < 1e38:  # counts as zero
        rest = engine.sum(cohort, less(batch, 1), 0.7).double()
        assert float((whole - rest).norm()) <= 1e-5


@pytest.mark.parametrize("weight", [1e20, 3e38])
@pytest.mark.parametrize("name", networks())
def test_no_parameters_make_a_patient_stick_out(name: str, weight: float) -> None:
    network, shape = networks()[name]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.sign() * weight)
    cohort = cohort_of([1, 3, 2], shape)
    engine, batch = TappedGradients(network, OBJECTIVE), everybody(cohort)
    whole = engine.sum(cohort, batch, 1.0).double()
    assert whole.isfinite().all()
    for index in range(3):
        assert float((whole - engine.sum(cohort, less(batch, index), 1.0).double()).norm()) <= 1


class Steps(nn.Module):
    """A layer of each step, whose outputs add up, times a weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(37, 192), nn.Linear(192, OUTPUTS)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(OUTPUTS, 192).sign() * weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.layer(x).sum(dim=1))
        return outputs


@pytest.mark.parametrize("weight", [1e10, 1e14, 3e14, 1e16, 1e17, 1e18, 3e18, 1e19])
def test_one_more_silences_nobody_else(weight: float) -> None:
    """From 591 patients on norms come from Gram matrices, in which less overflows."""
    torch.manual_seed(0)
    cohort = cohort_of([1] * 591, (16, 37))
    engine, batch = TappedGradients(Steps(weight), OBJECTIVE), everybody(cohort)
    whole, rest = engine.sum(cohort, batch, 1.0), engine.sum(cohort, less(batch, 590), 1.0)
    assert float((whole - rest).norm()) <= 1


@pytest.mark.parametrize("weight", [1e10, 1e15, 7e15, 1e16, 1e17, 1e19])
def test_a_patient_counts_alike_in_pieces(weight: float) -> None:
    torch.manual_seed(0)
    cohort, network = cohort_of([7], (2, 37)), Steps(weight)
    found = [
        TappedGradients(network, OBJECTIVE, memory=memory).sum(cohort, everybody(cohort), 1.0)
        for memory in (1 << 28, 1)
    ]
    assert float((found[0] - found[1]).norm()) <= 1e-5


class Cancelling(nn.Module):
    """Six steps, of which the second half undoes the first but for a little."""

    def __init__(self, close: float) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(10, 112, bias=False), nn.Linear(112, 1, bias=False)
        self.head.weight.requires_grad_(False)
        self.signs = torch.tensor([1.0] * 3 + [-1.0 - close] * 3)
        with torch.no_grad():
            self.layer.weight.zero_()
            self.head.weight.copy_(((4 * torch.randn(1, 112)).round() / 4 + 1 / 3) * 1e3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.layer(x) * self.signs[:, None]
        outputs: torch.Tensor = self.head(steps.transpose(1, 2).contiguous().sum(dim=2))
        return outputs


def test_equal_patients_who_all_go_another_way_are_within_the_margin() -> None:
    """From 3745 patients in one pass on norms would come from Gram matrices, and all move the same way."""
    torch.manual_seed(2)
    network = Cancelling(10 ** float(torch.empty(1).uniform_(-2.2, -1)))
    x = (4 * torch.randn(1, 3, 10)).round() / 4 + 1 / 3
    cohort = cohort_of([1] * 3745, (6, 10))
    cohort.features.copy_(torch.cat([x, x], dim=1))
    cohort.labels.zero_()
    engine, batch = TappedGradients(network, Objective(task="binary")), everybody(cohort)
    whole, rest = engine.sum(cohort, batch, 1.0), engine.sum(cohort, less(batch, 3744), 1.0)
    assert float((whole - rest).norm()) <= 1


@pytest.mark.parametrize("expected", [20.0, 300.0])
@pytest.mark.parametrize("layer", [nn.Linear(37, 64), nn.Conv1d(16, 24, 3)])
def test_the_number_of_others_doesnt_choose_the_way(
    layer: nn.Module, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that just holds the gradients of 30 patients: those of 31 aren't computed in another way."""
    network = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(OUTPUTS))
    cohort = cohort_of([1] * 31, (16, 37))
    network(cohort.features)
    batch, held, own = everybody(cohort), list[bool](), Norms.hold

    def hold(norms: Norms, size: int, itemsize: int) -> bool:
        held.append(own(norms, size, itemsize))
        return held[-1]

    monkeypatch.setattr(Norms, "hold", hold)
    ways = []
    for some in (batch, less(batch, 30)):
        held.clear()
        engine = TappedGradients(network, OBJECTIVE, expected, memory=1 << 30)
        engine._seats(cohort.features, 31)  # with room for all of them
        engine._memory = 4 * 4 * 30 * next(layer.parameters()).numel()
        engine.sum(cohort, some, 1.0)
        ways.append([*held])
    assert ways[0] == ways[1]


@pytest.mark.parametrize("engine", [TappedGradients, ClippedGradients])
def test_nobody_has_outputs(engine: Any) -> None:
    """InstanceNorm refuses an empty batch."""
    layers = nn.Conv1d(2, 5, 3), nn.InstanceNorm1d(5), nn.Flatten(), nn.Linear(30, OUTPUTS)
    found = engine(nn.Sequential(*layers), OBJECTIVE).outputs(torch.empty(0, 2, 8))
    assert found.shape == (0, OUTPUTS)


# --- what isn't covered


class Outside(nn.Module):
    """Uses its layer's weight by hand too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x)
        return outputs + functional.linear(x, self.layer.weight)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, OUTPUTS), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x) * self.scale
        return outputs


class Positions(nn.Module):
    """Looks up what doesn't depend on the record."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(x + self.table(torch.arange(4)).mean(dim=0))
        return outputs


class Changed(nn.Module):
    """Changes a layer's input after the layer has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.layer(y)
        y += 1
        outputs: torch.Tensor = self.head(y + z)
        return outputs


class MyLinear(nn.Linear):
    pass


def shared_packed() -> nn.Module:
    network = nn.Sequential(nn.MultiheadAttention(2, 1), nn.Linear(2, 6))
    network[1].weight = network[0].in_proj_weight
    return network


NOT_COVERED: dict[str, tuple[Any, str]] = {
    "of its own": (Own, "network (Own)"),
    "a subclass": (lambda: nn.Sequential(MyLinear(4, 2)), "0 (MyLinear)"),
    "bilinear": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Bilinear(2, 2, 2)), "1 (Bilinear)"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3), "network (ConvTranspose2d)"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), "1 (BatchNorm1d)"),
    "batch norm without parameters": (
        lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, affine=False)), "1 (BatchNorm1d)"),
    "statistics": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
                   "network (InstanceNorm2d)"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "network (Embedding)"),
    "scaled by frequency": (lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True), "network (EmbeddingBag)"),
    "the largest of a bag": (lambda: nn.EmbeddingBag(3, 2, mode="max"), "network (EmbeddingBag)"),
    "projected": (lambda: nn.LSTM(3, 4, proj_size=2), "network (LSTM)"),
    "biases of keys": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "network (MultiheadAttention)"),
    "zeros attended to": (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True),
                          "network (MultiheadAttention)"),
    "a packed matrix shared": (shared_packed, "1 (Linear)"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
                     "network (ParametrizedLinear)"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_is_named(name: str) -> None:
    make, called = NOT_COVERED[name]
    reason = covers(make())
    assert reason is not None
    assert reason.startswith(f"{called}: ")
    with pytest.raises(StudyError, match="per-sample gradients"):
        TappedGradients(make(), OBJECTIVE)


def test_frozen_layers_of_other_kinds_are_no_obstacle() -> None:
    network = nn.Sequential(MyLinear(4, 4), nn.Tanh(), nn.Linear(4, OUTPUTS))
    network[0].requires_grad_(False)
    assert covers(network) is None
    cohort = cohort_of([1, 3], (4,))
    assert_exact(network, cohort, everybody(cohort))


@pytest.mark.parametrize(
    ("network", "message"),
    [(Outside, "outside of its layer"), (Positions, "table .Embedding.*records"), (Changed, "in place")],
)
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 1, 1, 1], [5]])
def test_misuse_is_refused_in_the_step(network: Any, message: str, counts: list[int]) -> None:
    made = network()
    engine, cohort = TappedGradients(made, OBJECTIVE), cohort_of(counts, (4,))
    with pytest.raises(StudyError, match=message):
        engine.sum(cohort, everybody(cohort), 1.0)
    assert not any("forward" in layer.__dict__ for layer in made.modules())


def test_packed_sequences_and_the_time_first_are_refused() -> None:
    network = Last(nn.LSTM(4, 5))  # time first, fed with the batch first
    cohort = cohort_of([1, 1, 1], (6, 4))
    with pytest.raises(StudyError, match=r"layer \(LSTM\)"):
        TappedGradients(network, OBJECTIVE).sum(cohort, everybody(cohort), 1.0)


# --- empty batches and unused layers


def empty() -> Batch:
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(nothing, nothing, torch.empty(0), 0)


@pytest.mark.parametrize("name", networks())
def test_an_empty_batch_is_zeros(name: str) -> None:
    network, shape = networks()[name]
    found = TappedGradients(network, OBJECTIVE).sum(cohort_of([1, 2], shape), empty(), 1.0)
    assert found.shape == (sum(p.numel() for p in network.parameters()),)
    assert found.dtype == torch.float64
    assert not found.any()


def test_an_unused_layer_has_no_gradient() -> None:
    network = Last(nn.GRU(4, 5, batch_first=True))
    network.more = nn.Linear(3, 3)
    cohort = cohort_of([1, 2], (6, 4))
    assert_exact(network, cohort, everybody(cohort))
    assert not TappedGradients(network, OBJECTIVE).sum(cohort, everybody(cohort), 1.0)[-12:].any()


def test_old_gradients_change_nothing() -> None:
    network, shape = networks()["mlp"]
    cohort = cohort_of([1, 2, 3], shape)
    engine = TappedGradients(network, OBJECTIVE)
    first = engine.sum(cohort, everybody(cohort), 1.0)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert torch.equal(engine.sum(cohort, everybody(cohort), 1.0), first)


def test_the_same_as_per_sample_gradients() -> None:
    network, shape = networks()["mlp"]
    cohort = cohort_of([1, 9, 2, 1], shape)
    other = ClippedGradients(copy.deepcopy(network), OBJECTIVE)
    found = TappedGradients(network, OBJECTIVE).sum(cohort, everybody(cohort), 0.3)
    expected = other.sum(cohort, everybody(cohort), 0.3)
    assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_networks_on_threads_do_not_meet() -> None:
    cohort = cohort_of([1, 2, 3], (6,))
    engines = [TappedGradients(networks()["mlp"][0], OBJECTIVE) for _ in range(4)]
    expected = engines[0].sum(cohort, everybody(cohort), 1.0)
    same: list[bool] = []

    def work(engine: TappedGradients) -> None:
        same.extend(torch.equal(engine.sum(cohort, everybody(cohort), 1.0), expected) for _ in range(20))

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 80


# --- losses


@pytest.mark.parametrize(
    ("task", "loss", "width"),
    [("binary", "cross-entropy", 1), ("binary", "hinge", 1), ("multi-class", "cross-entropy", 4),
     ("multi-class", "hinge", 4), ("regression", "squared", 1), ("regression", "absolute", 1),
     ("binary", "cross-entropy", 2)],
)  # fmt: skip
def test_output_gradients_are_autograds(task: Any, loss: Any, width: int) -> None:
    objective = Objective(task=task, loss=loss)
    torch.manual_seed(1)
    outputs = torch.randn(50, width) * 3
    outputs[:4, 0] = torch.tensor([1.0, -1.0, 0.0, 40.0])  # the hinge's corners
    labels = torch.arange(50).remainder(width if task == "multi-class" else 2)
    labels = labels.float() - 0.3 if task == "regression" else labels
    weights = torch.rand(50)
    leaf = outputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(record_losses(objective, leaf, labels), leaf, weights)
    assert torch.allclose(output_gradients(objective, outputs, labels, weights), expected, atol=1e-6)


# --- random networks and batches


class Residual(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(dim=0) + x


@st.composite
def compositions(draw: Any) -> nn.Module:
    """A network from [records, time, 4] to [records, OUTPUTS]."""
    blocks: list[nn.Module] = []
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(["linear", "norm", "conv", "gru", "lstm", "attention", "again", "residual"])
        )
        if kind == "linear":
            block: nn.Module = nn.Sequential(
                nn.Linear(4, 6, bias=draw(st.booleans())), nn.Tanh(), nn.Linear(6, 4)
            )
        elif kind == "norm":
            block = nn.LayerNorm(4)
        elif kind == "conv":
            block = Turned(
                nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, groups=draw(st.sampled_from([1, 2]))),
                              nn.GroupNorm(2, 4))
            )  # fmt: skip
        elif kind in ("gru", "lstm"):
            layer = (nn.GRU if kind == "gru" else nn.LSTM)(4, 2, bidirectional=True, batch_first=True)
            block = First(layer)
        elif kind == "attention":
            block = nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True)
        elif kind == "again" and made:
            block = draw(st.sampled_from(made))
        else:
            block = Residual(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(True)))
        made.append(block)
        blocks.append(block)
        if draw(st.booleans()):
            blocks.append(draw(st.sampled_from([nn.Tanh(), nn.GELU(), nn.Sigmoid()])))
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(12, OUTPUTS))


class Turned(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return outputs


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x)[0]
        return outputs


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    network=compositions(),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=3) | st.lists(st.integers(1, 3), max_size=6),
    mean=st.booleans(),
    seed=st.integers(0, 999),
    frozen=st.sets(st.integers(0, 12)),
    memory=st.sampled_from([1 << 28, 1 << 15, 1]),
)
def test_random_networks_and_batches(
    network: nn.Module, counts: list[int], mean: bool, seed: int, frozen: set[int], memory: int
) -> None:
    parameters = list(network.parameters())
    torch.manual_seed(seed)
    for index, parameter in enumerate(parameters):
        parameter.data.normal_(std=0.6)
        parameter.requires_grad_(index not in frozen or index == len(parameters) - 1)
    cohort = cohort_of(counts, (3, 4), seed)
    batch = everybody(cohort, mean)
    if counts:
        assert_exact(network, cohort, batch, memory=memory)
    else:
        assert not TappedGradients(network, OBJECTIVE).sum(cohort, batch, 1.0).any()


# --- memory


class Counting(nn.Module):
    """Notes how many records pass at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.seen = nn.Linear(6, 50), nn.Linear(50, OUTPUTS), list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        outputs: torch.Tensor = self.head(self.layer(x).tanh())
        return outputs


def test_pieces_hold_no_more_records_than_memory_allows() -> None:
    network = Counting()
    cohort = cohort_of([1, 9, 2, 30, 1, 4, 4, 4], (6,))
    engine = TappedGradients(network, OBJECTIVE, memory=1)
    record = engine._measured(cohort.features)
    assert 4 * 50 <= record <= 40 * 50  # activations, their gradients, and what passes beside
    assert_exact(network, cohort, everybody(cohort), memory=8 * record * 4 // 3 + 1)
    for records, passes in ((8, [1, 8, 1, 2, 8, 8, 8, 6, 5, 8]), (20, [16] * 4)):
        network.seen.clear()
        engine = TappedGradients(network, OBJECTIVE, memory=records * record * 4 // 3 + 1)
        engine.sum(cohort, everybody(cohort), 1.0)
        assert network.seen[1:] == passes  # the first is for measuring


def test_many_images_pass_in_equal_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_ENOUGH", 1)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, OUTPUTS))
    cohort = cohort_of([1] * 70, (1, 6, 6))
    engine = TappedGradients(network, OBJECTIVE)
    sizes = {0: 4, 1: 4, 64: 64, 65: 36, 70: 36, 200: 52}
    assert {n: engine._seats(cohort.features, n).most for n in sizes} == sizes
    assert engine._seats(cohort.features, 200, alone=False).most == 200  # one patient's may be all of them
    assert_exact(network, cohort, everybody(cohort))


def test_measuring_leaves_torchs_generator_alone() -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, OUTPUTS))
    cohort = cohort_of([1, 1], (6,))
    engine = TappedGradients(network, OBJECTIVE)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    engine._limits(cohort.features)
    assert torch.equal(torch.rand(3), expected)


@settings(deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 30))
def test_blocks_and_layouts_hold_every_record_once(counts: list[int], size: int) -> None:
    patient = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    groups = Groups(patient, len(counts))
    values = torch.randn(len(patient), 2, 3)
    expected = torch.stack([values[patient == p].sum(dim=(0, 1)) for p in range(len(counts))])
    assert torch.allclose(groups.sum(values.sum(dim=1)), expected, atol=1e-5)
    blocks = list(groups.blocks(size))
    assert [b.records.start for b in blocks[1:]] == [b.records.stop for b in blocks[:-1]]
    assert all(b.groups.records <= size or b.groups.patients == 1 for b in blocks)
    assert sum(b.groups.patients for b in blocks) == len(counts)
    for layout in groups.layouts():
        who = slice(None) if layout.patients is None else layout.patients
        assert torch.allclose(layout.rows(values).sum(dim=1), expected[who], atol=1e-5)
