"""SIGKILL at every call between a request and its reply that changes the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crash_points import job
from small import allow, make_site, study

from client.policy import load_policy
from client.settings import SiteFolder
from client.site import open_vault
from common.messages import Reply, decode
from common.privacy.plan import plan_study

WANTED = study(algorithm={"rounds": 4}, evaluation={"every": 1})


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[int, SiteFolder]:
    """Two sites: one that has answered nothing, and one that has answered two rounds."""
    found = {}
    for number in (1, 3):
        folder = make_site(tmp_path_factory.mktemp(f"crash-{number}") / "site")
        allow(folder, WANTED)
        vault = open_vault(folder)
        for before in range(1, number):
            assert isinstance(decode(vault.answer(job(WANTED, before))), Reply)
        vault.close()
        found[number] = folder
    return found


@pytest.fixture(scope="module", params=[(n, k) for n in (1, 3) for k in ("before", "after", "torn")], ids=str)
def crashes(
    request: pytest.FixtureRequest, sites: dict[int, SiteFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    number, kind = request.param
    work = tmp_path_factory.mktemp("work")
    script = Path(__file__).with_name("crash_points.py")
    done = subprocess.run(
        [sys.executable, script, sites[number].root, work, str(number), kind],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return number, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_point_was_reached(crashes: tuple[int, list[dict[str, Any]]]) -> None:
    _, found = crashes
    assert [f["killed"] for f in found] == [True] * (len(found) - 1) + [False]
    trail = found[-1]["trail"]
    assert len(found) == len([t for t in trail if t != "cohort"]) + 1
    if set(trail) == {"write", "cohort"}:  # torn writes only: of the reservation and of the commit
        assert trail == ["write", "cohort", "write"]
        return
    assert len(found) > 6
    # on disk, synced, before the data is touched
    assert trail.index("write") < trail.index("fsync") < trail.index("cohort")
    assert trail[-3:] == ["write", "fsync", "unlink"]


def test_what_was_touched_is_paid_for(crashes: tuple[int, list[dict[str, Any]]]) -> None:
    number, found = crashes
    session = plan_study(WANTED, 50).epsilon
    for each in found:
        assert each["sequences"] == list(range(1, len(each["sequences"]) + 1))
        if number > 1 or "cohort" in each["trail"] or each["replied"]:
            assert each["spent_after_crash"] == pytest.approx(session)
        if "cohort" in each["trail"] or each["replied"]:
            assert each["reserved"]
        if each["reserved"]:
            assert each["other_content"] == "refused"
        assert each["leftovers"] == []


def test_life_goes_on(crashes: tuple[int, list[dict[str, Any]]], sites: dict[int, SiteFolder]) -> None:
    number, found = crashes
    granted = load_policy(sites[number]).approved[0].epsilon or 0
    for each in found:
        assert each["answers"]
        assert each["same_again"]
        assert each["same_as_before"] in (None, True)
        assert each["next_round"]
        assert each["second_session"] == "budget-exhausted"
        assert each["spent"] <= granted
        kinds = [tuple(e) for e in each["entries"]]
        assert len(set(kinds)) == len(kinds)  # no round was paid, or answered, twice
        assert {("reserve", n) for n in range(1, number + 2)} <= set(kinds)
