"""The digest of the installed package: of its Python files, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import client
import common
from common.software import digest_of, software

FOLDERS = {"client": Path(client.__file__).parent, "common": Path(common.__file__).parent}


@pytest.fixture
def copy(tmp_path: Path) -> dict[str, Path]:
    """Both packages, copied to another place."""
    places = {name: tmp_path / "elsewhere" / name for name in FOLDERS}
    for name, folder in FOLDERS.items():
        shutil.copytree(folder, places[name], ignore=shutil.ignore_patterns("__pycache__"))
    return places


def test_the_digest_is_the_one_that_an_auditor_would_make_by_hand() -> None:
    files = {}
    for name, folder in FOLDERS.items():
        for path in [*folder.rglob("*.py"), *folder.rglob("wire.proto")]:
            content = path.read_bytes().replace(b"\r\n", b"\n")
            files[f"{name}/{path.relative_to(folder)}"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    assert digest_of(FOLDERS) == hashlib.sha256(text.encode()).hexdigest()
    assert "client/wire.proto" in files
    assert "common/privacy/certificate.py" in files


def test_place_compiled_files_and_line_ends_do_not_count(copy: dict[str, Path]) -> None:
    wanted = digest_of(copy)
    compiled = copy["common"] / "__pycache__"
    compiled.mkdir(exist_ok=True)
    (compiled / "study.cpython-311.pyc").write_bytes(b"compiled")
    (copy["client"] / "README.md").write_text("not code")
    study = copy["common"] / "study.py"
    study.write_bytes(study.read_bytes().replace(b"\n", b"\r\n"))
    moved = {name: place.rename(place.parent.parent / name) for name, place in copy.items()}
    assert digest_of(moved) == wanted


@pytest.mark.parametrize("how", ["changed", "added", "removed", "renamed", "other protocol"])
def test_any_other_code_has_another_digest(copy: dict[str, Path], how: str) -> None:
    wanted, file = digest_of(copy), copy["client"] / "release.py"
    if how == "changed":
        file.write_bytes(file.read_bytes() + b"\n")
    elif how == "added":
        (copy["common"] / "privacy" / "extra.py").write_text("")
    elif how == "removed":
        file.unlink()
    elif how == "renamed":
        file.rename(file.with_name("releases.py"))
    else:
        (copy["client"] / "wire.proto").write_text("")
    assert digest_of(copy) != wanted


def test_software_says_version_and_digest() -> None:
    found = software()
    assert found is software()
    assert found.version
    assert len(found.package) == 64
