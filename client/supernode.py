"""A hospital's connection to its coordinator: SuperNode and SuperExec, kept running; and the node's key.

Connections go outwards only; both programs listen on loopback at most. Neither needs to read the site's
data: all that they reach of it is the vault's socket.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.door import SOCKET_KEY
from client.launcher import write_commands
from client.settings import SiteFolder
from common.errors import SiteError
from common.files import read_bounded, write_atomic
from common.processes import (
    Patience,
    Program,
    Supervisor,
    beside_python,
    free_port,
    offline_environment,
)

_LOOPBACK = "127.0.0.1"
_UNQUOTABLE = set("\"'\\\n")
# A SuperNode that was killed is locked out by SuperLink for about 60 s; a coordinator may be away longer.
PATIENCE = Patience(restarts=30, first_delay=2.0, longest_delay=60.0)


def create_node_key(folder: SiteFolder) -> Path:
    """Make the key that tells the coordinator who connects; return the public half's path (node.pub).

    Raises:
        SiteError: if the site has a key already, or the folder can't be written.
    """
    private, public = folder.node_key_path, folder.node_key_path.with_suffix(".pub")
    if private.exists() or public.exists():
        raise SiteError(
            f"{private} or {public.name} exists already",
            remedy="keep it; a site that changes its key has to be enrolled again",
        )
    key = ec.generate_private_key(ec.SECP384R1())
    try:
        private.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        write_atomic(
            public,
            key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            + f" {folder.name}\n".encode(),
            mode=0o644,
        )
    except OSError as error:
        raise SiteError(
            f"{private.parent} cannot be written ({error.strerror})", remedy="check its permissions"
        ) from None
    return public


def connect(folder: SiteFolder, announce: Callable[[], None] = lambda: None, *, warm: bool = True) -> None:
    """Stay connected to the coordinator until SIGTERM or SIGINT.

    `announce` is called once both programs have been started; whether the coordinator accepts this node
    is told by the programs' own output, and by the coordinator. `warm` forks a loaded process for every
    message; without it the launcher starts anew each time.

    Raises:
        SiteError: if site.toml names no coordinator, or certificate, key or paths are not as they must be.
        DeploymentError: if a program fails again and again, e.g. because the coordinator refuses the key.
    """
    check(folder)
    work = folder.socket_path.parent.resolve()
    try:
        work.mkdir(mode=0o700, exist_ok=True)
        write_commands(work / "bin")
        write_atomic(work / "superexec.secret", secrets.token_bytes(32))
        (work / "flower").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SiteError(
            f"{work} cannot be written ({error.strerror})", remedy="check its permissions"
        ) from None
    Supervisor(programs(folder, work, free_port(), warm=warm), PATIENCE, work).run(announce)


def check(folder: SiteFolder) -> None:
    """See whether the site could connect.

    Raises:
        SiteError: naming what is not as it must be.
    """
    if folder.file.coordinator is None:
        raise SiteError(
            f"{folder.root / 'site.toml'} has no [coordinator]",
            remedy="add the address and the CA certificate that the coordinator gave you",
        )
    authority = folder.root / folder.file.coordinator.certificate
    try:
        x509.load_pem_x509_certificate(read_bounded(authority, SiteError))
    except ValueError:
        raise SiteError(
            f"{authority} is no PEM certificate", remedy="ask the coordinator for its ca.crt"
        ) from None
    try:
        key = load_ssh_private_key(read_bounded(folder.node_key_path, SiteError), password=None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SiteError(
            f"{folder.node_key_path} is no EC key in OpenSSH format",
            remedy="move it away, make a new one and have its node.pub enrolled",
        )
    if folder.node_key_path.stat().st_mode & 0o077:
        raise SiteError(
            f"{folder.node_key_path}: others may read this secret", remedy=f"chmod 600 {folder.node_key_path}"
        )
    if _UNQUOTABLE & set(str(folder.socket_path.resolve())):
        raise SiteError(
            f"{folder.socket_path}: quotes and backslashes don't pass Flower's configuration",
            remedy="move the site's folder to a path without them",
        )


def programs(folder: SiteFolder, work: Path, port: int, *, warm: bool = True) -> tuple[Program, ...]:
    """SuperNode, and the SuperExec that runs the installed ClientApp for every message.

    Raises:
        SiteError: if site.toml names no coordinator.
        DeploymentError: if Flower isn't installed beside this interpreter.
    """
    coordinator = folder.file.coordinator
    if coordinator is None:
        raise SiteError("site.toml has no [coordinator]", remedy="add the coordinator's address")
    secret = ("--superexec-auth-secret-file", str(work / "superexec.secret"))
    supernode = Program(
        name="supernode",
        command=(
            beside_python("flower-supernode"),
            *("--superlink", coordinator.address),
            *("--root-certificates", str((folder.root / coordinator.certificate).resolve())),
            *("--auth-supernode-private-key", str(folder.node_key_path.resolve())),
            *("--host", _LOOPBACK, "--port", str(port)),
            *("--isolation", "process", *secret),
            *("--node-config", f'{SOCKET_KEY}="{folder.socket_path.resolve()}"'),
        ),
        environment=offline_environment(work / "flower"),
    )
    superexec = Program(
        name="superexec",
        command=(
            *((sys.executable, "-I", "-m", "client.warm") if warm else (beside_python("flower-superexec"),)),
            *("--runtime-api-address", f"{_LOOPBACK}:{port}", "--insecure", *secret),
        ),
        environment=offline_environment(work / "flower", PATH=str(work / "bin")),
    )
    return supernode, superexec
