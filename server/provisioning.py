"""A coordinator's folder: certificate authority, server certificate, secret, nginx and server.toml.

The consortium has an authority of its own: a hospital trusts one certificate, which the coordinator hands
over with the invitation, and no public authority can vouch for somebody else in the coordinator's place.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import Field, field_validator

from common.errors import DeploymentError
from common.files import Strict, load_config, sync_folder

LOOPBACK = "127.0.0.1"
_AUTHORITY_DAYS = 3650
_SERVER_DAYS = 825  # the longest that current TLS clients accept
_CLOCK_SKEW = timedelta(hours=1)
_ALWAYS_NAMED = ("localhost", LOOPBACK)

Port = Annotated[int, Field(ge=1, le=65535)]
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:\-]{0,251}[A-Za-z0-9])?$")]


class ServerFile(Strict):
    """The content of server.toml.

    Attributes:
        hosts: names and addresses that hospitals may use; the certificate bears them.
        listen: the address on which nginx listens.
        port: the port on which nginx listens; the only one that hospitals reach.
        loopback_port: where SuperLink listens, on loopback only.
    """

    hosts: Annotated[tuple[HostName, ...], Field(min_length=1)]
    listen: str = "0.0.0.0"  # noqa: S104 - the coordinator's public entrance
    port: Port
    loopback_port: Port

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        return str(ipaddress.ip_address(value))


class CoordinatorFolder:
    """The names of what lies in a coordinator's folder.

    Raises:
        DeploymentError: if it has no valid server.toml.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.file = load_config(ServerFile, self.root / "server.toml", DeploymentError)

    @property
    def authority(self) -> Path:
        """The CA certificate that every hospital gets."""
        return self.root / "ca.crt"

    @property
    def certificate(self) -> Path:
        return self.root / "server.crt"

    @property
    def key(self) -> Path:
        return self.root / "server.key"

    @property
    def secret(self) -> Path:
        """What proves to SuperLink that SuperExec is ours."""
        return self.root / "superexec.secret"

    @property
    def nginx_conf(self) -> Path:
        return self.root / "nginx.conf"

    @property
    def database(self) -> Path:
        """SuperLink's own state: registered nodes, runs, messages under way."""
        return self.root / "superlink.db"

    @property
    def flower_home(self) -> Path:
        return self.root / "flower"

    @property
    def sites(self) -> Path:
        """Which site each enrolled node is."""
        return self.root / "sites.json"

    @property
    def loopback(self) -> str:
        return f"{LOOPBACK}:{self.file.loopback_port}"


def provision(
    root: Path,
    hosts: Sequence[str],
    port: int,
    loopback_port: int,
    listen: str = "0.0.0.0",  # noqa: S104
) -> CoordinatorFolder:
    """Create a coordinator's folder: as a whole or not at all.

    Args:
        root: the folder; it must not exist, or be empty.
        hosts: names and IP addresses for the certificate; localhost and 127.0.0.1 are added.
        port: nginx's public port.
        loopback_port: SuperLink's port on 127.0.0.1.
        listen: the address on which nginx listens.

    Raises:
        DeploymentError: if the folder holds anything already, or a name, address or port is not valid.
    """
    root = root.resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DeploymentError(f"{root} exists and is not empty", remedy="name a new folder")
    if port == loopback_port and ipaddress.ip_address(listen) in map(
        ipaddress.ip_address,
        (LOOPBACK, "0.0.0.0"),  # noqa: S104
    ):
        raise DeploymentError(f"both servers would listen on port {port}", remedy="give two different ports")
    try:
        file = ServerFile(hosts=tuple(hosts), listen=listen, port=port, loopback_port=loopback_port)
    except ValueError:
        raise DeploymentError(
            f"not valid: hosts {', '.join(hosts)}, address {listen}, port {port} or {loopback_port}",
            remedy="give host names or IP addresses without a port, and ports from 1 to 65535",
        ) from None
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))  # 0700
    try:
        _fill(draft, file)
        sync_folder(draft)
        os.rename(draft, root)
    except OSError as error:
        raise DeploymentError(
            f"{root} cannot be created ({error.strerror})", remedy="check the path and its permissions"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(root.parent)
    return CoordinatorFolder(root)


def _fill(draft: Path, file: ServerFile) -> None:
    authority_key = ec.generate_private_key(ec.SECP384R1())
    server_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key)
    server = _server(server_key, authority_key, authority, file.hosts)
    (draft / "flower").mkdir(mode=0o700)
    (draft / "nginx").mkdir(mode=0o700)
    _write(draft / "ca.key", _private(authority_key))
    _write(draft / "ca.crt", authority.public_bytes(Encoding.PEM), mode=0o644)
    _write(draft / "server.key", _private(server_key))
    _write(draft / "server.crt", server.public_bytes(Encoding.PEM), mode=0o644)
    _write(draft / "superexec.secret", secrets.token_bytes(32))
    _write(draft / "nginx.conf", _nginx(file).encode())
    _write(draft / "server.toml", tomli_w.dumps(file.model_dump(mode="json")).encode())


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file that nobody else could read at any moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _named(subject: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name, now = _named("fedward consortium"), datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    hosts: Sequence[str],
) -> x509.Certificate:
    now = datetime.now(UTC)
    names = dict.fromkeys([*hosts, *_ALWAYS_NAMED])
    return (
        x509.CertificateBuilder()
        .subject_name(_named("fedward coordinator"))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=_SERVER_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(n) for n in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA384())
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _nginx(file: ServerFile) -> str:
    """The only door to the outside: known calls of the Fleet API, verified TLS on both sides.

    The path is rebuilt from what the expression caught, so that no encoding of `..` reaches SuperLink.
    Paths are relative to the folder (`nginx -p`).
    """
    listen = f"[{file.listen}]" if ":" in file.listen else file.listen
    return f"""\
worker_processes 1;
error_log stderr warn;
pid nginx/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    server_tokens off;
    client_body_temp_path nginx/body;
    proxy_temp_path nginx/proxy;
    fastcgi_temp_path nginx/fastcgi;
    uwsgi_temp_path nginx/uwsgi;
    scgi_temp_path nginx/scgi;
    upstream superlink {{
        server {LOOPBACK}:{file.loopback_port};
        keepalive 16;
    }}
    server {{
        listen {listen}:{file.port} ssl;
        ssl_certificate server.crt;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:tls:1m;
        client_max_body_size 64m;
        location ~ "^/v1/fleet/(?<call>[a-z]+(-[a-z]+)*)$" {{
            limit_except POST {{ deny all; }}
            proxy_pass https://superlink/v1/fleet/$call;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate ca.crt;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_session_reuse on;
            proxy_request_buffering off;
            proxy_read_timeout 300s;
            proxy_next_upstream off;
        }}
        location / {{ return 404; }}
    }}
}}
"""
