"""The launcher's seams, without any server."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from client import launcher
from common.errors import DeploymentError


def flower_module() -> Any:
    """A stand-in for Flower's `run_clientapp`, with what the launcher replaces."""
    module = ModuleType("run_clientapp")
    for name in ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn"):
        setattr(module, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))
    module.Error = lambda code, reason: (code, reason)  # type: ignore[attr-defined]
    return module


def test_the_bundle_is_left_alone() -> None:
    module = flower_module()
    launcher.pin(module)
    assert module.install_from_fab(b"bundle", skip_prompt=True) is None
    assert module.install_app_dependencies("path", launch_id="1") is None


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("<class 'RuntimeError'>:<'fedward: not-approved'>", "fedward: not-approved"),
        ("<class 'KeyError'>:<'Jane Roe, born 1954-03-01'>", "fedward: internal"),
        ("<class 'ValueError'>:<'/srv/hospital/patients.csv'>", "fedward: internal"),
        (None, "fedward: internal"),
    ],
)
def test_only_our_own_codes_leave(reason: str | None, shown: str) -> None:
    module = flower_module()
    launcher.pin(module)
    assert module.Error(code=8, reason=reason) == (8, shown)


@pytest.mark.parametrize("name", ["install_from_fab", "get_load_client_app_fn", "Error"])
def test_another_release_of_flower_is_refused(name: str) -> None:
    module = flower_module()
    delattr(module, name)
    with pytest.raises(DeploymentError, match=name):
        launcher.pin(module)


def test_the_commands_are_the_owners_and_complete(tmp_path: Path) -> None:
    launcher.write_commands(tmp_path / "bin")
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "bin").iterdir()}
    assert found == dict.fromkeys((launcher.COMMAND, *launcher.REFUSED), 0o700)


@pytest.mark.parametrize("name", launcher.REFUSED)
def test_other_kinds_of_app_are_refused(tmp_path: Path, name: str) -> None:
    launcher.write_commands(tmp_path)
    done = subprocess.run([tmp_path / name, "--token", "t"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_nothing_of_the_surroundings_is_imported(tmp_path: Path) -> None:
    """A module in the current folder or on PYTHONPATH must not stand in for an installed one."""
    launcher.write_commands(tmp_path / "bin")
    (tmp_path / "argparse.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        [tmp_path / "bin" / launcher.COMMAND, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert b"--runtime-api-address" in done.stdout
