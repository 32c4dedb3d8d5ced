"""`fedward-site` at the prompt: every malformed input is one clear error, and nothing changes on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from malformed import CASES, SECRETS, Case, fingerprint, write_sound
from typer.testing import CliRunner

from client.cli import app
from client.settings import SiteFolder
from client.site import make_site_keys
from common.errors import DataError, SiteError, StudyError

STATUS = {
    StudyError: StudyError.exit_status,
    SiteError: SiteError.exit_status,
    DataError: DataError.exit_status,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_check_ends_in_one_clear_error(case: Case, tmp_path: Path) -> None:
    site, study = case.build(tmp_path)
    if site.is_dir():
        (site / "keys").mkdir()
        (site / "keys" / "split.key").write_bytes(bytes(range(32)))
        (site / "keys" / "split.key").chmod(0o600)
    before = fingerprint(tmp_path)
    done = CliRunner().invoke(app, ["check", str(site), str(study)])
    assert done.exit_code == STATUS[case.error], done.output
    assert done.output.count("error:") == 1
    assert "remedy:" in done.output
    assert case.file in done.output
    assert "Traceback" not in done.output
    assert not any(secret in done.output for secret in SECRETS)
    assert fingerprint(tmp_path) == before


def test_a_sound_site_passes_and_programs_can_read_it(tmp_path: Path) -> None:
    write_sound(tmp_path)
    make_site_keys(SiteFolder(tmp_path / "site"))
    done = CliRunner().invoke(app, ["check", str(tmp_path / "site"), str(tmp_path / "study.toml"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["training_patients"] + told["test_patients"] == 20


def test_errors_are_one_json_object_for_programs(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(tmp_path), str(tmp_path / "none.toml"), "--json"])
    assert done.exit_code == SiteError.exit_status
    assert set(json.loads(done.stdout)) == {"error", "message", "remedy"}
