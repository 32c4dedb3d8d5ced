"""The same rounds without a framework: what a researcher writes in an afternoon, and what a patient one can.

No messages, policy, ledger, signatures or store; cohorts in memory before the clock starts. Without privacy
each takes fedward's own batches (drawn beforehand), so that all must end with the same weights.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from client.cohort import Patients, load_cohort
from common.messages import Arrays
from common.models import parameter_arrays, study_model
from common.privacy.noise import Seeded
from common.privacy.plan import StudyPlan, plan_study
from common.study import Study
from simulations.engine.sites import find_sites


@dataclass(frozen=True)
class Floor:
    """Everything that rounds need.

    Attributes:
        seed: of the initial weights.
        orders: [round][site] → int64 [patients], who comes in which batch.
        weights: of the sites in the mean; they sum to 1.
    """

    study: Study
    seed: int
    sites: tuple[Patients, ...]
    test: Patients
    plans: tuple[StudyPlan, ...]
    orders: tuple[tuple[torch.Tensor, ...], ...]
    weights: tuple[float, ...]

    @property
    def batch(self) -> int:
        return self.study.training.patients_per_step or 1

    @property
    def rate(self) -> float:
        return self.study.training.optimizer.learning_rate


@dataclass(frozen=True)
class Ended:
    """Attributes:
    ends: seconds since the first round began, at which each round ended.
    processor: likewise, of the processor.
    """

    ends: tuple[float, ...]
    processor: tuple[float, ...]
    parameters: Arrays


Rounds = Callable[[Floor], Callable[[int], None]]


def load(study: Study, sites: Path, seed: int) -> Floor:
    """Read the sites' cohorts and draw the batches as fedward's vaults would with this seed."""
    random = Seeded(seed)
    folders = [place.folder() for place in find_sites(sites, sites)]
    cohorts = [load_cohort(f, study, random.key("split", f.name)) for f in folders]
    trains = tuple(cohort.train for cohort in cohorts)
    tests = [cohort.test for cohort in cohorts]
    orders = tuple(
        tuple(
            torch.from_numpy(random.stream("sampling", f.name, study.digest, number).permutation(len(train)))
            for f, train in zip(folders, trains, strict=True)
        )
        for number in range(1, study.algorithm.rounds + 1)
    )
    sizes = [study.public_training_size(f.file.site.public_size) for f in folders]
    return Floor(
        study=study,
        seed=seed,
        sites=trains,
        test=Patients(
            torch.cat([t.features for t in tests]),
            torch.cat([t.labels for t in tests]),
            torch.arange(sum(len(t) for t in tests) + 1),
        ),
        plans=tuple(plan_study(study, f.file.site.public_size) for f in folders),
        orders=orders,
        weights=tuple(size / sum(sizes) for size in sizes),
    )


def run_floor(way: str, floor: Floor) -> Ended:
    """Take all rounds, the global model evaluated after each on all test patients together. One thread."""
    torch.set_num_threads(1)  # the fastest for work in such small pieces
    network = study_model(floor.study, floor.seed)
    one_round = FLOORS[way](floor, network)
    ends, processor = list[float](), list[float]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns of its noise, its hooks and its accountant
        began = time.perf_counter()
        for number in range(floor.study.algorithm.rounds):
            one_round(number)
            evaluate(network, floor.test)
            if not number:  # as fedward does: to look through all that was imported would be most of a round
                gc.freeze()
            ends.append(time.perf_counter() - began)
            processor.append(time.process_time())
    gc.unfreeze()
    return Ended(tuple(ends), tuple(processor), parameter_arrays(network))


@torch.no_grad()
def evaluate(network: nn.Module, test: Patients) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    network.eval()
    outputs = network(test.features)
    loss = functional.cross_entropy(outputs, test.labels)
    return loss.item(), (outputs.argmax(1) == test.labels).float().mean().item()


def _average(network: nn.Module, states: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> None:
    mean = {
        name: sum((s[name] * w for s, w in zip(states, weights, strict=True)), torch.zeros(()))
        for name in states[0]
    }
    network.load_state_dict(mean)


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> None:
    """As everybody writes it."""
    for features, labels in loader:
        optimizer.zero_grad()
        functional.cross_entropy(model(features), labels).backward()
        optimizer.step()


def _plain(floor: Floor, network: nn.Module) -> Callable[[int], None]:
    """What a tutorial shows: a DataLoader, a model and an optimiser made anew for every site and round."""

    def one_round(number: int) -> None:
        states = []
        for patients, order in zip(floor.sites, floor.orders[number], strict=True):
            model = study_model_like(network)
            optimizer = torch.optim.SGD(model.parameters(), lr=floor.rate)
            data = TensorDataset(patients.features, patients.labels)
            loader = DataLoader(data, batch_size=floor.batch, sampler=order.tolist())
            model.train()
            _epoch(model, optimizer, loader)
            states.append(model.state_dict())
        _average(network, states, floor.weights)

    return one_round


def study_model_like(network: nn.Module) -> nn.Module:
    """A model of its own with the same weights, as a tutorial makes one."""
    if not all(isinstance(m, nn.Linear | nn.ReLU) for m in network.children()):
        return deepcopy(network)
    layers = [nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else nn.ReLU()
              for m in network.children()]  # fmt: skip
    model = nn.Sequential(*layers)
    model.load_state_dict(network.state_dict())
    return model


def _tensor(floor: Floor, network: nn.Module) -> Callable[[int], None]:
    """One model kept, slices of tensors instead of a DataLoader, gradients taken directly."""
    model = study_model_like(network)
    parameters: list[torch.Tensor] = list(model.parameters())
    shared: list[torch.Tensor] = list(network.parameters())

    def one_round(number: int) -> None:
        model.train()
        total = [torch.zeros_like(p) for p in shared]
        for patients, order, weight in zip(floor.sites, floor.orders[number], floor.weights, strict=True):
            with torch.no_grad():
                torch._foreach_copy_(parameters, shared)
            features, labels = patients.features[order], patients.labels[order]
            for first in range(0, len(order), floor.batch):
                chosen = slice(first, first + floor.batch)
                loss = functional.cross_entropy(model(features[chosen]), labels[chosen])
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, gradients, alpha=-floor.rate)
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=weight)
        with torch.no_grad():
            torch._foreach_copy_(shared, total)

    return one_round


def _vmap(floor: Floor, network: nn.Module) -> Callable[[int], None]:
    """All sites stacked, gradients by `torch.func`."""
    from torch.func import functional_call, grad, vmap

    features, labels, rows = _stacked(floor)
    model = study_model_like(network)
    weights = torch.tensor(floor.weights)

    def loss(
        parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        found = functional.cross_entropy(functional_call(model, parameters, (x,)), y, reduction="none")
        return (found * mask).sum() / mask.sum().clamp(min=1)

    gradients = vmap(grad(loss))

    def one_round(number: int) -> None:
        order, mask = _padded(floor.orders[number])
        parameters = {
            name: p.detach().expand(len(rows), *p.shape).clone() for name, p in network.named_parameters()
        }
        for first in range(0, order.shape[1], floor.batch):
            chosen = order[:, first : first + floor.batch]
            found = gradients(
                parameters, features[rows, chosen], labels[rows, chosen], mask[:, first : first + floor.batch]
            )
            for name, p in parameters.items():
                p.add_(found[name], alpha=-floor.rate)
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(torch.tensordot(weights, parameters[name], dims=1))

    return one_round


def _numpy(floor: Floor, network: nn.Module) -> Callable[[int], None]:
    """All sites stacked, forward and backward pass of the two layers by hand."""
    stacked, targets, index = _stacked(floor)
    features, labels, rows = stacked.numpy(), targets.numpy(), index.numpy()
    weights = np.array(floor.weights, dtype=np.float32)
    unit = np.eye(2, dtype=np.float32)

    def one_round(number: int) -> None:
        order, mask = (each.numpy() for each in _padded(floor.orders[number]))
        w1, b1, w2, b2 = (np.repeat(p.detach().numpy()[None], len(rows), 0) for p in network.parameters())
        for first in range(0, order.shape[1], floor.batch):
            chosen, m = order[:, first : first + floor.batch], mask[:, first : first + floor.batch]
            x, y = features[rows, chosen], unit[labels[rows, chosen]]
            hidden = x @ w1.transpose(0, 2, 1) + b1[:, None]
            active = np.maximum(hidden, 0)
            out = active @ w2.transpose(0, 2, 1) + b2[:, None]
            out = np.exp(out - out.max(2, keepdims=True))
            out /= out.sum(2, keepdims=True)
            d2 = (out - y) * (m / np.maximum(m.sum(1, keepdims=True), 1))[..., None]
            d1 = (d2 @ w2) * (hidden > 0)
            w2 -= floor.rate * (d2.transpose(0, 2, 1) @ active)
            b2 -= floor.rate * d2.sum(1)
            w1 -= floor.rate * (d1.transpose(0, 2, 1) @ x)
            b1 -= floor.rate * d1.sum(1)
        with torch.no_grad():
            for p, found in zip(network.parameters(), (w1, b1, w2, b2), strict=True):
                p.copy_(torch.from_numpy(np.tensordot(weights, found, 1)))

    return one_round


def _stacked(floor: Floor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [sites, most patients, width], labels, and a column of the sites' numbers."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    features, labels = pad([s.features for s in floor.sites]), pad([s.labels for s in floor.sites])
    return features, labels, torch.arange(len(floor.sites))[:, None]


def _padded(orders: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders [sites, most patients], and a mask of those that are there, float32."""
    order = nn.utils.rnn.pad_sequence(list(orders), batch_first=True)
    counts = torch.tensor([len(each) for each in orders])
    return order, (torch.arange(order.shape[1]) < counts[:, None]).float()


