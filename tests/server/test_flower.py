"""What is handed to Flower and how its answers are read; the real servers are in tests/integration."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import DeploymentError
from server import flower
from server.provisioning import CoordinatorFolder, provision


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    return provision(tmp_path / "lab", ["fl.example.org"], 8443, 9443)


class Flwr:
    """Stands in for the `flwr` command: answers as told, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Any = {"success": True}
        self.asked: list[list[str]] = []
        monkeypatch.setattr(flower.subprocess, "run", self.run)

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(command[1:])
        text = self.answer if isinstance(self.answer, str) else json.dumps(self.answer)
        return subprocess.CompletedProcess(command, 0, text, "")  # 0, as it says after failures, too


@pytest.fixture
def flwr(monkeypatch: pytest.MonkeyPatch) -> Flwr:
    return Flwr(monkeypatch)


def public_key(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path


def test_the_bundle_is_nothing_but_names(tmp_path: Path) -> None:
    flower.write_app(tmp_path / "fedward", {"store": "/srv/secret", "rounds": 3})
    assert [p.name for p in (tmp_path / "fedward").iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((tmp_path / "fedward" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert app["config"] == {"store": "", "rounds": 0}


@pytest.mark.parametrize("answer", [{"success": False, "error-message": "no"}, {}, [], "Traceback", ""])
def test_a_failure_with_status_0_is_a_failure(folder: CoordinatorFolder, flwr: Flwr, answer: Any) -> None:
    flwr.answer = answer
    with pytest.raises(DeploymentError, match="`flwr ls` failed"):
        flower.run_status(folder, 7)


@pytest.mark.parametrize(
    ("status", "finished", "succeeded"),
    [
        ("running", False, False),
        ("finished:completed", True, True),
        ("finished:failed", True, False),
        ("finished:stopped", True, False),
    ],
)
def test_how_a_run_stands(
    folder: CoordinatorFolder, flwr: Flwr, status: str, finished: bool, succeeded: bool
) -> None:
    flwr.answer = {"success": True, "runs": [{"status": status, "status-details": "why"}]}
    found = flower.run_status(folder, 7)
    assert (found.finished, found.succeeded, found.details) == (finished, succeeded, "why")


def test_an_unknown_run_is_an_error(folder: CoordinatorFolder, flwr: Flwr) -> None:
    flwr.answer = {"success": True, "runs": []}
    with pytest.raises(DeploymentError, match="no run 7"):
        flower.run_status(folder, 7)


def test_enrolment_is_remembered_by_name(folder: CoordinatorFolder, flwr: Flwr, tmp_path: Path) -> None:
    flwr.answer = {"success": True, "node-id": 2**63 + 1}
    flower.register_node(folder, public_key(tmp_path / "north.pub"), "north")
    flwr.answer = {
        "success": True,
        "nodes": [
            {"node-id": str(2**63 + 1), "status": "online"},
            {"node-id": "5", "status": "online"},  # enrolled behind our back: it bears no site's name
        ],
    }
    assert flower.nodes(folder) == (flower.Node(2**63 + 1, "north", "online"),)


def test_a_name_and_a_key_are_enrolled_once(folder: CoordinatorFolder, flwr: Flwr, tmp_path: Path) -> None:
    flwr.answer = {"success": True, "node-id": 1}
    flower.register_node(folder, public_key(tmp_path / "north.pub"), "north")
    for path, name in ((tmp_path / "north.pub", "south"), (public_key(tmp_path / "new.pub"), "north")):
        with pytest.raises(DeploymentError, match="enrolled already"):
            flower.register_node(folder, path, name)
    assert len(flwr.asked) == 1


def test_only_an_ec_public_key_is_taken(folder: CoordinatorFolder, flwr: Flwr, tmp_path: Path) -> None:
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "ed.pub").write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    (tmp_path / "text.pub").write_text("no key")
    for name in ("ed.pub", "text.pub"):
        with pytest.raises(DeploymentError, match="no EC public key"):
            flower.register_node(folder, tmp_path / name, "north")
    assert flwr.asked == []
