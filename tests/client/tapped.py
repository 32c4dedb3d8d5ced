"""Networks and cohorts that the tests of the taps share, and the loop that they are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from client.batches import Batch
from client.cohort import Patients
from client.rowwise import CLIPPING_MARGIN
from client.taps import TappedGradients
from common.objectives import record_losses
from common.study import Objective

OUTPUTS = 3
OBJECTIVE = Objective(task="multi-class")

Network = Callable[[], nn.Module]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slower on more threads, above all where others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cohort_of(
    counts: Sequence[int], shape: Sequence[int], seed: int = 0, tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Patients:  # fmt: skip
    """Patients with so many random records [*shape] each: numbers, or integers below `tokens`."""
    random = np.random.default_rng(seed)
    records = int(sum(counts))
    if tokens is None:
        features = torch.from_numpy(random.normal(size=(records, *shape))).to(dtype)
    else:
        features = torch.from_numpy(random.integers(0, tokens, (records, *shape)))
    return Patients(
        features=features,
        labels=torch.from_numpy(random.integers(0, OUTPUTS, records)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
    )


def everybody(cohort: Patients, mean: bool = True, dtype: torch.dtype = torch.float32) -> Batch:
    counts = cohort.offsets.diff()
    patient = torch.repeat_interleave(torch.arange(len(cohort)), counts)
    weights = (1.0 / counts.double() if mean else torch.ones(len(cohort), dtype=torch.float64))[patient]
    return Batch(torch.arange(len(cohort.labels)), patient, weights.to(dtype), len(cohort))


def gradients_by_hand(network: nn.Module, cohort: Patients, batch: Batch,
                      objective: Objective = OBJECTIVE) -> torch.Tensor:  # fmt: skip
    """Each patient's gradient [patients, parameters]: a loop over records, plain autograd, in float64."""
    exact = copy.deepcopy(network).double()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    result = torch.zeros(batch.patients, sum(p.numel() for p in parameters), dtype=torch.float64)
    for record, patient, weight in zip(batch.records, batch.patient, batch.weights.double(), strict=True):
        x = cohort.features[record][None]
        outputs = exact(x.double() if x.is_floating_point() else x)
        loss = record_losses(objective, outputs, cohort.labels[record][None]).sum() * weight
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        result[patient] += torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(found, parameters, strict=True)
            ]
        )
    return result


def clipped_by_hand(gradients: torch.Tensor, C: float) -> torch.Tensor:
    norms = gradients.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (gradients * (C * (1 - CLIPPING_MARGIN) / norms).clamp(max=1.0)).sum(dim=0)


def clip_between(gradients: torch.Tensor) -> list[float]:
    """Norms to clip to: every patient, about half of them, nobody."""
    norms = gradients.norm(dim=1)
    return [float(norms.min()) / 3, float(norms.median()) * 1.001, float(norms.max()) * 2]


def assert_exact(network: nn.Module, cohort: Patients, batch: Batch, *, memory: int | None = None,
                 tolerance: float = 1e-5, objective: Objective = OBJECTIVE) -> None:  # fmt: skip
    """The taps' sum is the loop's, to `tolerance` of its largest number, above, below and between."""
    engine = (
        TappedGradients(network, objective)
        if memory is None
        else TappedGradients(network, objective, memory=memory)
    )
    gradients = gradients_by_hand(network, cohort, batch, objective)
    for C in clip_between(gradients):
        found = engine.sum(cohort, batch, C)
        expected = clipped_by_hand(gradients, C)
        assert found.shape == expected.shape
        assert found.dtype == torch.float64
        error = float((found.double() - expected).abs().max())
        assert error <= tolerance * float(expected.abs().max()) + 1e-12, (error, C)
        assert not found.requires_grad
