"""A site's key and the commands that connect it, without any server."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from client.settings import SiteFolder
from client.supernode import check, create_node_key, programs
from common.errors import SiteError
from server.provisioning import provision

SITE = '[site]\nname = "north"\npublic_size = 10\n[data]\nfile = "none.csv"\n'
COORDINATOR = '[coordinator]\naddress = "fl.example.org:8443"\n'


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    root = tmp_path / "north"
    root.mkdir()
    (root / "site.toml").write_text(SITE + COORDINATOR)
    coordinator = provision(tmp_path / "lab", ["fl.example.org"], 8443, 9443)
    shutil.copy(coordinator.authority, root / "ca.crt")
    return SiteFolder(root)


def test_the_key_is_the_owners_and_openssh_reads_it(site: SiteFolder) -> None:
    public = create_node_key(site)
    assert stat.S_IMODE(site.node_key_path.stat().st_mode) == 0o600
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    keygen = shutil.which("ssh-keygen")
    if keygen is not None:
        derived = subprocess.run([keygen, "-y", "-f", site.node_key_path], capture_output=True, check=True)
        assert derived.stdout.split()[:2] == public.read_bytes().split()[:2]


def test_a_key_is_never_replaced(site: SiteFolder) -> None:
    create_node_key(site)
    before = site.node_key_path.read_bytes()
    with pytest.raises(SiteError, match="exists already"):
        create_node_key(site)
    assert site.node_key_path.read_bytes() == before


def test_a_complete_site_may_connect(site: SiteFolder) -> None:
    create_node_key(site)
    check(site)


def test_a_missing_key_is_named(site: SiteFolder) -> None:
    with pytest.raises(SiteError, match=r"node\.key"):
        check(site)


def test_a_key_that_others_may_read_is_named(site: SiteFolder) -> None:
    create_node_key(site)
    site.node_key_path.chmod(0o640)
    with pytest.raises(SiteError, match=r"node\.key: others may read this secret"):
        check(site)


def test_a_certificate_that_is_none_is_named(site: SiteFolder) -> None:
    create_node_key(site)
    (site.root / "ca.crt").write_text("no certificate")
    with pytest.raises(SiteError, match=r"ca\.crt"):
        check(site)


def test_a_key_that_is_none_is_named(site: SiteFolder) -> None:
    site.node_key_path.parent.mkdir()
    site.node_key_path.write_text("no key")
    with pytest.raises(SiteError, match="no EC key"):
        check(site)


def test_a_site_without_coordinator_is_told_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    with pytest.raises(SiteError, match=r"\[coordinator\]"):
        check(SiteFolder(tmp_path))


def test_a_path_that_flower_cannot_quote_is_refused(tmp_path: Path, site: SiteFolder) -> None:
    create_node_key(site)
    moved = site.root.rename(tmp_path / 'no"rth')
    with pytest.raises(SiteError, match="quotes"):
        check(SiteFolder(moved))


def test_superexec_finds_nothing_but_our_commands(site: SiteFolder, tmp_path: Path) -> None:
    supernode, superexec = programs(site, tmp_path, 20_001)
    assert superexec.environment["PATH"] == str(tmp_path / "bin")
    assert "--insecure" not in supernode.command
    assert f'vault-socket="{site.socket_path.resolve()}"' in supernode.command
