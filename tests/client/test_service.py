"""The vault behind its socket, and the door on the Flower side."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket as sockets
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import allow, make_site, study

from client import door, service
from client.door import CHUNK_BYTES, ask, chunks, gather, vault_for
from client.service import secure_folder, serve
from client.settings import SiteFolder
from client.site import open_vault
from client.wire_pb2 import Chunk
from common.errors import MessageError, SiteError
from common.messages import Job, JobHeader, Refusal, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.privacy.noise import Seeded

WANTED = study()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fw"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def site(short: Path) -> SiteFolder:
    folder = make_site(short / "site")
    allow(folder, WANTED)
    return folder


class FakeVault:
    """A vault with another answer."""

    site = "north"

    class randomness:
        protective = True

    def __init__(self, answer: Any) -> None:
        self.answer = answer


def job(number: int = 1) -> bytes:
    header = JobHeader(session="one", round=number, study=WANTED.digest)
    return encode(Job(header, parameter_arrays(study_model(WANTED))))


def test_a_round_through_the_socket(site: SiteFolder) -> None:
    vault = open_vault(site, durable=False)
    server = serve(vault, site.socket_path)
    try:
        first = ask(str(site.socket_path), job(), timeout=60)
        assert isinstance(decode(first), Reply)
        assert ask(str(site.socket_path), job(), timeout=60) == first
        assert isinstance(decode(ask(str(site.socket_path), b"", timeout=60)), Refusal)
        mode = site.socket_path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) & 0o007 == 0
        assert stat.S_IMODE(site.socket_path.parent.stat().st_mode) == 0o700
    finally:
        server.stop(0).wait()
        vault.close()


def test_large_messages_pass(short: Path) -> None:
    """400 MB there, and as much back; equal by their hash, so that few copies are held."""
    answered = []

    def echo(request: bytes) -> bytes:
        answered.append(hashlib.sha256(request).hexdigest())
        return request

    server = serve(FakeVault(echo), short / "run" / "vault.sock")
    try:
        message = np.arange(50_000_000, dtype=np.int64).tobytes()
        expected = hashlib.sha256(message).hexdigest()
        reply = ask(str(short / "run" / "vault.sock"), message, timeout=300)
        assert hashlib.sha256(reply).hexdigest() == expected
        assert answered == [expected]
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_pieces_make_the_message(size: int) -> None:
    message = os.urandom(size)
    parts = list(chunks(message))
    assert all(len(p.data) <= CHUNK_BYTES for p in parts)
    assert gather(parts) == message


def test_a_message_beyond_the_limit_is_given_up_early() -> None:
    taken = 0

    def endless() -> Iterator[Chunk]:
        nonlocal taken
        while True:
            taken += 1
            yield Chunk(data=bytes(1000))

    with pytest.raises(MessageError, match="more than 5000 bytes"):
        gather(endless(), 5000)
    assert taken == 6


def test_the_limit_holds_at_the_socket(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_MESSAGE_BYTES", 1000)
    server = serve(FakeVault(lambda request: b"never"), short / "run" / "vault.sock")
    try:
        message = decode(ask(str(short / "run" / "vault.sock"), bytes(2000), timeout=60))
        assert isinstance(message, Refusal)
        assert message.header.code == "message-malformed"
    finally:
        server.stop(0).wait()


def test_a_vault_that_is_not_there(short: Path) -> None:
    with pytest.raises(SiteError, match="does not answer") as error:
        ask(str(short / "nowhere.sock"), b"x", timeout=60)
    assert "fedward-site serve" in error.value.remedy


@pytest.mark.parametrize("mode", [0o701, 0o704, 0o755, 0o777])
def test_a_folder_that_everybody_can_enter(short: Path, mode: int) -> None:
    folder = short / "run"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(SiteError, match="everybody"):
        serve(FakeVault(bytes), folder / "vault.sock")
    folder.chmod(0o750)
    secure_folder(folder / "vault.sock")


def test_a_path_that_is_too_long_or_taken(short: Path) -> None:
    with pytest.raises(SiteError, match="too long"):
        secure_folder(short / ("x" * 100) / "vault.sock")
    (short / "file").write_text("data")
    short.chmod(0o700)
    with pytest.raises(SiteError, match="not a socket"):
        secure_folder(short / "file")
    assert (short / "file").read_text() == "data"


def test_a_seeded_vault_does_not_serve(site: SiteFolder) -> None:
    vault = open_vault(site, randomness=Seeded(1), durable=False)
    with pytest.raises(SiteError, match="no seed"):
        serve(vault, site.socket_path)
    assert not site.socket_path.exists()
    vault.close()


def test_a_node_without_a_socket_says_so() -> None:
    for config in ({}, {"vault-socket": ""}, {"vault-socket": 7}):
        with pytest.raises(SiteError, match="vault-socket"):
            vault_for(config)


def test_a_simulation_puts_its_vaults_there_and_takes_them_away() -> None:
    door.install(lambda config: lambda request: request * int(str(config["n"])))
    try:
        assert vault_for({"n": 2})(b"x") == b"xx"
    finally:
        door.install(None)
    with pytest.raises(SiteError):
        vault_for({"n": 2})


@pytest.mark.parametrize("module", ["client.app", "client.door", "client.launcher"])
def test_the_flower_side_loads_no_torch(module: str) -> None:
    work = f"import {module}, sys; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    loaded = set(eval(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "opacus", "pandas", "sklearn", "server", "simulations"}


def namespaces() -> bool:
    probe = ["unshare", "-n", "true"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.namespace
def test_the_vault_needs_no_network_and_opens_none(site: SiteFolder) -> None:
    if not namespaces():
        pytest.skip("`unshare -n` is not allowed here")
    path = site.socket_path
    code = (
        "import sys; from client.cli import main; sys.argv = ['fedward-site', 'serve', sys.argv[1]]; main()"
    )
    command = ["unshare", "-n", sys.executable, "-u", "-c", code, str(site.root)]
    vault = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert vault.stdout is not None
        lines = []
        for line in vault.stdout:
            lines.append(line)
            if "listens on" in line:
                break
        assert path.is_socket(), "".join(lines)
        assert isinstance(decode(ask(str(path), job(), timeout=120)), Reply)
        for table in ("tcp", "tcp6", "udp", "udp6", "raw"):
            rows = Path(f"/proc/{vault.pid}/net/{table}").read_text().splitlines()[1:]
            assert rows == [], table
        interfaces = Path(f"/proc/{vault.pid}/net/dev").read_text().splitlines()[2:]
        assert [i.split(":")[0].strip() for i in interfaces if "lo" not in i] == []
    finally:
        vault.send_signal(signal.SIGTERM)
        assert vault.wait(timeout=60) == 0
        if vault.stdout is not None:
            vault.stdout.close()


def test_a_second_vault_of_a_site_does_not_take_the_first_ones_socket(site: SiteFolder) -> None:
    vault = open_vault(site, durable=False)
    server = serve(vault, site.socket_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from client.cli import main; main()", "serve", str(site.root)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 7, done.stderr
        assert "another vault" in done.stderr
        assert isinstance(decode(ask(str(site.socket_path), job(), timeout=60)), Reply)
    finally:
        server.stop(0).wait()
        vault.close()


def test_another_sites_vault_does_not_take_a_living_socket(short: Path) -> None:
    path = short / "run" / "vault.sock"
    first = serve(FakeVault(lambda request: b"first"), path)
    try:
        with pytest.raises(SiteError, match="another vault"):
            serve(FakeVault(lambda request: b"second"), path).stop(0)
        assert ask(str(path), b"x", timeout=60) == b"first"
    finally:
        first.stop(0).wait()


def test_a_dead_vaults_socket_is_no_obstacle(short: Path) -> None:
    path = short / "run" / "vault.sock"
    secure_folder(path)
    left = sockets.socket(sockets.AF_UNIX)
    left.bind(str(path))
    left.close()
    server = serve(FakeVault(lambda request: b"alive"), path)
    try:
        assert ask(str(path), b"x", timeout=60) == b"alive"
    finally:
        server.stop(0).wait()
