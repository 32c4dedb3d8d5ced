"""The steps' benchmark runs and tells what it measured; how fast is not asserted."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from client.dpsgd import ClippedGradients, engine_of
from common.study import Objective
from simulations.benchmarks import steps
from simulations.benchmarks.networks import WORKS, Work
from simulations.benchmarks.steps import HEADER, WAYS, StepResult, as_json, measure_steps, rows, step_of
from simulations.cli import app

SMALL = Work("A small one", lambda _: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (8, 5), 3)
GROUPED = Work("Patients", lambda _: nn.Linear(5, 3), (8, 5), 3, records=4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("work", [SMALL, GROUPED], ids=["mlp", "patients"])
def test_every_way_takes_steps(work: Work, way: str) -> None:
    kept: list[nn.Module] = []

    def network(private: bool) -> nn.Module:
        kept.append(work.network(private))
        return kept[-1]

    watched = Work(work.title, network, work.shape, work.outputs, work.records)
    with step_of(watched, way) as step:
        before = [p.detach().clone() for p in kept[0].parameters()]
        step()
        step()
    after = list(kept[0].parameters())
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in after)


def test_one_row_is_measured_in_processes_of_its_own() -> None:
    found = measure_steps(["logistic"], ["plain", "fedward"], repeats=1)
    assert [r.way for r in found] == ["plain", "fedward"]
    assert found[0].ratio == 1.0
    assert found[0].wall_ratio is None
    for result in found:
        assert result.milliseconds > 0
        assert result.memory is not None
        assert math.isfinite(result.memory)
    assert found[1].wall_ratio is not None
    assert found[1].thread_ratio is not None
    assert found[0].probes is None
    assert found[1].probes is not None
    assert found[1].probes >= 0
    assert all(len(row) == len(HEADER) for row in rows(found))
    json.dumps(as_json(found), allow_nan=False)


def test_likely_sizes_are_tried_before_steps_are_timed() -> None:
    """Of 10 n patients each takes part with probability 1/10: their number has n · 9/10 for a variance."""
    for records, expected, multiple in ((1, 256, 4), (1, 256, 32), (1, 32, 16), (4, 2, 32), (40, 16, 32)):
        work = Work("Some", SMALL.network, (expected * records, 5), 3, records)
        sizes = steps._sizes(work, expected, multiple)
        law = stats.binom(10 * expected, 0.1)
        tried = {-(-size * records // multiple) for size in sizes}
        assert len(tried) == len(sizes)
        likely = range(max(1, int(law.ppf(0.008))), int(law.isf(0.008)) + 1)
        assert {-(-size * records // multiple) for size in likely} <= tried
        assert all(law.pmf(size) > 1e-5 for size in sizes)
    seconds, tried_now = steps._tried(SMALL)
    assert seconds > 0
    assert tried_now >= 1


def test_every_rows_network_goes_without_opacus() -> None:
    for name, work in WORKS.items():
        with torch.no_grad():
            network = work.network(False)
        assert not isinstance(engine_of(network, Objective(task="multi-class")), ClippedGradients), name


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, object]]] = []
    made = [StepResult("mlp", "plain", 1.0, 1.0, memory=2.0)]

    def fake(names: list[str], **options: object) -> list[StepResult]:
        asked.append((names, options))
        return made

    monkeypatch.setattr(steps, "measure_steps", fake)
    command = ["benchmark", "steps", "mlp", "--repeats", "3", "--allocator", "default", "--json"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {"benchmarks": [], "steps": as_json(made)}
    assert asked == [(["mlp"], {"repeats": 3, "tuned": False})]
    assert "MLP 784" in CliRunner().invoke(app, ["benchmark", "steps"]).stdout
    assert asked[-1] == (list(WORKS), {"repeats": 5, "tuned": True})
    assert CliRunner().invoke(app, ["benchmark", "steps", "nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["benchmark", "mlp"]).exit_code == 2
