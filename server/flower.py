"""What the coordinator asks of Flower: submit a run, look at it, stop it, enrol a site, see who is there.

Plain functions around the `flwr` command, whose exit status is not to be believed: it may be 0 after a
failure. What counts is its JSON answer.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import Field

from common.errors import DeploymentError
from common.files import Strict, load_config, read_bounded, write_atomic
from common.processes import beside_python, offline_environment
from server.provisioning import CoordinatorFolder

CONNECTION = "coordinator"
SERVER_APP, CLIENT_APP = "server.app:app", "client.app:app"
ConfigValue = bool | int | float | str
_COMMAND_SECONDS = 120
_USED = "Public key already in use"  # what Flower says
_FRAME = dict.fromkeys(map(ord, "╭╮╰╯│─"), " ")  # Flower draws a box round its errors
_SHOWN_CHARACTERS = 500


@dataclass(frozen=True)
class RunStatus:
    """Attributes:
    run_id: Flower's number of the run.
    status: pending, starting, running or finished.
    outcome: completed, failed or stopped once finished; empty before.
    details: Flower's own words on the outcome.
    """

    run_id: int
    status: str
    outcome: str
    details: str

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def succeeded(self) -> bool:
        return self.finished and self.outcome == "completed"


@dataclass(frozen=True)
class Node:
    """Attributes:
    node_id: Flower's number of the site's SuperNode.
    name: the site's name as enrolled.
    status: registered (never seen), online or offline.
    """

    node_id: int
    name: str
    status: str

    @property
    def online(self) -> bool:
        return self.status == "online"


class EnrolledSite(Strict):
    """Attributes:
    node_id: Flower's number of the site's SuperNode.
    public_key: its key, as an OpenSSH line.
    """

    node_id: int
    public_key: str


class EnrolledSites(Strict):
    """The content of sites.json."""

    sites: Annotated[dict[str, EnrolledSite], Field(max_length=10_000)]


def submit(folder: CoordinatorFolder, run_config: Mapping[str, ConfigValue], app: Path | None = None) -> int:
    """Start a run of the installed ServerApp and return its id.

    Args:
        folder: the coordinator's folder.
        run_config: what the ServerApp finds as its run configuration. Flower shows it to every site.
        app: a folder with another Flower app; the bundle then is what that folder says.

    Raises:
        DeploymentError: if SuperLink doesn't answer or refuses.
    """
    with tempfile.TemporaryDirectory(prefix="fedward-") as temporary:
        if app is None:
            app = Path(temporary) / "fedward"
            write_app(app, run_config)
        command = ["run", str(app), CONNECTION]
        if run_config:
            overrides = Path(temporary) / "run.toml"
            overrides.write_bytes(tomli_w.dumps(dict(run_config)).encode())
            command += ["--run-config", str(overrides)]
        return int(_flwr(folder, *command)["run-id"])


def write_app(app: Path, run_config: Mapping[str, ConfigValue]) -> None:
    """Write a Flower app that is nothing but names: both sides run what they have installed.

    Flower wants every key of the run configuration declared; the values declared are empty ones.
    """
    components = {"serverapp": SERVER_APP, "clientapp": CLIENT_APP}
    declared = {name: type(value)() for name, value in run_config.items()}
    content = {
        "project": {
            "name": "fedward",
            "version": version("fedward"),
            "description": "Names only; both sides run what they have installed.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {"flwr": {"app": {"publisher": "fedward", "components": components, "config": declared}}},
    }
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_bytes(tomli_w.dumps(content).encode())


def run_status(folder: CoordinatorFolder, run_id: int) -> RunStatus:
    """How a run stands.

    Raises:
        DeploymentError: if SuperLink doesn't answer or knows no such run.
    """
    runs = _flwr(folder, "ls", CONNECTION, "--run-id", str(run_id)).get("runs") or []
    if len(runs) != 1:
        raise DeploymentError(f"no run {run_id}", remedy="check the run's number")
    status, _, outcome = str(runs[0]["status"]).partition(":")
    return RunStatus(run_id, status, outcome, str(runs[0].get("status-details") or ""))


def stop_run(folder: CoordinatorFolder, run_id: int) -> None:
    """Stop a run.

    Raises:
        DeploymentError: if SuperLink doesn't answer, or the run has finished already.
    """
    _flwr(folder, "stop", str(run_id), CONNECTION)


def register_node(folder: CoordinatorFolder, public_key_path: Path, name: str) -> int:
    """Let the SuperNode with this key connect, under the site's name; return its node id.

    Raises:
        DeploymentError: if the file is no EC public key in OpenSSH format, the name or the key is
            enrolled already, or SuperLink doesn't answer.
    """
    key = _public_key(public_key_path)
    enrolled = enrolled_sites(folder)
    for site, known in enrolled.items():
        if site == name or known.public_key == key:
            raise DeploymentError(
                f"{site} is enrolled already (node {known.node_id})",
                remedy="give the site another name, or have it make a key of its own",
            )
    try:
        answer = _flwr(
            folder, "supernode", "register", str(public_key_path.resolve()), CONNECTION, "--name", name
        )
    except DeploymentError as error:
        if _USED not in error.message:
            raise
        raise DeploymentError(
            f"{public_key_path}: this key was enrolled before, and was removed",
            remedy="have the site move keys/node.key and node.pub away, and make new ones: fedward-site join",
        ) from None
    node_id = int(answer["node-id"])
    sites = EnrolledSites(sites={**enrolled, name: EnrolledSite(node_id=node_id, public_key=key)})
    write_atomic(folder.sites, sites.model_dump_json(indent=2).encode())
    return node_id


def unregister_node(folder: CoordinatorFolder, name: str) -> int:
    """Let an enrolled site connect no more; return the node id that it had.

    Raises:
        DeploymentError: if no such site is enrolled, or SuperLink doesn't answer.
    """
    enrolled = enrolled_sites(folder)
    if name not in enrolled:
        raise DeploymentError(f"no site {name} is enrolled", remedy="see: fedward-server sites FOLDER")
    node_id = enrolled.pop(name).node_id
    if node_id in (i for i, _ in _listed(folder)):  # not after a removal that was cut short
        _flwr(folder, "supernode", "unregister", str(node_id), CONNECTION)
    write_atomic(folder.sites, EnrolledSites(sites=enrolled).model_dump_json(indent=2).encode())
    return node_id


def enrolled_sites(folder: CoordinatorFolder) -> dict[str, EnrolledSite]:
    """Site name → node.

    Raises:
        DeploymentError: if sites.json is not as written.
    """
    if not folder.sites.exists():
        return {}
    return load_config(EnrolledSites, folder.sites, DeploymentError).sites


def nodes(folder: CoordinatorFolder) -> tuple[Node, ...]:
    """Every enrolled site and whether it is connected, in order of name.

    Raises:
        DeploymentError: if SuperLink doesn't answer.
    """
    names = {site.node_id: name for name, site in enrolled_sites(folder).items()}
    found = [Node(i, names[i], status) for i, status in _listed(folder) if i in names]
    return tuple(sorted(found, key=lambda node: node.name))


def _listed(folder: CoordinatorFolder) -> list[tuple[int, str]]:
    """SuperLink's nodes and their status."""
    listed = _flwr(folder, "supernode", "list", CONNECTION).get("nodes") or []
    return [(int(node["node-id"]), str(node["status"])) for node in listed]


