"""Both engines: the same model bit for bit, bounded memory, and site folders left as they were."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from client.vault import Vault
from common.errors import DeploymentError, SiteError, StudyFailed
from common.files import write_atomic
from common.processes import beside_python
from common.study import Study, load_study
from server.coordinator import PARAMETERS, part
from simulations.datasets import prepare
from simulations.engine import Simulation, SimulationSettings, simulate, sites
from simulations.engine.manifest import read_manifest, write_manifest
from simulations.engine.ray import simulate_on_ray
from simulations.engine.ray_worker import PARTITION_KEY, install
from simulations.engine.sites import find_sites
from simulations.engine.superlink import superlink
from simulations.studies import ready_study

ROUNDS, SEED = 2, 3
RAY_SECONDS = 540


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    prepare("breast-cancer", folder, folder)
    return folder


@pytest.fixture(scope="module")
def study() -> Study:
    whole = load_study(ready_study("breast-cancer"))
    return whole.model_copy(update={"algorithm": whole.algorithm.model_copy(update={"rounds": ROUNDS})})


@pytest.fixture(scope="module")
def model(study: Study, hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the in-process engine makes of the study with one worker."""
    run = tmp_path_factory.mktemp("one-worker")
    return final_model(simulate(study, hospitals, run, SimulationSettings(workers=1, seed=SEED)))


def final_model(simulation: Simulation) -> bytes:
    checkpoint = simulation.store.checkpoint(simulation.session, ROUNDS + 1)
    return as_bytes(part(checkpoint, PARAMETERS))


