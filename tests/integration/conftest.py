"""One consortium of four sites with false vaults: starting it is the expensive part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, echo, fake_vault, loaded_libraries

# Site → shared libraries in the process that asked its vault last.
ASKING: dict[str, set[str]] = {}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")

    def answer(site: str, request: bytes) -> bytes:
        ASKING[site] = loaded_libraries("client.", root / "sites" / site)
        return echo(site, request)

    with Cluster(root, vault=fake_vault(answer), cold={"west"}) as running:
        yield running


@pytest.fixture
def asking() -> dict[str, set[str]]:
    return ASKING
