"""SIGKILL, or a disk that fills up, at every call between a request and its reply that changes the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from crash_points import job
from small import allow, make_site, study

from client.ledger import KEPT_REPLIES
from client.policy_file import load_policy
from client.settings import SiteFolder
from client.site import open_vault, read_split_key
from client.withdrawal import key_line, patient_hash
from common.messages import Reply, decode
from common.privacy.plan import plan_study

WANTED = study(
    algorithm={"rounds": 4}, evaluation={"every": 1}, statistics={"epsilon": 0.5, "delta": 1e-4, "bins": 4}
)
FINAL = 5
KINDS = ("before", "after", "torn", "full")
LATER = [(3, "before"), (3, "torn"), (FINAL, "after"), (FINAL, "full"), (0, "after"), (0, "full")]
CASES = [(1, kind) for kind in KINDS] + LATER


Found = tuple[int, str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process loses nothing there that a disk would keep."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(prefix="fedward-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def sites(work: Path) -> dict[int, SiteFolder]:
    """Sites that have answered nothing, or all rounds before. A list of withdrawn consents was written by
    hand, so the vault keeps a copy of it with its first round."""
    found = {}
    for number in {number for number, _ in CASES}:
        folder = make_site(work / f"base-{number}", count=60 if number else 400)
        allow(folder, WANTED)
        key = read_split_key(folder)
        folder.withdrawn_path.write_text(f"{key_line(key)}\n{patient_hash(key, 'patient-7').hex()}\n")
        vault = open_vault(folder)
        for before in range(1, number):
            assert isinstance(decode(vault.answer(job(WANTED, before))), Reply)
        vault.close()
        found[number] = folder
    return found


@pytest.fixture(scope="module")
def every(sites: dict[int, SiteFolder], work: Path) -> list[dict[str, Any]]:
    """All cases in one process: it imports torch once."""
    script = Path(__file__).with_name("crash_points.py")
    words = [str(w) for n, kind in CASES for w in (sites[n].root, n, kind)]
    done = subprocess.run([sys.executable, script, work, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=CASES, ids=str)
def crashes(request: pytest.FixtureRequest, every: list[dict[str, Any]]) -> Found:
    number, kind = request.param
    return number, kind, [f for f in every if (f["round"], f["kind"]) == (number, kind)]


def test_every_point_was_reached(crashes: Found) -> None:
    number, kind, found = crashes
    assert [f["reached"] for f in found] == [True] * (len(found) - 1) + [False]
    trail = found[-1]["trail"]
    assert len(found) == len([t for t in trail if t != "records"]) + 1
    fresh = number <= 1  # then the policy in force is written down first
    written = ["write"] * (1 + fresh)
    if kind == "torn":
        assert trail == [*written, "records", "write"]
        return
    data = trail.index("records")
    assert [t for t in trail[:data] if t == "write"] == written
    # each entry is synced by itself, and the head beside it, before the data is touched
    assert all(then == "fsync" for call, then in pairwise(trail) if call == "write")
    if kind != "full":
        entry = ["write", "fsync", "fchmod", "fsync", "replace", "fsync"]
        assert trail[data - 6 : data] == entry
        kept = ["unlink"] if number > KEPT_REPLIES else []
        certificate = number == FINAL  # kept once its last release is committed
        end = entry + kept + entry[2:] * certificate
        assert trail[len(trail) - len(end) :] == end
        heads = 2 + fresh
        assert trail.count("replace") == heads + 1 + fresh + certificate  # a reply, a list, a certificate


def test_what_was_touched_is_paid_for(crashes: Found) -> None:
    number, kind, found = crashes
    plan = plan_study(WANTED, 50)
    session = plan.statistics_epsilon if number == 0 else plan.epsilon
    for each in found:
        assert each["sequences"] == list(range(1, len(each["sequences"]) + 1))
        touched = "records" in each["trail"] or each["replied"]
        if number > 1 or touched:
            assert each["spent_after_crash"] == pytest.approx(session)
        if touched:
            assert each["reserved"]
        if each["reserved"] and number:
            assert each["other_content"] == "refused"
        assert each["leftovers"] == []
        if kind == "full":
            assert each["first"] == ("refusal" if each["reached"] and not each["replied"] else each["first"])
            assert each["second"] == "reply"  # there is room again, and nobody restarted the vault


def test_life_goes_on(crashes: Found, sites: dict[int, SiteFolder]) -> None:
    number, _, found = crashes
    granted = load_policy(sites[number]).approved[0].epsilon or 0
    for each in found:
        assert each["answers"]
        assert each["same_again"]
        assert each["same_as_before"]
        assert each["next_round"]
        assert each["second_session"] == "budget-exhausted"
        assert each["spent"] <= granted
        kinds = [tuple(e) for e in each["entries"]]
        assert len(set(kinds)) == len(kinds)  # no round was paid, or answered, twice
        last = min(number + 1, FINAL)
        asked = {0, 1} if number == 0 else set(range(1, last + 1))
        for kind in ("reserve", "commit"):
            assert {e[1] for e in kinds if e[0] == kind} == asked
        assert [e[0] for e in kinds].count("policy") == 1