def run_log(folder: CoordinatorFolder, run_id: int) -> str:
    """What the run's ServerApp has logged so far.

    Raises:
        DeploymentError: if the command takes too long.
    """
    return _command(folder, "log", str(run_id), CONNECTION, "--show").stdout


def _flwr(folder: CoordinatorFolder, *arguments: str) -> dict[str, Any]:
    done = _command(folder, *arguments, "--format", "json")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and answer.get("success") is True:
        return answer
    reason = answer.get("error-message") if isinstance(answer, dict) else None
    words = str(reason or done.stderr or done.stdout).translate(_FRAME).split()
    shown = " ".join(words)[-_SHOWN_CHARACTERS:]
    raise DeploymentError(
        f"`flwr {arguments[0]}` failed: {shown or f'status {done.returncode}'}",
        remedy=f"see that `fedward-server start {folder.root}` is running, and what it prints",
    )


def _command(folder: CoordinatorFolder, *arguments: str) -> subprocess.CompletedProcess[str]:
    _write_connection(folder)
    try:
        return subprocess.run(
            [beside_python("flwr"), *arguments],
            env=offline_environment(folder.flower_home, NO_COLOR="1", COLUMNS="1000"),
            cwd=folder.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeploymentError(
            f"`flwr {arguments[0]}` took more than {_COMMAND_SECONDS} s",
            remedy=f"see that `fedward-server start {folder.root}` is running",
        ) from None


def _write_connection(folder: CoordinatorFolder) -> None:
    """Flower's file of connections; written when needed, so that the folder may be moved."""
    link = {"address": folder.loopback, "root-certificates": str(folder.authority)}
    content = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: link}}).encode()
    path = folder.flower_home / "config.toml"
    folder.flower_home.mkdir(mode=0o700, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        write_atomic(path, content)


def _public_key(path: Path) -> str:
    try:
        key = load_ssh_public_key(read_bounded(path, DeploymentError))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DeploymentError(
            f"{path} is no EC public key in OpenSSH format",
            remedy="ask the site for its keys/node.pub (never for node.key)",
        )
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
