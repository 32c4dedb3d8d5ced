"""The main job, for real: four hospitals, TLS, SuperNodes, vaults; the simulation's model, bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
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
from opacus.accountants.analysis.rdp import compute_rdp
from safetensors.numpy import save_file

from client.account import read_account, spending
from client.policy import approval_of
from client.policy_file import approve, load_policy, set_policy
from client.settings import SiteFolder
from client.site import make_site_keys
from common.models import parameter_arrays, study_model
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian, rate_and_steps
from common.privacy.noise import Seeded
from common.privacy.plan import plan_study
from common.study import Study, load_study
from server import sessions
from server.coordinator import PARAMETERS, part
from server.store import FAILED, FINISHED
from simulations.datasets import fetch, prepare
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_study

pytestmark = [pytest.mark.deployment, pytest.mark.shared]

SEED = 7
ROUNDS = 5
LIFETIME, DELTA = 1.4, 1e-2  # of one hospital; the others have plenty
STUDIES, SMALL_EPSILON = 10, 0.4


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
        make_site_keys(SiteFolder(folder))
        lifetime = LIFETIME if folder.name == names[0] else 100.0
        set_policy(SiteFolder(folder), {"cohort": {"epsilon": lifetime, "delta": DELTA}})

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


def small_study(study: Path, number: int) -> Study:
    """One of ten studies on the same cohort: one round, a small ε."""
    value = load_study(study).model_dump(mode="json")
    value |= {"title": f"Small study {number}", "algorithm": {"rounds": 1}}
    value["privacy"]["epsilon"] = SMALL_EPSILON
    return Study.model_validate(value)


def fitting(folder: SiteFolder, wanted: Study) -> int:
    """How many of these studies the lifetime budget has left, by Opacus's Rényi accountant."""
    budget = load_policy(folder).cohort
    assert budget is not None
    order = budget.filter().order

    def rdp(event: SubsampledGaussian | GaussianRelease) -> float:
        rate, steps = rate_and_steps(event)
        return float(compute_rdp(q=rate, noise_multiplier=event.noise_multiplier, steps=steps, orders=order))

    capacity = budget.epsilon - math.log1p(-1 / order) + (math.log(DELTA) + math.log(order)) / (order - 1)
    begun = {r.session: r.plan for r in read_account(folder.ledger_path).reserved.values()}
    plan = plan_study(wanted, folder.file.site.public_size)
    costs = [
        max(rdp(p.training_event(p.rounds)), sum(rdp(e) for e in p.evaluation_events()))
        for p in (*begun.values(), plan)
    ]
    return math.floor((capacity - sum(costs[:-1])) / costs[-1])


def test_ten_studies_on_one_cohort_stop_where_the_policy_says_and_the_others_go_on(
    consortium: Cluster, study: Path, tmp_path: Path
) -> None:
    tight, *others = consortium.names
    last = fitting(consortium.sites[tight], small_study(study, 0))
    assert 1 <= last < STUDIES - 1
    store = sessions.store_of(consortium.coordinator)
    for number in range(1, STUDIES + 1):
        wanted = small_study(study, number)
        for site in consortium.sites.values():
            approve(
                site, wanted, approval_of(wanted, "officer"), plan_study(wanted, site.file.site.public_size)
            )
        path = tmp_path / f"{number}.json"
        path.write_bytes(wanted.canonical)
        status, told = command(
            "fedward-server", "run", consortium.coordinator.root, path, "--quorum", str(len(others))
        )
        assert status == 0, told
        for each in store.rounds(str(told["session"])):
            outcomes = {a.site: a.outcome for a in each.answers}
            assert all(outcomes[name] == "reply" for name in others)
            assert outcomes[tight] == ("reply" if number <= last else "refusal"), (number, last)
            details = [a.detail for a in each.answers if a.outcome == "refusal"]
            assert all("budget-exhausted: the lifetime budget" in d for d in details)
    told_by_site = command("fedward-site", "budget", consortium.sites[tight].root)[1]
    assert isinstance(told_by_site["lifetime"], dict)
    assert 0.6 < told_by_site["lifetime"]["share_reserved"] <= 1 + 1e-9


