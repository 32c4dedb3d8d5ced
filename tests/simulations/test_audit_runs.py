"""Many audits of a sound site: what is counted, and what is too often."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import audited
import pytest
import small
from scipy.stats import binomtest
from typer.testing import CliRunner

from common.errors import StudyError
from simulations.audit import sound_runs as module
from simulations.audit.cli import app
from simulations.audit.run import Size
from simulations.audit.sound_runs import Count, SoundRuns, counted, sound_runs

STUDY = audited.study("logistic-regression", rounds=8)


def test_counts_are_binomial_tests() -> None:
    for count, of, rate in ((0, 3, 0.01), (1, 100, 0.01), (4, 100, 0.01), (9, 100, 0.01), (20, 200, 0.05)):
        found = Count("x", count, of, rate)
        assert found.p == pytest.approx(binomtest(count, of, rate, alternative="greater").pvalue)
        assert found.sound == (found.p >= 0.001)
    assert Count("alarms", 5, 100, 0.01).sound
    assert not Count("alarms", 6, 100, 0.01).sound


@pytest.fixture(scope="module")
def found() -> SoundRuns:
    seen: list[int] = []
    told = sound_runs(STUDY, 200, 3, size=Size(60, 8, 40), done=lambda number, _: seen.append(number))
    assert seen == [1, 2, 3]
    return told


def test_three_sound_runs(found: SoundRuns) -> None:
    assert found.sound
    assert not found.broken
    counts = {count.what: count.of for count in found.counts}
    assert counts["audits with an alarm"] == 3
    assert counts["claims refuted"] == counts["bounds by trade-off above ε"] == 6
    told = json.loads(json.dumps(found.as_json()))
    assert told["runs"] == len(told["alarms"]) == len(told["seconds"]) == 3


def test_what_holds_exactly_must_hold_each_time(found: SoundRuns) -> None:
    assert not dataclasses.replace(found, broken=("replay",)).sound


def test_a_suspicious_auditor_is_told(
    found: SoundRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    often = dataclasses.replace(found, counts=(Count("audits with an alarm", 3, 3, 0.01),))
    monkeypatch.setattr(module, "sound_runs", lambda *given, **named: often)
    command = [
        "sound-runs",
        str(small.toml(STUDY, tmp_path / "s.json")),
        "--runs",
        "3",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "more often than is stated" in result.output
    assert not json.loads((tmp_path / "sound-runs.json").read_text())["sound"]
    monkeypatch.setattr(module, "sound_runs", lambda *given, **named: found)
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["sound"]


def test_no_runs_tell_nothing() -> None:
    with pytest.raises(StudyError, match="0 runs"):
        sound_runs(STUDY, 200, 0)
    assert counted(STUDY, []).sound
