"""What a coordinator's folder holds, who can read it, and that it is made as a whole or not at all."""

from __future__ import annotations

import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from common.errors import DeploymentError
from server import provisioning
from server.provisioning import CoordinatorFolder, provision

HOSTS = ["fl.example.org", "192.0.2.7"]


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    return provision(tmp_path / "lab", HOSTS, 8443, 9443)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_the_owners_alone(folder: CoordinatorFolder) -> None:
    assert mode(folder.root) == 0o700
    for path in (folder.key, folder.root / "ca.key", folder.secret, folder.nginx_conf):
        assert mode(path) == 0o600
    assert len(folder.secret.read_bytes()) == 32


def test_the_certificate_names_every_host_and_loopback(folder: CoordinatorFolder) -> None:
    certificate = x509.load_pem_x509_certificate(folder.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1"]
    assert certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=700)


def test_openssl_accepts_the_chain(folder: CoordinatorFolder) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    command = [openssl, "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(folder.authority)]
    subprocess.run([*command, str(folder.certificate)], check=True, capture_output=True)


def test_python_loads_the_authority(folder: CoordinatorFolder) -> None:
    context = ssl.create_default_context(cafile=str(folder.authority))
    assert len(context.get_ca_certs()) == 1


def test_it_reads_back_as_written(folder: CoordinatorFolder) -> None:
    assert CoordinatorFolder(folder.root).file == folder.file
    assert folder.loopback == "127.0.0.1:9443"


def test_nginx_finds_no_fault_with_its_configuration(folder: CoordinatorFolder) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if nginx is None:
        pytest.skip("needs nginx")
    command = [nginx, "-t", "-e", "stderr", "-p", str(folder.root), "-c", str(folder.nginx_conf)]
    subprocess.run(command, check=True, capture_output=True)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(DeploymentError, match="not empty"):
        provision(tmp_path, HOSTS, 8443, 9443)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir(mode=0o755)
    assert mode(provision(tmp_path / "lab", HOSTS, 8443, 9443).root) == 0o700


def test_nothing_remains_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provisioning, "_nginx", fail)
    with pytest.raises(DeploymentError, match="No space left"):
        provision(tmp_path / "lab", HOSTS, 8443, 9443)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hosts", "port", "loopback_port", "listen"),
    [
        ([], 8443, 9443, "0.0.0.0"),
        (["fl.example.org; evil"], 8443, 9443, "0.0.0.0"),
        (["a\nb"], 8443, 9443, "0.0.0.0"),
        (HOSTS, 0, 9443, "0.0.0.0"),
        (HOSTS, 8443, 65536, "0.0.0.0"),
        (HOSTS, 8443, 9443, "everywhere; include /etc/passwd"),
        (HOSTS, 8443, 8443, "0.0.0.0"),
    ],
)
def test_nonsense_is_refused(
    tmp_path: Path, hosts: list[str], port: int, loopback_port: int, listen: str
) -> None:
    with pytest.raises(DeploymentError):
        provision(tmp_path / "lab", hosts, port, loopback_port, listen)
    assert not (tmp_path / "lab").exists()


def test_a_folder_without_server_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"server\.toml"):
        CoordinatorFolder(tmp_path)
