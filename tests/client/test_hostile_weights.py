"""Weights that a coordinator chose so that rounding decides: a patient still counts once, and no more."""

from __future__ import annotations

import numpy as np
import pytest
import small
import torch
from torch import nn

from client import dpsgd, training
from client.blocks import LANES, filled, layout
from client.cohort import Cohort, Patients
from client.dpsgd import ClippedGradients, batch_of
from client.training import Trainer
from common.models import parameter_arrays
from common.privacy.plan import plan_study

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
            names = parameter_arrays(trainer._network)
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
    for module in (dpsgd, training):
        monkeypatch.setattr(module, "layout", as_they_come)
        monkeypatch.setattr(module, "filled", lambda values, rows, size: values)
    assert max(changes_of_sums()) > 1.01
    assert max(changes_of_histograms()) > 1.01


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
