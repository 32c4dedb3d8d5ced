"""The benchmarks run and tell what they measured; how fast is not asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from simulations.benchmarks import deployment
from simulations.benchmarks.measure import HEADER, Comparison, Result, Timing
from simulations.benchmarks.noise import Network, compare_noise
from simulations.benchmarks.sites import compare_sites, peak_bytes
from simulations.benchmarks.workload import write_sites
from simulations.cli import app
from simulations.engine.sites import find_sites


def check(comparison: Comparison, names: list[str]) -> None:
    told = comparison.as_json()
    json.dumps(told, allow_nan=False)
    assert [r["name"] for r in told["results"]] == names
    assert told["results"][0]["ratio"] == told["results"][0]["ratio_with_start_up"] == 1
    for result in told["results"]:
        assert result["seconds_per_round"] > 0
        assert result["seconds_per_round_with_start_up"] > 0
        assert math.isfinite(result["start_up_seconds"])
    assert all(len(row) == len(HEADER) for row in comparison.rows())


def test_ratios_are_of_medians_to_the_first() -> None:
    first = Result("a", (Timing(3.0, 0.25, 10), Timing(9.0, 0.5, 10), Timing(100.0, 9.0, 10)))
    second = Result("b", (Timing(27.0, 2.0, 10),), {"bytes": 5.0})
    told = Comparison("c", "C", (first, second)).as_json()["results"]
    assert told[0]["seconds_per_round"] == 0.5
    assert told[0]["start_up_seconds"] == 4.0
    assert told[1]["ratio"] == 4.0
    assert told[1]["ratio_with_start_up"] == 3.0
    assert told[1]["bytes"] == 5.0
    assert told[1]["runs"] == 1


def test_sites(tmp_path: Path) -> None:
    private = compare_sites(tmp_path / "private", counts=(1, 2), rounds=2, repeats=1)
    public = compare_sites(tmp_path / "public", counts=(1,), rounds=2, repeats=1, private=False)
    check(private, ["1 sites", "2 sites"])
    check(public, ["1 sites"])
    for result in (*private.results, *public.results):
        assert 50 < result.more["MiB at peak"] < 50_000
    assert peak_bytes() > 0


def test_sites_are_sound(tmp_path: Path) -> None:
    places = find_sites(write_sites(tmp_path, 3, 20), tmp_path)
    assert [place.folder().file.site.public_size for place in places] == [20, 20, 20]


def test_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.ahead.DRAWN_AHEAD", 500)
    monkeypatch.setattr("simulations.benchmarks.noise.DRAWN_AHEAD", 500)
    threads = torch.get_num_threads()
    networks = (Network(5, (3,), 4), Network(50, (10,), 4))
    draws, *steps = compare_noise(tmp_path, repeats=2, values=1000, networks=networks, steps=3)
    ours = ["fedward's normals, float64", "fedward's normals, added, put on the grid, divided"]
    check(draws, ["torch.randn, float32", *ours, "torch.randn, added, divided, float32"])
    for found in steps:
        check(found, ["drawn in turn", "drawn ahead where it pays"])
    assert [found.name for found in steps] == ["noise-ahead-58-4", "noise-ahead-620-4"]
    assert "too few" in steps[0].title
    assert "it pays" in steps[1].title
    assert torch.get_num_threads() == threads


@pytest.mark.deployment
def test_the_deployment(tmp_path: Path) -> None:
    if not deployment.available():
        pytest.skip("nginx is not installed")
    check(deployment.compare_deployment(tmp_path, sites=1, rounds=2), ["in one process", "deployed"])


def test_the_command_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(1.0, 0.1, 5)
    made = Comparison("noise", "Noise", (Result("torch", (timing,)), Result("ours", (timing,))))
    asked: list[dict[str, object]] = []

    def fake(_: Path, **options: object) -> tuple[Comparison, ...]:
        asked.append(options)
        return (made,)

    monkeypatch.setattr("simulations.benchmarks.noise.compare_noise", fake)
    told = CliRunner().invoke(app, ["benchmark", "noise", "--repeats", "3", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {"benchmarks": [made.as_json()]}
    assert asked == [{"repeats": 3}]
