"""The coordinator's servers as one foreground process: SuperLink, SuperExec and nginx.

SuperLink's Control API knows no authentication and its Runtime API hands out task tokens, so SuperLink
listens on loopback only, gives tasks only to who knows the secret, and nginx passes nothing but the
Fleet API. Process isolation and the database let a study outlive a restart of SuperLink.
"""

from __future__ import annotations

import os
import pwd
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography import x509

from common.errors import DeploymentError
from common.files import read_bounded
from common.processes import (
    Patience,
    Program,
    Supervisor,
    beside_python,
    offline_environment,
    port_is_free,
)
from server.provisioning import LOOPBACK, CoordinatorFolder

_PROBE_SECONDS = 2.0
_SYSTEM_FOLDERS = "/usr/sbin:/usr/local/sbin:/sbin"  # Debian keeps nginx out of ordinary users' PATH


def start(folder: CoordinatorFolder, announce: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is called once hospitals can connect.

    Raises:
        DeploymentError: if nginx is missing, a port is taken, a certificate has expired or a file is
            missing, or if a server fails again and again.
    """
    nginx = find_nginx()
    check(folder)
    Supervisor(programs(folder, nginx), Patience(), folder.root).run(announce)


def find_nginx() -> str:
    """The path of nginx.

    Raises:
        DeploymentError: if it isn't installed.
    """
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:{_SYSTEM_FOLDERS}")
    if found is None:
        raise DeploymentError("nginx is not installed", remedy="apt-get install nginx")
    return found


def check(folder: CoordinatorFolder) -> None:
    """See whether the servers could start.

    Raises:
        DeploymentError: naming the file or port that is not as it must be.
    """
    for path in (folder.key, folder.secret, folder.nginx_conf):
        read_bounded(path, DeploymentError)
    for path in (folder.authority, folder.certificate):
        try:
            certificate = x509.load_pem_x509_certificate(read_bounded(path, DeploymentError))
        except ValueError:
            raise DeploymentError(f"{path} is no certificate", remedy="restore it from a backup") from None
        if certificate.not_valid_after_utc < datetime.now(UTC):
            raise DeploymentError(
                f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}",
                remedy="issue a new one with the folder's authority",
            )
    for address, port in ((LOOPBACK, folder.file.loopback_port), (folder.file.listen, folder.file.port)):
        if not port_is_free(address, port):
            raise DeploymentError(
                f"{address}:{port} cannot be listened on",
                remedy="stop what holds the port, get the right to ports below 1024, or change server.toml",
            )


def programs(folder: CoordinatorFolder, nginx: str) -> tuple[Program, ...]:
    """The three servers in the order in which they start."""
    environment = offline_environment(folder.flower_home, PATH=_path_with_flower())
    superlink = Program(
        name="superlink",
        command=(
            beside_python("flower-superlink"),
            *("--host", LOOPBACK, "--port", str(folder.file.loopback_port)),
            *("--ssl-certfile", str(folder.certificate), "--ssl-keyfile", str(folder.key)),
            *("--ssl-ca-certfile", str(folder.authority)),
            "--enable-supernode-auth",
            *("--isolation", "process", "--superexec-auth-secret-file", str(folder.secret)),
            *("--database", str(folder.database)),
            "--disable-runtime-dependency-installation",
        ),
        environment=environment,
        ready=lambda: status_of(folder, folder.loopback, "/health") == 200,
    )
    superexec = Program(
        name="superexec",
        command=(
            beside_python("flower-superexec"),
            *("--runtime-api-address", folder.loopback),
            *("--root-certificates", str(folder.authority)),
            *("--superexec-auth-secret-file", str(folder.secret)),
        ),
        environment=environment,
    )
    proxy = Program(
        name="nginx",
        command=(
            nginx,
            *("-e", "stderr", "-p", str(folder.root), "-c", str(folder.nginx_conf)),
            *("-g", f"daemon off; {_worker_user()}"),
        ),
        environment={k: v for k, v in environment.items() if not k.startswith("FLWR_")},
        ready=lambda: status_of(folder, entrance(folder), "/") == 404,
    )
    return superlink, superexec, proxy


def entrance(folder: CoordinatorFolder) -> str:
    """Where nginx is reached from this machine, as host:port."""
    listen = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(folder.file.listen, folder.file.listen)  # noqa: S104
    return f"[{listen}]:{folder.file.port}" if ":" in listen else f"{listen}:{folder.file.port}"


def status_of(folder: CoordinatorFolder, address: str, path: str) -> int | None:
    """The HTTP status that a server of ours answers with; `None` if none of ours answers."""
    context = ssl.create_default_context(cafile=str(folder.authority))
    # nginx may listen on one address that the certificate doesn't name.
    context.check_hostname = address == folder.loopback
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(f"https://{address}{path}", timeout=_PROBE_SECONDS) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def _path_with_flower() -> str:
    """SuperExec finds `flwr-serverapp` on PATH; it must be the one installed beside this interpreter."""
    return os.pathsep.join((os.path.dirname(beside_python("flwr-serverapp")), os.environ.get("PATH", "")))


def _worker_user() -> str:
    """Keep nginx's workers on this user: started by root they would else lose access to the folder."""
    return f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
