"""Simulated vaults behind the ClientApp, in the processes of Flower's simulation runtime.

Ray would send each worker a copy of the app, and the copy would look for a deployed vault's socket. So the
app travels as the name of `install` and the manifest's path: a worker that receives it puts the vaults in
place first. Nothing else has to reach the worker, be it on this machine or on another of a cluster.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from flwr.clientapp import ClientApp

from client import door
from client.app import app as client_app
from simulations.engine.manifest import Manifest, read_manifest
from simulations.engine.sites import open_simulated

PARTITION_KEY = "partition-id"  # of the node configuration that Flower's runtime makes

_manifest_of = lru_cache(maxsize=1)(read_manifest)


def install(path: str) -> ClientApp:
    """Put the vaults of a manifest behind the ClientApp of this process, and return it.

    Raises:
        DeploymentError: if the manifest is not as written.
    """
    manifest = _manifest_of(Path(path))
    door.install(lambda node_config: _vault(manifest, node_config))
    copyreg.pickle(ClientApp, lambda _: (install, (path,)))
    return client_app


def _vault(manifest: Manifest, node_config: Mapping[str, object]) -> door.Answer:
    place = manifest.place(int(str(node_config[PARTITION_KEY])))

    def answer(request: bytes) -> bytes:
        # A site's next message may reach another worker, and a ledger has one vault: so let it go.
        with closing(open_simulated(place, manifest.seed)) as vault:
            return vault.answer(request)

    return answer
