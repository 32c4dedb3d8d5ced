"""The main job, for real: four hospitals, TLS, SuperNodes, vaults; the simulation's model, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster import START_SECONDS, Cluster, pids, vault_process

from client.ledger import spending
from client.policy import load_policy
from client.settings import SiteFolder
from common.privacy.noise import Seeded
from common.study import Study, load_study
from server import sessions
from server.coordinator import PARAMETERS, part
from server.store import FAILED
from simulations.datasets import fetch, prepare
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_study

pytestmark = [pytest.mark.deployment, pytest.mark.shared]

SEED = 7
ROUNDS = 5


@pytest.fixture(scope="module")
def hospitals(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    prepare("heart-disease", fetch("heart-disease", folder / "raw", mirror), folder / "sites")
    return folder / "sites"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """heart-disease with five rounds, as a file."""
    value = load_study(ready_study("heart-disease")).model_dump(mode="json")
    value["algorithm"]["rounds"] = ROUNDS
    path = tmp_path_factory.mktemp("study") / "study.json"
    path.write_bytes(Study.model_validate(value).canonical)
    return path


@pytest.fixture(scope="module")
def consortium(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    names = sorted(path.name for path in hospitals.iterdir())

    def prepare_site(folder: Path) -> None:
        shutil.copytree(hospitals / folder.name, folder, dirs_exist_ok=True)
        key = SiteFolder(folder).split_key_path
        key.parent.mkdir(mode=0o700)
        key.write_bytes(Seeded(SEED).key("split", folder.name))
        key.chmod(0o600)

    script = str(Path(__file__).with_name("seeded_vault.py"))
    vault = vault_process(lambda site: [sys.executable, script, str(site.root), str(SEED)])
    with Cluster(tmp_path_factory.mktemp("real"), names, prepare=prepare_site, vault=vault) as running:
        yield running


def command(program: str, *arguments: str | Path) -> tuple[int, dict[str, object]]:
    """Run a fedward command with --json; its exit status and its answer."""
    line = [str(Path(sys.executable).with_name(program)), *map(str, arguments), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    lines = done.stdout.strip().splitlines()
    assert lines, (line, done.returncode, done.stderr)
    return done.returncode, json.loads(lines[-1])


def test_a_site_that_did_not_approve_refuses_and_the_coordinator_is_told_why(
    consortium: Cluster, study: Path
) -> None:
    status, told = command("fedward-server", "run", consortium.coordinator.root, study, "--deadline", "120")
    assert status == 8
    assert told["error"] == "study-failed"
    assert str(told["message"]).count("not-approved") == len(consortium.names)
    assert all(spending(site.ledger_path) == {} for site in consortium.sites.values())


def test_the_deployed_study_ends_with_the_simulated_model_although_its_server_was_killed(
    consortium: Cluster, study: Path, hospitals: Path, tmp_path: Path
) -> None:
    for site in consortium.sites.values():
        status, approval = command("fedward-site", "approve", site.root, study, "--yes")
        assert status == 0
        assert approval["epsilon"] == 1.0
        assert not load_policy(site).approved[0].public

    root = consortium.coordinator.root
    status, begun = command("fedward-server", "run", root, study, "--detach")
    assert status == 0
    session, store = str(begun["session"]), sessions.store_of(consortium.coordinator)
    consortium.wait_for(lambda: store.rounds_done(session) >= 2, START_SECONDS, "two rounds")
    for pid in pids("flwr-serverapp", consortium.root):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(sessions.StudyFailed):
        sessions.follow(consortium.coordinator, session, lambda done: None)
    assert store.session(session).status == FAILED
    reached = store.rounds_done(session)
    assert 2 <= reached <= ROUNDS

    status, told = command("fedward-server", "resume", root, session)
    assert status == 0, told
    assert told["status"] == "finished"
    assert not told["exact"]
    assert {s["site"] for s in told["sites"]} == set(consortium.names)

    simulated = simulate(load_study(study), hospitals, tmp_path, SimulationSettings(seed=SEED))
    expected = simulated.store.checkpoint(simulated.session, ROUNDS + 1)
    found = store.checkpoint(session, ROUNDS + 1)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert any(np.any(a != 0) for a in part(found, PARAMETERS).values())

    digest = load_study(study).digest
    for site in consortium.sites.values():
        spent = spending(site.ledger_path)[digest]
        assert (spent.sessions, spent.rounds) == (1, ROUNDS + 1)
        assert 0.99 < spent.epsilon <= 1.0
    for site in told["sites"]:
        assert 0.99 < site["epsilon"] <= 1.0


def test_a_second_session_is_refused_because_the_budget_is_spent(consortium: Cluster, study: Path) -> None:
    status, told = command("fedward-server", "run", consortium.coordinator.root, study)
    assert status == 8
    assert str(told["message"]).count("budget-exhausted") == len(consortium.names)