def as_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    return b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def processes_that_know(text: str) -> list[int]:
    """Processes with `text` in their environment, command line or working directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                known = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                known += os.readlink(entry / "cwd").encode()
            except OSError:
                continue
            if text.encode() in known:
                found.append(int(entry.name))
    return found


@pytest.fixture
def alone() -> tuple[str, ...]:
    """The start of a command that runs where there is no network but loopback."""
    command = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    try:
        permitted = subprocess.run([*command, "true"], capture_output=True, timeout=30, check=False)
    except OSError as error:
        pytest.skip(f"unshare cannot be run ({error.strerror})")
    if permitted.returncode:
        pytest.skip(f"unshare -n is not permitted: {permitted.stderr.decode().strip()}")
    return command


def test_workers_do_not_change_the_model(study: Study, hospitals: Path, model: bytes, tmp_path: Path) -> None:
    done = simulate(study, hospitals, tmp_path, SimulationSettings(workers=4, seed=SEED))
    assert final_model(done) == model


def test_another_seed_does(study: Study, hospitals: Path, model: bytes, tmp_path: Path) -> None:
    done = simulate(study, hospitals, tmp_path, SimulationSettings(seed=SEED + 1))
    assert final_model(done) != model


@pytest.mark.namespace
def test_ray_gives_the_same_model_and_leaves_no_process(
    alone: tuple[str, ...], study: Study, hospitals: Path, model: bytes, tmp_path: Path
) -> None:
    """One start of Ray for all that there is to see, because it is slow."""
    from safetensors.numpy import load_file

    before = digests(hospitals)
    write_atomic(tmp_path / "study.json", study.canonical)
    command = [beside_python("fedward-sim"), "run", str(tmp_path / "study.json"), "--engine", "ray"]
    options = ["--sites", str(hospitals), "--out", str(tmp_path / "runs"), "--seed", str(SEED), "--json"]
    done = subprocess.run(
        [*alone, *command, *options], capture_output=True, text=True, timeout=RAY_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(json.loads(done.stdout)["folder"])
    assert as_bytes(load_file(folder / "model.safetensors")) == model
    assert digests(hospitals) == before
    assert processes_that_know(str(folder)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_sites_beyond_memory_are_opened_one_per_worker(
    study: Study,
    hospitals: Path,
    model: bytes,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, opened, most, openings = threading.Lock(), 0, 0, 0

    def open_counted(*arguments: object) -> Vault:
        nonlocal opened, most, openings
        with lock:
            opened, openings = opened + 1, openings + 1
            most = max(most, opened)
        vault = original(*arguments)
        close = vault.close

        def close_counted() -> None:
            nonlocal opened
            close()
            with lock:
                opened -= 1

        monkeypatch.setattr(vault, "close", close_counted)
        return vault

    original = sites.open_simulated
    monkeypatch.setattr(sites, "open_simulated", open_counted)
    done = simulate(
        study, hospitals, tmp_path, SimulationSettings(workers=workers, seed=SEED, memory_bytes=1)
    )
    assert final_model(done) == model
    assert most <= workers
    assert openings > 4  # four sites, each opened again
    assert opened == 0


def test_site_folders_stay_as_they_are(study: Study, hospitals: Path, tmp_path: Path) -> None:
    before = digests(hospitals)
    simulate(study, hospitals, tmp_path, SimulationSettings(seed=SEED))
    assert digests(hospitals) == before


def test_progress_never_goes_back(study: Study, hospitals: Path, tmp_path: Path) -> None:
    told: list[int] = []
    done = simulate(study, hospitals, tmp_path, SimulationSettings(seed=SEED), told.append)
    assert told == sorted(told)
    assert told
    assert told[-1] <= done.store.rounds_done(done.session) == ROUNDS + 1


def nothing(folder: Path) -> Path:
    return folder / "absent"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def same_name_twice(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / "twice" / name).mkdir(parents=True)
        content = '[site]\nname = "same"\npublic_size = 10\n[data]\nfile = "patients.csv"\n'
        (folder / "twice" / name / "site.toml").write_text(content)
    return folder / "twice"


@pytest.mark.parametrize("engine", [simulate, simulate_on_ray])
@pytest.mark.parametrize(
    ("make", "words"),
    [(nothing, "no such folder"), (empty, r"site\.toml"), (same_name_twice, "two sites")],
)
def test_a_bad_folder_of_sites_is_refused(
    engine: object, make: object, words: str, study: Study, tmp_path: Path
) -> None:
    with pytest.raises(SiteError, match=words) as caught:
        engine(study, make(tmp_path), tmp_path / "run", SimulationSettings())  # type: ignore[operator]
    assert caught.value.remedy


def test_a_site_without_data_fails_the_study(study: Study, hospitals: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sites" / "bare"
    folder.mkdir(parents=True)
    (folder / "site.toml").write_bytes((hospitals / "cedar-hill" / "site.toml").read_bytes())
    with pytest.raises(StudyFailed, match="cedar-hill"):
        simulate(study, tmp_path / "sites", tmp_path / "run", SimulationSettings(seed=SEED))


def test_a_manifest_tells_a_worker_its_sites(hospitals: Path, tmp_path: Path) -> None:
    places = find_sites(hospitals, tmp_path)
    path = write_manifest(tmp_path / "manifest.json", places, SEED)
    told = read_manifest(path)
    assert told.seed == SEED
    assert [told.place(i) for i in range(4)] == list(places)
    for partition in (-1, 4):
        with pytest.raises(DeploymentError, match="simulated node"):
            told.place(partition)
    path.write_text('{"sites": [], "seed": 1, "more": 2}')
    with pytest.raises(DeploymentError, match="more"):
        read_manifest(path)


def test_the_app_travels_by_name(hospitals: Path, tmp_path: Path) -> None:
    """In a process of its own: installing changes how ClientApps are sent."""
    path = write_manifest(tmp_path / "manifest.json", find_sites(hospitals, tmp_path), SEED)
    program = (
        "import pickle, sys\n"
        "from client import door\n"
        "from client.app import app\n"
        "from simulations.engine.ray_app import app as loaded\n"
        "sent = pickle.dumps(loaded)\n"
        "door.install(None)\n"
        "assert pickle.loads(sent) is loaded is app\n"
        "door.vault_for({'partition-id': 3})\n"
        "assert len(sent) < 1000\n"
    )
    environment = {**os.environ, "FEDWARD_SIMULATION": str(path)}
    subprocess.run([beside_python("python"), "-c", program], env=environment, timeout=120, check=True)
    del environment["FEDWARD_SIMULATION"]
    lost = subprocess.run(
        [beside_python("python"), "-c", program],
        env=environment,
        timeout=120,
        check=False,
        capture_output=True,
    )
    assert b"FEDWARD_SIMULATION is not set" in lost.stderr


def test_a_superlink_that_ends_at_once_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "flower-superlink"
    fake.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr("simulations.engine.superlink.beside_python", lambda name: str(tmp_path / name))
    with pytest.raises(DeploymentError, match="no such luck"), superlink(tmp_path / "flower", {}):
        pass


def test_what_a_superlink_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "flower-superlink"
    fake.write_text("#!/bin/sh\ntrap '' TERM\n(trap '' TERM; sleep 600) &\nsleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setattr("simulations.engine.superlink.beside_python", lambda name: str(tmp_path / name))
    monkeypatch.setattr("simulations.engine.superlink._await_health", lambda link, address: None)
    monkeypatch.setattr("simulations.engine.superlink._STOP_SECONDS", 1.0)
    token = f"token-of-{tmp_path.name}"
    with superlink(tmp_path / "flower", {"FEDWARD_TEST": token}) as link:
        assert link.running
        assert processes_that_know(token)
    assert processes_that_know(token) == []


def test_a_worker_lets_the_ledger_go(study: Study, hospitals: Path, tmp_path: Path) -> None:
    """Two messages to one site, with another vault on its ledger in between."""
    import copyreg

    from flwr.clientapp import ClientApp

    from client import door

    places = find_sites(hospitals, tmp_path)
    for place in places:
        sites.admit(place, study, public=False)
    path = write_manifest(tmp_path / "manifest.json", places, SEED)
    install(str(path))
    try:
        answer = door.vault_for({PARTITION_KEY: 0})
        for _ in range(2):
            assert answer(b"nonsense")  # a refusal
            sites.open_simulated(places[0], SEED).close()
    finally:
        door.install(None)
        copyreg.dispatch_table.pop(ClientApp, None)
