"""What Flower's simulation runtime loads: `client.app`'s own ClientApp, with simulated vaults behind it."""

from __future__ import annotations

import os

from common.errors import DeploymentError
from simulations.engine.manifest import MANIFEST_VARIABLE
from simulations.engine.ray_worker import install

if MANIFEST_VARIABLE not in os.environ:
    raise DeploymentError(f"{MANIFEST_VARIABLE} is not set", remedy="use `fedward-sim run --engine ray`")

app = install(os.environ[MANIFEST_VARIABLE])
