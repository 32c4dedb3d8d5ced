"""The audit of networks that no column of the first layer tells apart: canaries by label, finite differences,
and the final model alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import audited
import pytest
import small
import torch
from faulty import planted

from client import dpsgd, training
from client.batches import Batch
from client.cohort import Patients
from common.privacy.noise import Seeded
from common.privacy.plan import plan_study
from common.study import Study
from simulations.audit.attacks import without_privacy
from simulations.audit.conformance import FALSE_ALARM
from simulations.audit.differences import differences
from simulations.audit.final_model import final_model
from simulations.audit.run import Size, audit, sent

SIZE = Size(150, 24, 40)


def study(name: str, **privacy: Any) -> Study:
    return audited.study(name, rounds=24, **{"clipping_norm": 0.5, **privacy})


def test_a_sound_site_raises_no_alarm() -> None:
    found = audit(study("cnn"), 150, size=SIZE)
    assert min(check.p for check in found.conformance.checks) > FALSE_ALARM / 1000
    assert all(each.sound for each in found.differences)
    assert found.final_model.sound
    assert not any(bound.refuted for bound in found.bounds)
    assert any("this study's loss" in line for line in found.untested)


def test_nor_does_one_that_trains_a_gru() -> None:
    asked = study("gru")
    assert min(check.p for check in sent(asked, 150, size=SIZE).checks) > FALSE_ALARM / 1000
    assert all(each.sound for each in differences(asked, plan_study(asked, 150)))


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("no noise on one tensor", "noise on every number, "),
        ("each layer clipped at C", "noise variance, "),
        ("record instead of patient as the unit", "clipping and sampling, patients with many records"),
        ("Poisson claimed, but shuffled", "each patient's coins are its own"),
        ("the cap on a patient's records ignored", "no more records of a patient than the cap"),
        ("evaluation without noise", "evaluation's noise, confidence"),
    ],
)
def test_a_planted_fault_is_caught_in_a_cnn(fault: str, caught_by: str) -> None:
    with planted(fault):
        found = sent(study("cnn"), 150, size=SIZE)
    assert any(check.name.startswith(caught_by) for check in found.alarms)


class _Summed:
    """An engine that sums what another function makes of the true sum."""

    def __init__(self, engine: dpsgd.Engine, faulty: Any) -> None:
        self._engine, self._faulty = engine, faulty
        self.network, self.parameters = engine.network, engine.parameters

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        found: torch.Tensor = self._faulty(self._engine, patients, batch, clipping_norm)
        return found


def _twice(engine: dpsgd.Engine, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
    return engine.sum(patients, batch, 2 * c)


def _mean(engine: dpsgd.Engine, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
    return engine.sum(patients, batch, c) / max(1, batch.patients)


def _records(engine: dpsgd.Engine, patients: Patients, batch: Batch, c: float) -> torch.Tensor:
    count = len(batch.records)
    return engine.sum(patients, Batch(batch.records, torch.arange(count), torch.ones(count), count), c)


@pytest.mark.parametrize("faulty", [_twice, _mean, _records])
def test_finite_differences_see_a_broken_sum(monkeypatch: pytest.MonkeyPatch, faulty: Any) -> None:
    own = training.engine_of
    monkeypatch.setattr(training, "engine_of", lambda *given: _Summed(own(*given), faulty))
    asked = study("cnn", clipping_norm=0.05)
    assert not all(each.sound for each in differences(asked, plan_study(asked, 150)))


def test_the_final_model_gives_away_what_was_not_protected() -> None:
    """Without noise, and with many steps, a model knows its canaries by heart."""
    data = small.study().model_dump(mode="json")["data"]
    data["columns"] = [{"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 40}]
    asked = small.study(
        data=data,
        model={"name": "mlp", "parameters": {"hidden": [64]}},
        algorithm={"rounds": 30},
        training={
            "local_steps": 20,
            "sample_rate": 0.25,
            "optimizer": {"name": "adam", "learning_rate": 0.01},
        },
        privacy={"mode": "patient-dp", "epsilon": 1.0, "delta": 1e-4, "clipping_norm": 0.5},
    )
    bare = without_privacy(asked)
    plan, bare_plan = plan_study(asked, 100), plan_study(bare, 100)
    found = final_model(asked, bare, plan, bare_plan, 200, Seeded(1))
    assert found.claimed == pytest.approx(1.0, rel=0.02)
    assert found.at_least < 1.0 < found.unprotected
    assert found.sound
    assert not dataclasses.replace(found, at_least=1.5).sound
