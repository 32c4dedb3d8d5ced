"""Weights that a coordinator chose so that rounding decides: a patient still counts once, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
import torch
from tapped import one_thread
from torch import nn
from torch.nn import functional

from client import dpsgd
from client.batches import batch_of
from client.blocks import LANES, filled, layout
from client.cohort import Cohort, Patients, lanes_of
from client.dense import DenseGradients
from client.dpsgd import ClippedGradients
from client.taps import TappedGradients, products
from client.taps.company import Seats
from client.training import Trainer
from common.errors import StudyError
from common.models import parameter_arrays
from common.privacy.plan import plan_study
from common.study import Objective

__all__ = ["one_thread"]  # a fixture that pytest finds here
CODES = 5  # of each category, one-hot encoded
TRIALS = 60


def cancelling(random: np.random.Generator, width: int, scale: float) -> nn.Linear:
    """A layer whose sums cancel: what is left of a record's logit is rounding, many times enlarged."""
    layer = nn.Linear(width, 1)
    weights = np.repeat(random.normal(size=width // CODES) * scale, CODES).astype(np.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights)[None])
        layer.bias.fill_(-float(weights[::CODES].astype(np.float64).sum()))
    return layer


def one_hot(random: np.random.Generator, records: int, width: int) -> torch.Tensor:
    rows = np.zeros((records, width), np.float32)
    for first in range(0, width, CODES):
        rows[np.arange(records), first + random.integers(0, CODES, records)] = 1
    return torch.from_numpy(rows)


def single(features: torch.Tensor, labels: torch.Tensor) -> Patients:
    return Patients(features, labels, torch.arange(len(labels) + 1))


def neighbours(seed: int) -> tuple[nn.Linear, Patients, Patients]:
    """A hostile layer, and two cohorts that differ in one patient anywhere."""
    random = np.random.default_rng(seed)
    count, width = int(random.integers(20, 90)), CODES * int(random.integers(1, 9))
    features = one_hot(random, count, width)
    labels = torch.from_numpy(random.integers(0, 2, count))
    kept = torch.arange(count) != int(random.integers(count))
    layer = cancelling(random, width, 10.0 ** random.integers(6, 14))
    return layer, single(features, labels), single(features[kept], labels[kept])


def changes_of_sums() -> list[float]:
    """How far the clipped sum moves when one patient goes, in units of C."""
    found = []
    for seed in range(TRIALS):
        layer, more, fewer = neighbours(seed)
        clipped = ClippedGradients(nn.Sequential(layer), small.study().objective, expected=40.0)
        sums = [
            clipped.sum(p, batch_of(p, np.arange(len(p)), small.step_plan(), None), 1.0)  # type: ignore[arg-type]
            for p in (more, fewer)
        ]
        found.append(float((sums[0] - sums[1]).norm()))
    return found


def changes_of_histograms() -> list[float]:
    found = []
    for seed in range(TRIALS):
        layer, more, fewer = neighbours(seed)
        width = layer.in_features
        columns = [{"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": width}]
        wanted = small.study(data={"columns": columns})
        told = []
        for patients in (more, fewer):
            trainer = Trainer(wanted, Cohort(patients, patients), plan_study(wanted, 50))
            names = parameter_arrays(trainer.network)
            values = zip(names, (layer.weight, layer.bias), strict=True)
            told.append(trainer.evaluate({n: v.detach().numpy() for n, v in values}, 10)["scores"])
        found.append(float(np.linalg.norm(told[0] - told[1])))
    return found


def test_the_clipped_sum_moves_by_no_more_than_a_patient() -> None:
    assert max(changes_of_sums()) <= 1.0


def test_a_histogram_moves_by_no_more_than_a_patient() -> None:
    assert max(changes_of_histograms()) <= 1.0 + 1e-9


def as_they_come(lanes: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    everybody = torch.arange(len(lanes))
    return [(everybody, everybody)]


def test_without_blocks_these_tests_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "layout", as_they_come)
    monkeypatch.setattr(dpsgd, "filled", lambda values, rows, size: values)
    assert max(changes_of_sums()) > 1.01


class Unlike(nn.Module):
    """Of a type that Opacus takes, and the taps don't know: x · 2e38, which reaches the layer above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2e38


def test_an_overflow_doesnt_depend_on_the_order_of_records() -> None:
    """v, v and -v overflow in one order and not in another; lanes decide which, and others are in them."""
    objective = Objective(task="binary", loss="hinge")
    drawn = torch.cat([torch.ones(500, 1), torch.rand(500, 1, generator=torch.Generator().manual_seed(0))], 1)
    lanes = lanes_of(drawn) % LANES
    own = torch.stack([drawn[lanes == lane][0] for lane in (0, 1, 2)])
    signs = torch.tensor([0, 0, 1])

    def summed(others: int) -> torch.Tensor:
        features = torch.cat([own[:1].repeat(others, 1), own.repeat(32, 1)])
        labels = torch.cat([signs[:1].repeat(others), signs.repeat(32)])
        offsets = torch.cat([torch.arange(others), others + 3 * torch.arange(33)])
        cohort = Patients(features, labels, offsets)
        network = nn.Sequential(Unlike(), nn.Linear(2, 1, bias=False))
        nn.init.zeros_(network[1].weight)  # type: ignore[arg-type]
        plan = small.step_plan(max_records=3, average_records=False)
        batch = batch_of(cohort, np.arange(len(cohort)), plan, None)  # type: ignore[arg-type]
        return ClippedGradients(network, objective).sum(cohort, batch, 1.0)

    assert float((summed(1) - summed(0)).norm()) <= 1.0


@pytest.mark.parametrize("clipping_norm", [1e-9, 1e-12, 1e-20])
def test_no_clipping_norm_is_too_small_for_float32(clipping_norm: float) -> None:
    """A gradient of 2^90 and more times C / 2^90; what wouldn't be exact is refused."""
    privacy = {"mode": "patient-dp", "epsilon": 2.0, "delta": 1e-3, "clipping_norm": clipping_norm}
    if clipping_norm < 1e-9:
        with pytest.raises(StudyError, match="clipping_norm"):
            small.study(privacy=privacy)
        return
    assert small.study(privacy=privacy).privacy.clipping_norm == clipping_norm
    layers = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    cohort = single(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    batch = batch_of(cohort, np.arange(1), small.step_plan(), None)  # type: ignore[arg-type]
    for power in np.linspace(40, 49.9, 40):
        for layer, value in zip(layers, (2.0**power, 2.0**-power, 2.0**power), strict=True):
            nn.init.constant_(layer.weight, value)
        for engine in (DenseGradients, TappedGradients):
            found = engine(network, Objective(task="binary", loss="hinge")).sum(cohort, batch, clipping_norm)
            assert float(found.norm()) <= clipping_norm


# --- through the taps

CATEGORIES = 4  # of one record, or of each of its positions
WIDTH = CODES * CATEGORIES


def hostile_row(random: np.random.Generator, scale: float, places: int = 1) -> tuple[torch.Tensor, float]:
    """Weights [WIDTH] of one-hot codes at so many places, and the bias that makes their sum nothing."""
    weights = np.repeat(random.normal(size=CATEGORIES) * scale, CODES).astype(np.float32)
    return torch.from_numpy(weights), -places * float(weights[::CODES].astype(np.float64).sum())


def made_hostile(random: np.random.Generator, weight: torch.Tensor, bias: torch.Tensor, scale: float) -> None:
    """All outputs of [outputs, WIDTH, places …] or [outputs, WIDTH] cancel, each in its own way."""
    with torch.no_grad():
        for output in range(len(weight)):
            row, offset = hostile_row(random, scale, weight[output, 0].numel())
            weight[output] = row.view(-1, *[1] * (weight.dim() - 2))
            bias[output] = offset


class Reading(nn.Module):
    """A layer of sequences, and a head that reads its last outputs."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        outputs: torch.Tensor = self.head(self.layer(*inputs)[0][:, -1])
        return outputs


class Block(nn.Module):
    """A residual block whose first convolution is hostile."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(WIDTH, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.second, self.head = nn.Conv2d(6, WIDTH, 3, padding=1), nn.Linear(WIDTH * 9, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x + self.second(self.norm(self.first(x)).relu())
        outputs: torch.Tensor = self.head(found.flatten(1))
        return outputs


Made = tuple[nn.Module, tuple[int, ...]]
"""A network, and the shape of positions at which a record has its codes."""


def convolutional(random: np.random.Generator, scale: float, layer: Any, sides: tuple[int, ...]) -> Made:
    first = layer(WIDTH, 3, sides)
    made_hostile(random, first.weight, first.bias, scale)
    return nn.Sequential(first, nn.Flatten(), nn.Linear(3, 1)), sides


def sequential(random: np.random.Generator, scale: float, layer: nn.Module) -> Made:
    if isinstance(layer, nn.MultiheadAttention):
        made_hostile(random, layer.in_proj_weight, layer.in_proj_bias, scale)
        return Reading(layer, WIDTH), (6,)
    made_hostile(random, layer.weight_ih_l0, layer.bias_ih_l0, scale)
    return Reading(layer, 7), (6,)


def dense(random: np.random.Generator, scale: float, outputs: int) -> Made:
    layers = [nn.Linear(WIDTH, outputs)] + [nn.Linear(outputs, 1)] * (outputs > 1)
    made_hostile(random, layers[0].weight, layers[0].bias, scale)
    return nn.Sequential(*layers), ()


def residual(random: np.random.Generator, scale: float) -> Made:
    network = Block()
    made_hostile(random, network.first.weight, network.first.bias, scale)
    return network, (3, 3)


def looking_up(random: np.random.Generator, scale: float) -> Made:
    """Records are codes; a table of unit vectors makes them one-hot."""
    table, (head, _) = nn.EmbeddingBag(WIDTH, WIDTH, mode="sum"), dense(random, scale, 1)
    with torch.no_grad():
        table.weight.copy_(torch.eye(WIDTH))
    return nn.Sequential(table, head), ()


NETWORKS: dict[str, Callable[[np.random.Generator, float], Made]] = {
    "linear": lambda r, s: dense(r, s, 1),
    "mlp": lambda r, s: dense(r, s, 9),
    "conv2d": lambda r, s: convolutional(r, s, nn.Conv2d, (3, 2)),
    "conv3d": lambda r, s: convolutional(r, s, nn.Conv3d, (2, 2, 3)),
    "gru": lambda r, s: sequential(r, s, nn.GRU(WIDTH, 7, batch_first=True)),
    "lstm": lambda r, s: sequential(r, s, nn.LSTM(WIDTH, 7, batch_first=True)),
    "rnn": lambda r, s: sequential(r, s, nn.RNN(WIDTH, 7, batch_first=True)),
    "attention": lambda r, s: sequential(r, s, nn.MultiheadAttention(WIDTH, 4, batch_first=True)),
    "residual": residual,
    "embedding": looking_up,
}


def codes_of(random: np.random.Generator, name: str, records: int, places: tuple[int, ...]) -> torch.Tensor:
    """One-hot codes at each place, channels first for convolutions; the codes themselves for a table."""
    if name == "embedding":
        return torch.from_numpy(
            random.integers(0, CODES, (records, CATEGORIES)) + CODES * np.arange(CATEGORIES)
        )
    flat = one_hot(random, records * math.prod(places), WIDTH).view(records, *places, WIDTH)
    return flat.movedim(-1, 1).contiguous() if name in ("conv2d", "conv3d", "residual") else flat


def changes_of_taps(name: str, trials: int) -> list[float]:
    """How far the sum moves when one patient goes, and that nobody's outputs move."""
    found = []
    for seed in range(trials):
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        network, places = NETWORKS[name](random, 10.0 ** random.integers(5, 13))
        counts = random.integers(1, 5 if seed % 2 else 2, int(random.integers(5, 60)))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        features = codes_of(random, name, int(counts.sum()), places)
        patients = Patients(features, torch.from_numpy(random.integers(0, 2, len(features))), offsets)
        engine = TappedGradients(network, small.study().objective)
        everyone, out = np.arange(len(counts)), int(random.integers(len(counts)))
        plan = small.step_plan()
        sums = [
            engine.sum(patients, batch_of(patients, who, plan, None), 1.0)  # type: ignore[arg-type]
            for who in (everyone, np.delete(everyone, out))
        ]
        found.append(float((sums[0] - sums[1]).norm()))
        kept = torch.ones(len(features), dtype=torch.bool)
        kept[int(offsets[out]) : int(offsets[out + 1])] = False
        outputs = engine.outputs(features)
        same = torch.equal(outputs[kept].nan_to_num(7.0), engine.outputs(features[kept]).nan_to_num(7.0))
        found.append(0.0 if same else math.inf)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tapped_sum_moves_by_no_more_than_a_patient(name: str) -> None:
    assert max(changes_of_taps(name, 10)) <= 1.0


def test_without_tiles_this_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "rows_product", functional.linear)
    monkeypatch.setattr(Seats, "seated", lambda self, records: (records, slice(None)))
    found = changes_of_taps("linear", 16)
    assert max(found[::2]) > 1.01
    assert max(found[1::2]) > 1.01


# --- blocks and lanes


@pytest.mark.parametrize("widths", [(30, 64, 1), (30, 7, 3), (31, 10, 5), (3, 8, 2), (784, 128, 10)])
def test_a_record_is_computed_alike_in_any_company(widths: tuple[int, int, int]) -> None:
    """Bit for bit, forward and backward, through a network of two layers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:]))
    random = np.random.default_rng(1)
    features = torch.from_numpy(random.normal(size=(70, widths[0])).astype(np.float32))
    patients = single(features, torch.zeros(70, dtype=torch.int64))

    def computed(records: torch.Tensor) -> dict[int, bytes]:
        found = {}
        for chosen, rows in layout(patients.lanes[records], 64):
            block = filled(features[records[chosen]], rows, 64).requires_grad_()
            outputs = network(block)
            outputs.square().sum().backward()
            assert block.grad is not None
            for record, row in zip(records[chosen].tolist(), rows.tolist(), strict=True):
                found[record] = outputs[row].detach().numpy().tobytes() + block.grad[row].numpy().tobytes()
        return found

    whole = computed(torch.arange(70))
    for _ in range(40):
        some = torch.from_numpy(random.permutation(70)[: int(random.integers(1, 71))])
        assert all(whole[record] == bits for record, bits in computed(some).items())


def test_every_record_is_in_one_row_of_its_lane() -> None:
    lanes = torch.from_numpy(np.random.default_rng(0).integers(-100, 100, 1000))
    seen = []
    for chosen, rows in layout(lanes, 128):
        assert len(set(rows.tolist())) == len(rows) <= 128
        assert torch.equal(rows.remainder(LANES), lanes[chosen].remainder(LANES))
        seen += chosen.tolist()
    assert sorted(seen) == list(range(1000))
    assert list(layout(lanes[:0], 128)) == []
