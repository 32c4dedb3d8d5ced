"""A SuperLink of one simulated run: started on loopback, asked, and ended with all that it started.

Flower's Control API knows no authentication: while the run lasts, every user of this machine could submit
runs to it. The in-process engine, which is the default, opens no port.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import tomli_w

from common.errors import DeploymentError
from common.processes import beside_python, free_port, offline_environment

CONNECTION = "simulation"
OWNER_VARIABLE = "FEDWARD_SUPERLINK"  # marks all that a SuperLink of ours has started
SERVER_APP, CLIENT_APP = "server.app:app", "simulations.engine.ray_app:app"
_START_SECONDS = 90.0
_COMMAND_SECONDS = 120.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.2
_CALM_LOOKS = 10  # in a row
_SHOWN_CHARACTERS = 1500


@dataclass(frozen=True)
class SuperLink:
    """Attributes:
    folder: Flower's state, the app and superlink.log.
    environment: of every program of this run.
    """

    folder: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        return self.folder / "superlink.log"

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def submit(self, run_config: Mapping[str, bool | str], federation: Mapping[str, int]) -> int:
        """Start a run; returns Flower's number of it.

        Raises:
            DeploymentError: if Flower refuses.
        """
        app = self.folder / "app"
        _write_app(app, run_config)
        wanted = self.folder / "run.toml"
        wanted.write_bytes(tomli_w.dumps(dict(run_config)).encode())
        nodes = " ".join(f"{key}={value}" for key, value in federation.items())
        command = ("run", str(app), CONNECTION, "--run-config", str(wanted), "--federation-config", nodes)
        return int(self._flwr(*command)["run-id"])

    def outcome(self, run_id: int) -> str:
        """How a run stands, in Flower's words: `running`, `finished:completed`, `finished:failed`, …

        Raises:
            DeploymentError: if Flower doesn't answer.
        """
        runs = self._flwr("ls", CONNECTION, "--run-id", str(run_id)).get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def told(self) -> str:
        """The end of what SuperLink and the run have logged."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-_SHOWN_CHARACTERS:]

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [beside_python("flwr"), *arguments, "--format", "json"],
                env=dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeploymentError(
                f"`flwr {arguments[0]}` took more than {_COMMAND_SECONDS:g} s", remedy=f"see {self.log}"
            ) from None
        with suppress(ValueError):
            answer = json.loads(done.stdout)
            if isinstance(answer, dict) and answer.get("success") is True:
                return answer
        shown = " ".join((done.stdout + done.stderr).split())[-_SHOWN_CHARACTERS:]
        raise DeploymentError(f"`flwr {arguments[0]}` failed: {shown}", remedy=f"see {self.log}")


@contextmanager
def superlink(folder: Path, variables: Mapping[str, str]) -> Iterator[SuperLink]:
    """A SuperLink that serves inside the context and has ended, with all its descendants, after it.

    Args:
        folder: gets Flower's state; made if absent.
        variables: of the environment, besides this process's own.

    Raises:
        DeploymentError: if it doesn't start.
    """
    flower = beside_python("flower-superlink")
    home = folder / "home"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = free_port()
    address = f"127.0.0.1:{port}"
    # Flower starts `flwr-simulation` by name: it must be the one beside this interpreter.
    path = os.pathsep.join((str(Path(flower).parent), os.environ.get("PATH", "")))
    owner = str(folder.resolve())
    environment = offline_environment(
        home, PATH=path, NO_COLOR="1", COLUMNS="1000", **variables, **{OWNER_VARIABLE: owner}
    )
    link = {"address": address, "insecure": True}
    content = {"superlink": {"default": CONNECTION, CONNECTION: link}}
    (home / "config.toml").write_bytes(tomli_w.dumps(content).encode())
    command = [
        flower,
        *("--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends it
        )
    running = SuperLink(folder, environment, process)
    try:
        _await_health(running, address)
        yield running
    finally:
        _end(process, owner)


def _await_health(link: SuperLink, address: str) -> None:
    import httpx

    deadline = time.monotonic() + _START_SECONDS
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while time.monotonic() < deadline and link.running:
            with suppress(httpx.HTTPError):
                if client.get(f"http://{address}/health").status_code == 200:
                    return
            time.sleep(_POLL_SECONDS)
    raise DeploymentError(
        f"Flower's SuperLink did not start: {link.told()[-500:]}",
        remedy=f"see {link.log}, or use the in-process engine",
    )


def _write_app(app: Path, run_config: Mapping[str, bool | str]) -> None:
    """A bundle that is nothing but names (Flower wants every key of the configuration declared)."""
    declared = {name: type(value)() for name, value in run_config.items()}
    content = {
        "project": {
            "name": "fedward",
            "version": version("fedward"),
            "description": "Names only; the code is what is installed.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedward",
                    "components": {"serverapp": SERVER_APP, "clientapp": CLIENT_APP},
                    "config": declared,
                }
            }
        },
    }
    app.mkdir(parents=True, exist_ok=True)
    (app / "pyproject.toml").write_bytes(tomli_w.dumps(content).encode())


def _end(process: subprocess.Popen[bytes], owner: str) -> None:
    """End SuperLink and all that it has started, Ray's daemons too: politely, then by force.

    A process that is just being started shows no environment yet, and Ray starts some while others end:
    so nobody may be seen for a while before this is over.
    """
    asked: set[int] = set()
    calm = 0
    began = time.monotonic()
    while calm < _CALM_LOOKS and time.monotonic() < began + 4 * _STOP_SECONDS:
        left = _owned(process, owner)
        calm = 0 if left else calm + 1
        late = time.monotonic() > began + _STOP_SECONDS
        for pid in left if late else set(left) - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, SIGKILL if late else SIGTERM)
        asked.update(left)
        time.sleep(_POLL_SECONDS)
    process.wait(timeout=_STOP_SECONDS)


def _owned(process: subprocess.Popen[bytes], owner: str) -> list[int]:
    """The living processes of one SuperLink.

    Ray's daemons leave its session and its tree, but not the folder that they were started in, and most not
    the environment that they were given: setting a title, some write over it (Linux's /proc tells; elsewhere
    only SuperLink itself is known, and Ray's daemons follow their driver).
    """
    found = {process.pid} if process.poll() is None else set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has just ended
            environment = (path / "environ").read_bytes()
            # Not by the variable's name: a title may have been written over some of this. Not by the folder
            # alone: someone's shell may be in it
            titled = environment.startswith(b"\0")
            if owner.encode() in environment or (titled and os.readlink(path / "cwd") == owner):
                found.add(int(path.name))
    found.discard(os.getpid())
    return sorted(found)
