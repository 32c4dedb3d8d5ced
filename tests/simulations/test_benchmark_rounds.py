"""The bare loops take the steps that they say, fedward ends where they do, and all is told."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from common.errors import DeploymentError
from simulations.benchmarks import profiles
from simulations.benchmarks.federations import FEDERATIONS, Federation, public_size
from simulations.benchmarks.floors import PRIVATE, PUBLIC, load, run_floor
from simulations.benchmarks.measure import HEADER, Comparison, Result, Timing, in_a_process
from simulations.benchmarks.peers import takes, write_work
from simulations.benchmarks.peers.run import Work
from simulations.benchmarks.rounds import FEDWARD, compare_rounds
from simulations.cli import app

FEW = Federation("few", "3 sites", rounds=2, sites=3, patients=40)


def test_the_bare_loops_end_alike(tmp_path: Path) -> None:
    study = FEW.study()
    floor = load(study, FEW.write(tmp_path), seed=3)
    assert [len(each) for each in floor.sites] == [40, 40, 40]
    assert [plan.steps_per_round for plan in floor.plans] == [2, 2, 2]
    found = {way: run_floor(way, floor) for way in PUBLIC}
    first = found[PUBLIC[0]].parameters
    initial = run_floor(PUBLIC[0], replace(floor, study=FEW.study(), weights=(1.0, 0.0, 0.0))).parameters
    assert any(not np.allclose(first[name], initial[name], atol=1e-4) for name in first)
    for way, ended in found.items():
        assert len(ended.ends) == 2
        for name, value in ended.parameters.items():
            np.testing.assert_allclose(value, first[name], atol=2e-6, err_msg=way)


def test_the_private_loops_learn(tmp_path: Path) -> None:
    """They take noised steps: a loop that did nothing would be a poor reference."""
    federation = replace(FEW, private=True)
    floor = load(federation.study(), federation.write(tmp_path), seed=3)
    assert all(plan.step.noise_multiplier > 0 for plan in floor.plans)
    start = None
    for way in PRIVATE:
        ended = run_floor(way, floor)
        flat = np.concatenate([value.ravel() for value in ended.parameters.values()])
        assert np.isfinite(flat).all()
        assert start is None or np.abs(flat - start).max() > 1e-3  # its own noise
        start = flat


def test_the_table_is_dealt_out(tmp_path: Path) -> None:
    floor = load(FEDERATIONS["w1a"].study(), FEDERATIONS["w1a"].write(tmp_path), seed=0)
    assert [len(each) for each in floor.sites] == [182, 136, 92, 45]
    assert len(floor.test) == 114
    assert sum(floor.weights) == pytest.approx(1)
    assert floor.weights[0] == pytest.approx(182 / 455)
    assert [plan.steps_per_round for plan in floor.plans] == [6, 5, 3, 2]


@pytest.mark.parametrize("training", [1, 3, 45, 92, 136, 182, 1000])
def test_public_sizes_stand_for_the_training_patients(training: int) -> None:
    assert FEW.study().public_training_size(public_size(training)) == training


def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEDERATIONS, "few", FEW)
    monkeypatch.setattr("simulations.benchmarks.floors.PUBLIC", PUBLIC[1:2])
    (found,) = compare_rounds(tmp_path, names=["few"], repeats=1)
    told = found.as_json()
    json.dumps(told, allow_nan=False)
    assert [each["name"] for each in told["results"]] == [PUBLIC[1], FEDWARD]
    for each in told["results"]:
        assert each["seconds_per_round"] > 0
        assert math.isfinite(each["start_up_seconds"])
        assert each["first round, ms"] > 0
        assert 50 < each["MiB at peak"] < 50_000
    assert told["results"][1]["weights differ by"] < 1e-5
    assert told["results"][1]["whole command, s"] > 0
    assert all(len(row) == len(HEADER) for row in found.rows())


def test_a_failing_run_is_told() -> None:
    with pytest.raises(DeploymentError, match="ended with 3: wrong"):
        in_a_process([sys.executable, "-c", "import sys; sys.stderr.write('wrong'); sys.exit(3)"], 60.0)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(1.0, 0.1, 5)
    made = Comparison("w1a", "Four sites", (Result("plain", (timing,)), Result("ours", (timing,))))
    asked: list[dict[str, object]] = []

    def fake(work: Path, **options: object) -> tuple[Comparison, ...]:
        assert work.is_dir()
        asked.append(options)
        return (made,)

    monkeypatch.setattr("simulations.benchmarks.rounds.compare_rounds", fake)
    told = CliRunner().invoke(app, ["benchmark", "rounds", "--rounds", "5", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {"benchmarks": [made.as_json()]}
    assert asked == [{"rounds": 5, "repeats": 3, "ray": False, "peers": {}}]
    shown = CliRunner().invoke(app, ["benchmark", "rounds"])
    assert "Four sites" in shown.stdout
    assert CliRunner().invoke(app, ["benchmark", "nonsense"]).exit_code == 2
    for wrong in ("fedjax", "fedjax=/nowhere/python", f"ours={sys.executable}"):
        refused = CliRunner().invoke(app, ["benchmark", "rounds", "--peer", wrong])
        assert refused.exit_code == 2
        assert f"--peer {wrong}" in refused.output
    asked.clear()
    peer = ["--peer", f"pfl={sys.executable}"]
    assert CliRunner().invoke(app, ["benchmark", "rounds", *peer]).exit_code == 0
    assert asked[0]["peers"] == {"pfl": Path(sys.executable)}


def test_a_peer_gets_the_same_work(tmp_path: Path) -> None:
    floor = load(FEW.study(), FEW.write(tmp_path), seed=3)
    write_work(floor, tmp_path / "work.npz")
    work = Work.read(tmp_path / "work.npz")
    assert (work.batch, work.rate) == (floor.batch, floor.rate)
    for (features, labels), patients in zip(work.sites, floor.sites, strict=True):
        np.testing.assert_array_equal(features, patients.features.numpy())
        np.testing.assert_array_equal(labels, patients.labels.numpy())
    for theirs, ours in zip(work.orders, floor.orders, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            np.testing.assert_array_equal(one, other.numpy())
    assert [value.shape for value in work.parameters.values()] == [(64, 30), (64,), (2, 64), (2,)]
    assert work.noise == ()


def test_a_peer_gets_the_same_privacy(tmp_path: Path) -> None:
    private = replace(FEW, private=True)
    floor = load(private.study(), private.write(tmp_path), seed=3)
    write_work(floor, tmp_path / "work.npz")
    work = Work.read(tmp_path / "work.npz")
    assert work.noise == tuple(plan.step.noise_multiplier for plan in floor.plans)
    assert work.clipping_norm == floor.plans[0].step.clipping_norm
    assert takes("flower", private)
    assert not takes("fedjax", private)
    assert not takes("flower", FEDERATIONS["w2a"])


def test_a_peer_that_isnt_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEDERATIONS, "few", FEW)
    monkeypatch.setattr("simulations.benchmarks.floors.PUBLIC", ())
    with pytest.raises(DeploymentError, match="No module named 'jax'"):
        compare_rounds(tmp_path, names=["few"], repeats=1, peers={"fedjax": Path(sys.executable)})


def test_profiles_tell_where_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setitem(FEDERATIONS, "few", FEW)
    told = profiles.profile_rounds("few", lines=5, rounds=2)
    assert "rounds 2 to 2" in told
    assert "coordinator.py" in told
    monkeypatch.setattr(profiles, "STEPS", 2)
    step = profiles.profile_step("logistic", lines=5)
    assert "logistic, plain" in step
    assert "logistic, fedward" in step
    torch.set_num_threads(threads)
