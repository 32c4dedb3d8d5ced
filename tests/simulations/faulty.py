"""Broken trainers: each a mistake that somebody has made, planted in the vault's real path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from client import training, vault
from client.batches import Batch, batch_of, draw_batch
from client.cohort import Patients
from client.dpsgd import Engine, noised_mean
from common.messages import Arrays
from common.objectives import record_losses
from common.privacy.noise import Normals, Seeded, Stream
from common.privacy.plan import HistogramPlan, StepPlan
from common.study import Objective

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Plant] = {}


def fault(name: str) -> Callable[[Plant], Plant]:
    def keep(plant: Plant) -> Plant:
        FAULTS[name] = plant
        return plant

    return keep


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The vault's own code with one fault in it."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[name](patch)
        yield


# --- noise


def _noise(
    patch: pytest.MonkeyPatch, faulty: Callable[[torch.Tensor, StepPlan, Normals], torch.Tensor]
) -> None:
    patch.setattr(training, "noised_mean", faulty)


@fault("σ halved")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
        return noised_mean(
            total, dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / 2), source
        )

    _noise(patch, faulty)


@fault("noise from a fixed seed, the same in each round")
def _(patch: pytest.MonkeyPatch) -> None:
    _noise(patch, lambda total, plan, source: noised_mean(total, plan, Seeded(7).stream("noise", len(total))))


@fault("the same noise on two sites")
def _(patch: pytest.MonkeyPatch) -> None:
    own = vault.Vault._stream

    def faulty(self: vault.Vault, purpose: str, told: Any) -> Stream:
        return Seeded(7).stream(purpose, told.round) if purpose == "noise" else own(self, purpose, told)

    patch.setattr(vault.Vault, "_stream", faulty)


@fault("no noise on one tensor")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
        found = noised_mean(total, plan, source)
        found[-1:] = (total[-1:] / plan.divisor).float()  # the last layer's bias
        return found

    _noise(patch, faulty)


@fault("uniform noise")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
        width = 12**0.5 * plan.noise_multiplier * (plan.clipping_norm or 1.0)
        drawn = torch.from_numpy(np.random.default_rng().uniform(-width / 2, width / 2, len(total)))
        return ((total + drawn) / plan.divisor).float()

    _noise(patch, faulty)


# --- clipping


class _Broken:
    """An engine that forwards to the real one, but for what is to be summed."""

    def __init__(self, engine: Engine, objective: Objective) -> None:
        self._engine, self._objective = engine, objective
        self.network, self.parameters, self.size = engine.network, engine.parameters, engine.size
        self.outputs = engine.outputs

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        return self._engine.sum(patients, batch, clipping_norm)

    def gradients(self, patients: Patients, batch: Batch) -> torch.Tensor:
        """By hand, unclipped, float64 [patients, size]."""
        rows = [torch.zeros(0, self.size, dtype=torch.float64)]
        for index in range(batch.patients):
            mine = batch.patient == index
            records = batch.records[mine]
            outputs = self.network(patients.features[records])
            losses = record_losses(self._objective, outputs, patients.labels[records]) * batch.weights[mine]
            found = torch.autograd.grad(losses.sum(), self.parameters)
            rows.append(torch.cat([g.flatten() for g in found]).double()[None])
        return torch.cat(rows)


def _clipped(rows: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    norms = rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return rows * (clipping_norm / norms).clamp(max=1.0)


def _clipping(
    patch: pytest.MonkeyPatch, faulty: Callable[[_Broken, Patients, Batch, float], torch.Tensor]
) -> None:
    real = training.engine_of

    class Faulty(_Broken):
        def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
            return faulty(self, patients, batch, clipping_norm)

    patch.setattr(
        training,
        "engine_of",
        lambda network, objective, *more: Faulty(real(network, objective, *more), objective),
    )


@fault("no clipping")
def _(patch: pytest.MonkeyPatch) -> None:
    _clipping(patch, lambda own, patients, batch, _: own._engine.sum(patients, batch, 1e30))


@fault("clipped at 2 C")
def _(patch: pytest.MonkeyPatch) -> None:
    _clipping(patch, lambda own, patients, batch, c: own._engine.sum(patients, batch, 2 * c))


@fault("each layer clipped at C")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(own: _Broken, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
        rows = own.gradients(patients, batch)
        parts = rows.split([p.numel() for p in own.parameters], dim=1)
        return torch.cat([_clipped(part, c).sum(dim=0) for part in parts])

    _clipping(patch, faulty)


@fault("the batch's mean clipped")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(own: _Broken, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
        rows = own.gradients(patients, batch)
        return _clipped(rows.sum(dim=0, keepdim=True) / max(1, len(rows)), c)[0] * len(rows)

    _clipping(patch, faulty)


@fault("micro-batches of four clipped")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(own: _Broken, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
        rows = own.gradients(patients, batch)
        groups = [part.mean(dim=0, keepdim=True) for part in rows.split(4)]
        return 4 * _clipped(torch.cat(groups), c).sum(dim=0) if len(rows) else rows.sum(dim=0)

    _clipping(patch, faulty)


@fault("record instead of patient as the unit")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(own: _Broken, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
        count = len(batch.records)
        alone = Batch(batch.records, torch.arange(count), torch.ones(count), count)
        return own._engine.sum(patients, alone, c)

    _clipping(patch, faulty)


# --- sampling and accounting


@fault("Poisson claimed, but shuffled")
def _(patch: pytest.MonkeyPatch) -> None:
    waiting: dict[int, np.ndarray] = {}

    def faulty(patients: Patients, plan: StepPlan, stream: Stream) -> Batch:
        left = waiting.get(id(patients), np.empty(0, dtype=np.intp))
        size = round(plan.sample_rate * len(patients))
        if len(left) < size:
            left = np.concatenate([left, stream.permutation(len(patients))])
        chosen, waiting[id(patients)] = np.unique(left[:size]), left[size:]
        return batch_of(patients, chosen, plan, stream)

    patch.setattr(training, "draw_batch", faulty)


@fault("divided by the batch's true size")
def _(patch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def drawn(patients: Patients, plan: StepPlan, stream: Stream) -> Batch:
        batch = draw_batch(patients, plan, stream)
        sizes.append(batch.patients)
        return batch

    def faulty(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
        return noised_mean(total, dataclasses.replace(plan, divisor=float(max(1, sizes[-1]))), source)

    patch.setattr(training, "draw_batch", drawn)
    _noise(patch, faulty)


@fault("the cap on a patient's records ignored")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        training, "draw_batch",
        lambda patients, plan, stream: draw_batch(
            patients, dataclasses.replace(plan, max_records=10**6), stream
        ),
    )  # fmt: skip


@fault("steps under-counted")
def _(patch: pytest.MonkeyPatch) -> None:
    own = training.Trainer._private_steps

    def faulty(self: training.Trainer, *arguments: Any) -> None:
        own(self, *arguments)
        own(self, *arguments)

    patch.setattr(training.Trainer, "_private_steps", faulty)


# --- what is not the gradient


@fault("a buffer that data changes leaves without noise")
def _(patch: pytest.MonkeyPatch) -> None:
    own = training.Trainer.train

    def faulty(self: training.Trainer, parameters: Arrays, *streams: Stream) -> dict[str, np.ndarray]:
        update = own(self, parameters, *streams)
        return update | {"running_mean": self.cohort.train.features.mean(dim=0).numpy()}

    patch.setattr(training.Trainer, "train", faulty)


@fault("Adam's state from gradients without noise")
def _(patch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[torch.Tensor]] = {}

    def faulty(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
        known = seen.setdefault(len(total), [])
        known.append((total / (plan.clipping_norm or 1.0)) ** 2)
        return noised_mean(total, plan, source) / (torch.stack(known[-9:]).mean(dim=0).sqrt() + 1).float()

    _noise(patch, faulty)


@fault("evaluation without noise")
def _(patch: pytest.MonkeyPatch) -> None:
    def faulty(exact: Mapping[str, np.ndarray], plan: HistogramPlan, stream: Stream) -> dict[str, np.ndarray]:
        return {name: np.array(array, dtype=np.float64) for name, array in exact.items()}

    patch.setattr(vault, "noised_histograms", faulty)


# --- a table of simulations/audit/README.md; run with PYTHONPATH=tests:.


def main() -> None:
    """Plant each fault, audit, and print which checks raise an alarm."""
    import argparse
    import logging
    import time

    import audited

    from simulations.audit.run import SHORT, audit

    logging.getLogger("fedward").setLevel(logging.CRITICAL)  # vaults refuse the attacks, and say so
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--model", choices=audited.MODELS, default=audited.MODELS[0])
    study = audited.study(options.parse_args().model)
    print("| fault | alarms | least p, and its check | differences | bound refutes | s |")
    print("|---|---|---|---|---|---|")
    for name in FAULTS:
        began = time.monotonic()
        with planted(name):
            found = audit(study, 200, size=SHORT)
        worst = min(found.conformance.checks, key=lambda check: check.p)
        broken = sum(not each.sound for each in found.differences)
        refuted = "yes" if any(bound.refuted for bound in found.bounds) else "no"
        print(
            f"| {name} | {len(found.conformance.alarms)} of {len(found.conformance.checks)} "
            f"| {worst.p:.1g}: {worst.name} | {broken} of {len(found.differences)} "
            f"| {refuted} | {time.monotonic() - began:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
