"""What all tests share: where the real data lies, and a sound site to start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder with the real data sets, one folder each; the test is skipped where there is none."""
    folder = Path(os.environ.get("FEDWARD_MIRROR") or PROJECT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent; set FEDWARD_MIRROR")
    return folder