def test_a_deployed_study_begins_with_the_weights_that_it_names(
    consortium: Cluster, study: Path, tmp_path: Path
) -> None:
    value = small_study(study, 98).model_dump(mode="json")
    shapes = parameter_arrays(study_model(Study.model_validate(value)))
    weights = tmp_path / "weights.safetensors"
    save_file({name: np.full_like(array, 50.0) for name, array in shapes.items()}, weights)
    value["model"]["initial_weights"] = {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    wanted = Study.model_validate(value)
    path = tmp_path / "study.json"
    path.write_bytes(wanted.canonical)
    for site in consortium.sites.values():
        approve(site, wanted, approval_of(wanted, "officer"), plan_study(wanted, site.file.site.public_size))
    line = ["fedward-server", "run", consortium.coordinator.root, path, "--quorum", "2"]
    status, told = command(*line)
    assert (status, told["remedy"]) == (2, "give that file: --initial FILE.safetensors")
    status, told = command(*line, "--initial", weights)
    assert status == 0, told
    ended = part(sessions.store_of(consortium.coordinator).checkpoint(str(told["session"]), 2), PARAMETERS)
    for name, array in ended.items():
        assert not np.array_equal(array, np.full_like(array, 50.0)), name
        np.testing.assert_allclose(array, 50.0, atol=25.0, err_msg=name)


def test_every_certificate_of_the_deployment_holds_but_for_its_seeds(consortium: Cluster) -> None:
    """The vaults of these tests are seeded, which a certificate doesn't hide."""
    root = consortium.coordinator.root
    store = sessions.store_of(consortium.coordinator)
    session = next(s for s in store.sessions() if s.status == FINISHED)
    study = root / "study.json"
    study.write_bytes(session.study.canonical)
    folder = root / "store" / "certificates" / session.id
    keys = [f"{name}={site.signing_key_path.with_suffix('.pub')}" for name, site in consortium.sites.items()]
    options = [o for key in keys for o in ("--key", key)]
    line = ["fedward-audit", "verify", folder, "--study", study, "--store", root / "store", *options]
    assert command(*line)[0] != 0
    status, told = command(*line, "--allow-seeded")
    assert status == 0, told


def test_a_hospital_that_was_put_back_is_refused_until_it_is_whole_again(
    consortium: Cluster, study: Path
) -> None:
    """The whole state folder of an earlier day: only the coordinator can tell."""
    name = consortium.names[-1]
    site = consortium.sites[name]
    wanted = small_study(study, 99)
    path = consortium.root / "again.json"
    path.write_bytes(wanted.canonical)
    for each in consortium.sites.values():
        twice = approval_of(wanted, "officer", sessions=2)
        approve(each, wanted, twice, plan_study(wanted, each.file.site.public_size))
    consortium.stop_vault(name)
    ledger = site.ledger_path.parent
    kept = ledger.with_name("kept")
    shutil.copytree(ledger, kept)
    lines = site.ledger_path.read_bytes().splitlines(keepends=True)
    site.ledger_path.write_bytes(b"".join(lines[:2]))
    shutil.rmtree(site.replies)
    (ledger / "head").unlink()
    certificates = site.certificates.rename(site.certificates.with_name("kept-certificates"))
    consortium.start_vault(name)
    options = ("--quorum", "2")
    status, told = command("fedward-server", "run", consortium.coordinator.root, path, *options)
    assert status == 0, told
    answers = sessions.store_of(consortium.coordinator).rounds(str(told["session"]))[0].answers
    assert [a.site for a in answers if "ledger-rolled-back" in a.detail] == [name]
    consortium.stop_vault(name)
    shutil.rmtree(ledger)
    kept.rename(ledger)
    shutil.rmtree(site.certificates, ignore_errors=True)
    certificates.rename(site.certificates)
    consortium.start_vault(name)
    status, told = command("fedward-server", "run", consortium.coordinator.root, path, *options)
    assert status == 0, told
    answers = sessions.store_of(consortium.coordinator).rounds(str(told["session"]))[0].answers
    assert name in {a.site for a in answers if a.outcome == "reply"}


def test_a_deployed_cohort_is_described_before_anything_is_trained(
    consortium: Cluster, study: Path, tmp_path: Path
) -> None:
    """Noised statistics of all hospitals together, charged; one of them has no budget left for it."""
    value = small_study(study, 100).model_dump(mode="json")
    value["statistics"] = {"epsilon": 3.0, "delta": 1e-4, "bins": 10}
    wanted = Study.model_validate(value)
    path = tmp_path / "described.json"
    path.write_bytes(wanted.canonical)
    for site in consortium.sites.values():
        size = site.file.site.public_size
        approve(site, wanted, approval_of(wanted, "officer", descriptions=1), plan_study(wanted, size))
    tight, *others = consortium.names
    root = consortium.coordinator.root
    status, told = command("fedward-server", "describe", root, path, "--quorum", "2")
    assert status == 0, told
    assert tight not in told["sites"]  # type: ignore[operator]
    assert set(told["sites"]) <= set(others)  # type: ignore[call-overload]
    assert any("budget-exhausted" in reason for reason in told["refused"])  # type: ignore[union-attr]
    ages = next(c for c in told["columns"] if c["name"] == "age")  # type: ignore[union-attr]
    assert 40 < ages["mean"]["value"] < 70
    for name in told["sites"]:  # type: ignore[union-attr]
        assert spending(consortium.sites[name].ledger_path)[wanted.digest].epsilon == pytest.approx(
            3.0, abs=0.01
        )
