"""The same federated work without a framework: what a researcher writes in one afternoon.

No messages, no ledger, no checks, no checkpoints, no evaluation, one thread. With privacy, start-up holds
Opacus' own search for the noise, as the engine's holds ours.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from opacus import GradSampleModule
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from common.models import study_model
from common.study import Study
from simulations.benchmarks.measure import Timing
from simulations.benchmarks.workload import BATCH, CLIPPING_NORM, LEARNING_RATE, STEPS

Site = tuple[torch.Tensor, torch.Tensor]
LocalSteps = Callable[[Site], None]


def run_loop(study: Study, sites: Path, *, loader: bool = False) -> Timing:
    """Train as `study` says, site after site, with torch alone (and Opacus for a private study).

    Args:
        loader: draw batches with a DataLoader, as tutorials do, instead of slicing tensors.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.perf_counter()
    data = [_load(folder, study) for folder in sorted(sites.iterdir())]
    model, local_steps = _prepared(study, data, loader)
    parameters: list[torch.Tensor] = list(model.parameters())
    total = sum(len(labels) for _, labels in data)
    ends = []
    for _ in range(study.algorithm.rounds):
        start = [p.detach().clone() for p in parameters]
        mean = [torch.zeros_like(p) for p in start]
        for site in data:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            local_steps(site)
            with torch.no_grad():
                torch._foreach_add_(mean, parameters, alpha=len(site[1]) / total)
        with torch.no_grad():
            torch._foreach_copy_(parameters, mean)
        ends.append(time.perf_counter())
    return Timing(ends[-1] - began, (ends[-1] - ends[0]) / max(1, len(ends) - 1), len(ends))


def _load(folder: Path, study: Study) -> Site:
    table = pd.read_csv(folder / "patients.csv")
    training = study.public_training_size(len(table))
    features = torch.tensor(table.filter(like="x_").to_numpy()[:training] / 8, dtype=torch.float32)
    return features, torch.tensor(table["y"].to_numpy()[:training], dtype=torch.float32)


def _prepared(study: Study, data: list[Site], loader: bool) -> tuple[nn.Module, LocalSteps]:
    if study.private:
        return _private(study, len(data[0][1]))
    model = study_model(study)

    def local_steps(site: Site) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for features, labels in _loaded(site) if loader else _sliced(site):
            optimizer.zero_grad()
            _loss(model, features, labels).backward()
            optimizer.step()

    return model, local_steps


def _private(study: Study, training: int) -> tuple[nn.Module, LocalSteps]:
    """Opacus' per-sample gradients and its optimiser, on batches that it would draw too."""
    model = GradSampleModule(study_model(study))
    rate = min(1.0, BATCH / training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its search starts where its accountant is not exact
        noise = get_noise_multiplier(
            target_epsilon=float(study.privacy.epsilon or 0),
            target_delta=float(study.privacy.delta or 0),
            sample_rate=rate,
            steps=STEPS * study.algorithm.rounds,
            accountant="prv",  # the default of Opacus' own engine
        )

    def local_steps(site: Site) -> None:
        features, labels = site
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            noise_multiplier=noise,
            max_grad_norm=CLIPPING_NORM,
            expected_batch_size=BATCH,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for _ in range(STEPS):
                chosen = (torch.rand(len(labels)) < rate).nonzero().flatten()
                if len(chosen):
                    _loss(model, features[chosen], labels[chosen]).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    return model, local_steps


def _loss(model: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return binary_cross_entropy_with_logits(model(features).flatten(), labels)


def _sliced(site: Site) -> Iterator[Site]:
    features, labels = site
    done = 0
    while done < STEPS:
        order = torch.randperm(len(labels))
        for first in range(0, len(order), BATCH):
            if done < STEPS:
                chosen = order[first : first + BATCH]
                yield features[chosen], labels[chosen]
                done += 1


def _loaded(site: Site) -> Iterator[Site]:
    done = 0
    while done < STEPS:
        for features, labels in DataLoader(TensorDataset(*site), batch_size=BATCH, shuffle=True):
            if done < STEPS:
                yield features, labels
                done += 1