def _opacus(floor: Floor, network: nn.Module) -> Callable[[int], None]:
    """As Flower's own example does: a privacy engine made anew for every site and round."""
    from opacus import PrivacyEngine

    def one_round(number: int) -> None:
        states = []
        for patients, plan in zip(floor.sites, floor.plans, strict=True):
            data = TensorDataset(patients.features, patients.labels)
            wrapped, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
                module=(model := study_model_like(network).train()),
                optimizer=torch.optim.SGD(model.parameters(), lr=floor.rate),
                data_loader=DataLoader(data, batch_size=floor.batch),
                noise_multiplier=plan.step.noise_multiplier,
                max_grad_norm=plan.step.clipping_norm or 0.0,
            )
            _epoch(wrapped, optimizer, loader)
            states.append(model.state_dict())
        _average(network, states, floor.weights)

    return one_round


def _opacus_kept(floor: Floor, network: nn.Module) -> Callable[[int], None]:
    """Opacus wrapped once, with batches by index: what one does who has measured."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(study_model_like(network))
    parameters: list[torch.Tensor] = list(model.parameters())
    shared: list[torch.Tensor] = list(network.parameters())
    optimizers = [
        DPOptimizer(
            torch.optim.SGD(parameters, lr=floor.rate),
            noise_multiplier=plan.step.noise_multiplier,
            max_grad_norm=plan.step.clipping_norm or 0.0,
            expected_batch_size=max(1, int(plan.step.divisor)),
        )
        for plan in floor.plans
    ]

    def one_round(number: int) -> None:
        total = [torch.zeros_like(p) for p in shared]
        for patients, plan, optimizer, weight in zip(
            floor.sites, floor.plans, optimizers, floor.weights, strict=True
        ):
            with torch.no_grad():
                torch._foreach_copy_(parameters, shared)
            for _ in range(plan.steps_per_round):
                chosen = (torch.rand(len(patients)) < plan.step.sample_rate).nonzero().flatten()
                outputs = model(patients.features[chosen])
                functional.cross_entropy(outputs, patients.labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=weight)
        with torch.no_grad():
            torch._foreach_copy_(shared, total)

    return one_round


FLOORS: dict[str, Callable[[Floor, nn.Module], Callable[[int], None]]] = {
    "plain loop": _plain,
    "tensors, no DataLoader": _tensor,
    "vmap over sites": _vmap,
    "numpy, by hand": _numpy,
    "Opacus, an engine a round": _opacus,
    "Opacus, wrapped once": _opacus_kept,
}
PUBLIC = ("plain loop", "tensors, no DataLoader", "vmap over sites", "numpy, by hand")
IMAGES = PUBLIC[:2]  # the others know an MLP only
PRIVATE = ("Opacus, an engine a round", "Opacus, wrapped once")
