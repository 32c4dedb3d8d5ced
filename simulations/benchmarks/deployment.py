"""Seconds per round of a real deployment: coordinator, sites and vaults as processes on loopback.

A site's own work is trivial, so what is measured is the way of the messages.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import DeploymentError
from common.files import write_atomic
from common.processes import beside_python, free_port
from server.provisioning import CoordinatorFolder, provision
from server.sessions import store_of
from server.superlink import find_nginx
from simulations.benchmarks.measure import Comparison, Result, Timing, rounds_timing
from simulations.benchmarks.workload import PATIENTS, benchmark_study, site_name, write_sites
from simulations.engine import SimulationSettings, simulate

_START_SECONDS = 180.0
_COMMAND_SECONDS = 120.0
_ROUND_SECONDS = 180.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.3


def available() -> bool:
    """Whether this machine has what a deployment needs besides fedward: nginx."""
    try:
        find_nginx()
    except DeploymentError:
        return False
    return True


def compare_deployment(work: Path, *, sites: int = 4, rounds: int = 10) -> Comparison:
    """The same trivial study in one process, and over TLS, SuperNodes and sockets.

    Raises:
        DeploymentError: if a part does not start or the study does not end.
    """
    study = benchmark_study(rounds, private=True, trivial=True)
    began = time.perf_counter()
    simulated = simulate(
        study, write_sites(work / "in-process", sites, PATIENTS), work / "run", SimulationSettings()
    )
    inside = rounds_timing(time.perf_counter() - began, simulated.store, simulated.session)
    deployed = _deployed(work, sites, study.canonical, rounds)
    return Comparison(
        "deployment",
        f"{sites} sites x {rounds} rounds of one linear step, on one machine",
        (Result("in one process", (inside,)), Result("deployed", (deployed,))),
    )


def _deployed(work: Path, sites: int, study: bytes, rounds: int) -> Timing:
    write_atomic(work / "study.json", study)
    write_sites(work / "sites", sites, PATIENTS)
    with ExitStack() as stack:
        folder = provision(work / "coordinator", ["127.0.0.1"], free_port(), free_port(), listen="127.0.0.1")
        began = time.perf_counter()
        stack.enter_context(_running(work, "fedward-server", "start", str(folder.root), "--json"))
        _wait(lambda: b'"ready"' in (work / "fedward-server-start.log").read_bytes(), "the coordinator")
        for index in range(sites):
            _join(stack, work, folder, work / "sites" / site_name(index))
        _wait(lambda: _online(folder) >= sites, "all sites online")
        command = ("run", str(folder.root), str(work / "study.json"), "--json")
        told = _command("fedward-server", *command, seconds=_ROUND_SECONDS * (rounds + 1))
        total = time.perf_counter() - began
        return rounds_timing(total, store_of(folder), str(told["session"]))


def _join(stack: ExitStack, work: Path, folder: CoordinatorFolder, site: Path) -> None:
    entrance = ("--address", f"127.0.0.1:{folder.file.port}", "--certificate", str(folder.authority))
    _command("fedward-site", "join", str(site), *entrance, "--json")
    _command("fedward-site", "policy", str(site), "--epsilon", "100", "--delta", "1e-2", "--json")
    _command("fedward-site", "approve", str(site), str(work / "study.json"), "--yes", "--json")
    stack.enter_context(_running(site, "fedward-site", "serve", str(site)))
    _wait((site / "run" / "vault.sock").exists, f"the vault of {site.name}")
    key = str(site / "keys" / "node.pub")
    _command("fedward-server", "enrol", str(folder.root), key, "--name", site.name, "--json")
    stack.enter_context(_running(site, "fedward-site", "connect", str(site)))


def _online(folder: CoordinatorFolder) -> int:
    told = _command("fedward-server", "sites", str(folder.root), "--json")
    return sum(site["status"] == "online" for site in told["sites"])


@contextmanager
def _running(logs: Path, name: str, *arguments: str) -> Iterator[None]:
    """A command of ours that runs meanwhile; it ends its own children when it is told to end."""
    with (logs / f"{name}-{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            [beside_python(name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(),
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_SECONDS)


def _command(name: str, *arguments: str, seconds: float = _COMMAND_SECONDS) -> dict[str, Any]:
    """The JSON answer of a command of ours."""
    try:
        done = subprocess.run(
            [beside_python(name), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=_environment(),
        )
    except subprocess.TimeoutExpired:
        raise _failed(name, arguments, f"took more than {seconds:g} s") from None
    with suppress(ValueError):
        answer = json.loads(done.stdout)
        if done.returncode == 0 and isinstance(answer, dict):
            return answer
    raise _failed(name, arguments, (done.stdout + done.stderr)[-500:])


def _failed(name: str, arguments: Sequence[str], why: str) -> DeploymentError:
    return DeploymentError(f"`{name} {arguments[0]}` failed: {why}", remedy="run it by hand to see more")


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"not within {_START_SECONDS:g} s: {what}", remedy="see what else runs here"
            )
        time.sleep(_POLL_SECONDS)


def _environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1"}
